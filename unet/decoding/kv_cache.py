"""KV caches of attention layers for decoding."""

from __future__ import annotations

from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from estimators.decode_state import AbstractDecodeState
from estimators.equations import soft_cap

MIN_SLICED_SLOTS = 128
"""Slots from which on a token-level cache is worth compiling programs that read only its filled part."""


class KVUpdate(eqx.Module):
    """Keys and values of new positions."""

    keys: Float[Array, "batch length heads head_dim"]
    values: Float[Array, "batch length heads head_dim"]


class KVCache(AbstractDecodeState):
    """Keys and values of earlier positions. Without a `window`, position p is in slot p. With one, only the last `window`
    positions are kept, position p in slot p modulo `window`.

    Sequences advance independently: `lengths` counts the positions of each. Keys are stored with their rotary embedding, so the
    order of slots does not matter. A cache without slots is empty; its first update allocates one slot for each new position
    (`window` slots if there is a window).
    """

    keys: Float[Array, "batch heads slots head_dim"]
    values: Float[Array, "batch heads slots head_dim"]
    lengths: Int[Array, " batch"]
    window: int | None = eqx.field(static=True)

    @classmethod
    def empty(cls, batch: int, heads: int, head_dim: int, window: int | None) -> KVCache:
        """The cache before the first position."""
        none = jnp.zeros((batch, heads, 0, head_dim), jnp.float32)
        return cls(none, none, jnp.zeros((batch,), jnp.int32), window)

    @property
    def slots(self) -> int:
        return self.keys.shape[2]

    def visible(self, length: int) -> Bool[Array, "batch length slots"]:
        """The slots that each of the next `length` positions sees."""
        slot = jnp.arange(self.slots, dtype=jnp.int32)
        if self.window is None:
            seen = slot < self.lengths[:, None]
            return jnp.broadcast_to(seen[:, None], (seen.shape[0], length, self.slots))
        position = _position_in(slot, self.lengths, self.window)
        here = self.lengths[:, None] + jnp.arange(length, dtype=jnp.int32)
        return (position >= 0)[:, None] & (here[..., None] - position[:, None] < self.window)

    def updated(self, update: KVUpdate, lengths: Int[Array, " batch"]) -> KVCache:
        """Positions beyond the last slot are not stored."""
        if not self.slots:
            keys, values = (jnp.swapaxes(part, 1, 2) for part in (update.keys, update.values))
            return _filled(keys, values, lengths.astype(jnp.int32), self.window)
        new = jnp.arange(update.keys.shape[1], dtype=jnp.int32)
        slot, written = self.lengths[:, None] + new, new < lengths[:, None]
        if self.window is not None:
            # If there are more new positions than slots, the last ones are kept.
            slot, written = slot % self.slots, written & (new >= lengths[:, None] - self.slots)
        slot = jnp.where(written, slot, self.slots)
        sequence = jnp.arange(self.lengths.shape[0])[:, None]

        def put(kept: Array, new: Array) -> Array:
            return kept.at[sequence, :, slot].set(new.astype(kept.dtype), mode="drop")

        return KVCache(
            put(self.keys, update.keys),
            put(self.values, update.values),
            self.lengths + lengths.astype(jnp.int32),
            self.window,
        )

    def with_slots(self, slots: int) -> KVCache:
        """Grown to at least `slots` slots; a windowed cache never needs to grow."""
        more = 0 if self.window is not None else max(0, slots - self.slots)
        if not more:
            return self
        keys, values = (jnp.pad(part, ((0, 0), (0, 0), (0, more), (0, 0))) for part in (self.keys, self.values))
        return KVCache(keys, values, self.lengths, self.window)


class KVCacheView(eqx.Module):
    """The first `slots` slots of the `chosen` sequences of a `cache`, copied only where they are read.

    There is room for one more position of each as long as none of them has `slots` positions or more.
    """

    cache: KVCache
    chosen: Int[Array, " some"]
    slots: int = eqx.field(static=True)

    @property
    def lengths(self) -> Int[Array, " some"]:
        return self.cache.lengths.at[self.chosen].get(mode="promise_in_bounds")

    @property
    def window(self) -> int | None:
        return self.cache.window

    def of(self, chosen: Int[Array, " fewer"], slots: int) -> KVCacheView:
        """The first `slots` slots of some of these sequences."""
        return KVCacheView(self.cache, self.chosen.at[chosen].get(mode="promise_in_bounds"), slots)

    def copied(self) -> KVCache:
        """A copy, as a cache of these sequences alone."""

        def some(kept: Float[Array, "batch heads slots head_dim"]) -> Float[Array, "some heads first head_dim"]:
            size = (1, kept.shape[1], self.slots, kept.shape[3])
            return jax.vmap(lambda one: jax.lax.dynamic_slice(kept, (one, 0, 0, 0), size)[0])(self.chosen)

        return KVCache(some(self.cache.keys), some(self.cache.values), self.lengths, self.window)


AnyCache = KVCache | KVCacheView

Tree = TypeVar("Tree", bound=PyTree[Array])


def attend_cached(
    query: Float[Array, "batch length heads head_dim"],
    new: KVUpdate,
    cache: AnyCache,
    mask: Bool[Array, "batch length"],
    *,
    cap: float | None,
) -> Float[Array, "batch length heads head_dim"]:
    r"""$\mathrm{softmax}\big(c\tanh(qk^\top/(c\sqrt{d}))\big)v$ over the cache and the `new` positions, causal; see `attend`.

    The result is NaN at positions of the `mask` for which a cache without a window has no slot left. Padding stays finite, since
    a NaN among the values would reach every position.
    """
    cache = cache.copied() if isinstance(cache, KVCacheView) else cache
    length = query.shape[1]
    # Heads first, so that a CPU multiplies whole matrices without transposing the cache.
    query, keys, values = (jnp.swapaxes(part, 1, 2) for part in (query, new.keys, new.values))
    query = query * jnp.asarray(query.shape[-1] ** -0.5, query.dtype)
    before = jnp.matmul(query, jnp.swapaxes(cache.keys, -1, -2), preferred_element_type=jnp.float32)
    among = jnp.matmul(query, jnp.swapaxes(keys, -1, -2), preferred_element_type=jnp.float32)
    logits = soft_cap(jnp.concatenate([before, among], axis=-1), cap)
    distance = jnp.arange(length)[:, None] - jnp.arange(length)
    causal = (distance >= 0) & (True if cache.window is None else distance < cache.window)
    causal = jnp.broadcast_to(causal, (query.shape[0], length, length))
    visible = jnp.concatenate([cache.visible(length), causal], axis=-1)
    weights = jax.nn.softmax(jnp.where(visible[:, None], logits, -jnp.inf), axis=-1).astype(values.dtype)
    mixed = jnp.matmul(weights[..., : cache.slots], cache.values) + jnp.matmul(weights[..., cache.slots :], values)
    if cache.window is None:
        place = cache.lengths[:, None] + jnp.arange(length, dtype=jnp.int32)
        lost = mask & (place >= cache.slots)
        mixed = jnp.where(lost[:, None, :, None], jnp.asarray(jnp.nan, mixed.dtype), mixed)
    return jnp.swapaxes(mixed, 1, 2)


def is_unallocated(state: PyTree[Array]) -> bool:
    """Whether a KV cache inside has no slots yet: there are no earlier positions, and the first update changes shapes. False for
    a state without KV caches, such as that of Mamba-2 layers, whose shapes never change."""
    return any(not part.slots for part in _caches(state))


def select_sequences(state: Tree, chosen: Int[Array, " some"], quarters: int = 4) -> Tree:
    """The `chosen` sequences of a tree of batch-major arrays, for reading. Each KV cache without a window becomes a view of the
    first `quarters`/4 of its slots (see `KVCacheView`), each windowed one a view of all."""

    def some(part: Array | AnyCache) -> Array | KVCacheView:
        if not isinstance(part, AnyCache):
            return part.at[chosen].get(mode="promise_in_bounds")
        slots = part.slots if part.window is not None else _slots(part, quarters)
        return KVCacheView(part, chosen, slots) if isinstance(part, KVCache) else part.of(chosen, slots)

    return jax.tree.map(some, state, is_leaf=_is_cache)


def filled_quarters(state: PyTree[Array], chosen: Int[Array, " some"]) -> Int[Array, ""]:
    """The fewest quarters of the slots in which every cache inside has room for one more position of each chosen sequence; 4 if
    three are not enough."""
    most = jnp.ones((), jnp.int32)
    for part in _caches(state):
        if part.window is None:
            needed = 1 + jnp.max(part.lengths.at[chosen].get(mode="promise_in_bounds"))
            fewer = jnp.asarray([_slots(part, quarters) for quarters in (1, 2, 3)], jnp.int32)
            most = jnp.maximum(most, 1 + jnp.sum(needed > fewer, dtype=jnp.int32))
    return most


def most_slots(state: PyTree[Array]) -> int:
    """Slots of the largest cache inside without a window; 0 if there is none."""
    return max((part.slots for part in _caches(state) if part.window is None), default=0)


def with_room(state: Tree, positions: int) -> Tree:
    """Grow all caches inside until every sequence has room for `positions` more; returns `state` itself if no cache must grow.

    Slots are rounded up (see `rounded_up`), so that few compiled programs serve all lengths. Lengths are read on the host, so
    this cannot run under `jit`.
    """

    def needed(part: AnyCache) -> int:
        return 0 if part.window is not None else int(np.max(np.asarray(part.lengths))) + positions

    def widened(part: Array | AnyCache) -> Array | AnyCache:
        return part.with_slots(rounded_up(needed(part))) if isinstance(part, KVCache) else part

    if all(needed(part) <= part.slots for part in _caches(state)):
        return state
    return jax.tree.map(widened, state, is_leaf=_is_cache)


def rounded_up(size: int) -> int:
    """`size` rounded up to a multiple of a quarter of a power of two, the largest one below it; at least 16."""
    quarter = max(4, 1 << max(0, (size - 1).bit_length() - 3))
    return max(16, -(-size // quarter) * quarter)


def cache_bytes(state: PyTree[Array]) -> int:
    """Bytes of all cached keys and values."""
    return sum(part.keys.nbytes + part.values.nbytes for part in _caches(state) if isinstance(part, KVCache))


def _slots(part: AnyCache, quarters: int) -> int:
    return -(-part.slots * quarters // 4)


def _is_cache(part: object) -> bool:
    return isinstance(part, AnyCache)


def _caches(state: PyTree[Array]) -> list[AnyCache]:
    return [part for part in jax.tree.leaves(state, is_leaf=_is_cache) if isinstance(part, AnyCache)]


def _position_in(slot: Int[Array, " slots"], lengths: Int[Array, " batch"], window: int) -> Int[Array, "batch slots"]:
    """The last position before `lengths` that is stored in each slot; negative if there is none."""
    return slot + (lengths[:, None] - 1 - slot) // window * window


def _filled(
    keys: Float[Array, "batch heads length head_dim"],
    values: Float[Array, "batch heads length head_dim"],
    lengths: Int[Array, " batch"],
    window: int | None,
) -> KVCache:
    """A new cache with the first `lengths` positions of each sequence."""
    if window is None:
        return KVCache(keys, values, lengths, None)
    position = _position_in(jnp.arange(window, dtype=jnp.int32), lengths, window)

    def last(kept: Array) -> Array:
        found = jnp.take_along_axis(kept, jnp.maximum(position, 0)[:, None, :, None], axis=2, mode="clip")
        return jnp.where((position >= 0)[:, None, :, None], found, jnp.zeros((), kept.dtype))

    return KVCache(last(keys), last(values), lengths, window)
