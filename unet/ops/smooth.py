"""The exponential moving average that H-Net takes over its chunks."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def smooth(
    values: Float[Array, "batch tokens dim"],
    probs: Float[Array, "batch tokens"],
    starts: Bool[Array, "batch tokens"] | None = None,
) -> Float[Array, "batch tokens dim"]:
    r"""$\bar z_m = P_m z_m + (1 - P_m)\,\bar z_{m-1}$ with $\bar z_{-1} = 0$ (H-Net eq. 5).

    `probs` are P, clamped to $[10^{-4}, 1 - 10^{-4}]$ as in the released code. Where `starts` is True the average begins
    anew, so that nothing crosses from one document into the next. The recurrence runs in float32.
    """
    probs = jnp.clip(probs.astype(jnp.float32), 1e-4, 1.0 - 1e-4)
    keep = 1.0 - probs if starts is None else jnp.where(starts, 0.0, 1.0 - probs)

    def compose(earlier, later):
        keep_earlier, sum_earlier = earlier
        keep_later, sum_later = later
        return keep_earlier * keep_later, sum_later + keep_later * sum_earlier

    inputs = probs[..., None] * values.astype(jnp.float32)
    return jax.lax.associative_scan(compose, (keep[..., None], inputs), axis=1)[1].astype(values.dtype)
