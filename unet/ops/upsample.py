"""Tokens to positions: each position gets the last token that closed at or before it."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from unet.ops.mosaic import Implementation
from unet.ops.rows import bounds_of, spread_rows


def token_of(actions: Bool[Array, "batch length"]) -> Int[Array, "batch length"]:
    r"""$\mathrm{token\_of}(i) = \sum_{k \le i} a_k - 1$: the index of the last closed token, -1 before the first."""
    return jnp.cumsum(actions, axis=1, dtype=jnp.int32) - 1


def upsample(
    values: Float[Array, "batch tokens dim"],
    actions: Bool[Array, "batch length"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "batch length dim"]:
    r"""$Y_i = Y'_{\mathrm{token\_of}(i)}$ (SFE eq. 8, without the residual); zero before the first boundary.

    If there are more boundaries than tokens, later positions keep the last token. A token's gradient is the sum over its
    positions, in float32. Raises `ValueError` if a kernel requested by name cannot run.
    """
    token = jnp.minimum(token_of(actions), values.shape[1] - 1)
    return spread_rows(values, token, bounds_of(token, values.shape[1]), implementation)
