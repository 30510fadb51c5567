"""Groups of positions. A group is what one boundary closes: the positions after the previous boundary, up to and including its
own."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from estimators.base import Boundaries
from unet.ops.mosaic import Implementation
from unet.ops.rows import add_at, bounds_of, spread_rows


class Groups(eqx.Module):
    """Which group each position is in: `index`, equal to `tokens`, the capacity, if it is in none. `upcoming` never decreases:
    it is the same, except that positions in no group have the index of a neighbouring group."""

    index: Int[Array, "batch length"]
    upcoming: Int[Array, "batch length"]
    tokens: int = eqx.field(static=True)
    implementation: Implementation | None = eqx.field(static=True, default=None)

    @property
    def inside(self) -> Bool[Array, "batch length"]:
        """Whether a position is in a group."""
        return self.index < self.tokens

    def total(self, values: Float[Array, "batch length *rest"]) -> Float[Array, "batch tokens *rest"]:
        """The sum of each group."""
        return add_at(self.index, values, self.tokens)

    def largest(self, values: Float[Array, "batch length *rest"]) -> Float[Array, "batch tokens *rest"]:
        """The elementwise maximum of each group; -inf for a group without positions."""

        def maxima(index: Array, values: Array) -> Array:
            empty = jnp.full((self.tokens, *values.shape[1:]), -jnp.inf, values.dtype)
            return empty.at[index].max(values, mode="drop")

        return jax.vmap(maxima)(self.index, values)

    def spread(self, values: Float[Array, "batch tokens dim"]) -> Float[Array, "batch length dim"]:
        """Each group's values, copied to all its positions; positions of no group get those of another."""
        return spread_rows(values, self.upcoming, bounds_of(self.upcoming, self.tokens), self.implementation)


def groups_of(boundaries: Boundaries, capacity: int, implementation: Implementation | None = None) -> Groups:
    """The groups that boundaries close. Positions of a document that no boundary closes belong to none."""
    closed = boundaries.actions.astype(jnp.int32)
    index = jnp.cumsum(closed, axis=1) - closed
    count = jnp.sum(closed, axis=1, keepdims=True)
    outside = unclosed(boundaries.actions, boundaries.starts) | (index >= jnp.minimum(count, capacity))
    return Groups(jnp.where(outside, capacity, index), jnp.minimum(index, capacity - 1), capacity, implementation)


def unclosed(actions: Bool[Array, "batch length"], starts: Bool[Array, "batch length"]) -> Bool[Array, "batch length"]:
    """True where the next boundary is the start of another document. That boundary closes its own position alone, so it does
    not close these."""
    length = actions.shape[1]
    boundary = jnp.where(actions, jnp.arange(length, dtype=jnp.int32), length)
    following = jnp.flip(jax.lax.cummin(jnp.flip(boundary, 1), axis=1), 1)
    return jnp.take_along_axis(starts, jnp.minimum(following, length - 1), axis=1) & ~starts
