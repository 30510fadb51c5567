"""Parameters that lie in parts on several devices, put together where they are used (fully sharded data parallelism)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import equinox as eqx
import jax
from jaxtyping import Array, PyTree, Shaped

from estimators.base import has_gradient
from estimators.sharding import batch_axes

Tree = TypeVar("Tree", bound=PyTree)

OF_WEIGHTS = frozenset({"all_gather", "convert_element_type", "transpose", "reshape", "pcast", "pvary"})
"""Operations whose results may be weights, and are cheap to compute again if they are not."""


Division = tuple[int, tuple[str, ...]] | None
"""The axis of a leaf that is divided, and the axes of the mesh over which it is; None for a leaf that every device has whole."""


def whole_leaf(part: Shaped[Array, "*shape"], division: Division) -> Shaped[Array, "*whole"]:
    """A leaf from the `part` of it that this device holds.

    The backward pass adds up the gradients of all devices that share the batch, and leaves each its part: a reduce-scatter over
    the axes of the division and a sum of the parts over the others, or for a whole leaf one sum.
    """
    axis, names = (0, ()) if division is None else division
    # Before the gathering, so that the sum comes after the scattering: of a part, not of the whole.
    same = tuple(name for name in batch_axes() if name not in names)
    part = jax.lax.pcast(part, same, to="varying") if same else part
    return jax.lax.all_gather(part, names, axis=axis, tiled=True) if names else part


def gathered(tree: Tree, divisions: Sequence[Division]) -> Tree:
    """A tree of modules with its parameters whole. `divisions`: that of each of its leaves that has a gradient, in order."""
    params, static = eqx.partition(tree, has_gradient)
    parts, structure = jax.tree.flatten(params)
    whole = [whole_leaf(part, division) for part, division in zip(parts, divisions, strict=True)]
    return eqx.combine(jax.tree.unflatten(structure, whole), static)


def keeps_activations(primitive: jax.extend.core.Primitive, *_: object, **__: object) -> bool:
    """A policy for `jax.checkpoint`: whole weights are not stored for the backward pass, everything else is."""
    return primitive.name not in OF_WEIGHTS
