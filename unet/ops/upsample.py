"""Token rows to byte rows: each byte gets the last token that closed at or before it."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def token_of(actions: Bool[Array, "batch length"]) -> Int[Array, "batch length"]:
    r"""$\mathrm{token\_of}(i) = \sum_{k \le i} a_k - 1$: the row of the last closed token, -1 before the first."""
    return jnp.cumsum(actions, axis=1, dtype=jnp.int32) - 1


def upsample(
    values: Float[Array, "batch tokens dim"], actions: Bool[Array, "batch length"]
) -> Float[Array, "batch length dim"]:
    r"""$Y_i = Y'_{\mathrm{token\_of}(i)}$ (SFE eq. 8, without the residual); zero before the first boundary.

    Where there are more boundaries than token rows, the bytes past the last row keep that row.
    """
    token = token_of(actions)
    rows = jnp.take_along_axis(values, jnp.maximum(token, 0)[..., None], axis=1, mode="clip")
    return jnp.where(token[..., None] >= 0, rows, jnp.zeros((), values.dtype))
