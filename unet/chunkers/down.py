"""Downsamplers: a token is made of its last position, or of all positions that its boundary closes.

A group is what one boundary closes: the positions after the previous boundary, up to and including its own. So a token never
depends on a position after the one at which it is first used.
"""

from __future__ import annotations

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from estimators.base import Boundaries, Downsampled, Frozen, Tokens
from estimators.bounds import Vectors, Width, require_within
from estimators.decode_state import AbstractDecodeState, update_state
from unet.chunkers.chunker import AbstractDownsampler, Hidden, Mask
from unet.cross import CrossLayer
from unet.decoding.kv_cache import AnyCache, KVCache, KVCacheView, KVUpdate
from unet.layers import NORM_EPSILON, Linear, for_all_heads
from unet.ops import Implementation, downsample, mean_pool
from unet.ops.downsample import places_of
from unet.ops.groups import Groups, groups_of


class Select(AbstractDownsampler):
    r"""The position at the boundary (SFE eq. 7; H-Net): $X'_m = X_{i_m}$."""

    implementation: Implementation | None = eqx.field(static=True, default=None)

    def init_state(self, batch: int, dim: int) -> None:
        return None

    def __call__(
        self, hidden: Hidden, boundaries: Boundaries, *, capacity: int, mask: Mask | None = None, state: None = None
    ) -> Downsampled:
        return Downsampled(downsample(hidden, boundaries.actions, capacity, implementation=self.implementation), None)


class OpenGroup(eqx.Module):
    """The group that no boundary has closed yet. `inside` marks those of the new positions that are in it; `closed` is True if
    a boundary closed the group that was open before them."""

    inside: Mask
    closed: Bool[Array, " batch"]

    @property
    def count(self) -> Int[Array, " batch"]:
        """How many of the new positions are in it."""
        return jnp.sum(self.inside, axis=1, dtype=jnp.int32)


def open_group(closes: Mask, mask: Mask) -> OpenGroup:
    """The group that is open after these positions of one document; `closes` marks the positions that close a group."""
    positions = jnp.arange(mask.shape[1], dtype=jnp.int32)
    last_boundary = jnp.max(jnp.where(closes, positions, -1), axis=1)
    return OpenGroup((positions > last_boundary[:, None]) & mask, last_boundary >= 0)


class GroupSum(eqx.Module):
    """The sum of an open group's positions, in float32, and their number."""

    total: Float[Array, "batch 1 dim"]
    count: Int[Array, " batch"]

    @classmethod
    def empty(cls, batch: int, dim: int) -> GroupSum:
        """The sum of no positions."""
        return cls(jnp.zeros((batch, 1, dim), jnp.float32), jnp.zeros((batch,), jnp.int32))

    def completed(self, means: Float[Array, "batch tokens dim"], tokens: Tokens) -> Float[Array, "batch tokens dim"]:
        """The `means` of groups of new positions, with the earlier positions of the first group, summed here, included."""
        new, earlier = tokens.positions[:, :1, None] + 1, self.count[:, None, None]
        first = means[:, :1].astype(jnp.float32) * new.astype(jnp.float32) + self.total
        first = first / (new + earlier).astype(jnp.float32)
        return jnp.concatenate([jnp.where(earlier > 0, first.astype(means.dtype), means[:, :1]), means[:, 1:]], axis=1)

    def after(self, hidden: Hidden, group: OpenGroup) -> GroupSum:
        """The sum of the group that is open after these positions."""
        new = jnp.sum(jnp.where(group.inside[..., None], hidden.astype(jnp.float32), 0.0), axis=1, keepdims=True)
        total = jnp.where(group.closed[:, None, None], 0.0, self.total) + new
        return GroupSum(total, jnp.where(group.closed, 0, self.count) + group.count)


class MeanPool(AbstractDownsampler):
    """The mean of each group. A learned null group comes before the first (DPT; authors' code).

    The null group is the token of the boundary forced at every document's start; the position there belongs to the next group.
    So bytes have a token before any boundary is drawn. Gradients reach the boundaries through the means, via
    `Boundaries.relaxed`.
    """

    null: Float[Array, " dim"]
    implementation: Implementation | None = eqx.field(static=True)

    @property
    def passes_gradient_to(self) -> frozenset[str]:
        return frozenset({"relaxed"})

    def __init__(self, dim: int, *, key: PRNGKeyArray, implementation: Implementation | None = None):
        """The null group, of width `dim`, starts as a draw from a standard normal. If it started at zero, the norm of every block
        would amplify its gradient a thousandfold."""
        self.null = jax.random.normal(key, (dim,), jnp.float32)
        self.implementation = implementation

    def init_state(self, batch: int, dim: int) -> GroupSum:
        return GroupSum.empty(batch, dim)

    def __call__(
        self,
        hidden: Hidden,
        boundaries: Boundaries,
        *,
        capacity: int,
        mask: Mask | None = None,
        state: GroupSum | None = None,
    ) -> Downsampled:
        actions, starts, relaxed = boundaries.actions, boundaries.starts, boundaries.relaxed
        tokens = mean_pool(
            hidden, actions, capacity, starts=starts, relaxed=relaxed, implementation=self.implementation
        )
        values, update = tokens.values, None
        if state is not None and mask is not None:
            values = state.completed(values, tokens)
            update = state.after(hidden, open_group(actions & ~starts, mask))
        first = jnp.take_along_axis(starts, tokens.positions, axis=1, mode="clip") & tokens.mask
        values = jnp.where(first[..., None], self.null.astype(hidden.dtype), values)
        return Downsampled(tokens.replaced(values), update)


class AveragePool(AbstractDownsampler):
    """The mean of each group; the position at a document's start is a group of its own (H-Net fig. 13)."""

    implementation: Implementation | None = eqx.field(static=True, default=None)

    def init_state(self, batch: int, dim: int) -> GroupSum:
        return GroupSum.empty(batch, dim)

    def __call__(
        self,
        hidden: Hidden,
        boundaries: Boundaries,
        *,
        capacity: int,
        mask: Mask | None = None,
        state: GroupSum | None = None,
    ) -> Downsampled:
        tokens = mean_pool(
            hidden,
            boundaries.actions,
            capacity,
            starts=boundaries.starts,
            own_start=True,
            implementation=self.implementation,
        )
        if state is None or mask is None:
            return Downsampled(tokens, None)
        update = state.after(hidden, open_group(boundaries.actions, mask))
        return Downsampled(tokens.replaced(state.completed(tokens.values, tokens)), update)


class MaxPool(AbstractDownsampler):
    """The elementwise maximum of each group (H-Net fig. 13; BLT's first patch query)."""

    implementation: Implementation | None = eqx.field(static=True, default=None)

    def init_state(self, batch: int, dim: int) -> Float[Array, "batch 1 dim"]:
        """The maximum of the open group."""
        return jnp.full((batch, 1, dim), -jnp.inf, jnp.float32)

    def __call__(
        self,
        hidden: Hidden,
        boundaries: Boundaries,
        *,
        capacity: int,
        mask: Mask | None = None,
        state: Float[Array, "batch 1 dim"] | None = None,
    ) -> Downsampled:
        return group_maxima(hidden, boundaries, groups_of(boundaries, capacity, self.implementation), mask, state)


def group_maxima(
    hidden: Hidden,
    boundaries: Boundaries,
    groups: Groups,
    mask: Mask | None,
    state: Float[Array, "batch 1 dim"] | None,
) -> Downsampled:
    """The elementwise maximum of each group; `state` is the maximum of the group that was open before these positions."""
    largest, update = groups.largest(hidden), None
    if state is not None and mask is not None:
        group, state = open_group(boundaries.actions, mask), state.astype(hidden.dtype)
        inside = jnp.where(group.inside[..., None], hidden, jnp.asarray(-jnp.inf, hidden.dtype))
        update = jnp.max(inside, axis=1, keepdims=True)
        update = jnp.maximum(update, jnp.where(group.closed[:, None, None], -jnp.inf, state))
        largest = jnp.concatenate([jnp.maximum(largest[:, :1], state), largest[:, 1:]], axis=1)
    values = jnp.where(jnp.isneginf(largest), jnp.zeros((), hidden.dtype), largest)
    return Downsampled(places_of(boundaries.actions, groups.tokens).tokens(values), update)


class GroupUpdate(eqx.Module):
    """Keys and values of the new positions in the open group (they come first), their number (`count`), whether the group that
    was open before is `closed`, and the new maximum (`largest`)."""

    new: KVUpdate
    count: Int[Array, " batch"]
    closed: Bool[Array, " batch"]
    largest: Float[Array, "batch 1 dim"]


class GroupState(AbstractDecodeState):
    """KV cache of an open group's positions, and their maximum."""

    cache: KVCache
    largest: Float[Array, "batch 1 dim"]

    def updated(self, update: GroupUpdate, lengths: Int[Array, " batch"]) -> GroupState:
        advances = lengths > 0
        # A closed group leaves its slots to the next one.
        earlier = jnp.where(advances & update.closed, 0, self.cache.lengths)
        cache = dataclasses.replace(self.cache, lengths=earlier)
        cache = cache.updated(update.new, jnp.where(advances, update.count, 0))
        return GroupState(cache, update_state(self.largest, update.largest, lengths))


class AttentionPool(AbstractDownsampler):
    r"""Queries made from a group's maximum attend to the positions of that group alone (BLT's local encoder).

    $p_{m,s} = \mathrm{CrossLayer}(q_{m,s}, \{X_l\}_{l \in g_m})$ with $q_{m,1} \dots q_{m,k} = P \max_{l \in g_m} X_l$; the k
    vectors of a token are concatenated and, if there is a matrix `project`, multiplied by it. Softmax in float32.

    `idle` are cross-attention layers without any effect: those that a published encoder has after its earlier layers, whose
    result it replaces (docs/blt.md). They are kept so that they can be written again.
    """

    unfold: Linear
    cross: CrossLayer
    implementation: Implementation | None = eqx.field(static=True)
    project: Linear | None = None
    idle: Frozen[tuple[CrossLayer, ...]] | None = None

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        *,
        vectors: int = 1,
        width: int | None = None,
        kv_heads: int | None = None,
        epsilon: float = NORM_EPSILON,
        implementation: Implementation | None = None,
        key: PRNGKeyArray,
    ):
        """`heads`: the number of attention heads. Tokens are `vectors` (k) times as wide as `dim`, or `width` wide where that is
        another number. `kv_heads` is the number of heads of keys and values (None: as many). `epsilon` is that of the norms.
        Raises `ValueError` if `heads` does not divide `dim`, `kv_heads` not `heads`, or a number is out of range."""
        require_within("heads", heads, Width)
        require_within("vectors", vectors, Vectors)
        key_unfold, key_cross = jax.random.split(key)
        self.unfold = Linear(dim, vectors * dim, key=key_unfold)
        self.cross = CrossLayer(dim, heads, kv_heads=kv_heads, epsilon=epsilon, key=key_cross)
        self.implementation, self.project, self.idle = implementation, None, None
        if width is not None:
            require_within("width", width, Width)
            if width != vectors * dim:
                self.project = Linear(vectors * dim, width, key=jax.random.fold_in(key, 2))

    def token_dim(self, dim: int) -> int:
        return (self.unfold if self.project is None else self.project).weight.shape[1]

    def init_state(self, batch: int, dim: int) -> GroupState:
        cache = KVCache.empty(batch, self.cross.kv_heads, self.cross.head_dim, None)
        return GroupState(cache, MaxPool().init_state(batch, dim))

    def __call__(
        self,
        hidden: Hidden,
        boundaries: Boundaries,
        *,
        capacity: int,
        mask: Mask | None = None,
        state: GroupState | None = None,
    ) -> Downsampled:
        groups = groups_of(boundaries, capacity, self.implementation)
        largest = group_maxima(hidden, boundaries, groups, mask, None if state is None else state.largest)
        # The vectors that queries are made of, (b, tokens, vectors, dim).
        vectors = self.unfold(largest.tokens.values).reshape(*largest.tokens.values.shape[:2], -1, hidden.shape[2])
        keys, values = jnp.split(self.cross.keys_values(hidden), 2, axis=-1)
        new = KVUpdate(self.cross.split_heads(keys), self.cross.split_heads(values))
        attended = _attend_groups(self.cross.queries(vectors), new, groups, None if state is None else state.cache)
        pooled = self.cross.output(vectors, attended.astype(hidden.dtype)).reshape(*vectors.shape[:2], -1)
        pooled = pooled if self.project is None else self.project(pooled)
        tokens = largest.tokens.replaced(jnp.where(largest.tokens.mask[..., None], pooled, jnp.zeros((), pooled.dtype)))
        if state is None or mask is None:
            return Downsampled(tokens, None)
        group = open_group(boundaries.actions, mask)
        # The open group has the last valid positions; move them to the front.
        index = (jnp.sum(mask, axis=1) - group.count)[:, None] + jnp.arange(mask.shape[1], dtype=jnp.int32)
        moved = jax.tree.map(lambda part: jnp.take_along_axis(part, index[..., None, None], axis=1, mode="clip"), new)
        return Downsampled(tokens, GroupUpdate(moved, group.count, group.closed, largest.update))


def _attend_groups(
    query: Float[Array, "batch tokens vectors heads head_dim"],
    new: KVUpdate,
    groups: Groups,
    cache: AnyCache | None,
) -> Float[Array, "batch tokens vectors heads head_dim"]:
    """The attention result of each query over its group, in float32: a softmax over groups of any size. The first group also
    has the positions in the `cache`."""
    query = query.astype(jnp.float32) * query.shape[-1] ** -0.5
    # Each position meets the queries of its own group: (b, length, vectors, heads, head_dim), then logits without the last axis.
    own_query = groups.spread(query.reshape(*query.shape[:2], -1)).reshape(*new.keys.shape[:2], *query.shape[2:])
    keys, values = (for_all_heads(part, query.shape[3], 2)[:, :, None] for part in (new.keys, new.values))
    logits = jnp.sum(own_query * keys.astype(jnp.float32), axis=-1)
    largest = groups.largest(logits)
    cached = None if cache is None or not cache.slots else _cached_group(query[:, 0], cache)
    if cached is not None:
        first = jnp.maximum(largest[:, :1], jnp.max(cached.logits, axis=1)[:, None])
        largest = jnp.concatenate([first, largest[:, 1:]], axis=1)
    largest = jax.lax.stop_gradient(jnp.where(jnp.isneginf(largest), 0.0, largest))
    own_largest = groups.spread(largest.reshape(*largest.shape[:2], -1)).reshape(logits.shape)
    # Logits outside of groups are unbounded, and an overflow there would make the gradient NaN.
    inside = groups.inside[..., None, None]
    weights = jnp.where(inside, jnp.exp(jnp.where(inside, logits - own_largest, 0.0)), 0.0)
    total = groups.total(weights[..., None] * values.astype(jnp.float32))
    norm = groups.total(weights)
    if cached is not None:
        weights = jnp.exp(cached.logits - largest[:, :1])
        total = total.at[:, 0].add(jnp.einsum("bsvh,bhsd->bvhd", weights, cached.values))
        norm = norm.at[:, 0].add(jnp.sum(weights, axis=1))
    return total / jnp.where(norm > 0, norm, 1.0)[..., None]


class _CachedGroup(eqx.Module):
    """Logits (-inf in empty slots) and values of an open group's positions in a KV cache."""

    logits: Float[Array, "batch slots vectors heads"]
    values: Float[Array, "batch heads slots head_dim"]


def _cached_group(query: Float[Array, "batch vectors heads head_dim"], cache: AnyCache) -> _CachedGroup:
    """Logits are NaN if the cache had no slot for a position of the group."""
    cache = cache.copied() if isinstance(cache, KVCacheView) else cache
    keys, values = (for_all_heads(part, query.shape[2], 1).astype(jnp.float32) for part in (cache.keys, cache.values))
    logits = jnp.einsum("bvhd,bhsd->bsvh", query, keys)
    seen = (jnp.arange(cache.slots) < cache.lengths[:, None])[..., None, None]
    lost = (cache.lengths > cache.slots)[:, None, None, None]
    return _CachedGroup(jnp.where(lost, jnp.nan, jnp.where(seen, logits, -jnp.inf)), values)


class WithBoundary(AbstractDownsampler):
    """Another pool's token plus the last position of its group, the one at the boundary (H-Net fig. 13, +Res)."""

    pool: AbstractDownsampler
    implementation: Implementation | None = eqx.field(static=True, default=None)

    @property
    def passes_gradient_to(self) -> frozenset[str]:
        return self.pool.passes_gradient_to

    def token_dim(self, dim: int) -> int:
        return self.pool.token_dim(dim)

    def init_state(self, batch: int, dim: int) -> PyTree[Array]:
        return self.pool.init_state(batch, dim)

    def __call__(
        self, hidden: Hidden, boundaries: Boundaries, *, capacity: int, mask: Mask | None = None, state: PyTree = None
    ) -> Downsampled:
        pooled = self.pool(hidden, boundaries, capacity=capacity, mask=mask, state=state)
        last = downsample(hidden, boundaries.actions, capacity, implementation=self.implementation)
        return Downsampled(last.replaced(pooled.tokens.values + last.values), pooled.update)
