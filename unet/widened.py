"""A stage that is wider than the stage around it."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from estimators.base import AbstractEstimator, Layout
from unet.hierarchy import AbstractStage, Encoded, StageOutput, StageSampling


class Widened(AbstractStage):
    """A wider stage inside: a learned vector is appended to every position on the way in, and the extra dimensions are cut off
    on the way out (H-Net section 2.1)."""

    padding: Float[Array, " extra"]
    stage: AbstractStage

    @property
    def estimators(self) -> tuple[AbstractEstimator, ...]:
        return self.stage.estimators

    def init_state(self, batch: int, dim: int) -> PyTree[Array]:
        return self.stage.init_state(batch, dim + self.padding.shape[0])

    def encode(
        self,
        hidden: Float[Array, "batch length dim"],
        layout: Layout,
        sampling: StageSampling,
        state: PyTree[Array] = None,
    ) -> Encoded:
        padding = jnp.broadcast_to(self.padding.astype(hidden.dtype), (*hidden.shape[:2], *self.padding.shape))
        return self.stage.encode(jnp.concatenate([hidden, padding], axis=-1), layout, sampling, state)

    def decode(
        self, encoded: Encoded, sampling: StageSampling, state: PyTree[Array] = None, *, capacity: int | None = None
    ) -> StageOutput:
        output = self.stage.decode(encoded, sampling, state, capacity=capacity)
        narrow = output.hidden[..., : output.hidden.shape[-1] - self.padding.shape[0]]
        return dataclasses.replace(output, hidden=narrow)
