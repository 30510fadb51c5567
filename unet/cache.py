"""What attention, and a hierarchy as a whole, keep of earlier rows while a text is written row by row."""

from __future__ import annotations

from typing import Generic, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from estimators.base import AbstractMemory, written

MANY_SLOTS = 128
"""Slots of a token cache from which on a program that reads only the filled ones is worth its compilation."""

Kept = TypeVar("Kept")


class Cached(eqx.Module, Generic[Kept]):
    """Hidden states, and what is kept for the rows after them, or how that changes (see `estimators.base.written`)."""

    hidden: Float[Array, "batch length dim"]
    memory: Kept


class NewRow(eqx.Module):
    """The key and the value of one more row."""

    key: Float[Array, "batch heads head_dim"]
    value: Float[Array, "batch heads head_dim"]


class RowCache(AbstractMemory):
    """The keys and values of earlier rows: of all, row r in slot r; or of the last `slots` (`ring`), row r in slot r modulo
    `slots`.

    Sequences advance on their own: `count` says how many rows each has had. Keys have been turned by their positions, so that
    the order of the slots means nothing.
    """

    keys: Float[Array, "batch heads slots head_dim"]
    values: Float[Array, "batch heads slots head_dim"]
    count: Int[Array, " batch"]
    ring: bool = eqx.field(static=True)

    @property
    def slots(self) -> int:
        return self.keys.shape[2]

    @property
    def seen(self) -> Bool[Array, "batch slots"]:
        """The slots that the next row looks at, beside itself: of a full ring all but the oldest, whose place it takes."""
        slot = jnp.arange(self.slots, dtype=jnp.int32)
        there = slot < self.count[:, None]
        return there & (slot != self.count[:, None] % self.slots) if self.ring else there

    def written(self, change: NewRow, advance: Bool[Array, " batch"]) -> RowCache:
        """With one more row, in a ring in place of the oldest, where a sequence advances; as it is where not."""
        sequence = jnp.arange(self.count.shape[0])
        slot = self.count % self.slots if self.ring else self.count
        # Beyond the last slot nothing is written.
        slot = jnp.where(advance, slot, self.slots)

        def put(rows: Array, row: Array) -> Array:
            return rows.at[sequence, :, slot].set(row.astype(rows.dtype), mode="drop")

        count = self.count + advance.astype(jnp.int32)
        return RowCache(put(self.keys, change.key), put(self.values, change.value), count, self.ring)

    def with_room(self, rows: int) -> RowCache:
        """With slots for `rows` rows in all; a ring needs no more than it has."""
        more = 0 if self.ring else max(0, rows - self.slots)
        if not more:
            return self
        keys, values = (jnp.pad(part, ((0, 0), (0, 0), (0, more), (0, 0))) for part in (self.keys, self.values))
        return RowCache(keys, values, self.count, self.ring)


class ChosenRows(eqx.Module):
    """The first `slots` slots that some sequences of a batch have in a `cache`, copied only where they are read.

    Enough for another row of each where none has had `slots` rows.
    """

    cache: RowCache
    chosen: Int[Array, " rows"]
    slots: int = eqx.field(static=True)

    @property
    def count(self) -> Int[Array, " rows"]:
        return self.cache.count.at[self.chosen].get(mode="promise_in_bounds")

    @property
    def ring(self) -> bool:
        return self.cache.ring

    def of(self, chosen: Int[Array, " fewer"], slots: int) -> ChosenRows:
        """The first `slots` slots of some of these sequences."""
        return ChosenRows(self.cache, self.chosen.at[chosen].get(mode="promise_in_bounds"), slots)

    def copied(self) -> RowCache:
        """As a cache of these sequences alone."""

        def some(rows: Float[Array, "batch heads slots head_dim"]) -> Float[Array, "rows heads first head_dim"]:
            size = (1, rows.shape[1], self.slots, rows.shape[3])
            return jax.vmap(lambda one: jax.lax.dynamic_slice(rows, (one, 0, 0, 0), size)[0])(self.chosen)

        return RowCache(some(self.cache.keys), some(self.cache.values), self.count, self.ring)


Memory = TypeVar("Memory", bound=PyTree[Array])


def of_sequences(memory: Memory, chosen: Int[Array, " rows"], quarters: int = 4) -> Memory:
    """Any tree of arrays that begin with `batch` as it is for the chosen sequences, to be read: of caches only so many quarters
    of the slots, and those only where they are read (see `ChosenRows`)."""

    def some(part: Array | RowCache | ChosenRows) -> Array | ChosenRows:
        if not isinstance(part, RowCache | ChosenRows):
            return part.at[chosen].get(mode="promise_in_bounds")
        slots = part.slots if part.ring else _slots(part, quarters)
        return ChosenRows(part, chosen, slots) if isinstance(part, RowCache) else part.of(chosen, slots)

    return jax.tree.map(some, memory, is_leaf=_has_rows)


def filled_quarters(memory: PyTree[Array], chosen: Int[Array, " rows"]) -> Int[Array, ""]:
    """The fewest quarters of its slots in which every cache inside has room for another row of each chosen sequence; 4 where one
    has room in none."""
    found = jnp.ones((), jnp.int32)
    for part in jax.tree.leaves(memory, is_leaf=_has_rows):
        if isinstance(part, RowCache | ChosenRows) and not part.ring:
            rows = 1 + jnp.max(part.count.at[chosen].get(mode="promise_in_bounds"))
            fewer = jnp.asarray([_slots(part, quarters) for quarters in (1, 2, 3)], jnp.int32)
            found = jnp.maximum(found, 1 + jnp.sum(rows > fewer, dtype=jnp.int32))
    return found


def most_slots(memory: PyTree[Array]) -> int:
    """The slots of the largest cache inside that is no ring."""
    parts = jax.tree.leaves(memory, is_leaf=_has_rows)
    return max((part.slots for part in parts if isinstance(part, RowCache | ChosenRows) and not part.ring), default=0)


def _slots(part: RowCache | ChosenRows, quarters: int) -> int:
    return -(-part.slots * quarters // 4)


def _has_rows(part: object) -> bool:
    return isinstance(part, RowCache | ChosenRows)


def _is_cache(part: object) -> bool:
    return isinstance(part, RowCache)


def with_room(memory: Memory, rows: int) -> Memory:
    """All caches inside with room for so many more rows in every sequence; the very memory given where they have it.

    Slots come in whole quarters of a power of two, so that few programs serve all lengths. Reads how many rows there are, so
    it cannot be compiled.
    """

    def needed(cache: RowCache) -> int:
        return 0 if cache.ring else int(np.max(np.asarray(cache.count))) + rows

    def widen(part: Array | RowCache) -> Array | RowCache:
        return part.with_room(rounded_up(needed(part))) if isinstance(part, RowCache) else part

    if all(needed(cache) <= cache.slots for cache in _caches(memory)):
        return memory
    return jax.tree.map(widen, memory, is_leaf=_is_cache)


def rounded_up(size: int) -> int:
    """The least whole number of quarters of a power of two, not below 16, that is at least `size`."""
    quarter = max(4, 1 << max(0, (size - 1).bit_length() - 3))
    return max(16, -(-size // quarter) * quarter)


def cache_bytes(memory: PyTree[Array]) -> int:
    """Bytes of all keys and values inside."""
    return sum(cache.keys.nbytes + cache.values.nbytes for cache in _caches(memory))


def _caches(memory: PyTree[Array]) -> list[RowCache]:
    return [part for part in jax.tree.leaves(memory, is_leaf=_is_cache) if isinstance(part, RowCache)]


def filled_cache(
    keys: Float[Array, "batch heads length head_dim"],
    values: Float[Array, "batch heads length head_dim"],
    lengths: Int[Array, " batch"],
    window: int | None,
) -> RowCache:
    """After the first `lengths` rows of each sequence, of which the next row sees all, or a `window` with itself in it."""
    lengths = lengths.astype(jnp.int32)
    if window is None:
        return RowCache(keys, values, lengths, False)
    slot = jnp.arange(window, dtype=jnp.int32)
    # The last row before the end that lies in each slot; before the first row where there is none.
    row = slot + (lengths[:, None] - 1 - slot) // window * window

    def last(rows: Array) -> Array:
        found = jnp.take_along_axis(rows, jnp.maximum(row, 0)[:, None, :, None], axis=2, mode="clip")
        return jnp.where((row >= 0)[:, None, :, None], found, jnp.zeros((), rows.dtype))

    return RowCache(last(keys), last(values), lengths, True)


def capped(logits: Float[Array, "*shape"], cap: float | None) -> Float[Array, "*shape"]:
    r"""$c\tanh(l/c)$, or the logits l themselves without a cap."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def attend_cached(
    query: Float[Array, "batch heads head_dim"], row: NewRow, cache: RowCache | ChosenRows, *, cap: float | None
) -> Float[Array, "batch heads head_dim"]:
    r"""$\mathrm{softmax}\big(c\tanh(qk^\top/(c\sqrt{d}))\big)v$ over the rows in a cache and the new `row`; see `attend`.

    Where a cache that is no ring has no slot left for the row, the result is not a number.
    """
    if isinstance(cache, ChosenRows):
        cache = cache.copied()
    query = (query * jnp.asarray(query.shape[-1] ** -0.5, query.dtype))[:, :, None]
    # The products of whole matrices that a CPU does without turning the cache.
    there = jnp.matmul(query, jnp.swapaxes(cache.keys, -1, -2), preferred_element_type=jnp.float32)[:, :, 0]
    own = jnp.sum(query[:, :, 0].astype(jnp.float32) * row.key.astype(jnp.float32), axis=-1, keepdims=True)
    logits = capped(jnp.concatenate([there, own], axis=-1), cap)
    seen = jnp.pad(cache.seen, ((0, 0), (0, 1)), constant_values=True)
    weights = jax.nn.softmax(jnp.where(seen[:, None], logits, -jnp.inf), axis=-1).astype(cache.values.dtype)
    mixed = jnp.matmul(weights[:, :, None, :-1], cache.values)[:, :, 0] + weights[:, :, -1:] * row.value
    if cache.ring:
        return mixed
    return jnp.where((cache.count < cache.slots)[:, None, None], mixed, jnp.asarray(jnp.nan, mixed.dtype))


class HierarchyChange(eqx.Module):
    """How what a hierarchy keeps of earlier rows changes, part by part, and where a token `closed`; with it the `last` token's
    output is another."""

    encoder: tuple[PyTree[Array], ...]
    router: PyTree[Array]
    chunker: PyTree[Array]
    inner: PyTree[Array]
    decoder: tuple[PyTree[Array], ...]
    closed: Bool[Array, " batch"]
    last: Float[Array, "batch 1 dim"] | None


class HierarchyMemory(AbstractMemory):
    """What a hierarchy keeps of earlier rows, part by part, the number of `tokens` closed so far, and where the decoder looks at
    them the output of the `last`. The stage inside goes on only where one closes."""

    encoder: tuple[PyTree[Array], ...]
    router: PyTree[Array]
    chunker: PyTree[Array]
    inner: PyTree[Array]
    decoder: tuple[PyTree[Array], ...]
    tokens: Int[Array, " batch"]
    last: Float[Array, "batch 1 dim"] | None

    def written(self, change: HierarchyChange, advance: Bool[Array, " batch"]) -> HierarchyMemory:
        closed = advance & change.closed
        return HierarchyMemory(
            written(self.encoder, change.encoder, advance),
            written(self.router, change.router, advance),
            written(self.chunker, change.chunker, advance),
            written(self.inner, change.inner, closed),
            written(self.decoder, change.decoder, advance),
            self.tokens + closed.astype(jnp.int32),
            written(self.last, change.last, advance),
        )
