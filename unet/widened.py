"""A stage whose hidden states are wider than those around it."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from estimators.base import AbstractEstimator, Layout
from unet.stage import AbstractStage, Begun, Drawing, Prefilled, StageOutput, Stepped

Output = TypeVar("Output", StageOutput, Stepped)
"""What holds the `hidden` states that a stage returns."""


class Widened(AbstractStage):
    """A wider stage inside: a learned vector is appended to every row on the way in, and the surplus cut on the way out (H-Net
    section 2.1)."""

    padding: Float[Array, " extra"]
    stage: AbstractStage

    @property
    def estimators(self) -> tuple[AbstractEstimator, ...]:
        return self.stage.estimators

    def begin(self, hidden: Float[Array, "batch length dim"], layout: Layout, drawing: Drawing) -> Begun:
        return self.stage.begin(self.widened(hidden), layout, drawing)

    def finish(self, begun: Begun, drawing: Drawing, *, capacity: int | None = None) -> StageOutput:
        return self.narrowed(self.stage.finish(begun, drawing, capacity=capacity))

    def ending(self) -> Widened:
        return Widened(self.padding, self.stage.ending())

    def prefill(self, hidden: Float[Array, "batch length dim"], layout: Layout, drawing: Drawing) -> Prefilled:
        done = self.stage.prefill(self.widened(hidden), layout, drawing)
        return Prefilled(self.narrowed(done.output), done.memory)

    def step(
        self, hidden: Float[Array, "batch 1 dim"], layout: Layout, drawing: Drawing, memory: PyTree[Array]
    ) -> Stepped:
        return self.narrowed(self.stage.step(self.widened(hidden), layout, drawing, memory))

    def widened(self, hidden: Float[Array, "batch length dim"]) -> Float[Array, "batch length wide"]:
        """With the padding behind every row."""
        padding = jnp.broadcast_to(self.padding.astype(hidden.dtype), (*hidden.shape[:2], *self.padding.shape))
        return jnp.concatenate([hidden, padding], axis=-1)

    def narrowed(self, output: Output) -> Output:
        """With rows as wide as they came in."""
        hidden = output.hidden
        return dataclasses.replace(output, hidden=hidden[..., : hidden.shape[-1] - self.padding.shape[0]])
