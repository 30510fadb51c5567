"""Byte rows to token rows: select the rows at which a token closes."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from estimators.base import TokenRows


def downsample(
    hidden: Float[Array, "batch length dim"], actions: Bool[Array, "batch length"], capacity: int
) -> TokenRows:
    r"""$X'_m = X_{i_m}$ with $i_m$ the m-th row where `actions` is True (SFE eq. 7).

    At most `capacity` rows a sequence, the first ones; boundaries past them are counted in `overflow`. Rows past a
    sequence's own count are zero. Raises `ValueError` for a capacity below 1.
    """
    if capacity < 1:
        raise ValueError(f"a capacity is at least 1 token row; got {capacity}")
    batch, length = actions.shape
    total = jnp.sum(actions, axis=1, dtype=jnp.int32)
    row = jnp.where(actions, jnp.cumsum(actions, axis=1, dtype=jnp.int32) - 1, capacity)
    place = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), actions.shape)
    positions = jnp.zeros((batch, capacity), jnp.int32)
    positions = positions.at[jnp.arange(batch)[:, None], row].set(place, mode="drop")
    lengths = jnp.minimum(total, capacity)
    kept = jnp.arange(capacity)[None, :] < lengths[:, None]
    values = jnp.take_along_axis(hidden, positions[..., None], axis=1, mode="clip")
    values = jnp.where(kept[..., None], values, jnp.zeros((), hidden.dtype))
    return TokenRows(values, positions, lengths, total - lengths)
