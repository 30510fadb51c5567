"""Stages: what runs at each level of the hierarchy. A stage may contain another stage, to any depth."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from estimators.base import (
    AbstractEstimator,
    Boundaries,
    ChunkerState,
    Keys,
    Layout,
    SamplingOptions,
    Tokens,
    has_many,
)
from estimators.decode_state import AbstractDecodeState, update_state
from estimators.sharding import batch_max
from unet.blocks import Stack
from unet.chunkers.up import last_output
from unet.cross import visible_tokens
from unet.decoding.kv_cache import is_unallocated
from unet.decoding.sparse import for_closed
from unet.experts import ExpertLoss
from unet.ops import Implementation, boundary_scan, token_of

Batched = TypeVar("Batched")
"""Any tree of arrays whose first axis is the batch."""


class Level(eqx.Module):
    """What one level of a hierarchy computed: the encoder's `hidden` states, the actions `drawn`, the `boundaries` truncated to
    capacity, the number of tokens of each sequence (`lengths`), and the number of boundaries dropped (`overflow`)."""

    hidden: Float[Array, "batch length dim"]
    layout: Layout
    drawn: Bool[Array, "batch length"]
    boundaries: Boundaries
    lengths: Int[Array, " batch"]
    overflow: Int[Array, " batch"]


def boundary_depth(levels: Sequence[Level], mask: Bool[Array, "batch length"]) -> Int[Array, "batch length"]:
    """How many levels, counted from the outermost, closed a token at each position of the outermost level: 1 if only the
    outermost did, 2 if the next one did too, and so on."""
    depth = jnp.zeros(mask.shape, jnp.int32)
    for level, closed, index in _at_positions(levels, mask):
        depth += (closed & jnp.take_along_axis(level.boundaries.actions, index, axis=1, mode="clip")).astype(jnp.int32)
    return depth


def boundary_probs(levels: Sequence[Level], mask: Bool[Array, "batch length"]) -> Float[Array, "batch length levels"]:
    """The probability of a boundary of each level at each position of the outermost level; NaN where a level outside it closed
    no token, so that there was none to draw."""
    probs = [
        jnp.where(closed, jnp.take_along_axis(level.boundaries.probs, index, axis=1, mode="clip"), jnp.nan)
        for level, closed, index in _at_positions(levels, mask)
    ]
    return jnp.stack(probs, axis=-1) if probs else jnp.zeros((*mask.shape, 0), jnp.float32)


def _at_positions(
    levels: Sequence[Level], mask: Bool[Array, "batch length"]
) -> Iterator[tuple[Level, Bool[Array, "batch length"], Int[Array, "batch length"]]]:
    """Each level, with whether all levels outside it closed a token at a position of the outermost one, and its own latest
    position there."""
    index = jnp.broadcast_to(jnp.arange(mask.shape[1]), mask.shape)
    closed = mask
    for level in levels:
        yield level, closed, index
        actions = level.boundaries.actions
        closed = closed & jnp.take_along_axis(actions, index, axis=1, mode="clip")
        index = jnp.take_along_axis(token_of(actions), index, axis=1, mode="clip")


class StageOutput(eqx.Module):
    """The stage's hidden states, its levels, the outermost first, the update of its decode state (None in training), and in
    training the loss of its mixtures of experts, if there are any."""

    hidden: Float[Array, "batch length dim"]
    levels: tuple[Level, ...]
    update: PyTree[Array] = None
    experts: ExpertLoss | None = None


class StageSampling(eqx.Module):
    """How one forward pass draws boundaries, level by level, the outermost first.

    `key` draws them (None: greedy; one key for all sequences, or one each: see `SamplingOptions`). `actions`, if given, are
    used as they are. `target_rate`, if given, replaces the rate that the outermost level was built for. `capacities` bounds the
    tokens of each level (empty: one for each position, so that none is dropped). `samples` draws that many sets of boundaries
    for each sequence at the outermost level, from one pass of its encoder. `noise`, if given, replaces the uniform numbers that
    `key` would yield at the outermost level.
    """

    key: Keys | None = None
    actions: tuple[Bool[Array, "batch _"], ...] = ()
    target_rate: Float[Array, ""] | None = None
    capacities: tuple[int, ...] = eqx.field(static=True, default=())
    samples: int = eqx.field(static=True, default=1)
    training: bool = eqx.field(static=True, default=False)
    noise: Float[Array, "batch length"] | None = None

    def router_options(self, implementation: Implementation | None = None) -> SamplingOptions:
        """The sampling options of the outermost level's router; `implementation` is that of the boundary scan."""
        actions = self.actions[0] if self.actions else None
        scan = functools.partial(boundary_scan, implementation=implementation)
        return SamplingOptions(scan, self.key, actions, self.target_rate, self.training, self.noise)

    def capacity(self, length: int) -> int:
        """The maximum number of tokens for a sequence of `length` positions at the outermost level."""
        return min(self.capacities[0], length) if self.capacities else length

    def inner(self) -> StageSampling:
        """The options of the next level inside."""
        key = self.key
        if key is not None:
            key = jax.vmap(jax.random.fold_in, (0, None))(key, 1) if has_many(key) else jax.random.fold_in(key, 1)
        return StageSampling(key, self.actions[1:], None, self.capacities[1:], training=self.training)


def repeated(batched: Batched, samples: int) -> Batched:
    """Each sequence `samples` times, the copies adjacent."""
    return batched if samples == 1 else jax.tree.map(lambda leaf: jnp.repeat(leaf, samples, axis=0), batched)


def without_copies(batched: Batched, samples: int) -> Batched:
    """The inverse of `repeated`: the first of the copies of each sequence."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, samples, *leaf.shape[1:])[:, 0], batched)


class Encoded(eqx.Module):
    """The first half of a stage: the encoder's states, the actions drawn, the boundaries truncated to capacity (both None if
    the stage has none), and the updates of the encoder's and the router's decode states."""

    hidden: Float[Array, "batch length dim"]
    layout: Layout
    drawn: Bool[Array, "batch length"] | None = None
    boundaries: Boundaries | None = None
    encoder: PyTree[Array] = None
    router: PyTree[Array] = None

    @property
    def most_tokens(self) -> Int[Array, ""]:
        """The largest number of tokens of any sequence of the batch."""
        if self.boundaries is None:
            return jnp.zeros((), jnp.int32)
        return batch_max(jnp.max(jnp.sum(self.boundaries.actions, axis=1, dtype=jnp.int32)))


class AbstractStage(eqx.Module):
    """A causal map from hidden states to hidden states, in two parts: `encode` determines how many tokens there are, `decode`
    does the rest. So `UNet.loss` can choose a capacity in between.

    One pass serves training (no decode state) and decoding, where the new positions of each sequence (as many as `layout.mask`
    marks) follow the `layout.before` positions of its state. With one key for each sequence, a text has the same boundaries and
    hidden states however it is split into calls.
    """

    @property
    @abstractmethod
    def estimators(self) -> tuple[AbstractEstimator, ...]:
        """The estimators of the token levels inside, the outermost first."""

    @abstractmethod
    def init_state(self, batch: int, dim: int) -> PyTree[Array]:
        """The decode state before the first position, for hidden states of width `dim`."""

    @abstractmethod
    def encode(
        self,
        hidden: Float[Array, "batch length dim"],
        layout: Layout,
        sampling: StageSampling,
        state: PyTree[Array] = None,
    ) -> Encoded:
        """Encode and draw the boundaries. With several `samples` the batch gets that many rows for each sequence."""

    @abstractmethod
    def decode(
        self, encoded: Encoded, sampling: StageSampling, state: PyTree[Array] = None, *, capacity: int | None = None
    ) -> StageOutput:
        """The token stage and the decoder. `capacity`, if given, is the maximum number of tokens per sequence; below
        `encoded.most_tokens`, tokens are lost."""

    def __call__(
        self,
        hidden: Float[Array, "batch length dim"],
        layout: Layout,
        sampling: StageSampling,
        state: PyTree[Array] = None,
    ) -> StageOutput:
        """Output position i depends only on the positions up to i of its own document."""
        return self.decode(self.encode(hidden, layout, sampling, state), sampling, state)


class Flat(AbstractStage):
    """A stack of blocks without a token level."""

    stack: Stack

    @property
    def estimators(self) -> tuple[AbstractEstimator, ...]:
        return ()

    def init_state(self, batch: int, dim: int) -> PyTree[Array]:
        return self.stack.init_state(batch)

    def encode(
        self,
        hidden: Float[Array, "batch length dim"],
        layout: Layout,
        sampling: StageSampling,
        state: PyTree[Array] = None,
    ) -> Encoded:
        if sampling.samples > 1:
            raise ValueError("there are no boundaries to draw several samples of, since the model has no token level")
        return Encoded(hidden, layout)

    def decode(
        self, encoded: Encoded, sampling: StageSampling, state: PyTree[Array] = None, *, capacity: int | None = None
    ) -> StageOutput:
        output = self.stack(encoded.hidden, encoded.layout, state, training=sampling.training)
        return StageOutput(output.hidden, (), output.update, output.experts)


class HierarchyUpdate(eqx.Module):
    """The updates of a hierarchy's parts, the number of new `tokens`, and the output of the `last` token."""

    encoder: PyTree[Array]
    router: PyTree[Array]
    chunker: ChunkerState
    inner: PyTree[Array]
    decoder: PyTree[Array]
    tokens: Int[Array, " batch"]
    last: Float[Array, "batch 1 token_dim"] | None


class HierarchyState(AbstractDecodeState):
    """Decode states of a hierarchy's parts, the number of `tokens` so far, and the output of the `last` token if the decoder
    attends to tokens. The inner stage advances only when a token closes."""

    encoder: PyTree[Array] = None
    router: PyTree[Array] = None
    chunker: ChunkerState = ChunkerState(None, None)
    inner: PyTree[Array] = None
    decoder: PyTree[Array] = None
    tokens: Int[Array, " batch"] | None = None
    last: Float[Array, "batch 1 token_dim"] | None = None

    def updated(self, update: HierarchyUpdate, lengths: Int[Array, " batch"]) -> HierarchyState:
        assert self.tokens is not None
        tokens = jnp.where(lengths > 0, update.tokens, 0)
        return HierarchyState(
            encoder=update_state(self.encoder, update.encoder, lengths),
            router=update_state(self.router, update.router, lengths),
            chunker=update_state(self.chunker, update.chunker, lengths),
            inner=update_state(self.inner, update.inner, tokens),
            decoder=update_state(self.decoder, update.decoder, lengths),
            tokens=self.tokens + tokens,
            last=update_state(self.last, update.last, tokens),
        )


class Hierarchy(AbstractStage):
    """Encode, draw boundaries, downsample, run the inner stage on the tokens, upsample, decode (SFE eq. 1-6).

    A token has the byte and the document of the position that closed it. `chunk_positions` selects the positions that rotary
    embeddings use at the token level: the index of the token (True), or the byte position of its boundary (False).
    """

    encoder: Stack
    estimator: AbstractEstimator
    inner: AbstractStage
    decoder: Stack
    chunk_positions: bool = eqx.field(static=True, default=False)
    implementation: Implementation | None = eqx.field(static=True, default=None)

    @property
    def estimators(self) -> tuple[AbstractEstimator, ...]:
        return (self.estimator, *self.inner.estimators)

    def init_state(self, batch: int, dim: int) -> HierarchyState:
        chunker, unfold = self.estimator.chunker, self.decoder.unfold
        return HierarchyState(
            encoder=self.encoder.init_state(batch),
            router=self.estimator.router.init_state(batch),
            chunker=chunker.init_state(batch, dim),
            inner=self.inner.init_state(batch, chunker.token_dim(dim)),
            decoder=self.decoder.init_state(batch),
            tokens=jnp.zeros((batch,), jnp.int32),
            last=None if unfold is None else jnp.zeros((batch, 1, unfold.weight.shape[0]), jnp.float32),
        )

    def encode(
        self,
        hidden: Float[Array, "batch length dim"],
        layout: Layout,
        sampling: StageSampling,
        state: HierarchyState | None = None,
    ) -> Encoded:
        old = HierarchyState() if state is None else state
        per_sequence = (
            sampling.actions or sampling.noise is not None or (sampling.key is not None and has_many(sampling.key))
        )
        if sampling.samples > 1 and per_sequence:
            raise ValueError("several samples share one key; got actions, noise or keys of each sequence")
        with jax.named_scope("encode"):
            encoded = self.encoder(hidden, layout, old.encoder)
            hidden, layout = repeated((encoded.hidden, layout), sampling.samples)
        with jax.named_scope("boundary"):
            options = sampling.router_options(self.implementation)
            routed = self.estimator.router.route(hidden, layout, options, old.router)
            boundaries = routed.boundaries.truncated(sampling.capacity(hidden.shape[1]))
        return Encoded(hidden, layout, routed.boundaries.actions, boundaries, encoded.update, routed.update)

    def decode(
        self,
        encoded: Encoded,
        sampling: StageSampling,
        state: HierarchyState | None = None,
        *,
        capacity: int | None = None,
    ) -> StageOutput:
        old = HierarchyState() if state is None else state
        hidden, layout, boundaries, chunker = encoded.hidden, encoded.layout, encoded.boundaries, self.estimator.chunker
        assert boundaries is not None
        assert encoded.drawn is not None
        with jax.named_scope("downsample"):
            capacity = capacity or sampling.capacity(hidden.shape[1])
            down = chunker.down(hidden, boundaries, capacity=capacity, mask=layout.mask, state=old.chunker.down)
            token_layout = self.token_layout(down.tokens, layout, old.tokens)
        with jax.named_scope("mid"):
            inner = self.run_inner(down.tokens.values, token_layout, sampling.inner(), old.inner)
        with jax.named_scope("upsample"):
            up = chunker.up(inner.hidden, down.tokens, hidden, boundaries, state=old.chunker.up)
            tokens = None
            if self.decoder.unfold is not None:
                tokens = visible_tokens(inner.hidden, boundaries.actions, self.implementation, old.last)
        with jax.named_scope("decode"):
            decoded = self.decoder(up.hidden, layout, old.decoder, tokens)
        lengths = jnp.sum(boundaries.actions, axis=1, dtype=jnp.int32)
        overflow = jnp.sum(encoded.drawn, axis=1, dtype=jnp.int32) - lengths
        level = Level(hidden, layout, encoded.drawn, boundaries, lengths, overflow)
        output = StageOutput(decoded.hidden, (level, *inner.levels))
        if state is None:
            return output
        last = None if state.last is None else last_output(inner.hidden, down.tokens, state.last)
        update = HierarchyUpdate(
            encoder=encoded.encoder,
            router=encoded.router,
            chunker=ChunkerState(down.update, up.update),
            inner=inner.update,
            decoder=decoded.update,
            tokens=lengths,
            last=last,
        )
        return StageOutput(output.hidden, output.levels, update)

    def run_inner(
        self,
        values: Float[Array, "batch tokens token_dim"],
        layout: Layout,
        sampling: StageSampling,
        state: PyTree[Array],
    ) -> StageOutput:
        """Run the inner stage. In a decoding step of one position it runs only for the sequences that close a token."""
        if state is None or is_unallocated(state) or values.shape[1] > 1:
            return self.inner(values, layout, sampling, state)
        return for_closed(self.inner, layout.mask[:, 0], (values, layout, sampling, state))

    def boundaries(
        self, hidden: Float[Array, "batch length dim"], layout: Layout, sampling: StageSampling
    ) -> Boundaries:
        """The boundaries of this level, drawn from the encoder's states."""
        return self.estimator.router(hidden, layout, sampling.router_options(self.implementation))

    def token_layout(self, tokens: Tokens, layout: Layout, before: Int[Array, " batch"] | None = None) -> Layout:
        """The layout of the tokens; `before`: how many tokens each sequence had before these."""

        def at(values: Int[Array, "batch length"]) -> Int[Array, "batch tokens"]:
            return jnp.take_along_axis(values, tokens.positions, axis=1, mode="clip")

        positions = at(layout.positions)
        if self.chunk_positions:
            positions = jnp.broadcast_to(jnp.arange(positions.shape[1], dtype=jnp.int32), positions.shape)
            positions = positions if before is None else positions + before[:, None]
        return Layout(at(layout.bytes), positions, at(layout.segments), tokens.mask, before)
