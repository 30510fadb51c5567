"""Parameters that lie in parts on several devices, put together where they are used (fully sharded data parallelism)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import equinox as eqx
import jax
from jaxtyping import Array, PyTree, Shaped

from estimators.base import has_gradient
from estimators.sharding import FSDP, batch_axes

Tree = TypeVar("Tree", bound=PyTree)

OF_WEIGHTS = frozenset({"all_gather", "convert_element_type", "transpose", "reshape", "pcast", "pvary"})
"""Operations whose results may be weights, and are cheap to compute again if they are not."""


def whole_leaf(part: Shaped[Array, "*shape"], axis: int | None) -> Shaped[Array, "*whole"]:
    """A leaf from the `part` of it that each device along `FSDP` holds, divided along `axis`; None: it is whole.

    The backward pass adds up the gradients of all devices that share the batch, and leaves each its part: a reduce-scatter along
    `FSDP` and a sum of the parts along the other axes, or for a whole leaf one sum.
    """
    # Before the gathering, so that the sum comes after the scattering: of a part, not of the whole.
    same = tuple(name for name in batch_axes() if axis is None or name != FSDP)
    part = jax.lax.pcast(part, same, to="varying") if same else part
    return part if axis is None else jax.lax.all_gather(part, FSDP, axis=axis, tiled=True)


def gathered(tree: Tree, axes: Sequence[int | None]) -> Tree:
    """A tree of modules with its parameters whole. `axes`: of each of its leaves that has a gradient, in order, the axis that is
    divided; None for one that is whole."""
    params, static = eqx.partition(tree, has_gradient)
    parts, structure = jax.tree.flatten(params)
    whole = [whole_leaf(part, axis) for part, axis in zip(parts, axes, strict=True)]
    return eqx.combine(jax.tree.unflatten(structure, whole), static)


def keeps_activations(primitive: jax.extend.core.Primitive, *_: object, **__: object) -> bool:
    """A policy for `jax.checkpoint`: whole weights are not stored for the backward pass, everything else is."""
    return primitive.name not in OF_WEIGHTS
