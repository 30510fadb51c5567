"""The three kinds of thing an estimator is made of, and the named values that pass between them.

A **router** says where a boundary may be drawn, a **chunker** turns byte rows into token rows and back, an **objective**
trains the router beside the language-model loss. An **estimator** is a named composition of the three.

Axis glossary, used by every annotation of the library:

========  =====================================================================
batch     sequences
length    rows of the level a stage runs at: bytes, or the tokens of the level above
tokens    token rows, a static capacity; rows past a sequence's own count are padding
dim       width of a hidden state
heads     attention heads
vocab     256 byte values (254 is BOS, 255 is EOS: neither occurs in UTF-8)
taps      1 + the number of past boundaries that a policy sees
========  =====================================================================
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import Generic, Protocol, TypeVar, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, PyTree

from estimators.equations import confidence, start_of

Value = TypeVar("Value")
State = TypeVar("State", bound=PyTree[Array])

Keys = PRNGKeyArray | Key[Array, " batch"]
"""One key for a batch, or one for each of its sequences."""

VOCAB = 256
BOS = 254
EOS = 255
"""Bytes 254 and 255 occur in no valid UTF-8, so they mark the begin and the end of a document."""


class Layout(eqx.Module):
    """What each row of an array stands for.

    `bytes`: the byte a row was read from (for a token: the byte that closed it). `positions`: its place in the sequence,
    in bytes. `segments`: the number of its document; rows of different documents never see each other. `mask`: False
    where the row is padding.

    `before`, where given, says how many rows of the same document came before the first of these, so that they go on with it;
    each sequence is then one document. Below 0 so many rows of padding come first.
    """

    bytes: Int[Array, "batch length"]
    positions: Int[Array, "batch length"]
    segments: Int[Array, "batch length"]
    mask: Bool[Array, "batch length"]
    before: Int[Array, " batch"] | None = None

    @property
    def numbers(self) -> Int[Array, "batch length"]:
        """The place of each row in its document, from 0."""
        place = jnp.arange(self.mask.shape[1], dtype=jnp.int32)[None, :]
        return place - start_of(self.starts) if self.before is None else place + self.before[:, None]

    @property
    def starts(self) -> Bool[Array, "batch length"]:
        """True at the first row of each document, where a boundary is forced."""
        if self.before is not None:
            return (self.numbers == 0) & self.mask
        previous = jnp.pad(self.segments[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
        return (self.segments != previous) & self.mask

    @property
    def free(self) -> Bool[Array, "batch length"]:
        """True where a boundary is neither forced nor forbidden."""
        return self.mask & ~self.starts


class Boundaries(eqx.Module):
    """Where tokens end, and how likely each ending was.

    `actions_i` is True where a token closes at row i. `logits` are the log-odds of `actions_i = 1` given the rows up to i
    and the actions before i, `probs` their sigmoid; gradients reach the router through these two. `decided` is True where
    the policy itself chose: forced, padded and suppressed rows are in no policy term. `starts` is True where a document
    begins, which forces a boundary.

    `relaxed`, where there is one, has the values of `actions` as drawn and a gradient to the router: a chunker that is
    differentiable in the boundaries reads it. `behaviour_log_prob`, where there is one, is the log-probability of the
    actions under the policy that drew them, when that was another than `logits` describe.
    """

    actions: Bool[Array, "batch length"]
    logits: Float[Array, "batch length"]
    probs: Float[Array, "batch length"]
    decided: Bool[Array, "batch length"]
    starts: Bool[Array, "batch length"]
    relaxed: Float[Array, "batch length"] | None = None
    behaviour_log_prob: Float[Array, "batch length"] | None = None

    @property
    def confidence(self) -> Float[Array, "batch length"]:
        """How sure the router was of what it did: `probs` at boundaries, `1 - probs` elsewhere."""
        return confidence(self.probs, self.actions)

    def limited(self, capacity: int) -> Boundaries:
        """The same boundaries with those suppressed, and no longer `decided`, for which `capacity` rows are too few.

        The `starts` of documents keep their rows, so that no document is left with a token of the one before it; the first
        of the other boundaries share the rest. Of more starts than rows the last go without. A row is dropped from the
        policy terms whenever no token row was left for it, whether or not it drew a boundary: keeping only the zeros there
        would bias the policy towards fewer boundaries.
        """
        free = (self.actions & ~self.starts).astype(jnp.int32)
        before = jnp.cumsum(free, axis=1) - free
        forced = jnp.sum(self.actions & self.starts, axis=1, keepdims=True, dtype=jnp.int32)
        room = before < capacity - forced
        kept = self.actions & (room | self.starts)
        kept = kept & (jnp.cumsum(kept, axis=1) <= capacity)
        return dataclasses.replace(self, actions=kept, decided=self.decided & room)


class TokenRows(eqx.Module):
    """Token rows made of byte rows.

    `values`: the rows, zero where padded. `positions`: the row of the level below at which each token closed (0 where
    padded). `lengths`: tokens kept in each sequence. `overflow`: boundaries for which no row was left.
    """

    values: Float[Array, "batch tokens dim"]
    positions: Int[Array, "batch tokens"]
    lengths: Int[Array, " batch"]
    overflow: Int[Array, " batch"]

    @property
    def mask(self) -> Bool[Array, "batch tokens"]:
        """True where a row holds a token."""
        return jnp.arange(self.values.shape[1])[None, :] < self.lengths[:, None]


class BoundaryScan(eqx.Module):
    """What sampling a policy with memory returns: the hard `actions` and the `logits` they were drawn from."""

    actions: Bool[Array, "batch length"]
    logits: Float[Array, "batch length"]


@runtime_checkable
class Sampler(Protocol):
    """Draws boundaries one after another: the op `unet.ops.boundary_scan`, which a model hands to its router."""

    def __call__(
        self,
        projections: Float[Array, "batch length taps"],
        uniforms: Float[Array, "batch length"],
        starts: Bool[Array, "batch length"],
        cap: float | None,
    ) -> BoundaryScan: ...


class Draw(eqx.Module):
    """How a router is asked to draw.

    `key` draws the boundaries (None: the likelier action of each row, `probs > 0.5`). Where there is a key for each sequence,
    what a row draws depends on nothing but that key and the row's number, whatever stands beside or after it; `noise`, where
    given, are the uniform numbers that come of it. `actions`, where given, are scored instead of drawn. `target_rate`, where
    given, is the rate to aim at now: routers that draw at a given rate by lot (`UniformRouter`, `Bernoulli`) follow it at once.
    Routers that learn ignore it, since what they were built for is only where they start: their objective aims at it for them.
    """

    sampler: Sampler = eqx.field(static=True)
    key: Keys | None = None
    actions: Bool[Array, "batch length"] | None = None
    target_rate: Float[Array, ""] | None = None
    training: bool = eqx.field(static=True, default=False)
    noise: Float[Array, "batch length"] | None = None

    def uniforms(self, layout: Layout) -> Float[Array, "batch length"]:
        """What to compare probabilities with: uniform numbers, or one half everywhere without a key."""
        batch, length = layout.mask.shape
        if self.key is None:
            return jnp.full((batch, length), 0.5)
        if self.noise is not None:
            return self.noise
        if not self.by_sequence:
            return jax.random.uniform(self.key, (batch, length))
        first = jnp.zeros((batch,), jnp.int32) if layout.before is None else layout.before
        return uniforms_from(self.key, first, length)

    def rate(self, built_for: float) -> Float[Array, ""]:
        """The rate to draw at by lot: `target_rate`, or the one that the router was built for."""
        return jnp.asarray(built_for if self.target_rate is None else self.target_rate, jnp.float32)

    @property
    def by_sequence(self) -> bool:
        """Whether each sequence has a key of its own."""
        return self.key is not None and has_many(self.key)

    def bernoulli(self, probs: Float[Array, "batch length"], layout: Layout) -> Bool[Array, "batch length"]:
        """Independent actions with these probabilities, or those given; forced at starts, none on padding."""
        drawn = self.uniforms(layout) < probs if self.actions is None else self.actions
        return (drawn | layout.starts) & layout.mask


def has_many(key: Keys) -> bool:
    """Whether there is one key for each sequence."""
    return bool(jnp.issubdtype(key.dtype, jax.dtypes.prng_key)) and key.ndim == 1


def uniforms_from(keys: Key[Array, " batch"], first: Int[Array, " batch"], length: int) -> Float[Array, "batch length"]:
    """The uniform numbers of `length` rows from number `first` on: each depends on its sequence's key and its own number."""
    numbers = first[:, None] + jnp.arange(length, dtype=jnp.int32)
    keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys, numbers)
    return jax.vmap(jax.vmap(jax.random.uniform))(keys)


class AbstractMemory(eqx.Module):
    """What is kept of earlier rows in a form of its own; arrays that begin with `batch` need none."""

    @abstractmethod
    def written(self, change: PyTree[Array], advance: Bool[Array, " batch"]) -> AbstractMemory:
        """The memory after one more row of the sequences that advance."""


def written(memory: State, change: PyTree[Array], advance: Bool[Array, " batch"]) -> State:
    """`memory` after one more row of the sequences that advance; the others keep theirs.

    `change` has the structure of `memory`: a new array for each array, and whatever an `AbstractMemory` takes for each of
    those. A step reads a memory and returns a change, so that large memories can be written in place.
    """

    def write(old: Array | AbstractMemory, new: PyTree[Array]) -> Array | AbstractMemory:
        if isinstance(old, AbstractMemory):
            return old.written(new, advance)
        return jnp.where(advance.reshape(-1, *[1] * (old.ndim - 1)), new, old)

    return jax.tree.map(write, memory, change, is_leaf=lambda part: isinstance(part, AbstractMemory))


class Routed(eqx.Module):
    """The `boundaries` of some rows; and what the router keeps of them for the rows after them, or how that changes."""

    boundaries: Boundaries
    memory: PyTree[Array]


class AbstractRouter(eqx.Module):
    """Decides where a boundary may be drawn: hidden states and bytes to logits and hard actions.

    A text can also be routed row by row: `prefill` takes its first rows, `step` one more. Together they draw what a call
    draws for all rows at once, if each sequence has a key of its own.
    """

    @property
    @abstractmethod
    def rate(self) -> float | None:
        """The share of bytes at which it aims to draw a boundary, or None where the text alone decides."""

    @property
    def initial_rate(self) -> float | None:
        """The share of bytes at which it draws a boundary before training; token levels have room for that and for `rate`."""
        return self.rate

    @abstractmethod
    def __call__(self, hidden: Float[Array, "batch length dim"], layout: Layout, draw: Draw) -> Boundaries:
        """Boundaries drawn as asked. Row i may use rows up to i and actions before i, nothing later."""

    @abstractmethod
    def prefill(self, hidden: Float[Array, "batch length dim"], layout: Layout, draw: Draw) -> Routed:
        """The same, and the memory after the rows of each sequence: those where `layout.mask` is True, which come first and
        are of one document."""

    @abstractmethod
    def step(self, hidden: Float[Array, "batch 1 dim"], layout: Layout, draw: Draw, memory: PyTree[Array]) -> Routed:
        """The next row of each sequence, and how the memory of the rows before it changes (see `written`)."""


class AbstractRowRouter(AbstractRouter):
    """A router whose row i looks at nothing but row i, so that nothing has to be remembered."""

    def prefill(self, hidden: Float[Array, "batch length dim"], layout: Layout, draw: Draw) -> Routed:
        return Routed(self(hidden, layout, draw), None)

    def step(self, hidden: Float[Array, "batch 1 dim"], layout: Layout, draw: Draw, memory: PyTree[Array]) -> Routed:
        return Routed(self(hidden, layout, draw), None)


class Joined(eqx.Module):
    """A byte row with what the token level says to it, and the chunker's memory after it."""

    hidden: Float[Array, "batch 1 dim"]
    memory: PyTree[Array]


class AbstractChunker(eqx.Module):
    """Turns byte rows into token rows and back; which gradient flows to the router on the way is its affair.

    Row by row: `remember` follows `down` and `up` over the first rows; then for each row `down_step`, the token level where a
    boundary was drawn, and `up_step`.
    """

    @abstractmethod
    def down(self, hidden: Float[Array, "batch length dim"], boundaries: Boundaries, *, capacity: int) -> TokenRows:
        """Byte rows to at most `capacity` token rows a sequence."""

    @abstractmethod
    def up(
        self,
        outputs: Float[Array, "batch tokens dim"],
        rows: TokenRows,
        hidden: Float[Array, "batch length dim"],
        boundaries: Boundaries,
    ) -> Float[Array, "batch length dim"]:
        """What the token level made of `rows`, brought back to the byte rows `hidden` it came from."""

    @abstractmethod
    def remember(
        self,
        outputs: Float[Array, "batch tokens dim"],
        rows: TokenRows,
        hidden: Float[Array, "batch length dim"],
        boundaries: Boundaries,
        mask: Bool[Array, "batch length"],
    ) -> PyTree[Array]:
        """What the rows after these need; `mask` is True where there is one. Every sequence is one document."""

    @abstractmethod
    def down_step(
        self, hidden: Float[Array, "batch 1 dim"], boundaries: Boundaries, memory: PyTree[Array]
    ) -> Float[Array, "batch 1 dim"]:
        """The token row that a boundary at the next row closes; means nothing where there is no boundary."""

    @abstractmethod
    def up_step(
        self,
        output: Float[Array, "batch 1 dim"],
        value: Float[Array, "batch 1 dim"],
        hidden: Float[Array, "batch 1 dim"],
        boundaries: Boundaries,
        memory: PyTree[Array],
    ) -> Joined:
        """The next row after the token level has made `output` of `value`, which is there where it has a boundary."""


class Signal(eqx.Module):
    """What an objective learns from, all `batch length`.

    `log_lik_i` and `early_log_lik_i` are log p(x_{i+1} | x_<=i) in nats with and without the token level (the second only
    where the objective asks for it); `mask` is True where that prediction exists; `continues_i` is True where row i + 1
    belongs to the same document. `hidden` are the encoder's states, which no action has touched. `target_rate`, where
    given, takes the place of the rate that the objective was built for. `samples` says how many neighbouring rows are draws
    for the same sequence.
    """

    boundaries: Boundaries
    hidden: Float[Array, "batch length dim"]
    log_lik: Float[Array, "batch length"]
    early_log_lik: Float[Array, "batch length"] | None
    mask: Bool[Array, "batch length"]
    continues: Bool[Array, "batch length"]
    target_rate: Float[Array, ""] | None = None
    samples: int = eqx.field(static=True, default=1)


class ObjectiveOutput(eqx.Module):
    """A scalar `loss` to add to the language-model loss, and scalars worth watching."""

    loss: Float[Array, ""]
    metrics: dict[str, Float[Array, ""]]


class Frozen(eqx.Module, Generic[Value]):
    """Something that training leaves as it is: no gradient reaches it, no optimizer moves it, checkpoints keep it."""

    value: Value

    def __call__(self) -> Value:
        """The value, cut off from gradients."""
        arrays, rest = eqx.partition(self.value, eqx.is_array)
        return eqx.combine(jax.lax.stop_gradient(arrays), rest)


class AbstractObjective(eqx.Module):
    """Trains the router beside the language-model loss."""

    @property
    @abstractmethod
    def needs_early_exit(self) -> bool:
        """Whether `Signal.early_log_lik` must be there, which means a second head on the encoder."""

    @abstractmethod
    def __call__(self, signal: Signal) -> ObjectiveOutput:
        """The loss of one batch."""


class AbstractEstimator(eqx.Module):
    """A named composition of a router, a chunker and an objective."""

    router: eqx.AbstractVar[AbstractRouter]
    chunker: eqx.AbstractVar[AbstractChunker]
    objective: eqx.AbstractVar[AbstractObjective]


class Estimator(AbstractEstimator):
    """Any router with any chunker and any objective."""

    router: AbstractRouter
    chunker: AbstractChunker
    objective: AbstractObjective
