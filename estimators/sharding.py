"""Batches that are divided over devices, and values that take part in a `jax.shard_map`.

Inside a `jax.shard_map` over `BATCH_AXES`, such as a training step on a mesh, every device holds some sequences of the batch.
What is said of a batch in this library is then true of the batch of all devices: sums, means and maxima over sequences go
through `batch_sum` and `batch_max`, and random numbers are those of the whole batch. Over axes of other names, and outside, the
batch is what a function is given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Num, PRNGKeyArray, PyTree, Shaped

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
"""The axes of a training mesh: `data` and `fsdp` divide the sequences of a batch, `fsdp` also the parameters, `tensor` heads and
MLPs."""
BATCH_AXES = (DATA, FSDP)
"""The axes over which the sequences of a batch are divided, the outer one first."""

Sums = TypeVar("Sums", bound=PyTree[Array])


def batch_axes() -> tuple[str, ...]:
    """The axes over which the sequences of the batch are divided here."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return tuple(axis for axis in BATCH_AXES if axis in manual)


def batch_shards() -> int:
    """The number of devices that share the batch here."""
    return math.prod(jax.lax.axis_size(axis) for axis in batch_axes())


def batch_sum(sums: Sums) -> Sums:
    """Sums over the sequences of this device, summed over all devices that share the batch."""
    axes = batch_axes()
    return jax.lax.psum(sums, axes) if axes else sums


def batch_max(value: Num[Array, "*shape"]) -> Num[Array, "*shape"]:
    """The maximum over the sequences of this device, over all devices that share the batch."""
    axes = batch_axes()
    return jax.lax.pmax(value, axes) if axes else value


def other_shards_sum(sums: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The sum of the `sums` of the other devices that share the batch; without any, zeros.

    It is added up from theirs alone, since the sum over all less the own one would cancel next to a large own one.
    """
    axes = batch_axes()
    if not axes:
        return jnp.zeros_like(sums)
    others = jnp.arange(batch_shards()) != jax.lax.axis_index(axes)
    everybody = jax.lax.all_gather(sums, axes)
    return jnp.sum(jnp.where(others.reshape(-1, *[1] * sums.ndim), everybody, 0.0), axis=0)


def batch_uniform(key: PRNGKeyArray, shape: Sequence[int]) -> Float[Array, "batch ..."]:
    """Uniform numbers of `shape`, whose first axis is the batch: those that one device with the whole batch would draw for the
    same sequences."""
    batch, *rest = shape
    drawn = jax.random.uniform(key, (batch * batch_shards(), *rest), jnp.float32)
    return own_rows(drawn, batch)


def own_rows(whole: Shaped[Array, "all ..."], batch: int) -> Shaped[Array, "batch ..."]:
    """Of an array with a row for each sequence of the whole batch, the `batch` rows of this device."""
    axes = batch_axes()
    return jax.lax.dynamic_slice_in_dim(whole, jax.lax.axis_index(axes) * batch, batch) if axes else whole


def varying_like(value: Array, like: Array) -> Array:
    """`value`, varying over the mesh axes that `like` varies over: itself outside of `jax.shard_map`.

    Inside `jax.shard_map` a loop's initial carry must vary as its results do, and a kernel's output as its inputs. The choice
    between two equal arrays says so in every version of JAX; the compiler removes it.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return value
    return jnp.where(like[(0,) * like.ndim] > 0, value, value)


def varying_zeros(like: Array, shape: Sequence[int], dtype: DTypeLike) -> Array:
    """Zeros that vary as `like` does."""
    return varying_like(jnp.zeros(shape, dtype), like)
