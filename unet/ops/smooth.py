"""H-Net's exponential moving average over chunks."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from estimators.sharding import varying_zeros
from unet.ops.mosaic import AHEAD, LANES, Implementation, declare, dispatch, refusal


def smooth(
    values: Float[Array, "batch tokens dim"],
    probs: Float[Array, "batch tokens"],
    starts: Bool[Array, "batch tokens"] | None = None,
    *,
    initial: Float[Array, "batch 1 dim"] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "batch tokens dim"]:
    r"""$\bar z_m = P_m z_m + (1 - P_m)\,\bar z_{m-1}$ with $\bar z_{-1}$ = `initial` (None: 0; H-Net eq. 5).

    `probs` are P, clamped to $[10^{-4}, 1 - 10^{-4}]$ as in the released code. Where `starts` is True the average restarts, so
    that nothing crosses from one document into the next. The recurrence is float32. Raises `ValueError` if a kernel requested
    by name cannot run.
    """
    probs = clamped(probs)
    keep = 1.0 - probs if starts is None else jnp.where(starts, 0.0, 1.0 - probs)
    averages = recurrence(values, probs, keep, implementation)
    if initial is not None:
        # The recurrence is linear: add the initial value, decayed.
        averages = averages + jnp.cumprod(keep, axis=1)[..., None] * initial
    return averages.astype(values.dtype)


def clamped(probs: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Probabilities clamped to $[10^{-4}, 1 - 10^{-4}]$, in float32."""
    return jnp.clip(probs.astype(jnp.float32), 1e-4, 1.0 - 1e-4)


def recurrence(
    values: Float[Array, "batch tokens dim"],
    scale: Float[Array, "batch tokens"],
    keep: Float[Array, "batch tokens"],
    implementation: Implementation | None = None,
) -> Float[Array, "batch tokens dim"]:
    """$h_m = k_m h_{m-1} + s_m x_m$ from zero, in float32; `scale` s and `keep` k are one number for each token."""
    if implementation == "native":
        return _recur(values, scale, keep, False, implementation)
    return _recurrence(values, scale, keep, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _recurrence(values: Array, scale: Array, keep: Array, implementation: Implementation | None) -> Array:
    return _recur(values, scale, keep, False, implementation)


def _forward(values, scale, keep, implementation):
    states = _recurrence(values, scale, keep, implementation)
    return states, (values, scale, keep, states)


def _backward(implementation, saved, gradient):
    r"""The same recurrence in reverse: $g_m = \partial L/\partial h_m + k_{m+1} g_{m+1}$."""
    values, scale, keep, states = saved
    after = jnp.pad(keep[:, 1:], ((0, 0), (0, 1)))
    total = _recur(gradient, jnp.ones_like(scale), after, True, implementation)
    before = jnp.pad(states[:, :-1], ((0, 0), (1, 0), (0, 0)))
    d_scale = jnp.sum(total * values.astype(jnp.float32), axis=2)
    return (scale[..., None] * total).astype(values.dtype), d_scale, jnp.sum(total * before, axis=2)


_recurrence.defvjp(_forward, _backward)


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
    # An associative scan does more work in fewer steps, which does not pay on a CPU.
    return jax.lax.platform_dependent(
        keep[..., None],
        inputs,
        cpu=functools.partial(_sequential, reverse=reverse),
        default=functools.partial(_associative, reverse=reverse),
    )


def _sequential(keep: Array, inputs: Array, *, reverse: bool) -> Array:
    def step(state: Array, row: tuple[Array, Array]) -> tuple[Array, Array]:
        kept, value = row
        state = kept * state + value
        return state, state

    rows = jnp.swapaxes(keep, 0, 1), jnp.swapaxes(inputs, 0, 1)
    return jnp.swapaxes(
        jax.lax.scan(step, varying_zeros(inputs, inputs[:, 0].shape, inputs.dtype), rows, reverse=reverse)[1], 0, 1
    )


def _associative(keep: Array, inputs: Array, *, reverse: bool) -> Array:
    def compose(earlier, later):
        keep_earlier, sum_earlier = earlier
        keep_later, sum_later = later
        return keep_earlier * keep_later, sum_later + keep_later * sum_earlier

    return jax.lax.associative_scan(compose, (keep, inputs), axis=1, reverse=reverse)[1]


def _kernel(values: Array, scale: Array, keep: Array, *, reverse: bool, interpret: bool) -> Array:
    """Each thread computes one column of one sequence from end to end."""
    from jax.experimental import pallas as pl

    batch, tokens, dim = values.shape
    ahead = AHEAD if tokens % AHEAD == 0 else 1

    def body(values_ref, scale_ref, keep_ref, out_ref):
        b = jax.lax.axis_index("x")
        lanes = pl.ds(jax.lax.axis_index("y") * LANES, LANES)

        def run_block(block, state):
            rows = [block * ahead + i for i in range(ahead)]
            if reverse:
                rows = [tokens - 1 - row for row in rows]
            loaded = [(values_ref[b, row, lanes], scale_ref[b, row], keep_ref[b, row]) for row in rows]
            for row, (value, factor, kept) in zip(rows, loaded, strict=True):
                state = factor * value.astype(jnp.float32) + kept * state
                out_ref[b, row, lanes] = state
            return state

        jax.lax.fori_loop(0, tokens // ahead, run_block, jnp.zeros((LANES,), jnp.float32))

    out = jax.ShapeDtypeStruct((batch, tokens, dim), jnp.float32)
    return declare(body, [out], (batch, dim // LANES), interpret=interpret)(values, scale, keep)[0]
