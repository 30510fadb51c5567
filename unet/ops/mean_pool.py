"""Positions to tokens: the mean of each group of positions that a boundary closes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from estimators.base import Tokens
from unet.ops.downsample import places_of
from unet.ops.groups import unclosed
from unet.ops.mosaic import Implementation
from unet.ops.rows import bounds_of, pool_rows


def mean_pool(
    hidden: Float[Array, "batch length dim"],
    actions: Bool[Array, "batch length"],
    capacity: int,
    *,
    starts: Bool[Array, "batch length"] | None = None,
    relaxed: Float[Array, "batch length"] | None = None,
    own_start: bool = False,
    implementation: Implementation | None = None,
) -> Tokens:
    r"""$X'_m = \sum_{l \in g_m} w_l X_l / \sum_{l \in g_m} w_l$, the group $g_m$ ending at the m-th boundary (DPT).

    The weights $w_l = 1 + c_l - \mathrm{sg}(c_l)$, $c_l = \sum_{k<l} h_k$, are 1 and carry the gradient to `relaxed` ($h$), the
    boundaries as numbers; with None there is no such gradient. The boundary at a document's start (`starts`) closes an empty
    group and leaves its position to the next group; with `own_start` it closes a group of that position alone. Empty groups are
    zero, positions that no boundary of their document closes are in no group, and sums are float32. Raises `ValueError` for a
    capacity below 1, and if a kernel requested by name cannot run.
    """
    places = places_of(actions, capacity)
    starts = jnp.zeros(actions.shape, bool) if starts is None else starts
    closed = actions.astype(jnp.int32)
    group = jnp.cumsum(closed, axis=1) - closed
    weights = jnp.ones(actions.shape, jnp.float32)
    if own_start:
        weights = jnp.where(unclosed(actions, starts), 0.0, weights)
    else:
        group = group + starts.astype(jnp.int32)
    if relaxed is not None:
        before = jnp.cumsum(relaxed.astype(jnp.float32), axis=1) - relaxed.astype(jnp.float32)
        weights = weights + (before - jax.lax.stop_gradient(before))

    # Positions that no boundary closes, or one past the capacity, lie beyond the last bound.
    bounds = bounds_of(jnp.where(group < places.lengths[:, None], group, capacity), capacity)
    span = jnp.where(group < places.lengths[:, None], group, -1)
    sums = pool_rows(weights[..., None] * hidden.astype(jnp.float32), bounds, span, implementation)
    counts = pool_rows(weights[..., None], bounds, span, "native" if implementation == "native" else "xla")
    tokens, nonempty = places.tokens(sums), counts[..., 0] > 0
    if not own_start:
        # Unclosed positions of the previous document end up in the group of the boundary at a start, which must stay empty.
        nonempty = nonempty & ~jnp.take_along_axis(starts, tokens.positions, axis=1, mode="clip")
    means = jnp.where(nonempty[..., None], sums / jnp.where(nonempty[..., None], counts, 1.0), 0.0)
    return tokens.replaced(means.astype(hidden.dtype))
