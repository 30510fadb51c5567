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
"""Slots from which on programs are compiled that read only the filled part of a token-level cache."""


FEW = 4
"""Sequences up to which caches are copied one by one: a CPU copies a slice as a block, and gathers value by value."""


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
        queries = self.lengths[:, None] + jnp.arange(length, dtype=jnp.int32)
        keys = _position_in(slot, self.lengths, self.window)
        return (keys >= 0)[:, None] & (queries[..., None] - keys[:, None] < self.window)

    def updated(self, update: KVUpdate, lengths: Int[Array, " batch"]) -> KVCache:
        """The cache with the first `lengths` new positions of each sequence; those beyond the last slot are not stored."""
        if not self.slots:
            keys, values = (jnp.swapaxes(part, 1, 2) for part in (update.keys, update.values))
            return _filled(keys, values, lengths.astype(jnp.int32), self.window)
        new = jnp.arange(update.keys.shape[1], dtype=jnp.int32)
        slot, stored = self.lengths[:, None] + new, new < lengths[:, None]
        if self.window is not None:
            # If there are more new positions than slots, the last ones are kept.
            slot, stored = slot % self.slots, stored & (new >= lengths[:, None] - self.slots)
        slot = jnp.where(stored, slot, self.slots)
        sequence = jnp.arange(self.lengths.shape[0])[:, None]

        def store(cached: Array, new: Array) -> Array:
            return cached.at[sequence, :, slot].set(new.astype(cached.dtype), mode="drop")

        return KVCache(
            store(self.keys, update.keys),
            store(self.values, update.values),
            self.lengths + lengths.astype(jnp.int32),
            self.window,
        )

    def with_slots(self, slots: int) -> KVCache:
        """The cache grown to at least `slots` slots; a windowed cache never needs to grow."""
        more = 0 if self.window is not None else max(0, slots - self.slots)
        if not more:
            return self
        keys, values = (jnp.pad(part, ((0, 0), (0, 0), (0, more), (0, 0))) for part in (self.keys, self.values))
        return KVCache(keys, values, self.lengths, self.window)


class KVCacheView(eqx.Module):
    """The first `slots` slots of the `chosen` sequences of a `cache`. Nothing is copied until it is read.

    `slots` must be greater than the length of each of these sequences: one more position must fit.
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

        def copy(part: Float[Array, "batch heads slots head_dim"]) -> Float[Array, "some heads first head_dim"]:
            size = (1, part.shape[1], self.slots, part.shape[3])
            if len(self.chosen) <= FEW:
                return jnp.concatenate([jax.lax.dynamic_slice(part, (one, 0, 0, 0), size) for one in self.chosen])
            return jax.vmap(lambda one: jax.lax.dynamic_slice(part, (one, 0, 0, 0), size)[0])(self.chosen)

        return KVCache(copy(self.cache.keys), copy(self.cache.values), self.lengths, self.window)


AnyCache = KVCache | KVCacheView

Tree = TypeVar("Tree", bound=PyTree[Array])


def attend_cached(
    query: Float[Array, "batch length query_heads head_dim"],
    new: KVUpdate,
    cache: AnyCache,
    mask: Bool[Array, "batch length"],
    *,
    cap: float | None,
) -> Float[Array, "batch length query_heads head_dim"]:
    r"""$\mathrm{softmax}\big(c\tanh(qk^\top/(c\sqrt{d}))\big)v$ over the cache and the `new` positions, causal; see `attend`.
    Adjacent heads of queries may share a head of keys and values.

    The result is NaN at positions of the `mask` for which a cache without a window has no slot left. Padding stays finite, since
    a NaN among the values would reach every position.
    """
    cache = cache.copied() if isinstance(cache, KVCacheView) else cache
    length = query.shape[1]
    # Heads first, so that a CPU multiplies whole matrices without transposing the cache.
    query, keys, values = (jnp.swapaxes(part, 1, 2) for part in (query, new.keys, new.values))
    query = query * jnp.asarray(query.shape[-1] ** -0.5, query.dtype)
    # The queries that share a head of keys stand below each other, so that nothing of the cache is repeated.
    shape, kv_heads = query.shape, keys.shape[1]
    query = query.reshape(shape[0], kv_heads, -1, shape[3])
    cached_logits = jnp.matmul(query, jnp.swapaxes(cache.keys, -1, -2), preferred_element_type=jnp.float32)
    new_logits = jnp.matmul(query, jnp.swapaxes(keys, -1, -2), preferred_element_type=jnp.float32)
    logits = soft_cap(jnp.concatenate([cached_logits, new_logits], axis=-1), cap)
    distance = jnp.arange(length)[:, None] - jnp.arange(length)
    causal = (distance >= 0) & (True if cache.window is None else distance < cache.window)
    causal = jnp.broadcast_to(causal, (query.shape[0], length, length))
    visible = jnp.concatenate([cache.visible(length), causal], axis=-1)
    visible = jnp.tile(visible, (1, shape[1] // kv_heads, 1))
    weights = jax.nn.softmax(jnp.where(visible[:, None], logits, -jnp.inf), axis=-1).astype(values.dtype)
    mixed = jnp.matmul(weights[..., : cache.slots], cache.values) + jnp.matmul(weights[..., cache.slots :], values)
    mixed = mixed.reshape(shape)
    if cache.window is None:
        positions = cache.lengths[:, None] + jnp.arange(length, dtype=jnp.int32)
        lost = mask & (positions >= cache.slots)
        mixed = jnp.where(lost[:, None, :, None], jnp.asarray(jnp.nan, mixed.dtype), mixed)
    return jnp.swapaxes(mixed, 1, 2)


def is_unallocated(state: PyTree[Array]) -> bool:
    """Whether a KV cache inside has no slots yet: there are no earlier positions, and the first update changes shapes. False for
    a state without KV caches, such as that of Mamba-2 layers, whose shapes never change."""
    return any(not part.slots for part in _caches(state))


def select_sequences(state: Tree, chosen: Int[Array, " some"], quarters: int = 4) -> Tree:
    """The `chosen` sequences of a tree of batch-major arrays, for reading. A KV cache becomes a view (see `KVCacheView`) of the
    first `quarters`/4 of its slots, or of all slots if it has a window."""

    def select(part: Array | AnyCache) -> Array | KVCacheView:
        if not isinstance(part, AnyCache):
            return part.at[chosen].get(mode="promise_in_bounds")
        slots = part.slots if part.window is not None else _slots(part, quarters)
        return KVCacheView(part, chosen, slots) if isinstance(part, KVCache) else part.of(chosen, slots)

    return jax.tree.map(select, state, is_leaf=_is_cache)


def filled_quarters(state: PyTree[Array], chosen: Int[Array, " some"]) -> Int[Array, ""]:
    """How many quarters of its slots the fullest cache needs for the chosen sequences and one more position of each: 1 to 4."""
    most = jnp.ones((), jnp.int32)
    for part in _caches(state):
        if part.window is None:
            needed = 1 + jnp.max(part.lengths.at[chosen].get(mode="promise_in_bounds"))
            sizes = jnp.asarray([_slots(part, quarters) for quarters in (1, 2, 3)], jnp.int32)
            most = jnp.maximum(most, 1 + jnp.sum(needed > sizes, dtype=jnp.int32))
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

    def grown(part: Array | AnyCache) -> Array | AnyCache:
        return part.with_slots(rounded_up(needed(part))) if isinstance(part, KVCache) else part

    if all(needed(part) <= part.slots for part in _caches(state)):
        return state
    return jax.tree.map(grown, state, is_leaf=_is_cache)


def rounded_up(size: int) -> int:
    """`size` rounded up to a multiple of a quarter of a power of two, the largest one below it; at least 16."""
    quarter = max(4, 1 << max(0, (size - 1).bit_length() - 3))
    return max(16, -(-size // quarter) * quarter)


def cache_bytes(state: PyTree[Array]) -> int:
    """Bytes of all cached keys and values."""
    return sum(part.keys.nbytes + part.values.nbytes for part in _caches(state) if isinstance(part, KVCache))


def _slots(part: AnyCache, quarters: int) -> int:
    """The number of slots in `quarters`/4 of a cache, rounded up."""
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

    def by_slot(part: Array) -> Array:
        stored = jnp.take_along_axis(part, jnp.maximum(position, 0)[:, None, :, None], axis=2, mode="clip")
        return jnp.where((position >= 0)[:, None, :, None], stored, jnp.zeros((), part.dtype))

    return KVCache(by_slot(keys), by_slot(values), lengths, window)
