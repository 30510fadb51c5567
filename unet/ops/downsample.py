"""Positions to tokens: select the positions at which a token closes."""

from __future__ import annotations

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from estimators.base import Tokens
from unet.ops.mosaic import Implementation
from unet.ops.rows import add_at, pick_rows


class Places(eqx.Module):
    """Where tokens close: the position of each token (`index`, -1 past the last), the token that closes at each position
    (`back`, -1 for none), the number of tokens of each sequence (`lengths`), and of boundaries dropped (`overflow`)."""

    index: Int[Array, "batch tokens"]
    back: Int[Array, "batch length"]
    lengths: Int[Array, " batch"]
    overflow: Int[Array, " batch"]

    def tokens(self, values: Float[Array, "batch tokens dim"]) -> Tokens:
        """Tokens with these `values`."""
        return Tokens(values, jnp.maximum(self.index, 0), self.lengths, self.overflow)


def places_of(actions: Bool[Array, "batch length"], capacity: int) -> Places:
    """The positions of the first `capacity` boundaries of each sequence. Raises `ValueError` for a capacity below 1."""
    if capacity < 1:
        raise ValueError(f"a capacity must be at least 1 token; got {capacity}")
    length = actions.shape[1]
    total = jnp.sum(actions, axis=1, dtype=jnp.int32)
    number = jnp.cumsum(actions, axis=1, dtype=jnp.int32) - 1
    token = jnp.where(actions, number, capacity)
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), actions.shape)
    # Each sum has one term, or none: 1 is added and subtracted so that an empty sum becomes -1.
    index = add_at(token, positions + 1, capacity) - 1
    lengths = jnp.minimum(total, capacity)
    return Places(index, jnp.where(token < capacity, token, -1), lengths, total - lengths)


def downsample(
    hidden: Float[Array, "batch length dim"],
    actions: Bool[Array, "batch length"],
    capacity: int,
    *,
    implementation: Implementation | None = None,
) -> Tokens:
    """$X'_m = X_{i_m}$ with $i_m$ the m-th position where `actions` is True (SFE eq. 7).

    Truncated to `capacity` tokens for each sequence; the boundaries dropped are counted in `overflow`. Unused tokens are zero.
    Raises `ValueError` for a capacity below 1, and if a kernel requested by name cannot run.
    """
    places = places_of(actions, capacity)
    return places.tokens(pick_rows(hidden, places.index, places.back, implementation))
