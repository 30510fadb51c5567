"""A program that is compiled for several sizes and chooses between them while it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

Operands = TypeVar("Operands", bound=PyTree)
Aside = TypeVar("Aside", bound=PyTree[Array])

Sized = Callable[[Operands], tuple[Float[Array, ""], Aside]]
"""A scalar to differentiate, and arrays beside it whose shapes do not depend on the size."""


def smallest_with_room(needed: Int[Array, ""], sizes: Sequence[int]) -> Int[Array, ""]:
    """The number of the first of the ascending `sizes` that is at least `needed`; the last where none is."""
    return jnp.sum(needed > jnp.asarray(sizes[:-1], jnp.int32), dtype=jnp.int32)


def chosen(which: Int[Array, ""], ways: Sequence[Sized[Operands, Aside]], operands: Operands) -> tuple[Array, Aside]:
    """`ways[which](operands)`, differentiable once in the first of its two values.

    Differentiated, each way computes its value and its gradient in one go. So nothing has to be kept from one to the other,
    which `lax.switch` alone would keep for all ways at once, whichever was chosen, or compute a second time.
    """
    if len(ways) == 1:
        return ways[0](operands)
    dynamic, static = eqx.partition(operands, eqx.is_array)
    moving, fixed = eqx.partition(dynamic, eqx.is_inexact_array)

    def value_of(way: Sized[Operands, Aside]):
        return lambda moving, fixed: way(eqx.combine(moving, fixed, static))

    def gradient_of(way: Sized[Operands, Aside]):
        return jax.value_and_grad(value_of(way), has_aux=True)

    @jax.custom_vjp
    def run(which: Int[Array, ""], moving: Operands, fixed: Operands) -> tuple[Array, Aside]:
        return jax.lax.switch(which, [value_of(way) for way in ways], moving, fixed)

    def forward(which: Int[Array, ""], moving: Operands, fixed: Operands):
        return jax.lax.switch(which, [gradient_of(way) for way in ways], moving, fixed)

    def backward(gradient: Operands, cotangents: tuple[Array, Aside]):
        scaled = jax.tree.map(lambda leaf: leaf * cotangents[0].astype(leaf.dtype), gradient)
        return None, scaled, None

    run.defvjp(forward, backward)
    return run(which, moving, fixed)
