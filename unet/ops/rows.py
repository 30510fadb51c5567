"""Gathering rows by index, and summing spans of neighbouring rows.

Each is the other's backward pass. So gradients are float32 sums, in a fixed order in the kernels and on a CPU, in no fixed order
in XLA on a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from unet.ops.mosaic import LANES, Implementation, declare, dispatch, refusal


def gather_rows(
    values: Float[Array, "batch rows dim"],
    index: Int[Array, "batch length"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "batch length dim"]:
    """Row `index[b, i]` of sequence b; zeros for a negative index. No gradient is defined: see `spread_rows`.

    Indices past the last row read the last row. Raises `ValueError` if a kernel requested by name cannot run.
    """
    refused = refusal(values.shape[2], values.dtype)
    return dispatch("gather_rows", refused, implementation, values, index, xla=_gather_xla, kernel=_gather_kernel)


def sum_spans(
    values: Float[Array, "batch length dim"],
    bounds: Int[Array, "batch edges"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "batch spans dim"]:
    r"""$S_m = \sum_{l = b_m}^{b_{m+1} - 1} X_l$ in float32, rounded once at the end; `bounds` must not decrease.

    Raises `ValueError` if a kernel requested by name cannot run.
    """
    refused = refusal(values.shape[2], values.dtype)
    return dispatch("sum_spans", refused, implementation, values, bounds, xla=_sum_xla, kernel=_sum_kernel)


Move = Callable[
    [Float[Array, "batch _ dim"], Int[Array, "batch _"], Int[Array, "batch _"], Implementation | None],
    Float[Array, "batch _ dim"],
]
"""`(values, where, back, implementation)`: `where` indexes the forward pass, `back` the backward pass."""


def _with_gradient(forward: Callable[..., Array], backward: Callable[..., Array]) -> Move:
    """`forward` of the index `where`, whose gradient is `backward` of the index `back`."""

    @functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
    def by_hand(values: Array, where: Array, back: Array, implementation: Implementation | None) -> Array:
        return forward(values, where, implementation=implementation)

    def value(values: Array, where: Array, back: Array, implementation: Implementation | None) -> tuple[Array, Array]:
        return by_hand(values, where, back, implementation), back

    def gradient(implementation: Implementation | None, back: Array, cotangent: Array) -> tuple[Array, None, None]:
        return backward(cotangent, back, implementation=implementation), None, None

    by_hand.defvjp(value, gradient)

    def move(values: Array, where: Array, back: Array, implementation: Implementation | None) -> Array:
        if implementation == "native":
            return forward(values, where, implementation=implementation)
        return by_hand(values, where, back, implementation)

    return move


spread_rows = _with_gradient(gather_rows, sum_spans)
"""`gather_rows` with an index that never decreases; `back` is its `bounds_of`."""

pick_rows = _with_gradient(gather_rows, gather_rows)
"""`gather_rows` with an index that takes no row twice; `back` is the inverse, -1 for rows not taken."""

pool_rows = _with_gradient(sum_spans, gather_rows)
"""`sum_spans`; `back` is the span of each row, -1 for none."""


def bounds_of(index: Int[Array, "batch length"], rows: int) -> Int[Array, "batch edges"]:
    """For an index that never decreases: where each of the values 0 … `rows` - 1 begins in it, and where the last one ends.
    Negative values come before the first bound."""
    counts = add_at(index + 1, jnp.ones(index.shape, jnp.int32), rows + 1)
    return jnp.cumsum(counts, axis=1)


def add_at(
    index: Int[Array, "batch length"], values: Shaped[Array, "batch length *rest"], rows: int
) -> Shaped[Array, "batch rows *rest"]:
    """`rows` sums for each sequence: the sum of the `values` with each `index`; indices past the end are dropped."""

    def add(index: Array, values: Array) -> Array:
        return jnp.zeros((rows, *values.shape[1:]), values.dtype).at[index].add(values, mode="drop")

    # `vmap` over the batch lets XLA see that devices with different sequences need no communication.
    return jax.vmap(add)(index, values)


def _gather_xla(values: Array, index: Array) -> Array:
    rows = jnp.take_along_axis(values, jnp.maximum(index, 0)[..., None], axis=1, mode="clip")
    return jnp.where(index[..., None] >= 0, rows, jnp.zeros((), values.dtype))


def _sum_xla(values: Array, bounds: Array) -> Array:
    length, spans = values.shape[1], bounds.shape[1] - 1
    edges = add_at(bounds, jnp.ones(bounds.shape, jnp.int32), length + 1)
    # Rows before the first bound have -1, rows past the last one are out of range; both are dropped.
    span = jnp.cumsum(edges[:, :length], axis=1) - 1
    span = jnp.where(span < 0, spans, span)
    return add_at(span, values.astype(jnp.float32), spans).astype(values.dtype)


def _gather_kernel(interpret: bool):
    def run(values: Array, index: Array) -> Array:
        from jax.experimental import pallas as pl

        batch, rows, dim = values.shape
        length = index.shape[1]

        def body(values_ref, index_ref, out_ref):
            b, i = jax.lax.axis_index("x"), jax.lax.axis_index("y")
            row = index_ref[b, i]
            clipped = jnp.minimum(row, rows - 1)
            for column in range(0, dim, LANES):
                lanes = pl.ds(column, LANES)

                @pl.when(row >= 0)
                def _(lanes=lanes):
                    out_ref[b, i, lanes] = values_ref[b, clipped, lanes]

                @pl.when(row < 0)
                def _(lanes=lanes):
                    out_ref[b, i, lanes] = jnp.zeros((LANES,), values.dtype)

        out = jax.ShapeDtypeStruct((batch, length, dim), values.dtype)
        return declare(body, [out], (batch, length), interpret=interpret)(values, index)[0]

    return run


def _sum_kernel(interpret: bool):
    def run(values: Array, bounds: Array) -> Array:
        from jax.experimental import pallas as pl

        batch, length, dim = values.shape
        spans = bounds.shape[1] - 1

        def body(values_ref, bounds_ref, out_ref):
            # CUDA limits every axis of a grid but the last one to 65535.
            b, m = jax.lax.axis_index("x"), jax.lax.axis_index("z")
            lanes = pl.ds(jax.lax.axis_index("y") * LANES, LANES)

            first = bounds_ref[b, m]

            def add(i, total):
                return total + values_ref[b, first + i, lanes].astype(jnp.float32)

            # From 0: inside `jax.shard_map` a loop's first number may not vary over devices.
            count = jnp.minimum(bounds_ref[b, m + 1], length) - first
            total = jax.lax.fori_loop(0, count, add, jnp.zeros((LANES,), jnp.float32))
            out_ref[b, m, lanes] = total.astype(values.dtype)

        out = jax.ShapeDtypeStruct((batch, spans, dim), values.dtype)
        return declare(body, [out], (batch, dim // LANES, spans), interpret=interpret)(values, bounds)[0]

    return run
