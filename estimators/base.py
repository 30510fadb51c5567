"""The three parts of an estimator, and the values that pass between them.

A **router** draws boundaries, a **chunker** pools positions into tokens and maps tokens back to positions, an **objective**
trains the router beside the language-model loss. An **estimator** is a named composition of the three.

Axis names in the annotations of the library:

========  =====================================================================
batch     sequences
length    positions of the level a stage runs at: bytes, or tokens of the enclosing stage
tokens    tokens, up to a static capacity; those past a sequence's own count are padding
dim       width of a hidden state
heads     attention heads
vocab     256 byte values (254 is BOS, 255 is EOS; neither occurs in UTF-8)
lags      1 + the number of past boundaries that a policy sees
========  =====================================================================
"""

from __future__ import annotations

import dataclasses
import functools
from abc import abstractmethod
from typing import Generic, Protocol, TypeVar, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, PyTree

from estimators.equations import confidence, start_of
from estimators.keys import threefry_keys
from estimators.limits import Limits
from estimators.sharding import batch_uniform

Value = TypeVar("Value")

Keys = PRNGKeyArray | Key[Array, " batch"]
"""One key for a batch, or one key for each sequence."""

VOCAB = 256
"""How many values a byte has."""
BOS = 254
"""The byte at the start of a document. It occurs in no valid UTF-8."""
EOS = 255
"""The byte at the end of a document. It occurs in no valid UTF-8."""


class Layout(eqx.Module):
    """The byte, place and document of each position.

    `bytes`: the byte read at the position (for a token: the byte that closed it). `positions`: its place in the sequence, in
    bytes. `segments`: the number of its document; positions of different documents never see each other. `mask`: False
    where there is padding.

    `before` is set in decoding: the number of positions of the same document that precede the first of these. Each sequence
    is then a single document. A negative number means that the sequence begins with that many positions of padding.
    """

    bytes: Int[Array, "batch length"]
    positions: Int[Array, "batch length"]
    segments: Int[Array, "batch length"]
    mask: Bool[Array, "batch length"]
    before: Int[Array, " batch"] | None = None

    @property
    def document_positions(self) -> Int[Array, "batch length"]:
        """The position of each in its document, from 0."""
        place = jnp.arange(self.mask.shape[1], dtype=jnp.int32)[None, :]
        return place - start_of(self.starts) if self.before is None else place + self.before[:, None]

    @property
    def starts(self) -> Bool[Array, "batch length"]:
        """True at the first position of each document, where a boundary is forced."""
        if self.before is not None:
            return (self.document_positions == 0) & self.mask
        previous = jnp.pad(self.segments[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
        return (self.segments != previous) & self.mask

    @property
    def lengths(self) -> Int[Array, " batch"]:
        """The number of positions of each sequence that are not padding."""
        return jnp.sum(self.mask, axis=1, dtype=jnp.int32)

    @property
    def free(self) -> Bool[Array, "batch length"]:
        """True where a boundary is neither forced by a start nor forbidden by padding."""
        return self.mask & ~self.starts

    def preceded_by(self, recent: Int[Array, "batch reach"]) -> Layout:
        """In decoding: the layout with the bytes before its first position in front; those before the document are padding."""
        reach = recent.shape[1]
        bytes, before = jnp.concatenate([recent, self.bytes], axis=1), self.document_positions[:, 0] - reach
        document_positions = before[:, None] + jnp.arange(bytes.shape[1], dtype=jnp.int32)
        return Layout(bytes, document_positions, jnp.zeros_like(bytes), document_positions >= 0, before)


class Boundaries(eqx.Module):
    """Where tokens end, and how likely each boundary was.

    `actions_i` is True where a token closes at position i. `logits` are the log-odds of `actions_i = 1` given positions up to
    i and actions before i; `probs` are their sigmoid. Gradients reach the router through these two. `decided` is True where
    the policy chose: forced, forbidden, padded and truncated positions enter no policy term. `starts` is True where a document
    begins, which forces a boundary.

    `relaxed`, if there is one, has the values of `actions` as drawn and a gradient to the router, for chunkers that are
    differentiable in the boundaries. `behaviour_log_prob`, if there is one, is the log-probability of the actions under the
    policy that drew them, where that is not the policy of `logits`. `constrained`, if there is one, is True where a constraint
    forced or forbade the boundary: what stands there is certain, and `probs`, `logits` and `relaxed` are constants that say so.
    `settled` is True where that was so whatever the earlier actions.
    """

    actions: Bool[Array, "batch length"]
    logits: Float[Array, "batch length"]
    probs: Float[Array, "batch length"]
    decided: Bool[Array, "batch length"]
    starts: Bool[Array, "batch length"]
    relaxed: Float[Array, "batch length"] | None = None
    behaviour_log_prob: Float[Array, "batch length"] | None = None
    constrained: Bool[Array, "batch length"] | None = None
    settled: Bool[Array, "batch length"] | None = None

    @property
    def deciding(self) -> Bool[Array, "batch length"]:
        """Where the policy decided or could have: the positions over which policy losses are averaged. Their number does not
        depend on the actions; if it did, its reciprocal would bias policy gradients."""
        if self.constrained is None or self.settled is None:
            return self.decided
        return self.decided | (self.constrained & ~self.settled)

    @property
    def confidence(self) -> Float[Array, "batch length"]:
        """The probability of the action taken: `probs` at boundaries, `1 - probs` elsewhere, and 1 where a boundary is forced or
        forbidden."""
        certain = self.starts if self.constrained is None else self.starts | self.constrained
        return jnp.where(certain, 1.0, confidence(self.probs, self.actions))

    def truncated(self, capacity: int) -> Boundaries:
        """Drops boundaries beyond `capacity` and masks them from the policy loss.

        Boundaries at `starts` are kept first, so that no document reads a token of the one before it; the earliest of the
        others fill what capacity is left. If there are more starts than `capacity`, the last ones are dropped. A position is
        masked wherever no capacity is left for it, whether or not a boundary was drawn there: masking only the dropped
        boundaries would bias the policy towards fewer boundaries.
        """
        free = (self.actions & ~self.starts).astype(jnp.int32)
        before = jnp.cumsum(free, axis=1) - free
        forced = jnp.sum(self.actions & self.starts, axis=1, keepdims=True, dtype=jnp.int32)
        room = before < capacity - forced
        kept = self.actions & (room | self.starts)
        kept = kept & (jnp.cumsum(kept, axis=1) <= capacity)
        settled = None if self.settled is None else self.settled | ~room
        return dataclasses.replace(self, actions=kept, decided=self.decided & room, settled=settled)


class Tokens(eqx.Module):
    """Tokens made of positions.

    `values`: hidden states, zero where padded. `positions`: the position at which each token closed (0 where padded).
    `lengths`: the number of tokens kept in each sequence. `overflow`: the number of boundaries beyond the capacity.
    """

    values: Float[Array, "batch tokens dim"]
    positions: Int[Array, "batch tokens"]
    lengths: Int[Array, " batch"]
    overflow: Int[Array, " batch"]

    def replaced(self, values: Float[Array, "batch tokens some_dim"]) -> Tokens:
        """The same tokens with other values."""
        return dataclasses.replace(self, values=values)

    @property
    def mask(self) -> Bool[Array, "batch tokens"]:
        """True at tokens, False at padding."""
        return jnp.arange(self.values.shape[1])[None, :] < self.lengths[:, None]


class BoundaryScan(eqx.Module):
    """The hard `actions` sampled from a policy with memory, and the `logits` they were drawn from."""

    actions: Bool[Array, "batch length"]
    logits: Float[Array, "batch length"]


@runtime_checkable
class Sampler(Protocol):
    """Draws boundaries sequentially: the op `unet.ops.boundary_scan`, which a model hands to its router."""

    def __call__(
        self,
        projections: Float[Array, "batch length lags"],
        uniforms: Float[Array, "batch length"],
        starts: Bool[Array, "batch length"],
        cap: float | None,
        limits: Limits | None = None,
    ) -> BoundaryScan: ...


class SamplingOptions(eqx.Module):
    """How a router draws boundaries.

    `key`: None is greedy (`probs > 0.5`). With one key per sequence, the random number at a position depends only on that key
    and on the position in the sequence, not on other sequences or later positions; `noise`, if given, holds these numbers.
    `actions`, if given, are scored instead of drawn. `target_rate`, if given, replaces the rate that the router was built for
    in routers that draw at a fixed rate (`UniformRouter`, `Bernoulli`). Learned routers ignore it: their own rate only sets
    their initial weights, and the objective trains them towards the target. `limits`, if given, are what constraints allow: a
    router whose probabilities depend on earlier actions must draw with `sampler` and hand them on; of any other, `Constrained`
    corrects the draws.
    """

    sampler: Sampler = eqx.field(static=True)
    key: Keys | None = None
    actions: Bool[Array, "batch length"] | None = None
    target_rate: Float[Array, ""] | None = None
    training: bool = eqx.field(static=True, default=False)
    noise: Float[Array, "batch length"] | None = None
    limits: Limits | None = None

    def uniforms(self, layout: Layout) -> Float[Array, "batch length"]:
        """The numbers to compare probabilities with: uniform draws, or one half everywhere without a key."""
        batch, length = layout.mask.shape
        if self.key is None:
            return jnp.full((batch, length), 0.5, jnp.float32)
        if self.noise is not None:
            return self.noise
        if not self.by_sequence:
            return batch_uniform(self.key, (batch, length))
        first = jnp.zeros((batch,), jnp.int32) if layout.before is None else layout.before
        return uniforms_from(self.key, first, length)

    def rate(self, built_for: float) -> Float[Array, ""]:
        """`target_rate` if given, else the rate that the router was built for."""
        return jnp.asarray(built_for if self.target_rate is None else self.target_rate, jnp.float32)

    @property
    def by_sequence(self) -> bool:
        """Whether there is one key for each sequence."""
        return self.key is not None and has_many(self.key)

    def bernoulli(self, probs: Float[Array, "batch length"], layout: Layout) -> Bool[Array, "batch length"]:
        """Independent actions with these probabilities, or the given ones; forced at starts, none on padding."""
        drawn = self.uniforms(layout) < probs if self.actions is None else self.actions
        return (drawn | layout.starts) & layout.mask

    def limited(self, drawn: Bool[Array, "batch length"], layout: Layout) -> Bool[Array, "batch length"]:
        """Actions `drawn` without regard to the limits, corrected from left to right: `equations.within_limits`, with sizes that
        follow from the corrected ones. Given actions, and any without limits, stay as they are."""
        if self.limits is None or self.actions is not None:
            return drawn
        sure = jnp.where(drawn, 1.0, -1.0)[..., None].astype(jnp.float32)
        half = jnp.full(drawn.shape, 0.5, jnp.float32)
        return self.sampler(sure, half, layout.starts, None, self.limits).actions & layout.mask


def has_many(key: Keys) -> bool:
    """Whether `key` holds one key for each sequence."""
    return bool(jnp.issubdtype(key.dtype, jax.dtypes.prng_key)) and key.ndim == 1


def uniforms_from(keys: Key[Array, " batch"], first: Int[Array, " batch"], length: int) -> Float[Array, "batch length"]:
    """Uniform numbers for `length` positions of a document from `first` on, each a function of the key and the position."""
    document_positions = first[:, None] + jnp.arange(length, dtype=jnp.int32)
    keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(threefry_keys(keys), document_positions)
    return jax.vmap(jax.vmap(functools.partial(jax.random.uniform, dtype=jnp.float32)))(keys)


class Routed(eqx.Module):
    """The `boundaries` of some positions, and the update of the router's decode state (None without one)."""

    boundaries: Boundaries
    update: PyTree[Array]


class AbstractRouter(eqx.Module):
    """Decides where boundaries are drawn: maps hidden states and bytes to logits and hard actions.

    One pass (`route`) serves training, without a decode state, and decoding, where the new positions follow those of the
    state. With one key per sequence, a text gets the same boundaries whether it is routed at once or in parts.
    """

    @property
    @abstractmethod
    def rate(self) -> float | None:
        """The target fraction of bytes with a boundary; None if the text alone decides."""

    @property
    def dim(self) -> int | None:
        """The width of the hidden states it was built for; None for any width."""
        return None

    @property
    def initial_rate(self) -> float | None:
        """The fraction of bytes with a boundary before training. Capacities are chosen for both this and `rate`."""
        return self.rate

    @property
    def off_policy(self) -> bool:
        """Whether it trains on boundaries of another router than the one that draws in evaluation."""
        return False

    @abstractmethod
    def init_state(self, batch: int) -> PyTree[Array]:
        """The decode state before the first position; None for a router that needs none."""

    @abstractmethod
    def route(
        self,
        hidden: Float[Array, "batch length dim"],
        layout: Layout,
        options: SamplingOptions,
        state: PyTree[Array] = None,
    ) -> Routed:
        """Boundaries drawn according to `options`, and the update of `state` (None in training).

        Position i may depend on positions up to i and on actions before i. With a state every sequence is a single document,
        and `layout.mask` marks its new positions, which come first.
        """

    def __call__(
        self, hidden: Float[Array, "batch length dim"], layout: Layout, options: SamplingOptions
    ) -> Boundaries:
        """The boundaries of whole texts, without a decode state."""
        return self.route(hidden, layout, options).boundaries


class AbstractPositionwiseRouter(AbstractRouter):
    """A router that decides each position from that position alone, so that it needs no decode state."""

    @abstractmethod
    def boundaries(
        self, hidden: Float[Array, "batch length dim"], layout: Layout, options: SamplingOptions
    ) -> Boundaries:
        """Boundaries drawn according to `options`."""

    def init_state(self, batch: int) -> None:
        return None

    def route(
        self,
        hidden: Float[Array, "batch length dim"],
        layout: Layout,
        options: SamplingOptions,
        state: PyTree[Array] = None,
    ) -> Routed:
        return Routed(self.boundaries(hidden, layout, options), None)


class Downsampled(eqx.Module):
    """The `tokens` made of some positions, and the update of `ChunkerState.down`."""

    tokens: Tokens
    update: PyTree[Array]


class Upsampled(eqx.Module):
    """The positions combined with the outputs of the token level, and the update of `ChunkerState.up`."""

    hidden: Float[Array, "batch length dim"]
    update: PyTree[Array]


class ChunkerState(eqx.Module):
    """The decode states of a chunker's downsampling and upsampling."""

    down: PyTree[Array]
    up: PyTree[Array]


class AbstractChunker(eqx.Module):
    """Downsamples positions to tokens and upsamples tokens to positions. It decides whether gradients reach the router.

    One pass serves training (no state) and decoding, where the new positions follow those of the state.
    """

    @property
    def passes_gradient_to(self) -> frozenset[str]:
        """The fields of `Boundaries` that receive a gradient through it (`probs`, `relaxed`); empty if there is none."""
        return frozenset()

    def token_dim(self, dim: int) -> int:
        """The width of tokens made of positions of width `dim`."""
        return dim

    @abstractmethod
    def init_state(self, batch: int, dim: int) -> ChunkerState:
        """The decode state before the first position, for hidden states of width `dim`."""

    @abstractmethod
    def down(
        self,
        hidden: Float[Array, "batch length dim"],
        boundaries: Boundaries,
        *,
        capacity: int,
        mask: Bool[Array, "batch length"] | None = None,
        state: PyTree[Array] = None,
    ) -> Downsampled:
        """The first `capacity` tokens of each sequence, at most. `state` is `ChunkerState.down`; with a state, `mask` marks
        the positions that are not padding."""

    @abstractmethod
    def up(
        self,
        outputs: Float[Array, "batch tokens token_dim"],
        tokens: Tokens,
        hidden: Float[Array, "batch length dim"],
        boundaries: Boundaries,
        *,
        state: PyTree[Array] = None,
    ) -> Upsampled:
        """Combines the positions with the `outputs` of the token level for `tokens`. `state` is `ChunkerState.up`."""


class ObjectiveInputs(eqx.Module):
    """What an objective is computed from, all `batch length`.

    `log_prob_i` and `early_log_prob_i` are log p(x_{i+1} | x_<=i) in nats with and without the token level (the second only
    if the objective needs it); `mask` is True where that prediction exists; `continues_i` is True where position i + 1
    belongs to the same document. `hidden` are the encoder's states, which do not depend on the actions. `target_rate`, if
    given, replaces the rate that the objective was built for. `samples` is the number of consecutive batch rows that are
    draws for the same sequence. `trains_early_exit` is False if an objective of another level already counts the loss of the
    early-exit head; `early_log_prob` then carries no gradient.
    """

    boundaries: Boundaries
    hidden: Float[Array, "batch length dim"]
    log_prob: Float[Array, "batch length"]
    early_log_prob: Float[Array, "batch length"] | None
    mask: Bool[Array, "batch length"]
    continues: Bool[Array, "batch length"]
    target_rate: Float[Array, ""] | None = None
    samples: int = eqx.field(static=True, default=1)
    trains_early_exit: bool = eqx.field(static=True, default=True)


class ObjectiveOutput(eqx.Module):
    """A scalar `loss` to add to the language-model loss, and scalars to log."""

    loss: Float[Array, ""]
    metrics: dict[str, Float[Array, ""]]


class Frozen(eqx.Module, Generic[Value]):
    """A value that training does not change: no gradient reaches it and no optimizer updates it, but checkpoints keep it."""

    value: Value

    def __call__(self) -> Value:
        """The value, with gradients stopped."""
        arrays, rest = eqx.partition(self.value, eqx.is_array)
        return eqx.combine(jax.lax.stop_gradient(arrays), rest)


def has_gradient(leaf: object) -> bool:
    """True for floating-point arrays, and for the `jax.ShapeDtypeStruct` of one."""
    shape = isinstance(leaf, jax.ShapeDtypeStruct) and bool(jnp.issubdtype(leaf.dtype, jnp.inexact))
    return shape or eqx.is_inexact_array(leaf)


def trainable(tree: PyTree) -> PyTree[bool]:
    """True for each leaf that training updates: floating-point arrays, or their shapes, outside any `Frozen`.

    Differentiate and optimize the first part of `eqx.partition(model, trainable(model))`. With `eqx.is_array` instead, weight
    decay would change frozen parts, and optimizers would fail on integer arrays such as those of a vocabulary.
    """

    def mark(part: PyTree) -> PyTree[bool]:
        return jax.tree.map(lambda leaf: has_gradient(leaf) and not isinstance(part, Frozen), part)

    return jax.tree.map(mark, tree, is_leaf=lambda part: isinstance(part, Frozen))


class AbstractObjective(eqx.Module):
    """Trains the router beside the language-model loss."""

    @property
    @abstractmethod
    def needs_early_exit(self) -> bool:
        """Whether `ObjectiveInputs.early_log_prob` is needed, which takes a second head, on the encoder."""

    @abstractmethod
    def __call__(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        """The loss of one batch."""


class AbstractEstimator(eqx.Module):
    """A composition of a router, a chunker and an objective. Raises `TypeError` if one of them is of another kind."""

    router: eqx.AbstractVar[AbstractRouter]
    chunker: eqx.AbstractVar[AbstractChunker]
    objective: eqx.AbstractVar[AbstractObjective]

    def __check_init__(self):
        for name, kind in (("router", AbstractRouter), ("chunker", AbstractChunker), ("objective", AbstractObjective)):
            if not isinstance(part := getattr(self, name), kind):
                raise TypeError(
                    f"the {name} of a {type(self).__name__} must be an {kind.__name__}; got a {type(part).__name__}"
                )


class Estimator(AbstractEstimator):
    """Any router with any chunker and any objective."""

    router: AbstractRouter
    chunker: AbstractChunker
    objective: AbstractObjective
