"""Boundary rules that nothing trains: the baselines that a learned policy has to beat."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

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
from estimators.equations import logit
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
    continuation = (bytes >= 0x80) & (bytes <= 0xBF)
    return ~(digit | upper | lower | continuation)


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
