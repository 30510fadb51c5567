"""Where boundaries may and must stand, given how long the chunk is that they would close."""

from __future__ import annotations

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from estimators.equations import NEVER


class Limits(eqx.Module):
    r"""The sizes that a chunk may have, at each position at which it could close.

    A boundary at position i would close a chunk of $s_i$ positions, i included. It may stand there only if $s_i \ge$ `least_i`,
    and then it must if $s_i \ge$ `most_i`: where both speak, `least` wins. `sized` is False if every `least` and `most` is 1 or
    `NEVER` (larger than any chunk), so that what is possible depends on the text alone, not on earlier boundaries. `size` is the
    number of positions of the chunk that is open before the first of these (None: 0).
    """

    least: Int[Array, "batch length"]
    most: Int[Array, "batch length"]
    sized: bool = eqx.field(static=True, default=True)
    size: Int[Array, " batch"] | None = None

    @property
    def possible(self) -> Bool[Array, "batch length"]:
        """False where no boundary may stand, whatever the size of the chunk."""
        return self.least < NEVER

    @property
    def settled(self) -> Bool[Array, "batch length"]:
        """True where no size of the chunk leaves a choice."""
        return ~self.possible | ((self.least <= 1) & (self.most <= 1))

    def and_also(self, other: Limits | None) -> Limits:
        """The limits that keep both."""
        if other is None:
            return self
        least, most = jnp.maximum(self.least, other.least), jnp.minimum(self.most, other.most)
        size = other.size if self.size is None else self.size
        return Limits(least, most, self.sized or other.sized, size)

    def certain(self, uniforms: Float[Array, "batch length"]) -> Float[Array, "batch length"]:
        """For limits that are not `sized`: `uniforms` with 2 where no boundary may stand and -1 where one must, so that
        comparing them with any probability keeps the limits."""
        return jnp.where(self.least > 1, 2.0, jnp.where(self.most <= 1, -1.0, uniforms))
