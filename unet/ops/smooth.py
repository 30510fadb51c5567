"""The exponential moving average that H-Net takes over its chunks."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from unet.ops.mosaic import AHEAD, LANES, Implementation, declare, dispatch, refusal


def smooth(
    values: Float[Array, "batch tokens dim"],
    probs: Float[Array, "batch tokens"],
    starts: Bool[Array, "batch tokens"] | None = None,
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "batch tokens dim"]:
    r"""$\bar z_m = P_m z_m + (1 - P_m)\,\bar z_{m-1}$ with $\bar z_{-1} = 0$ (H-Net eq. 5).

    `probs` are P, clamped to $[10^{-4}, 1 - 10^{-4}]$ as in the released code. Where `starts` is True the average begins
    anew, so that nothing crosses from one document into the next. The recurrence runs in float32. Raises `ValueError`
    where a kernel asked for by name cannot run.
    """
    probs = clamped(probs)
    keep = 1.0 - probs if starts is None else jnp.where(starts, 0.0, 1.0 - probs)
    return recurrence(values, probs, keep, implementation).astype(values.dtype)


def smooth_step(
    value: Float[Array, "batch 1 dim"], prob: Float[Array, "batch 1"], last: Float[Array, "batch 1 dim"]
) -> Float[Array, "batch 1 dim"]:
    r"""$\bar z_m$ from $\bar z_{m-1}$ = `last`, in float32."""
    scale = clamped(prob)[..., None]
    return scale * value.astype(jnp.float32) + (1.0 - scale) * last


def clamped(probs: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Probabilities within $[10^{-4}, 1 - 10^{-4}]$, in float32."""
    return jnp.clip(probs.astype(jnp.float32), 1e-4, 1.0 - 1e-4)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def recurrence(
    values: Float[Array, "batch tokens dim"],
    scale: Float[Array, "batch tokens"],
    keep: Float[Array, "batch tokens"],
    implementation: Implementation | None = None,
) -> Float[Array, "batch tokens dim"]:
    r"""$h_m = k_m h_{m-1} + s_m x_m$ from zero, in float32, for `scale` s and `keep` k of a whole row."""
    return _recur(values, scale, keep, False, implementation)


def _forward(values, scale, keep, implementation):
    states = recurrence(values, scale, keep, implementation)
    return states, (values, scale, keep, states)


def _backward(implementation, saved, gradient):
    """With $g_m = \\partial L/\\partial h_m + k_{m+1} g_{m+1}$, the same recurrence from the other end."""
    values, scale, keep, states = saved
    after = jnp.pad(keep[:, 1:], ((0, 0), (0, 1)))
    total = _recur(gradient, jnp.ones_like(scale), after, True, implementation)
    before = jnp.pad(states[:, :-1], ((0, 0), (1, 0), (0, 0)))
    d_scale = jnp.sum(total * values.astype(jnp.float32), axis=2)
    return (scale[..., None] * total).astype(values.dtype), d_scale, jnp.sum(total * before, axis=2)


recurrence.defvjp(_forward, _backward)


def _recur(
    values: Array, scale: Array, keep: Array, reverse: bool, implementation: Implementation | None
) -> Float[Array, "batch tokens dim"]:
    def kernel(interpret: bool):
        return functools.partial(_kernel, reverse=reverse, interpret=interpret)

    refused = refusal(values.shape[2], values.dtype)
    xla = functools.partial(_xla, reverse=reverse)
    return dispatch("smooth", refused, implementation, values, scale, keep, xla=xla, kernel=kernel)


def _xla(values: Array, scale: Array, keep: Array, *, reverse: bool) -> Array:
    inputs = scale[..., None] * values.astype(jnp.float32)
    # A few cores have nothing to gain from doing more work in fewer steps.
    return jax.lax.platform_dependent(
        keep[..., None],
        inputs,
        cpu=functools.partial(_one_by_one, reverse=reverse),
        default=functools.partial(_by_halves, reverse=reverse),
    )


def _one_by_one(keep: Array, inputs: Array, *, reverse: bool) -> Array:
    def step(state: Array, row: tuple[Array, Array]) -> tuple[Array, Array]:
        kept, value = row
        state = kept * state + value
        return state, state

    rows = jnp.swapaxes(keep, 0, 1), jnp.swapaxes(inputs, 0, 1)
    return jnp.swapaxes(jax.lax.scan(step, jnp.zeros_like(inputs[:, 0]), rows, reverse=reverse)[1], 0, 1)


def _by_halves(keep: Array, inputs: Array, *, reverse: bool) -> Array:
    def compose(earlier, later):
        keep_earlier, sum_earlier = earlier
        keep_later, sum_later = later
        return keep_earlier * keep_later, sum_later + keep_later * sum_earlier

    return jax.lax.associative_scan(compose, (keep, inputs), axis=1, reverse=reverse)[1]


def _kernel(values: Array, scale: Array, keep: Array, *, reverse: bool, interpret: bool) -> Array:
    """Every thread follows one column of one sequence from end to end."""
    from jax.experimental import pallas as pl

    batch, tokens, dim = values.shape
    ahead = AHEAD if tokens % AHEAD == 0 else 1

    def body(values_ref, scale_ref, keep_ref, out_ref):
        b = jax.lax.axis_index("x")
        lanes = pl.ds(jax.lax.axis_index("y") * LANES, LANES)

        def some(block, state):
            rows = [block * ahead + i for i in range(ahead)]
            if reverse:
                rows = [tokens - 1 - row for row in rows]
            loaded = [(values_ref[b, row, lanes], scale_ref[b, row], keep_ref[b, row]) for row in rows]
            for row, (value, factor, kept) in zip(rows, loaded, strict=True):
                state = factor * value.astype(jnp.float32) + kept * state
                out_ref[b, row, lanes] = state
            return state

        jax.lax.fori_loop(0, tokens // ahead, some, jnp.zeros((LANES,), jnp.float32))

    out = jax.ShapeDtypeStruct((batch, tokens, dim), jnp.float32)
    return declare(body, [out], (batch, dim // LANES), interpret=interpret)(values, scale, keep)[0]
