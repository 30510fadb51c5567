"""Boundary rules that nothing trains: the baselines that a learned policy has to beat."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from estimators.base import (
    BOS,
    AbstractChunker,
    AbstractEstimator,
    AbstractObjective,
    AbstractRouter,
    AbstractRowRouter,
    Boundaries,
    Draw,
    Layout,
    Routed,
)
from estimators.equations import logit, start_of
from estimators.objectives import NoObjective

CERTAIN = 20.0
"""The log-odds given to a boundary that a rule leaves no choice about."""


def is_whitespace(bytes: Int[Array, "*shape"]) -> Bool[Array, "*shape"]:
    """True for the ASCII white space: tab, line feed, vertical tab, form feed, carriage return, space."""
    return ((bytes >= 9) & (bytes <= 13)) | (bytes == 32)


def is_spacelike(bytes: Int[Array, "*shape"]) -> Bool[Array, "*shape"]:
    """True unless the byte is an ASCII letter or digit or a UTF-8 continuation byte 0x80-0xBF (SpaceByte, section 3)."""
    digit = (bytes >= 48) & (bytes <= 57)
    upper = (bytes >= 65) & (bytes <= 90)
    lower = (bytes >= 97) & (bytes <= 122)
    return ~(digit | upper | lower | is_continuation(bytes))


def is_continuation(bytes: Int[Array, "*shape"]) -> Bool[Array, "*shape"]:
    """True for the bytes 0x80-0xBF, which open no UTF-8 character."""
    return (bytes >= 0x80) & (bytes <= 0xBF)


def character_size(bytes: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
    """How many bytes a UTF-8 character that opens with this byte has (RFC 3629); 0 for continuation bytes, which open none,
    and 1 for 0xF8-0xFF, which occur in no text and mark documents."""
    below = [bytes < bound for bound in (0x80, 0xC0, 0xE0, 0xF0, 0xF8)]
    return jnp.select(below, [jnp.full_like(bytes, size) for size in (1, 0, 2, 3, 4)], jnp.full_like(bytes, 1))


def every_byte(layout: Layout) -> Bool[Array, "batch length"]:
    """Everywhere."""
    return layout.mask


def whitespace(layout: Layout) -> Bool[Array, "batch length"]:
    """At every white-space byte (DPT)."""
    return is_whitespace(layout.bytes)


def spacelike(layout: Layout) -> Bool[Array, "batch length"]:
    """At a spacelike byte whose predecessor is not spacelike, and at BOS (SpaceByte)."""
    here = is_spacelike(layout.bytes)
    predecessor = jnp.pad(here[:, :-1], ((0, 0), (1, 0)))
    return here & ~predecessor | (layout.bytes == BOS)


def character_first(layout: Layout) -> Bool[Array, "batch length"]:
    """At the first byte of every UTF-8 character."""
    return character_size(layout.bytes) > 0


def character_last(layout: Layout) -> Bool[Array, "batch length"]:
    """At the last byte of every UTF-8 character: its first byte tells how many follow, so that the last is known when it comes.

    A character whose first byte lies before the document's begin, or that another cuts short, has none.
    """
    bytes = layout.bytes
    last, inside = character_size(bytes) == 1, is_continuation(bytes)
    for back in (1, 2, 3):
        shifted = jnp.pad(bytes, ((0, 0), (back, 0)))[:, : bytes.shape[1]]
        earlier = jnp.where(layout.numbers >= back, shifted, 0)
        last = last | inside & (character_size(earlier) == back + 1)
        inside = inside & is_continuation(earlier)
    return last


@dataclass(frozen=True)
class EveryNth:
    """At every `stride`-th byte of a document, its first included (MegaByte; H-Net's "pool")."""

    stride: int

    def __post_init__(self):
        if self.stride < 1:
            raise ValueError(f"a stride is at least 1 byte; got {self.stride}")

    def __call__(self, layout: Layout) -> Bool[Array, "batch length"]:
        return layout.numbers % self.stride == 0


def certain(actions: Bool[Array, "batch length"], layout: Layout) -> Boundaries:
    """The boundaries of a rule, which leaves nothing to chance: probabilities 0 and 1, no row `decided` by a policy."""
    actions = (actions | layout.starts) & layout.mask
    logits = jnp.where(actions, CERTAIN, -CERTAIN)
    return Boundaries(actions, logits, actions.astype(jnp.float32), jnp.zeros_like(actions), layout.starts)


class UniformRouter(AbstractRowRouter):
    r"""Exactly $\mathrm{round}(n\,\pi)$ boundaries among the n bytes of a row, drawn uniformly without replacement.

    The first byte of each document and the last byte of the row are forced and count among them (authors' code). With a key
    for each sequence, a row may depend on none after it: then each byte is drawn for itself, with probability π. Without a
    key: the likelier action of each byte, which is no boundary for any rate up to a half.
    """

    target_rate: float = eqx.field(static=True)

    def __check_init__(self):
        logit(self.target_rate)

    @property
    def rate(self) -> float | None:
        return self.target_rate

    def __call__(self, hidden: Float[Array, "batch length dim"], layout: Layout, draw: Draw) -> Boundaries:
        mask, starts = layout.mask, layout.starts
        rate = draw.rate(self.target_rate)
        probs = jnp.broadcast_to(rate, mask.shape)
        actions = draw.actions
        if actions is None:
            if draw.key is None or draw.by_sequence:
                actions = draw.uniforms(layout) < probs
            else:
                actions = self.by_lot(layout, rate, draw.key)
        actions = (actions | starts) & mask
        return Boundaries(actions, jnp.log(probs) - jnp.log1p(-probs), probs, jnp.zeros_like(mask), starts)

    def by_lot(self, layout: Layout, rate: Float[Array, ""], key: PRNGKeyArray) -> Bool[Array, "batch length"]:
        """The boundaries of each row, forced ones first, the others by lot."""
        mask = layout.mask
        last = mask & (jnp.cumsum(mask, axis=1) == jnp.sum(mask, axis=1, keepdims=True))
        priority = jnp.where(layout.starts | last, 2.0, jax.random.uniform(key, mask.shape))
        order = jnp.argsort(jnp.where(mask, priority, -1.0), axis=1, descending=True)
        count = jnp.sum(mask, axis=1, keepdims=True).astype(jnp.float32)
        budget = jnp.round(count * rate).astype(jnp.int32)
        return jnp.argsort(order, axis=1) < budget


class RuleRouter(AbstractRouter):
    """Boundaries wherever a pure function of the layout asks for one.

    `rule` may read bytes up to and including its own row, nothing later, and of those before it the last `reach` only: it is
    given as many where a text is routed row by row. `expected_rate` is the share of bytes it picks where that is known
    beforehand, None where the text decides.
    """

    rule: Callable[[Layout], Bool[Array, "batch length"]] = eqx.field(static=True)
    reach: int = eqx.field(static=True)
    expected_rate: float | None = eqx.field(static=True, default=None)

    @property
    def rate(self) -> float | None:
        return self.expected_rate

    def __call__(self, hidden: Float[Array, "batch length dim"], layout: Layout, draw: Draw) -> Boundaries:
        return certain(self.rule(layout) if draw.actions is None else draw.actions, layout)

    def prefill(self, hidden: Float[Array, "batch length dim"], layout: Layout, draw: Draw) -> Routed:
        """The memory is the last `reach` bytes."""
        place = jnp.sum(layout.mask, axis=1, keepdims=True) - self.reach + jnp.arange(self.reach)
        last = jnp.take_along_axis(layout.bytes, jnp.maximum(place, 0), axis=1, mode="clip")
        return Routed(self(hidden, layout, draw), last)

    def step(
        self, hidden: Float[Array, "batch 1 dim"], layout: Layout, draw: Draw, memory: Int[Array, "batch reach"]
    ) -> Routed:
        bytes, before = jnp.concatenate([memory, layout.bytes], axis=1), layout.numbers[:, 0] - self.reach
        numbers = before[:, None] + jnp.arange(self.reach + 1, dtype=jnp.int32)
        seen = Layout(bytes, numbers, jnp.zeros_like(bytes), numbers >= 0, before)
        actions = self.rule(seen)[:, -1:] if draw.actions is None else draw.actions
        return Routed(certain(actions, layout), bytes[:, 1:])


class Thinned(AbstractRouter):
    """Every n-th boundary of another rule in each document, counted from the one at its start, which is the first taken.

    Raises `ValueError` for `every` below 1.
    """

    rule: RuleRouter
    every: int = eqx.field(static=True)

    def __check_init__(self):
        if self.every < 1:
            raise ValueError(f"every n-th boundary is taken, for an n of at least 1; got {self.every}")

    @property
    def rate(self) -> float | None:
        return None if self.rule.rate is None else self.rule.rate / self.every

    def __call__(self, hidden: Float[Array, "batch length dim"], layout: Layout, draw: Draw) -> Boundaries:
        return self.prefill(hidden, layout, draw).boundaries

    def prefill(self, hidden: Float[Array, "batch length dim"], layout: Layout, draw: Draw) -> Routed:
        """The memory is the rule's, and how many boundaries the rule has asked for, whatever was drawn instead."""
        asked = self.rule.prefill(hidden, layout, dataclasses.replace(draw, actions=None))
        actions = asked.boundaries.actions
        one = actions.astype(jnp.int32)
        before = jnp.cumsum(one, axis=1) - one
        number = before - jnp.take_along_axis(before, start_of(layout.starts), axis=1)
        return Routed(self._taken(actions, number, layout, draw), (asked.memory, jnp.sum(one, axis=1)))

    def step(self, hidden: Float[Array, "batch 1 dim"], layout: Layout, draw: Draw, memory: PyTree[Array]) -> Routed:
        inner, count = memory
        asked = self.rule.step(hidden, layout, dataclasses.replace(draw, actions=None), inner)
        actions = asked.boundaries.actions
        boundaries = self._taken(actions, count[:, None], layout, draw)
        return Routed(boundaries, (asked.memory, count + actions[:, 0].astype(jnp.int32)))

    def _taken(
        self, asked: Bool[Array, "batch length"], number: Int[Array, "batch length"], layout: Layout, draw: Draw
    ) -> Boundaries:
        return certain(asked & (number % self.every == 0) if draw.actions is None else draw.actions, layout)


class Uniform(AbstractEstimator):
    """`round(n · target_rate)` boundaries at random places: the baseline of the score-function paper."""

    router: AbstractRouter
    chunker: AbstractChunker
    objective: AbstractObjective

    def __init__(self, *, chunker: AbstractChunker, target_rate: float = 0.2):
        """Raises `ValueError` for a rate outside (0, 1)."""
        self.router, self.chunker, self.objective = UniformRouter(target_rate), chunker, NoObjective()


class Stride(AbstractEstimator):
    """Tokens of `stride` bytes each."""

    router: AbstractRouter
    chunker: AbstractChunker
    objective: AbstractObjective

    def __init__(self, *, chunker: AbstractChunker, stride: int = 5):
        """Raises `ValueError` for a stride below 1."""
        rule = EveryNth(stride)
        self.router, self.chunker, self.objective = RuleRouter(rule, 0, 1.0 / stride), chunker, NoObjective()


class Characters(AbstractEstimator):
    """Tokens of `every` UTF-8 characters each, closed by the last byte of a character, or by its first.

    Where a script has no white space, these are the units a rule can know. Raises `ValueError` for `every` below 1.
    """

    router: AbstractRouter
    chunker: AbstractChunker
    objective: AbstractObjective

    def __init__(self, *, chunker: AbstractChunker, every: int = 1, at: Literal["last", "first"] = "last"):
        rule = RuleRouter(character_last, 3) if at == "last" else RuleRouter(character_first, 0)
        self.router, self.chunker, self.objective = Thinned(rule, every), chunker, NoObjective()


class Whitespace(AbstractEstimator):
    """Tokens end at white space."""

    router: AbstractRouter
    chunker: AbstractChunker
    objective: AbstractObjective

    def __init__(self, *, chunker: AbstractChunker):
        self.router, self.chunker, self.objective = RuleRouter(whitespace, 0), chunker, NoObjective()


class Spacelike(AbstractEstimator):
    """Tokens end where SpaceByte puts its global blocks."""

    router: AbstractRouter
    chunker: AbstractChunker
    objective: AbstractObjective

    def __init__(self, *, chunker: AbstractChunker):
        self.router, self.chunker, self.objective = RuleRouter(spacelike, 1), chunker, NoObjective()


class Isotropic(AbstractEstimator):
    """Every byte is a token: the byte-level baseline, with the whole token level run at every byte."""

    router: AbstractRouter
    chunker: AbstractChunker
    objective: AbstractObjective

    def __init__(self, *, chunker: AbstractChunker):
        self.router, self.chunker, self.objective = RuleRouter(every_byte, 0, 1.0), chunker, NoObjective()
