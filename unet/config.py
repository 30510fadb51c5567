"""The shape of an autoregressive U-Net."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import equinox as eqx
import jax
from jaxtyping import Array, Float, PRNGKeyArray

from estimators.base import VOCAB, AbstractEstimator
from estimators.keys import named_key
from unet.blocks import Attends, Stack, attending, transformer
from unet.layers import Linear, RMSNorm
from unet.ngrams import LONGEST, PRIMES, HashedNgrams
from unet.ops import Implementation
from unet.stage import AbstractStage, Flat, Hierarchy


class Parts(eqx.Module):
    """What a model is made of: an embedding, with or without one of the last few bytes; a stage; and a head (None where the
    embedding is the head too) behind a norm (None where the stage ends with one)."""

    embedding: Float[Array, "vocab dim"]
    stage: AbstractStage
    norm: RMSNorm | None
    head: Linear | None
    ngrams: HashedNgrams | None = None


@dataclass(frozen=True, kw_only=True)
class AbstractShape(ABC):
    """What every shape of model has: how it computes."""

    compute: Literal["float32", "bfloat16"] = "float32"
    """Dtype of hidden states and matrix products; parameters, losses and the insides of norms and softmax stay float32."""
    early_share: float = 1.0
    """Share of the rows, drawn anew every step, at which the early head predicts in training; at the others its mean over these
    stands for it."""
    remat: bool = False
    """Recompute each block in the backward pass, to save memory."""
    implementation: Implementation | None = None
    """How ragged operations run: as kernels on CUDA and in XLA elsewhere (None), always in `xla`, always as `pallas` kernels, or
    `interpret` those on the host, slowly."""

    ngrams: tuple[int, ...] = ()
    """Numbers of bytes whose hashed embeddings are added to each byte's own (BLT: 3 4 5 6 7 8); by default none."""
    ngram_buckets: int = 500_000
    """Rows of the table of each of these."""
    ngram_functions: int = 1
    """Hash functions by which each of these is looked up, in a table of its own (BLT: 1)."""
    attend: Attends = "none"
    """Which blocks after the tokens have come back let every byte attend to its token first: none, the first, or every one (as
    BLT). With as many heads as attention to bytes; at every level of tokens."""
    attend_vectors: int = 2
    """Vectors into which a token is unfolded for that."""

    def new_ngrams(self, key: PRNGKeyArray) -> HashedNgrams | None:
        """The embeddings of n-grams that were asked for, of the standard deviation that those of single bytes have; `key` is
        that of the whole model."""
        if not self.ngrams:
            return None
        return HashedNgrams(
            self.widths[0],
            self.ngrams,
            self.ngram_buckets,
            functions=self.ngram_functions,
            key=named_key(key, "ngrams"),
        )

    def __post_init__(self):
        if not 1 <= self.ngram_buckets <= 2**31 or any(not 2 <= size <= LONGEST for size in self.ngrams):
            raise ValueError(
                f"ngrams have two bytes or more, at most {LONGEST}, and tables one row or more, at most 2^31; got "
                f"{self.ngrams}, {self.ngram_buckets}"
            )
        if not 1 <= self.ngram_functions <= len(PRIMES):
            raise ValueError(f"ngram_functions lies between 1 and {len(PRIMES)}; got {self.ngram_functions}")
        if self.attend_vectors < 1:
            raise ValueError(f"attend_vectors must be at least 1; got {self.attend_vectors}")
        if not 0 < self.early_share <= 1:
            raise ValueError(f"early_share is a share of rows above 0, at most 1; got {self.early_share}")

    @property
    @abstractmethod
    def widths(self) -> tuple[int, ...]:
        """Widths of the hidden states of each stage, the outermost first."""

    @property
    def levels(self) -> int:
        """Levels of tokens; each has an estimator, which sees states as wide as those of the stage around it."""
        return len(self.widths) - 1

    @abstractmethod
    def parts(self, estimators: Sequence[AbstractEstimator], *, key: PRNGKeyArray) -> Parts:
        """A new model of this shape around one estimator for each level of tokens, the outermost first. Raises `ValueError`
        where their number does not fit."""


@dataclass(frozen=True)
class UNetConfig(AbstractShape):
    """Shape of an autoregressive U-Net with one level of tokens, of transformer blocks (SFE section 2.2).

    Raises `ValueError` where the numbers cannot make a model.
    """

    dim: int
    """Width of every hidden state."""
    heads: int
    """Attention heads; divides `dim`."""
    encoder_layers: int
    """Byte-level blocks before the boundaries."""
    main_layers: int
    """Token-level blocks."""
    decoder_layers: int
    """Byte-level blocks after the tokens are brought back."""
    window: int = 64
    """Bytes that byte-level attention sees, the current one included."""
    token_positions: Literal["byte", "chunk"] = "byte"
    """Rotary positions of a token: the byte position of its boundary, or its own number."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("dim", "heads", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        for name in ("encoder_layers", "main_layers", "decoder_layers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} cannot be negative; got {getattr(self, name)}")
        if self.attend != "none" and not self.decoder_layers:
            raise ValueError(
                f"there is no decoder block that could attend to tokens: decoder_layers is 0, attend {self.attend}"
            )
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            raise ValueError(
                f"heads must divide dim into heads of even width; got dim {self.dim} and heads {self.heads}"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.dim, self.dim)

    def parts(self, estimators: Sequence[AbstractEstimator], *, key: PRNGKeyArray) -> Parts:
        """Without an estimator the token level is left out, and what attends to it: encoder and decoder blocks alone, a purely
        byte-level model.

        Linear layers are drawn from normals of standard deviation `inputs**-0.5`, the embedding of 1; norms start at one, and
        heads have no biases. The authors' score-function code draws its linear layers, the heads and their biases included,
        uniformly within `inputs**-0.5`, a deviation of 1/√3 of this one (docs/hnet.md)."""
        if len(estimators) > 1:
            raise ValueError(f"this shape has one level of tokens; got {len(estimators)} estimators")
        dim, heads = self.dim, self.heads

        def byte_level(layers: int, key: PRNGKeyArray) -> Stack:
            return transformer(layers, dim, heads, dim, window=self.window, remat=self.remat, key=key)

        if not estimators:
            stage = Flat(byte_level(self.encoder_layers + self.decoder_layers, named_key(key, "encoder")))
        else:
            decoder = attending(
                byte_level(self.decoder_layers, named_key(key, "decoder")),
                self.attend,
                dim=dim,
                heads=heads,
                vectors=self.attend_vectors,
                key=named_key(key, "attention to tokens"),
            )
            main = transformer(
                self.main_layers, dim, heads, 4 * dim, window=None, remat=self.remat, key=named_key(key, "main")
            )
            stage = Hierarchy(
                byte_level(self.encoder_layers, named_key(key, "encoder")),
                estimators[0],
                Flat(main),
                decoder,
                chunk_positions=self.token_positions == "chunk",
                implementation=self.implementation,
            )
        embedding = jax.random.normal(named_key(key, "embedding"), (VOCAB, dim))
        head = Linear(dim, VOCAB, key=named_key(key, "head"))
        return Parts(embedding, stage, RMSNorm(dim), head, self.new_ngrams(key))
