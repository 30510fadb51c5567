"""Configuration of an autoregressive U-Net."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from estimators.base import VOCAB, AbstractEstimator
from estimators.bounds import MARGIN, Layers, Vectors, Width, Window, Within, check_bounds
from estimators.keys import named_key
from unet.blocks import Attends, Stack, attending, transformer
from unet.fused_attention import AttentionForm
from unet.hierarchy import AbstractStage, Flat, Hierarchy
from unet.layers import Linear, RMSNorm
from unet.ngrams import MAX_NGRAM, PRIMES, HashedNgrams
from unet.ops import Implementation


class Parts(eqx.Module):
    """The parts of a model: byte embedding, optional n-gram embeddings, stage, and head (None: tied to the embedding) with its
    norm (None: the stage ends with one)."""

    embedding: Float[Array, "vocab dim"]
    stage: AbstractStage
    norm: RMSNorm | None
    head: Linear | None
    ngrams: HashedNgrams | None = None


@dataclass(frozen=True, kw_only=True)
class AbstractShape(ABC):
    """Settings that all shapes of model share."""

    compute: Literal["float32", "bfloat16"] = "float32"
    """Dtype of hidden states and matrix products; parameters, losses and the insides of norms and softmax stay float32."""
    early_exit_fraction: Annotated[float, Within(MARGIN, 1.0)] = 1.0
    """Fraction of the positions, drawn anew every step, at which the early-exit head predicts in training; the others get its
    mean over these."""
    remat: bool | Literal["auto"] = False
    """Recompute each block in the backward pass, to save memory; with `auto` a training run does so only where its activations
    would not fit otherwise."""
    memory: Annotated[float, Within(MARGIN, 2.0**20)] | None = None
    """GiB that a training step may take on each device, for --unet.remat auto; by default what the device has."""
    implementation: Implementation | None = None
    """Implementation of the ragged operations, of norms and of gated MLPs: kernels on CUDA and XLA elsewhere (None), always
    `xla`, always `pallas` kernels (norms and gates of widths that these do not take stay in XLA), `interpret`, which emulates
    the kernels on the host, slowly, or `native`: XLA with JAX's own derivatives, so that the loss can be differentiated more
    than once and in forward mode."""

    attention: AttentionForm = "auto"
    """Implementation of self-attention: the fused kernels of tokamax on CUDA where they can run and XLA elsewhere (`auto`),
    always `xla`, or always `tokamax` (`pip install 'caesura-lm[gpu]'`). With --unet.implementation native it is XLA."""

    ngrams: tuple[Annotated[int, Within(2, MAX_NGRAM)], ...] = ()
    """Lengths of the byte n-grams whose hashed embeddings are added to each byte's own (BLT: 3 4 5 6 7 8); by default none."""
    ngram_buckets: Annotated[int, Within(1, 2**31)] = 500_000
    """Rows of each n-gram table."""
    ngram_functions: Annotated[int, Within(1, len(PRIMES))] = 1
    """Hash functions for each length of n-grams, each with a table of its own (BLT: 1)."""
    attend: Attends = "none"
    """Which decoder blocks cross-attend from every byte to its token: none, the first, or every one (as BLT). With as many
    heads as self-attention; at every token level."""
    attend_vectors: Vectors = 2
    """Number of vectors into which each token is unfolded for this."""

    @property
    def always_remat(self) -> bool:
        """Whether the blocks of a new model are recomputed wherever it is differentiated. With `auto` the trainer decides."""
        return self.remat is True

    @property
    def attention_form(self) -> AttentionForm:
        """The form of attention. The kernels of tokamax have a first derivative in reverse mode only."""
        return "xla" if self.implementation == "native" else self.attention

    def new_ngrams(self, key: PRNGKeyArray) -> HashedNgrams | None:
        """The configured n-gram embeddings, with the standard deviation of the byte embeddings; `key` is that of the whole
        model."""
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
        check_bounds(self)

    @property
    @abstractmethod
    def widths(self) -> tuple[int, ...]:
        """Widths of the hidden states of each stage, the outermost first."""

    @property
    def levels(self) -> int:
        """Number of token levels; each has an estimator, whose router sees hidden states as wide as those of the stage around
        it."""
        return len(self.widths) - 1

    @property
    @abstractmethod
    def attention_layers(self) -> Sequence[tuple[int, int | None]]:
        """The width of a head and the window (None: all positions) of the kinds of self-attention that the shape has."""

    @abstractmethod
    def parts(self, estimators: Sequence[AbstractEstimator], *, key: PRNGKeyArray, vocab: int = VOCAB) -> Parts:
        """A new model of this shape with one estimator for each token level, the outermost first, over so many bytes or tokens.
        Raises `ValueError` for another number of estimators."""


@dataclass(frozen=True)
class UNetConfig(AbstractShape):
    """Shape of an autoregressive U-Net with one token level, made of transformer blocks (SFE section 2.2).

    Raises `ValueError` for values that cannot make a model.
    """

    dim: Width
    """Width of every hidden state."""
    heads: Width
    """Attention heads; divides `dim`."""
    encoder_layers: Layers
    """Byte-level blocks before the boundaries."""
    main_layers: Layers
    """Token-level blocks."""
    decoder_layers: Layers
    """Byte-level blocks after upsampling."""
    window: Window = 64
    """Bytes that byte-level attention sees, the current one included."""
    token_positions: Literal["byte", "chunk"] = "byte"
    """Rotary positions of tokens: the byte position of the boundary, or the index of the token."""

    def __post_init__(self):
        super().__post_init__()
        if self.attend != "none" and not self.decoder_layers:
            raise ValueError(
                f"attend {self.attend} needs a decoder block that attends to tokens, but decoder_layers is 0"
            )
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            raise ValueError(
                f"heads must divide dim into heads of even width; got dim {self.dim} and heads {self.heads}"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.dim, self.dim)

    @property
    def attention_layers(self) -> tuple[tuple[int, int | None], ...]:
        head_dim = self.dim // self.heads
        return (head_dim, self.window), (head_dim, None)

    def parts(self, estimators: Sequence[AbstractEstimator], *, key: PRNGKeyArray, vocab: int = VOCAB) -> Parts:
        """Without an estimator there is no token level and no cross-attention: a purely byte-level model of encoder and decoder
        blocks.

        Linear layers are drawn from normals of standard deviation `inputs**-0.5`, the embedding of 1; norms start at one, and
        heads have no biases. The authors' score-function code draws its linear layers, including the heads and their biases,
        uniformly within `inputs**-0.5`, which has a standard deviation 1/√3 times as large (docs/hnet.md).
        """
        if len(estimators) > 1:
            raise ValueError(f"this shape has one token level; got {len(estimators)} estimators")
        dim, heads = self.dim, self.heads
        network = functools.partial(
            transformer, remat=self.always_remat, attention=self.attention_form, implementation=self.implementation
        )

        def byte_level(layers: int, key: PRNGKeyArray) -> Stack:
            return network(layers, dim, heads, dim, window=self.window, key=key)

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
            main = network(self.main_layers, dim, heads, 4 * dim, window=None, key=named_key(key, "main"))
            stage = Hierarchy(
                byte_level(self.encoder_layers, named_key(key, "encoder")),
                estimators[0],
                Flat(main),
                decoder,
                chunk_positions=self.token_positions == "chunk",
                implementation=self.implementation,
            )
        embedding = jax.random.normal(named_key(key, "embedding"), (vocab, dim), jnp.float32)
        head = Linear(dim, vocab, key=named_key(key, "head"))
        return Parts(embedding, stage, RMSNorm(dim), head, self.new_ngrams(key))
