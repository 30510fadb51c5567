"""Values that take part in the user's `jax.shard_map`."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike


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
