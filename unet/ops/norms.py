"""Root-mean-square norms together with the sums around them in a residual block.

XLA reads rows once for their mean square and again for what is made of it, and adds gradients of the residual stream in passes
of their own. The kernels read each row once and keep it in registers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from estimators.sharding import varying_like
from unet.ops.mosaic import Implementation, declare, dispatch, refusal

ROWS = 16
"""Rows of each program of a kernel, one after another. A program has one sum for the gradient of the scale."""

MAX_DIM = 2048
"""Widest rows of the kernels: wider ones do not fit into the registers of 128 threads."""


class Normed(NamedTuple):
    """Rows with their norms. `rows` are those that were given: whoever adds to them should use these, so that both gradients
    are added in one pass."""

    rows: Float[Array, "*shape dim"]
    norms: Float[Array, "*shape dim"]


def unit_rms(x: Float[Array, "*shape dim"], epsilon: float) -> Float[Array, "*shape dim"]:
    r"""$x/\sqrt{\mathrm{mean}(x^2) + \epsilon}$, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon)


def rms_norm(
    rows: Float[Array, "*shape dim"],
    scale: Float[Array, " dim"],
    epsilon: float,
    *,
    dtype: DTypeLike | None = None,
    implementation: Implementation | None = None,
) -> Normed:
    r"""The rows and $s \odot x/\sqrt{\mathrm{mean}(x^2) + \epsilon}$, computed in float32 and returned in `dtype` (None: that
    of the rows). Rows that kernels do not take are normed in XLA whatever the `implementation`."""
    dtype = jnp.dtype(rows.dtype if dtype is None else dtype)
    scale = varying_like(scale.astype(jnp.float32), rows)
    if implementation == "native":
        return Normed(rows, _norm_xla(rows, scale, epsilon=epsilon, dtype=dtype))
    return _rms_norm(rows, scale, epsilon, dtype, implementation)


def add_rms_norm(
    residual: Float[Array, "*shape dim"],
    rows: Float[Array, "*shape dim"],
    scale: Float[Array, " dim"],
    epsilon: float,
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "*shape dim"]:
    r"""$r + s \odot x/\sqrt{\mathrm{mean}(x^2) + \epsilon}$, computed in float32 and returned in the dtype of the residual r. As
    `rms_norm` for rows that kernels do not take."""
    scale = varying_like(scale.astype(jnp.float32), rows)
    if implementation == "native":
        return _norm_xla(rows, scale, residual, epsilon=epsilon, dtype=residual.dtype)
    return _add_rms_norm(residual, rows, scale, epsilon, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _rms_norm(rows: Array, scale: Array, epsilon: float, dtype: DTypeLike, implementation: Implementation | None):
    return Normed(rows, _norm([rows, scale], epsilon, dtype, implementation))


def _rms_norm_forward(rows, scale, epsilon, dtype, implementation):
    return _rms_norm(rows, scale, epsilon, dtype, implementation), (rows, scale)


def _rms_norm_backward(epsilon, dtype, implementation, saved, gradient):
    return _gradients([*saved, gradient.norms, gradient.rows], epsilon, implementation)


_rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _add_rms_norm(
    residual: Array, rows: Array, scale: Array, epsilon: float, implementation: Implementation | None
) -> Array:
    return _norm([rows, scale, residual], epsilon, residual.dtype, implementation)


def _add_forward(residual, rows, scale, epsilon, implementation):
    return _add_rms_norm(residual, rows, scale, epsilon, implementation), (rows, scale)


def _add_backward(epsilon, implementation, saved, gradient):
    return gradient, *_gradients([*saved, gradient], epsilon, implementation)


_add_rms_norm.defvjp(_add_forward, _add_backward)


def _norm(inputs: Sequence[Array], epsilon: float, dtype: DTypeLike, implementation: Implementation | None) -> Array:
    xla = functools.partial(_norm_xla, epsilon=epsilon, dtype=dtype)

    def kernel(interpret: bool):
        return functools.partial(_norm_kernel, epsilon=epsilon, dtype=dtype, interpret=interpret)

    return dispatch("rms_norm", _refusal(inputs), implementation, *inputs, xla=xla, kernel=kernel, optional=True)


def _gradients(inputs: Sequence[Array], epsilon: float, implementation: Implementation | None) -> tuple[Array, Array]:
    """The gradients of the rows and of the scale."""
    xla = functools.partial(_gradients_xla, epsilon=epsilon)

    def kernel(interpret: bool):
        return functools.partial(_gradients_kernel, epsilon=epsilon, interpret=interpret)

    return dispatch("rms_norm", _refusal(inputs), implementation, *inputs, xla=xla, kernel=kernel, optional=True)


def _refusal(inputs: Sequence[Array]) -> str | None:
    rows, _, *others = inputs
    if rows.shape[-1] > MAX_DIM:
        return f"rows of {rows.shape[-1]} values are wider than {MAX_DIM}"
    return next(filter(None, (refusal(rows.shape[-1], one.dtype) for one in (rows, *others))), None)


def _norm_xla(rows: Array, scale: Array, residual: Array | None = None, *, epsilon: float, dtype: DTypeLike) -> Array:
    norms = unit_rms(rows, epsilon) * scale
    return (norms if residual is None else norms + residual.astype(jnp.float32)).astype(dtype)


def _gradients_xla(
    rows: Array, scale: Array, gradient: Array, residual: Array | None = None, *, epsilon: float
) -> tuple[Array, Array]:
    r"""With $u = x/r$ and $r = \sqrt{\mathrm{mean}(x^2) + \epsilon}$: $\partial x = (s g - u\,\mathrm{mean}(s g u))/r$, and
    that of the residual; $\partial s = \sum g u$."""
    x, gradient = rows.astype(jnp.float32), gradient.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon)
    unit, scaled = x * inverse, gradient * scale
    change = inverse * (scaled - unit * jnp.mean(scaled * unit, axis=-1, keepdims=True))
    if residual is not None:
        change = change + residual.astype(jnp.float32)
    return change.astype(rows.dtype), jnp.sum(gradient * unit, axis=range(rows.ndim - 1))


def _norm_kernel(
    rows: Array, scale: Array, residual: Array | None = None, *, epsilon: float, dtype: DTypeLike, interpret: bool
) -> Array:
    from jax.experimental import pallas as pl

    dim = rows.shape[-1]
    inputs = [rows.reshape(-1, dim), scale, *([] if residual is None else [residual.reshape(-1, dim)])]
    count = inputs[0].shape[0]

    def body(rows_ref, scale_ref, *refs):
        first, factor = jax.lax.axis_index("x") * ROWS, scale_ref[:]

        def write(i, carry):
            x = rows_ref[first + i, :].astype(jnp.float32)
            out = x * jax.lax.rsqrt(jnp.sum(x * x) / dim + epsilon) * factor
            if residual is not None:
                out = out + refs[0][first + i, :].astype(jnp.float32)
            refs[-1][first + i, :] = out.astype(dtype)
            return carry

        jax.lax.fori_loop(0, jnp.minimum(count - first, ROWS), write, 0)

    out = jax.ShapeDtypeStruct((count, dim), dtype)
    [norms] = declare(body, [out], (pl.cdiv(count, ROWS),), interpret=interpret)(*inputs)
    return norms.reshape(rows.shape)


def _gradients_kernel(
    rows: Array, scale: Array, gradient: Array, residual: Array | None = None, *, epsilon: float, interpret: bool
) -> tuple[Array, Array]:
    from jax.experimental import pallas as pl

    dim = rows.shape[-1]
    wide = [part.reshape(-1, dim) for part in (rows, gradient, residual) if part is not None]
    count = wide[0].shape[0]
    programs = pl.cdiv(count, ROWS)

    def body(scale_ref, rows_ref, gradient_ref, *refs):
        program, factor = jax.lax.axis_index("x"), scale_ref[:]
        first = program * ROWS

        def write(i, total):
            x, g = (ref[first + i, :].astype(jnp.float32) for ref in (rows_ref, gradient_ref))
            inverse = jax.lax.rsqrt(jnp.sum(x * x) / dim + epsilon)
            unit, scaled = x * inverse, g * factor
            change = inverse * (scaled - unit * (jnp.sum(scaled * unit) / dim))
            if residual is not None:
                change = change + refs[0][first + i, :].astype(jnp.float32)
            refs[-2][first + i, :] = change.astype(rows.dtype)
            return total + g * unit

        size = jnp.minimum(count - first, ROWS)
        refs[-1][program, :] = jax.lax.fori_loop(0, size, write, jnp.zeros((dim,), jnp.float32))

    out = jax.ShapeDtypeStruct((count, dim), rows.dtype), jax.ShapeDtypeStruct((programs, dim), jnp.float32)
    changes, sums = declare(body, out, (programs,), interpret=interpret)(scale, *wide)
    return changes.reshape(rows.shape), jnp.sum(sums, axis=0)
