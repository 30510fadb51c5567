"""A stage that is wider than the stage around it."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from estimators.base import Layout
from unet.hierarchy import AbstractStage
from unet.wrapped import AbstractWrapped


class Widened(AbstractWrapped):
    """A wider stage inside: a learned vector is appended to every position on the way in, and the extra dimensions are cut off
    on the way out (H-Net section 2.1)."""

    padding: Float[Array, " extra"]
    stage: AbstractStage

    def __init__(self, padding: Float[Array, " extra"], stage: AbstractStage):
        self.padding, self.stage = padding, stage

    def inner_dim(self, dim: int) -> int:
        return dim + self.padding.shape[0]

    def inwards(self, hidden: Float[Array, "batch length dim"], layout: Layout) -> Float[Array, "batch length inner"]:
        padding = jnp.broadcast_to(self.padding.astype(hidden.dtype), (*hidden.shape[:2], *self.padding.shape))
        return jnp.concatenate([hidden, padding], axis=-1)

    def outwards(self, hidden: Float[Array, "batch length inner"]) -> Float[Array, "batch length dim"]:
        return hidden[..., : hidden.shape[-1] - self.padding.shape[0]]
