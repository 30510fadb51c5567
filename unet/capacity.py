"""Choosing between several capacities of the token level at run time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

Operands = TypeVar("Operands", bound=PyTree)
Aside = TypeVar("Aside", bound=PyTree[Array])

Branch = Callable[[Operands], tuple[Float[Array, ""], Aside]]
"""Returns a scalar to differentiate, and auxiliary arrays whose shapes do not depend on the capacity."""


def smallest_with_room(needed: Int[Array, ""], capacities: Sequence[int]) -> Int[Array, ""]:
    """The index of the first of the ascending `capacities` that is at least `needed`, or of the last if none is."""
    return jnp.sum(needed > jnp.asarray(capacities[:-1], jnp.int32), dtype=jnp.int32)


def switch_with_gradient(
    which: Int[Array, ""], branches: Sequence[Branch[Operands, Aside]], operands: Operands
) -> tuple[Array, Aside]:
    """`branches[which](operands)`: a scalar to differentiate, and auxiliary arrays.

    With several branches there is no forward mode: each branch computes its gradient immediately, so residuals of
    branches not taken are never stored, as `lax.switch` alone would store them; the auxiliary arrays then carry no gradient. A
    single branch is called directly.
    """
    if len(branches) == 1:
        return branches[0](operands)
    dynamic, static = eqx.partition(operands, eqx.is_array)
    moving, fixed = eqx.partition(dynamic, eqx.is_inexact_array)

    def value_of(branch: Branch[Operands, Aside]):
        return lambda moving, fixed: branch(eqx.combine(moving, fixed, static))

    def gradient_of(branch: Branch[Operands, Aside]):
        return jax.value_and_grad(value_of(branch), has_aux=True)

    @jax.custom_vjp
    def run(which: Int[Array, ""], moving: Operands, fixed: Operands) -> tuple[Array, Aside]:
        return jax.lax.switch(which, [value_of(branch) for branch in branches], moving, fixed)

    def forward(which: Int[Array, ""], moving: Operands, fixed: Operands):
        return jax.lax.switch(which, [gradient_of(branch) for branch in branches], moving, fixed)

    def backward(gradient: Operands, cotangents: tuple[Array, Aside]):
        scaled = jax.tree.map(lambda leaf: leaf * cotangents[0].astype(leaf.dtype), gradient)
        return None, scaled, None

    run.defvjp(forward, backward)
    return run(which, moving, fixed)
