"""Decode state: what is kept of earlier positions, and how it is updated."""

from __future__ import annotations

from abc import abstractmethod
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree, Shaped

State = TypeVar("State", bound=PyTree[Array])


class AbstractDecodeState(eqx.Module):
    """Decode state with its own update rule; plain batch-major arrays use the default (see `update_state`)."""

    @abstractmethod
    def updated(self, update: PyTree[Array], lengths: Int[Array, " batch"]) -> AbstractDecodeState:
        """The state after `lengths` more positions of each sequence; a sequence with 0 keeps its state."""


def update_state(state: State, update: PyTree[Array], lengths: Int[Array, " batch"]) -> State:
    """The decode state after `lengths` more positions of each sequence.

    A forward pass reads `state` and returns an `update` of the same structure. An array is replaced by its update in sequences
    with new positions; an `AbstractDecodeState` applies its update itself. Since the forward pass writes nothing, a large KV
    cache can be updated in place, and for some sequences of a batch only.
    """
    some = lengths > 0

    def write(old: Array | AbstractDecodeState, new: PyTree[Array]) -> Array | AbstractDecodeState:
        if isinstance(old, AbstractDecodeState):
            return old.updated(new, lengths)
        return jnp.where(some.reshape(-1, *[1] * (old.ndim - 1)), new, old.astype(new.dtype))

    return jax.tree.map(write, state, update, is_leaf=lambda part: isinstance(part, AbstractDecodeState))


def last_positions(
    before: Shaped[Array, "batch kept *rest"], new: Shaped[Array, "batch length *rest"], lengths: Int[Array, " batch"]
) -> Shaped[Array, "batch kept *rest"]:
    """The decode state of a filter over a few positions: the last `kept` positions of each sequence, oldest first, after
    `lengths` of the `new` positions have followed those `before`."""
    both = jnp.concatenate([before.astype(new.dtype), new], axis=1)
    place = lengths[:, None] + jnp.arange(before.shape[1], dtype=jnp.int32)
    return jnp.take_along_axis(both, place.reshape(*place.shape, *[1] * (both.ndim - 2)), axis=1, mode="clip")
