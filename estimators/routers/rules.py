"""Boundaries by rules on the bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from estimators.base import (
    BOS,
    AbstractRouter,
    Boundaries,
    Layout,
    Routed,
    SamplingOptions,
)
from estimators.bounds import Count, check_bounds
from estimators.decode_state import last_positions
from estimators.equations import start_of

CERTAIN = 20.0
"""The log-odds of the boundaries of a deterministic rule."""


def is_whitespace(bytes: Int[Array, "*shape"]) -> Bool[Array, "*shape"]:
    """True for ASCII white space: tab, line feed, vertical tab, form feed, carriage return, space."""
    return ((bytes >= 9) & (bytes <= 13)) | (bytes == 32)


def is_spacelike(bytes: Int[Array, "*shape"]) -> Bool[Array, "*shape"]:
    """True unless the byte is an ASCII letter or digit or a UTF-8 continuation byte 0x80-0xBF (SpaceByte, section 3)."""
    digit = (bytes >= 48) & (bytes <= 57)
    upper = (bytes >= 65) & (bytes <= 90)
    lower = (bytes >= 97) & (bytes <= 122)
    return ~(digit | upper | lower | is_continuation(bytes))


def is_continuation(bytes: Int[Array, "*shape"]) -> Bool[Array, "*shape"]:
    """True for 0x80-0xBF, the continuation bytes of UTF-8."""
    return (bytes >= 0x80) & (bytes <= 0xBF)


def character_size(bytes: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
    """The number of bytes of a UTF-8 character with this first byte (RFC 3629); 0 for continuation bytes, and 1 for 0xF8-0xFF,
    which occur in no text (BOS and EOS are among them)."""
    below = [bytes < bound for bound in (0x80, 0xC0, 0xE0, 0xF0, 0xF8)]
    return jnp.select(below, [jnp.full_like(bytes, size) for size in (1, 0, 2, 3, 4)], jnp.full_like(bytes, 1))


def every_byte(layout: Layout) -> Bool[Array, "batch length"]:
    """At every byte."""
    return layout.mask


def whitespace(layout: Layout) -> Bool[Array, "batch length"]:
    """At every white-space byte (DPT)."""
    return is_whitespace(layout.bytes)


def spacelike(layout: Layout) -> Bool[Array, "batch length"]:
    """At a spacelike byte whose predecessor is not spacelike, and at BOS (SpaceByte, section 3)."""
    here = is_spacelike(layout.bytes)
    predecessor = jnp.pad(here[:, :-1], ((0, 0), (1, 0)))
    return here & ~predecessor | (layout.bytes == BOS)


def character_first(layout: Layout) -> Bool[Array, "batch length"]:
    """At the first byte of every UTF-8 character."""
    return character_size(layout.bytes) > 0


def character_last(layout: Layout) -> Bool[Array, "batch length"]:
    """At the last byte of every UTF-8 character. This is causal, since the first byte tells how many follow.

    There is no boundary for a character that is cut short, or whose first byte lies before the start of the document.
    """
    return bytes_missing(layout) == 0


def bytes_missing(layout: Layout) -> Int[Array, "batch length"]:
    """How many bytes of its UTF-8 character follow each byte, as the character's first byte tells; -1 for a continuation byte of
    no character: one too many, or of a character whose first byte lies before the start of the document. Reads 3 bytes back."""
    bytes = layout.bytes
    missing, inside = character_size(bytes) - 1, is_continuation(bytes)
    for back in (1, 2, 3):
        shifted = jnp.pad(bytes, ((0, 0), (back, 0)))[:, : bytes.shape[1]]
        earlier = jnp.where(layout.document_positions >= back, shifted, 0)
        missing = jnp.where(inside & (character_size(earlier) > back), character_size(earlier) - back - 1, missing)
        inside = inside & is_continuation(earlier)
    return missing


@dataclass(frozen=True)
class EveryNth:
    """At every `stride`-th byte of a document, starting with the first (MegaByte; H-Net's "pool")."""

    stride: Count

    def __post_init__(self):
        check_bounds(self)

    def __call__(self, layout: Layout) -> Bool[Array, "batch length"]:
        return layout.document_positions % self.stride == 0


def certain(actions: Bool[Array, "batch length"], layout: Layout) -> Boundaries:
    """The boundaries of a deterministic rule: probabilities 0 and 1, and no position `decided` by a policy."""
    actions = (actions | layout.starts) & layout.mask
    logits = jnp.where(actions, jnp.float32(CERTAIN), jnp.float32(-CERTAIN))
    return Boundaries(actions, logits, actions.astype(jnp.float32), jnp.zeros_like(actions), layout.starts)


class RuleRouter(AbstractRouter):
    """Boundaries where `rule`, a pure function of the layout, is True.

    At each position, `rule` may depend on the byte there and on the `reach` bytes before it, which the decode state keeps.
    `expected_rate` is the fraction of bytes with a boundary, if it does not depend on the text; otherwise None.
    """

    rule: Callable[[Layout], Bool[Array, "batch length"]] = eqx.field(static=True)
    reach: int = eqx.field(static=True)
    expected_rate: float | None = eqx.field(static=True, default=None)

    @property
    def rate(self) -> float | None:
        return self.expected_rate

    def init_state(self, batch: int) -> Int[Array, "batch reach"]:
        """The last `reach` bytes."""
        return jnp.zeros((batch, self.reach), jnp.int32)

    def route(
        self,
        hidden: Float[Array, "batch length dim"],
        layout: Layout,
        options: SamplingOptions,
        state: Int[Array, "batch reach"] | None = None,
    ) -> Routed:
        if state is None:
            return Routed(certain(self.rule(layout) if options.actions is None else options.actions, layout), None)
        seen = layout.preceded_by(state)
        actions = self.rule(seen)[:, self.reach :] if options.actions is None else options.actions
        return Routed(certain(actions, layout), last_positions(state, layout.bytes, layout.lengths))


class Thinned(AbstractRouter):
    """Every n-th boundary of a rule, counted in each document from the boundary at its start, which is kept.

    n is `every`. Raises `ValueError` for one below 1.
    """

    rule: RuleRouter
    every: Count = eqx.field(static=True)

    def __check_init__(self):
        check_bounds(self)

    @property
    def rate(self) -> float | None:
        return None if self.rule.rate is None else self.rule.rate / self.every

    def init_state(self, batch: int) -> PyTree[Array]:
        """The rule's state, and its number of boundaries so far (those of the rule, even if other actions were given)."""
        return self.rule.init_state(batch), jnp.zeros((batch,), jnp.int32)

    def route(
        self,
        hidden: Float[Array, "batch length dim"],
        layout: Layout,
        options: SamplingOptions,
        state: PyTree[Array] = None,
    ) -> Routed:
        of_rule, count = (None, None) if state is None else state
        asked = self.rule.route(hidden, layout, dataclasses.replace(options, actions=None), of_rule)
        one = asked.boundaries.actions.astype(jnp.int32)
        before = jnp.cumsum(one, axis=1) - one
        # Boundaries count from the start of the document, which lies among these positions or, with a state, before them.
        number = before - (
            jnp.take_along_axis(before, start_of(layout.starts), axis=1) if count is None else -count[:, None]
        )
        taken = asked.boundaries.actions & (number % self.every == 0)
        boundaries = certain(taken if options.actions is None else options.actions, layout)
        return Routed(boundaries, None if count is None else (asked.update, count + jnp.sum(one, axis=1)))
