"""Stages around a stage: of another width, or with learned positions."""

from __future__ import annotations

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from estimators.base import AbstractEstimator, Layout
from unet.hierarchy import AbstractStage, Encoded, StageOutput, StageSampling
from unet.layers import ScaleNorm, SwiGLU


class Positioned(AbstractStage):
    """A stage whose positions have learned embeddings, which are added on the way in: `table[p]` at position p of its document
    (GPT-2).

    Positions beyond the last row of the table have no embedding: logits there, and after them, are NaN.
    """

    table: Float[Array, "positions dim"]
    stage: AbstractStage

    @property
    def estimators(self) -> tuple[AbstractEstimator, ...]:
        return self.stage.estimators

    def init_state(self, batch: int, dim: int) -> PyTree[Array]:
        return self.stage.init_state(batch, dim)

    def encode(
        self,
        hidden: Float[Array, "batch length dim"],
        layout: Layout,
        sampling: StageSampling,
        state: PyTree[Array] = None,
    ) -> Encoded:
        places = jnp.where(layout.mask, layout.document_positions, 0)
        added = jnp.take(self.table, places, axis=0, mode="fill", fill_value=jnp.nan)
        return self.stage.encode(hidden + added.astype(hidden.dtype), layout, sampling, state)

    def decode(
        self, encoded: Encoded, sampling: StageSampling, state: PyTree[Array] = None, *, capacity: int | None = None
    ) -> StageOutput:
        return self.stage.decode(encoded, sampling, state, capacity=capacity)


class Adapter(eqx.Module):
    """A norm and a gated MLP from one width to another (H-Net appendix F)."""

    norm: ScaleNorm
    mlp: SwiGLU

    def __init__(self, dim: int, hidden: int, outputs: int, *, key: PRNGKeyArray):
        self.norm, self.mlp = ScaleNorm(dim), SwiGLU(dim, hidden, outputs=outputs, key=key)

    def __call__(self, x: Float[Array, "*shape dim"]) -> Float[Array, "*shape outputs"]:
        return self.mlp(self.norm(x))


class Adapted(AbstractStage):
    """A stage of another width, or of another origin, between two adapters (H-Net appendix F)."""

    enter: Adapter
    stage: AbstractStage
    leave: Adapter

    def __init__(self, dim: int, stage: AbstractStage, token_dim: int, hidden: int, *, key: PRNGKeyArray):
        """A `stage` of width `token_dim` for positions of width `dim`; `hidden`: the inner width of the adapters."""
        key_enter, key_leave = jax.random.split(key)
        self.enter = Adapter(dim, hidden, token_dim, key=key_enter)
        self.leave = Adapter(token_dim, hidden, dim, key=key_leave)
        self.stage = stage

    @property
    def estimators(self) -> tuple[AbstractEstimator, ...]:
        return self.stage.estimators

    @property
    def token_dim(self) -> int:
        """The width of the stage inside."""
        return self.leave.norm.weight.shape[0]

    def init_state(self, batch: int, dim: int) -> PyTree[Array]:
        return self.stage.init_state(batch, self.token_dim)

    def encode(
        self,
        hidden: Float[Array, "batch length dim"],
        layout: Layout,
        sampling: StageSampling,
        state: PyTree[Array] = None,
    ) -> Encoded:
        return self.stage.encode(self.enter(hidden), layout, sampling, state)

    def decode(
        self, encoded: Encoded, sampling: StageSampling, state: PyTree[Array] = None, *, capacity: int | None = None
    ) -> StageOutput:
        output = self.stage.decode(encoded, sampling, state, capacity=capacity)
        return dataclasses.replace(output, hidden=self.leave(output.hidden))
