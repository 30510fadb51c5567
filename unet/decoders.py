"""Shapes of published language models of tokens: Llama and GPT-2.

"Llama" is Touvron et al., "LLaMA: open and efficient foundation language models"; grouped queries and the scaling of positions
are as in Llama 3. "GPT-2" is Radford et al., "Language models are unsupervised multitask learners".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from estimators.base import VOCAB, AbstractEstimator
from estimators.bounds import Layers, Width, Within
from estimators.keys import named_key
from unet.attention import Attention
from unet.blocks import PreNorm, Stack
from unet.config import AbstractShape, Parts
from unet.hierarchy import Flat
from unet.layers import MLP, NORM_EPSILON, ROTARY_BASE, Affine, LayerNorm, Linear, RotaryScaling, ScaleNorm, SwiGLU
from unet.wrapped import Positioned

STD = 0.02
"""Standard deviation of initial embeddings, as published for both."""


@dataclass(frozen=True, kw_only=True)
class AbstractDecoderShape(AbstractShape):
    """What the two shapes share. Raises `ValueError` for values that cannot make a model."""

    dim: Width
    """Width of the hidden states."""
    layers: Layers
    """Layers."""
    heads: Width
    """Attention heads; divides `dim`."""
    mlp_dim: Width
    """Inner width of the MLPs."""
    epsilon: Annotated[float, Within(1e-30, 1.0)] = NORM_EPSILON
    """Epsilon of the norms."""
    tie_embeddings: bool = False
    """Tie the output head to the embedding."""

    def __post_init__(self):
        super().__post_init__()
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            raise ValueError(
                f"heads must divide dim into heads of even width; got dim {self.dim} and heads {self.heads}"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.dim,)

    @property
    def attention_layers(self) -> tuple[tuple[int, int | None], ...]:
        return ((self.dim // self.heads, None),)

    def _require_no_levels(self, estimators: Sequence[AbstractEstimator]) -> None:
        if estimators:
            raise ValueError(f"this shape has no token level; got {len(estimators)} estimators")

    def _embedding(self, vocab: int, key: PRNGKeyArray) -> Float[Array, "vocab dim"]:
        return STD * jax.random.normal(named_key(key, "embedding"), (vocab, self.dim), jnp.float32)

    def _head(self, vocab: int, key: PRNGKeyArray) -> Linear | None:
        return None if self.tie_embeddings else Linear(self.dim, vocab, key=named_key(key, "head"))


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(AbstractDecoderShape):
    """Shape of a Llama: pre-norm layers of rotary attention with grouped queries and a gated MLP, without biases."""

    kv_heads: Width
    """Heads of keys and values, each shared by as many heads."""
    rotary_base: Annotated[float, Within(1.0, 1e30)] = ROTARY_BASE
    """Base of rotary embeddings (rope_theta)."""
    rotary_scaling: RotaryScaling | None = None
    """How their frequencies are scaled (Llama 3.1); None: not at all."""

    def parts(self, estimators: Sequence[AbstractEstimator], *, key: PRNGKeyArray, vocab: int = VOCAB) -> Parts:
        """Matrices are drawn from normals of standard deviation `inputs**-0.5`; norms start at one. Raises `ValueError` for
        estimators, and for heads that do not divide."""
        self._require_no_levels(estimators)
        blocks = []
        for one in jax.random.split(named_key(key, "main"), self.layers):
            key_attention, key_mlp = jax.random.split(one)
            mixer = Attention(self.dim, self.heads, cap=None, kv_heads=self.kv_heads, key=key_attention)
            mlp = SwiGLU(self.dim, self.mlp_dim, key=key_mlp)
            blocks.append(PreNorm(self.dim, mixer, mlp, epsilon=self.epsilon))
        stack = Stack(
            blocks,
            remat=self.always_remat,
            norm=ScaleNorm(self.dim, self.epsilon),
            rotary_base=self.rotary_base,
            attention=self.attention_form,
            implementation=self.implementation,
            rotary_scaling=self.rotary_scaling,
        )
        return Parts(self._embedding(vocab, key), Flat(stack), None, self._head(vocab, key))


@dataclass(frozen=True, kw_only=True)
class GPT2Config(AbstractDecoderShape):
    """Shape of a GPT-2: pre-norm layers of attention and an MLP, with biases, and learned positions."""

    positions: Width = 1024
    """Positions that have an embedding."""

    def parts(self, estimators: Sequence[AbstractEstimator], *, key: PRNGKeyArray, vocab: int = VOCAB) -> Parts:
        """Initial values as in `LlamaConfig.parts`; biases start at zero."""
        self._require_no_levels(estimators)
        blocks = []
        for one in jax.random.split(named_key(key, "main"), self.layers):
            key_attention, key_mlp = jax.random.split(one)
            mixer = Attention(self.dim, self.heads, cap=None, rotary_dim=0, linear=Affine, key=key_attention)
            mlp = MLP(self.dim, self.mlp_dim, key=key_mlp)
            blocks.append(PreNorm(self.dim, mixer, mlp, epsilon=self.epsilon, norm=LayerNorm))
        stack = Stack(
            blocks,
            remat=self.always_remat,
            norm=LayerNorm(self.dim, self.epsilon),
            attention=self.attention_form,
            implementation=self.implementation,
        )
        table = STD * jax.random.normal(named_key(key, "positions"), (self.positions, self.dim), jnp.float32)
        stage = Positioned(table, Flat(stack))
        return Parts(self._embedding(vocab, key), stage, None, self._head(vocab, key))
