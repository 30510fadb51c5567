"""Shape of a plain transformer: one network, no level of tokens inside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from estimators.base import VOCAB, AbstractEstimator
from estimators.bounds import Layers, Width, Within
from estimators.keys import named_key
from unet.blocks import transformer
from unet.config import AbstractShape, Parts
from unet.hierarchy import Flat
from unet.layers import Linear, RMSNorm


@dataclass(frozen=True)
class TransformerConfig(AbstractShape):
    """Shape of a transformer of the same blocks as the token level of `UNetConfig`: the tokens of a byte-pair encoding are its
    positions, or bytes.

    Raises `ValueError` for values that cannot make a model.
    """

    dim: Width
    """Width of the hidden states."""
    heads: Width
    """Attention heads; divides `dim`."""
    layers: Layers
    """Blocks."""
    mlp_dim: Width
    """Inner width of the MLPs."""
    attention_window: Annotated[int, Within(0, 2**24)] = 0
    """Positions that attention sees, its own included; 0 for all before it."""

    def __post_init__(self):
        super().__post_init__()
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            raise ValueError(
                f"heads must divide dim into heads of even width; got dim {self.dim} and heads {self.heads}"
            )
        if self.attend != "none":
            raise ValueError(f"attend {self.attend} needs a token level, and a transformer has none inside")

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.dim,)

    @property
    def attention_layers(self) -> tuple[tuple[int, int | None], ...]:
        return ((self.dim // self.heads, self.attention_window or None),)

    def parts(self, estimators: Sequence[AbstractEstimator], *, key: PRNGKeyArray, vocab: int = VOCAB) -> Parts:
        """Weights are initialised as by `UNetConfig.parts`."""
        if estimators:
            raise ValueError(f"this shape has no token level; got {len(estimators)} estimators")
        stack = transformer(
            self.layers,
            self.dim,
            self.heads,
            self.mlp_dim,
            window=self.attention_window or None,
            remat=self.always_remat,
            attention=self.attention_form,
            implementation=self.implementation,
            key=named_key(key, "main"),
        )
        embedding = jax.random.normal(named_key(key, "embedding"), (vocab, self.dim), jnp.float32)
        head = Linear(self.dim, vocab, key=named_key(key, "head"))
        return Parts(embedding, Flat(stack), RMSNorm(self.dim), head, self.new_ngrams(key))
