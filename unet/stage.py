"""Stages: what runs at one level of the hierarchy. A stage may hold another stage, to any depth."""

from __future__ import annotations

import dataclasses
import functools
from abc import abstractmethod
from collections.abc import Sequence
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from estimators.base import (
    AbstractEstimator,
    Boundaries,
    Draw,
    Keys,
    Layout,
    TokenRows,
    has_many,
)
from unet.blocks import Stack
from unet.buckets import smallest_with_room
from unet.cache import (
    MANY_SLOTS,
    HierarchyChange,
    HierarchyMemory,
    filled_quarters,
    most_slots,
    of_sequences,
)
from unet.chunkers import last_of, renewed
from unet.cross import Tokens, last_seen, tokens_seen
from unet.folding import Squares, fold, fold_layout, unfold
from unet.ops import Implementation, boundary_scan

Rows = TypeVar("Rows")
"""Any tree of arrays whose first axis is the batch."""


class Level(eqx.Module):
    """What one level of a hierarchy did: the encoder's `hidden` states, the actions `drawn` from them, the `boundaries`
    for which there was room, the tokens per sequence, and the boundaries for which no token row was left."""

    hidden: Float[Array, "batch length dim"]
    layout: Layout
    drawn: Bool[Array, "batch length"]
    boundaries: Boundaries
    lengths: Int[Array, " batch"]
    overflow: Int[Array, " batch"]


def closed_levels(levels: Sequence[Level], mask: Bool[Array, "batch length"]) -> Int[Array, "batch length"]:
    """How many levels closed a token with each row of the outermost: 1 where that level closed one, 2 where with it the level
    inside closed one too, and so on."""
    rows = jnp.broadcast_to(jnp.arange(mask.shape[1]), mask.shape)
    count, closed = jnp.zeros(mask.shape, jnp.int32), mask
    for level in levels:
        actions = level.boundaries.actions
        closed = closed & jnp.take_along_axis(actions, rows, axis=1, mode="clip")
        count += closed.astype(jnp.int32)
        rows = jnp.take_along_axis(jnp.cumsum(actions, axis=1) - 1, rows, axis=1, mode="clip")
    return count


class StageOutput(eqx.Module):
    """The stage's hidden states and its levels, the outermost first."""

    hidden: Float[Array, "batch length dim"]
    levels: tuple[Level, ...]


class Drawing(eqx.Module):
    """How boundaries are drawn in one forward pass, level by level, the outermost first.

    `key` draws them (None: the likelier action of each row; one for each sequence: see `Draw`); `actions`, where given, are
    taken as they are; `target_rate`,
    where given, takes the place of the rate that the outermost level was built for; `capacities` bound the tokens of each
    level (empty: as many as there are rows, so none is ever dropped); `samples` draws so many times for each sequence at the
    outermost level, from one pass of its encoder; `groups`, where it is not 0, folds the token rows of that level: those of
    each of so many groups of neighbouring sequences lie one after another, and are one row to the levels inside. `squares` says
    how rows that are folded come apart. `noise`, where given, are the uniform numbers that `key` would give the outermost level.
    """

    key: Keys | None = None
    actions: tuple[Bool[Array, "batch _"], ...] = ()
    target_rate: Float[Array, ""] | None = None
    capacities: tuple[int, ...] = eqx.field(static=True, default=())
    samples: int = eqx.field(static=True, default=1)
    groups: int = eqx.field(static=True, default=0)
    training: bool = eqx.field(static=True, default=False)
    squares: Squares | None = None
    noise: Float[Array, "batch length"] | None = None

    def here(self, implementation: Implementation | None = None) -> Draw:
        """What the router of the outermost level is asked; `implementation` is that of the scan over boundaries."""
        actions = self.actions[0] if self.actions else None
        scan = functools.partial(boundary_scan, implementation=implementation)
        return Draw(scan, self.key, actions, self.target_rate, self.training, self.noise)

    def capacity(self, length: int) -> int:
        """Token rows per sequence of `length` rows at the outermost level."""
        return self.capacities[0] if self.capacities else length

    def inner(self, squares: Squares | None = None) -> Drawing:
        """The same for the level inside this one, whose rows come apart by `squares`."""
        key = self.key
        if key is not None:
            key = jax.vmap(jax.random.fold_in, (0, None))(key, 1) if has_many(key) else jax.random.fold_in(key, 1)
        return Drawing(key, self.actions[1:], None, self.capacities[1:], 1, 0, self.training, squares)


def repeated(rows: Rows, samples: int) -> Rows:
    """Every sequence `samples` times, the copies neighbours."""
    return rows if samples == 1 else jax.tree.map(lambda leaf: jnp.repeat(leaf, samples, axis=0), rows)


class Prefilled(eqx.Module):
    """What a stage made of the first rows, and what it keeps of them."""

    output: StageOutput
    memory: PyTree[Array]


class Stepped(eqx.Module):
    """What a stage made of the next row of each sequence, whether each level closed a token with it, the outermost first, and
    how its memory changes."""

    hidden: Float[Array, "batch 1 dim"]
    closed: tuple[Bool[Array, " batch"], ...]
    change: PyTree[Array]


class Begun(eqx.Module):
    """A stage as far as its boundaries: the encoder's states, the actions drawn from them, and the boundaries for which there
    was room (both None where a stage draws none)."""

    encoded: Float[Array, "batch length dim"]
    layout: Layout
    drawn: Bool[Array, "batch length"] | None
    boundaries: Boundaries | None

    def fullest(self, groups: int) -> Int[Array, ""]:
        """The token rows that the sequence with most of them needs; where the sequences of `groups` share theirs, the most that
        those of a group need on average. Raises `ValueError` where these are not of equal size."""
        if self.boundaries is None:
            return jnp.zeros((), jnp.int32)
        batch = self.encoded.shape[0]
        needed = jnp.sum(fold(self.boundaries.actions, groups or batch), axis=1, dtype=jnp.int32)
        return -(-jnp.max(needed) * needed.shape[0] // batch)


class AbstractStage(eqx.Module):
    """A causal map of hidden states to hidden states, in two steps: what decides how many tokens there are, and the rest.

    Row by row, for sequences of one document each: `prefill` takes the first rows, those where `layout.mask` is True, and
    `step` one more, whose number is `layout.before`. Drawn with a key for each sequence, the boundaries and the hidden states
    are those of one call on all rows.
    """

    @property
    @abstractmethod
    def estimators(self) -> tuple[AbstractEstimator, ...]:
        """The estimators of the levels inside, the outermost first."""

    @abstractmethod
    def begin(self, hidden: Float[Array, "batch length dim"], layout: Layout, drawing: Drawing) -> Begun:
        """Encode and draw the boundaries. With several `samples` of them there are that many rows for each sequence."""

    @abstractmethod
    def finish(self, begun: Begun, drawing: Drawing, *, capacity: int | None = None) -> StageOutput:
        """The rest, in `capacity` token rows per sequence where it is given: at least `begun.fullest(…)`, or tokens are lost."""

    @abstractmethod
    def ending(self) -> AbstractStage:
        """This stage without the parameters that only `begin` needs: enough to `finish` and for the objectives."""

    @abstractmethod
    def prefill(self, hidden: Float[Array, "batch length dim"], layout: Layout, drawing: Drawing) -> Prefilled:
        """All rows at once, and what `step` needs. Where a level overflows, the memory is of no use."""

    @abstractmethod
    def step(
        self, hidden: Float[Array, "batch 1 dim"], layout: Layout, drawing: Drawing, memory: PyTree[Array]
    ) -> Stepped:
        """The next row of the sequences for which `layout.mask` is True."""

    def __call__(self, hidden: Float[Array, "batch length dim"], layout: Layout, drawing: Drawing) -> StageOutput:
        """Row i of the output depends on the rows up to i of its own document only."""
        return self.finish(self.begin(hidden, layout, drawing), drawing)


class Flat(AbstractStage):
    """A stack of blocks and nothing inside."""

    stack: Stack

    @property
    def estimators(self) -> tuple[AbstractEstimator, ...]:
        return ()

    def begin(self, hidden: Float[Array, "batch length dim"], layout: Layout, drawing: Drawing) -> Begun:
        if drawing.samples > 1:
            raise ValueError("there are no boundaries to draw several samples of: the model has no token level")
        return Begun(hidden, layout, None, None)

    def finish(self, begun: Begun, drawing: Drawing, *, capacity: int | None = None) -> StageOutput:
        return StageOutput(self.stack(begun.encoded, begun.layout, drawing.squares), ())

    def ending(self) -> Flat:
        return self

    def prefill(self, hidden: Float[Array, "batch length dim"], layout: Layout, drawing: Drawing) -> Prefilled:
        done = self.stack.prefill(hidden, layout)
        return Prefilled(StageOutput(done.hidden, ()), done.memory)

    def step(
        self, hidden: Float[Array, "batch 1 dim"], layout: Layout, drawing: Drawing, memory: tuple[PyTree[Array], ...]
    ) -> Stepped:
        done = self.stack.step(hidden, layout, memory)
        return Stepped(done.hidden, (), done.memory)


class Hierarchy(AbstractStage):
    r"""encode, draw boundaries, downsample, run the inner stage on the tokens, upsample, decode (SFE eq. 1-6).

    Token rows take the byte and the document of the row that closed them. `positions` decides what rotary embeddings see
    at the token level: `byte`, the byte position of that row, or `chunk`, the token's own number.
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

    def begin(self, hidden: Float[Array, "batch length dim"], layout: Layout, drawing: Drawing) -> Begun:
        with jax.named_scope("encode"):
            encoded = self.encoder(hidden, layout, drawing.squares)
            encoded, layout = repeated((encoded, layout), drawing.samples)
        with jax.named_scope("boundary"):
            drawn = self.route(encoded, layout, drawing)
            boundaries = drawn.limited(drawing.capacity(hidden.shape[1]))
        return Begun(encoded, layout, drawn.actions, boundaries)

    def finish(self, begun: Begun, drawing: Drawing, *, capacity: int | None = None) -> StageOutput:
        assert begun.drawn is not None
        assert begun.boundaries is not None
        encoded, layout, boundaries = begun.encoded, begun.layout, begun.boundaries
        (batch, length), chunker, squares = encoded.shape[:2], self.estimator.chunker, None
        bound = drawing.capacity(length)
        capacity = capacity or bound
        lengths = jnp.sum(boundaries.actions, axis=1, dtype=jnp.int32)
        with jax.named_scope("downsample"):
            if drawing.groups:
                encoded, boundaries = fold((encoded, boundaries), drawing.groups)
                layout, capacity = fold_layout(layout, drawing.groups), capacity * (batch // drawing.groups)
            rows = chunker.down(encoded, boundaries, capacity=capacity)
            token_layout = self.token_layout(rows, layout)
            if drawing.groups:
                squares = Squares(rows, lengths, length=length, capacity=bound, implementation=self.implementation)
                if self.chunk_positions:
                    token_layout = dataclasses.replace(token_layout, positions=squares.number)
        with jax.named_scope("mid"):
            inner = self.inner(rows.values, token_layout, drawing.inner(squares))
        with jax.named_scope("upsample"):
            joined = unfold(chunker.up(inner.hidden, rows, encoded, boundaries), batch)
            tokens = self.tokens_seen(inner.hidden, boundaries, batch)
        overflow = jnp.sum(begun.drawn, axis=1, dtype=jnp.int32) - lengths
        level = Level(begun.encoded, begun.layout, begun.drawn, begun.boundaries, lengths, overflow)
        with jax.named_scope("decode"):
            return StageOutput(self.decoder(joined, begun.layout, drawing.squares, tokens), (level, *inner.levels))

    def ending(self) -> Hierarchy:
        return eqx.tree_at(lambda stage: (stage.encoder, stage.estimator.router), self, (None, None))

    def prefill(self, hidden: Float[Array, "batch length dim"], layout: Layout, drawing: Drawing) -> Prefilled:
        chunker, capacity = self.estimator.chunker, drawing.capacity(hidden.shape[1])
        encoded = self.encoder.prefill(hidden, layout)
        routed = self.estimator.router.prefill(encoded.hidden, layout, drawing.here(self.implementation))
        boundaries = routed.boundaries.limited(capacity)
        rows = chunker.down(encoded.hidden, boundaries, capacity=capacity)
        inner = self.inner.prefill(rows.values, self.token_layout(rows, layout), drawing.inner())
        outputs = inner.output.hidden
        tokens = self.tokens_seen(outputs, boundaries, hidden.shape[0])
        decoded = self.decoder.prefill(chunker.up(outputs, rows, encoded.hidden, boundaries), layout, tokens)
        drawn = routed.boundaries.actions
        overflow = jnp.sum(drawn, axis=1, dtype=jnp.int32) - rows.lengths
        level = Level(encoded.hidden, layout, drawn, boundaries, rows.lengths, overflow)
        memory = HierarchyMemory(
            encoded.memory,
            routed.memory,
            chunker.remember(outputs, rows, encoded.hidden, boundaries, layout.mask),
            inner.memory,
            decoded.memory,
            rows.lengths,
            None if tokens is None else last_of(outputs, rows),
        )
        return Prefilled(StageOutput(decoded.hidden, (level, *inner.output.levels)), memory)

    def step(
        self, hidden: Float[Array, "batch 1 dim"], layout: Layout, drawing: Drawing, memory: HierarchyMemory
    ) -> Stepped:
        """The stage inside runs for the sequences that close a token only; see `inner_step`."""
        chunker = self.estimator.chunker
        encoded = self.encoder.step(hidden, layout, memory.encoder)
        draw = drawing.here(self.implementation)
        routed = self.estimator.router.step(encoded.hidden, layout, draw, memory.router)
        boundaries = routed.boundaries
        value = chunker.down_step(encoded.hidden, boundaries, memory.chunker)
        positions = memory.tokens[:, None] if self.chunk_positions else layout.positions
        token = Layout(layout.bytes, positions, layout.segments, boundaries.actions, memory.tokens)

        inner = self.inner_step(value, token, drawing.inner(), memory.inner)
        joined = chunker.up_step(inner.hidden, value, encoded.hidden, boundaries, memory.chunker)
        last = None if memory.last is None else renewed(boundaries, inner.hidden, memory.last)
        decoded = self.decoder.step(joined.hidden, layout, memory.decoder, None if last is None else last_seen(last))
        closed, parts = boundaries.actions[:, 0], (encoded.memory, routed.memory, joined.memory, inner.change)
        change = HierarchyChange(*parts, decoded.memory, closed, last)
        return Stepped(decoded.hidden, (closed, *inner.closed), change)

    def inner_step(
        self, values: Float[Array, "batch 1 dim"], layout: Layout, drawing: Drawing, memory: PyTree[Array]
    ) -> Stepped:
        """The stage inside, for the sequences where `layout.mask` is True; what the others get means nothing.

        They are gathered into as many rows as the smallest of a few sizes that has room for them: none, a quarter of the
        batch, half of it, all of it. So a batch costs what its tokens cost, although its sequences close them at different
        times. A quarter, as which most steps run, reads caches only as far as they are filled, in quarters of their slots.
        """
        batch = layout.mask.shape[0]
        sizes = sorted({-(-batch // 4), -(-batch // 2), batch})
        closed = layout.mask[:, 0]
        first = jnp.argsort(~closed, stable=True)
        operands = (values, layout, drawing, memory)

        def run(size: int, quarters: int = 4) -> Stepped:
            if size == batch:
                return self.inner.step(*operands)
            chosen = first[:size]
            done = self.inner.step(*of_sequences(operands, chosen, quarters))
            return jax.tree.map(lambda leaf: jnp.zeros((batch, *leaf.shape[1:]), leaf.dtype).at[chosen].set(leaf), done)

        def rest() -> Stepped:
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(lambda: run(batch)))

        parts = (2, 3, 4) if sizes[0] < batch and most_slots(memory) >= MANY_SLOTS else (4,)
        ways = [functools.partial(run, sizes[0], quarters) for quarters in parts]
        filled = jnp.clip(filled_quarters(memory, first[: sizes[0]]) - 2, 0, len(ways) - 1)
        which = smallest_with_room(jnp.sum(closed, dtype=jnp.int32), sizes)
        which = jnp.where(which == 0, filled, len(ways) - 1 + which)
        which = jnp.where(jnp.any(closed), 1 + which, 0)
        return jax.lax.switch(which, [rest, *ways, *(functools.partial(run, size) for size in sizes[1:])])

    def tokens_seen(
        self, outputs: Float[Array, "groups tokens dim"], boundaries: Boundaries, batch: int
    ) -> Tokens | None:
        """The tokens that the decoder looks at, where it does."""
        if self.decoder.unfold is None:
            return None
        return tokens_seen(outputs, boundaries.actions, batch, self.implementation)

    def route(self, encoded: Float[Array, "batch length dim"], layout: Layout, drawing: Drawing) -> Boundaries:
        """The boundaries of this level, drawn from the encoder's states."""
        return self.estimator.router(encoded, layout, drawing.here(self.implementation))

    def token_layout(self, rows: TokenRows, layout: Layout) -> Layout:
        """What each token row stands for."""

        def at(values: Int[Array, "batch length"]) -> Int[Array, "batch tokens"]:
            return jnp.take_along_axis(values, rows.positions, axis=1, mode="clip")

        number = jnp.broadcast_to(jnp.arange(rows.positions.shape[1], dtype=jnp.int32), rows.positions.shape)
        positions = number if self.chunk_positions else at(layout.positions)
        return Layout(at(layout.bytes), positions, at(layout.segments), rows.mask)
