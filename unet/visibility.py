"""Which positions see which: comparisons of documents and positions, and cutting sequences into blocks."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class Located(eqx.Module):
    """The document (negative for padding) and the position of each of some queries or keys."""

    segments: Int[Array, "*batch length"]
    positions: Int[Array, "*batch length"]


def visible(queries: Located, keys: Located, window: int | None) -> Bool[Array, "*batch queries keys"]:
    """Whether each query sees each key."""
    distance = queries.positions[..., :, None] - keys.positions[..., None, :]
    same = queries.segments[..., :, None] == keys.segments[..., None, :]
    allowed = same & (distance >= 0) & (queries.segments[..., :, None] >= 0)
    if window is not None:
        allowed = allowed & (distance < window)
    return allowed | (distance == 0)


def blocks_of(values: Array, block: int, *, fill: int, axis: int = 1) -> Array:
    """`… length …` to `… blocks block …`; the last block is padded with `fill`."""
    widths = [(0, 0)] * values.ndim
    widths[axis] = (0, -values.shape[axis] % block)
    values = jnp.pad(values, widths, constant_values=fill)
    return values.reshape(*values.shape[:axis], -1, block, *values.shape[axis + 1 :])


def spans_of(values: Array, block: int, before: int, *, fill: int, axis: int = 1) -> Array:
    """`… length …` to what each block of queries sees, `… blocks span …`: the block itself, after the last `before` positions
    of the block before it."""
    own = blocks_of(values, block, fill=fill, axis=axis)
    if not before:
        return own
    ends = jax.lax.slice_in_dim(own, block - before, block, axis=axis + 1)
    widths = [(0, 0)] * own.ndim
    widths[axis] = (1, 0)
    earlier = jnp.pad(jax.lax.slice_in_dim(ends, 0, -1, axis=axis), widths, constant_values=fill)
    return jnp.concatenate([earlier, own], axis=axis + 1)
