"""Shapes of Byte Latent Transformers, and the ids that published ones give to bytes.

"BLT" is Pagnoni et al., "Byte latent transformer: patches scale better than tokens".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, Integer, PRNGKeyArray

from estimators.base import BOS, VOCAB, AbstractEstimator
from estimators.bounds import Layers, Vectors, Width, Within
from estimators.keys import named_key
from unet.attention import Attention
from unet.blocks import Attends, PreNorm, Stack, attending
from unet.config import AbstractShape, Parts
from unet.hierarchy import Flat, Hierarchy
from unet.layers import Linear, ScaleNorm, SwiGLU
from unet.ngrams import MAX_NGRAM, OFFSET, HashedNgrams

SPECIAL_IDS = (1, 2, 0, 3, 258, 259)
"""Published ids of the marks from BOS (254) on: BOS, EOS, then those that are never drawn, among them the ids of the bytes 254
and 255, which occur in no text."""

PUBLISHED_IDS = np.array([*range(OFFSET, BOS + OFFSET), *SPECIAL_IDS])
"""The published id of each byte and mark."""

MARKS = PUBLISHED_IDS.size
"""Bytes and other marks that such a model reads: 260."""

NETWORKS = ("encoder", "main", "decoder")


def to_blt_ids(bytes: Integer[np.ndarray, "*shape"]) -> Int[np.ndarray, "*shape"]:
    """The published ids of bytes, BOS and EOS, and of the marks 256 … 259. Raises `ValueError` for other numbers."""
    return _looked_up(PUBLISHED_IDS, bytes, "bytes and marks")


def from_blt_ids(ids: Integer[np.ndarray, "*shape"]) -> Int[np.ndarray, "*shape"]:
    """The bytes of published ids: the inverse of `to_blt_ids`. Raises `ValueError` for other numbers."""
    return _looked_up(np.argsort(PUBLISHED_IDS), ids, "ids")


def _looked_up(table: np.ndarray, numbers: np.ndarray, what: str) -> np.ndarray:
    numbers = np.asarray(numbers)
    if numbers.size and not 0 <= numbers.min() <= numbers.max() < MARKS:
        raise ValueError(f"{what} lie between 0 and {MARKS - 1}; got {numbers.min()} … {numbers.max()}")
    return np.asarray(table[numbers], np.int32)


@dataclass(frozen=True, kw_only=True)
class BLTConfig(AbstractShape):
    """Shape of a Byte Latent Transformer (BLT section 3), or of a model of bytes alone, such as the one whose entropies make its
    patches.

    The settings from `layers` on have a number for the encoder, the main network and the decoder; for bytes alone one number.
    The decoder attends to tokens as `attend` says; what makes tokens is the chunker: `AttentionPool` in published models. Raises
    `ValueError` for values that cannot make a model.
    """

    dims: tuple[Width, ...]
    """Widths of bytes and of tokens; of a model of bytes alone, the one width."""
    layers: tuple[Layers, ...]
    """Layers."""
    heads: tuple[Width, ...]
    """Attention heads."""
    kv_heads: tuple[Width, ...]
    """Heads of keys and values, each shared by as many heads (GQA)."""
    mlp_dims: tuple[Width, ...]
    """Inner widths of the MLPs."""
    windows: tuple[Annotated[int, Within(0, 2**24)], ...]
    """Positions that attention sees, its own included; 0 for all before it."""
    rotary_bases: tuple[Annotated[float, Within(1.0, 1e30)], ...]
    """Bases of rotary embeddings (rope_theta)."""
    epsilons: tuple[Annotated[float, Within(1e-30, 1.0)], ...]
    """Epsilons of the norms."""
    tie_embeddings: bool = False
    """Tie the output head to the byte embedding."""
    ngrams: tuple[Annotated[int, Within(2, MAX_NGRAM)], ...] = (3, 4, 5, 6, 7, 8)
    ngram_buckets: Annotated[int, Within(1, 2**31)] = 500_002
    attend: Attends = "every"
    attend_vectors: Vectors = 2

    def __post_init__(self):
        super().__post_init__()
        if len(self.dims) not in (1, 2):
            raise ValueError(f"dims needs the widths of bytes and of tokens, or one width; got {self.dims}")
        networks = 1 if len(self.dims) == 1 else len(NETWORKS)
        for name in ("layers", "heads", "kv_heads", "mlp_dims", "windows", "rotary_bases", "epsilons"):
            if len(getattr(self, name)) != networks:
                raise ValueError(f"{name} needs {networks} numbers, one for each network; got {getattr(self, name)}")
        for number in range(networks):
            dim, heads, kv_heads = self._dim(number), self.heads[number], self.kv_heads[number]
            if dim % heads or dim // heads % 2 or heads % kv_heads:
                raise ValueError(
                    "heads must divide the width into heads of even width, and kv_heads divide heads; got a width of "
                    f"{dim}, heads {heads} and kv_heads {kv_heads}"
                )
        if networks > 1 and self.attend != "none" and not self.layers[2]:
            raise ValueError(f"attend {self.attend} needs a decoder layer that attends to tokens, but there is none")

    @property
    def widths(self) -> tuple[int, ...]:
        return self.dims

    @property
    def attention_layers(self) -> tuple[tuple[int, int | None], ...]:
        networks = [network for network, layers in enumerate(self.layers) if layers]
        return tuple((self._dim(one) // self.heads[one], self.windows[one] or None) for one in networks)

    def new_ngrams(self, key: PRNGKeyArray) -> HashedNgrams | None:
        if not self.ngrams:
            return None
        return HashedNgrams(
            self.dims[0],
            self.ngrams,
            self.ngram_buckets,
            functions=self.ngram_functions,
            special=SPECIAL_IDS,
            std=self.dims[0] ** -0.5,
            key=named_key(key, "ngrams"),
        )

    def parts(self, estimators: Sequence[AbstractEstimator], *, key: PRNGKeyArray, vocab: int = VOCAB) -> Parts:
        """Matrices are drawn from normals of standard deviation `inputs**-0.5`, embeddings of `dim**-0.5`; norms start at one.
        There are `MARKS` embeddings. Raises `ValueError` for another number of estimators than token levels, for a chunker whose
        tokens are not as wide as the main network, and for another `vocab` than that of bytes."""
        if vocab != VOCAB:
            raise ValueError(f"this shape reads bytes, not the {vocab} tokens of a tokenizer")
        if len(estimators) != self.levels:
            raise ValueError(f"this shape has {self.levels} token levels; got {len(estimators)} estimators")
        dim = self.dims[0]
        if not estimators:
            stage = Flat(self._stack(0, named_key(key, "main"), last=True))
        else:
            width = estimators[0].chunker.token_dim(dim)
            if width != self.dims[1]:
                raise ValueError(
                    f"tokens are {width} wide, but the main network {self.dims[1]}: use an attention pool of that width"
                )
            decoder = attending(
                self._stack(2, named_key(key, "decoder"), last=True),
                self.attend,
                dim=dim,
                heads=self.heads[2],
                vectors=self.attend_vectors,
                token_dim=self.dims[1],
                kv_heads=self.kv_heads[2],
                epsilon=self.epsilons[2],
                key=named_key(key, "attention to tokens"),
            )
            stage = Hierarchy(
                self._stack(0, named_key(key, "encoder")),
                estimators[0],
                Flat(self._stack(1, named_key(key, "main"))),
                decoder,
                chunk_positions=True,
                implementation=self.implementation,
            )
        embedding = dim**-0.5 * jax.random.normal(named_key(key, "embedding"), (MARKS, dim), jnp.float32)
        head = None if self.tie_embeddings else Linear(dim, MARKS, key=named_key(key, "head"))
        return Parts(embedding, stage, None, head, self.new_ngrams(key))

    def _dim(self, network: int) -> int:
        return self.dims[1] if network == 1 else self.dims[0]

    def _stack(self, network: int, key: PRNGKeyArray, *, last: bool = False) -> Stack:
        """The layers of a network. `last`: whether the output head follows, which needs a norm before it."""
        dim, epsilon = self._dim(network), self.epsilons[network]
        blocks = []
        for one in jax.random.split(key, self.layers[network]):
            key_attention, key_mlp = jax.random.split(one)
            attention = Attention(
                dim, self.heads[network], cap=None, kv_heads=self.kv_heads[network], key=key_attention
            )
            mlp = SwiGLU(dim, self.mlp_dims[network], key=key_mlp)
            blocks.append(PreNorm(dim, attention, mlp, epsilon=epsilon))
        return Stack(
            blocks,
            window=self.windows[network] or None,
            remat=self.always_remat,
            attention=self.attention_form,
            implementation=self.implementation,
            norm=ScaleNorm(dim, epsilon) if last else None,
            rotary_base=self.rotary_bases[network],
        )
