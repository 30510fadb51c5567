"""Batches whose rows are computed on all devices of this machine.

What a model makes of a text depends on no other text of its batch. So each device computes some of the rows, with the whole
model, and nothing is exchanged between them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Concatenate, Literal, ParamSpec, TypeVar

import equinox as eqx
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from estimators.sharding import DATA

Tree = TypeVar("Tree", bound=PyTree)
Model = TypeVar("Model", bound=PyTree)
Result = TypeVar("Result", bound=PyTree)
Parameters = ParamSpec("Parameters")


@dataclass(frozen=True)
class LocalDevices:
    """Devices that share the rows of a batch, each as many; `mesh` is None where one device computes all."""

    mesh: Mesh | None

    @classmethod
    def of(cls, rows: int, devices: Sequence[jax.Device] | None = None) -> LocalDevices:
        """As many of `devices` (None: those of this process) as divide `rows` into equal parts."""
        available = jax.local_devices() if devices is None else devices
        count = max((one for one in range(1, len(available) + 1) if rows % one == 0 and one <= rows), default=1)
        return cls(Mesh(np.asarray(available[:count]), (DATA,), axis_types=(AxisType.Auto,)) if count > 1 else None)

    def rows(self, arrays: Tree) -> Tree:
        """A tree of arrays that have a row for each row of the batch, on the devices that compute them."""
        return arrays if self.mesh is None else jax.device_put(arrays, NamedSharding(self.mesh, PartitionSpec(DATA)))

    def everywhere(self, tree: Tree) -> Tree:
        """A tree, such as a model, of which each device has all arrays."""
        if self.mesh is None:
            return tree
        arrays, rest = eqx.partition(tree, eqx.is_array)
        return eqx.combine(jax.device_put(arrays, NamedSharding(self.mesh, PartitionSpec())), rest)


def by_row(
    function: Callable[Concatenate[Model, Parameters], Result],
    *,
    donate: Literal["none", "all-except-first"] = "none",
) -> Callable[Concatenate[Model, Parameters], Result]:
    """`function` compiled, as by `equinox.filter_jit`. Its first argument is a model, or a module that holds one. Every other
    array has a row for each row of the batch, but single numbers and keys, which are the same for all; so has every array of its
    result. Where rows lie on `LocalDevices`, each device computes its own."""
    compiled = eqx.filter_jit(function, donate=donate)

    @eqx.filter_jit(donate=donate)
    def divided(whole: tuple[Mesh, Model], *arguments: Parameters.args, **named: Parameters.kwargs) -> Result:
        mesh, model = whole
        arrays, rest = eqx.partition((model, arguments), eqx.is_array)

        def own(*parts: PyTree) -> Result:
            own_model, own_arguments = eqx.combine(parts, rest)
            return function(own_model, *own_arguments, **named)

        specs = PartitionSpec(), jax.tree.map(lambda array: PartitionSpec(*[DATA] * (array.ndim > 0)), arrays[1])
        # No collectives and no gradients are inside, so nothing has to be known of what varies over the devices.
        return jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(DATA), check_vma=False)(*arrays)

    @functools.wraps(function)
    def run(model: Model, *arguments: Parameters.args, **named: Parameters.kwargs) -> Result:
        mesh = _mesh_of(arguments)
        if mesh is None:
            return compiled(model, *arguments, **named)
        return divided((mesh, model), *arguments, **named)

    return run


def _mesh_of(rows: PyTree) -> Mesh | None:
    """The mesh that rows are divided over; None where they lie on one device."""
    for leaf in jax.tree.leaves(rows):
        sharding = leaf.sharding if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) else None
        if isinstance(sharding, NamedSharding) and sharding.spec and sharding.spec[0] == DATA:
            return sharding.mesh if isinstance(sharding.mesh, Mesh) else None
    return None
