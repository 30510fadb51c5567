"""Boundary rules without training: the baselines that a learned policy has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from estimators.base import (
    AbstractChunker,
    AbstractEstimator,
    AbstractObjective,
    AbstractRouter,
)
from estimators.bounds import Count, check_bounds
from estimators.objectives import NoObjective
from estimators.routers import EveryNth, RuleRouter, Thinned, UniformRouter
from estimators.routers.rules import character_first, character_last, every_byte, spacelike, whitespace
from estimators.settings import Context, EstimatorConfig


class Uniform(AbstractEstimator):
    """`round(n · target_rate)` boundaries at random positions: the baseline of the score-function paper."""

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
    """Tokens of `every` UTF-8 characters each, with boundaries at the last byte of a character, or at its first.

    A rule for scripts without white space. Raises `ValueError` for `every` below 1.
    """

    router: AbstractRouter
    chunker: AbstractChunker
    objective: AbstractObjective

    def __init__(self, *, chunker: AbstractChunker, every: int = 1, at: Literal["last", "first"] = "last"):
        rule = RuleRouter(character_last, 3) if at == "last" else RuleRouter(character_first, 0)
        self.router, self.chunker, self.objective = Thinned(rule, every), chunker, NoObjective()


class Whitespace(AbstractEstimator):
    """Tokens end at white space."""

    reads_bytes: ClassVar[bool] = True

    router: AbstractRouter
    chunker: AbstractChunker
    objective: AbstractObjective

    def __init__(self, *, chunker: AbstractChunker):
        self.router, self.chunker, self.objective = RuleRouter(whitespace, 0), chunker, NoObjective()


class Spacelike(AbstractEstimator):
    """Tokens end where SpaceByte applies its global blocks."""

    reads_bytes: ClassVar[bool] = True

    router: AbstractRouter
    chunker: AbstractChunker
    objective: AbstractObjective

    def __init__(self, *, chunker: AbstractChunker):
        self.router, self.chunker, self.objective = RuleRouter(spacelike, 1), chunker, NoObjective()


class Isotropic(AbstractEstimator):
    """Every byte is a token: the byte-level baseline, which runs the token level at every byte."""

    router: AbstractRouter
    chunker: AbstractChunker
    objective: AbstractObjective

    def __init__(self, *, chunker: AbstractChunker):
        self.router, self.chunker, self.objective = RuleRouter(every_byte, 0, 1.0), chunker, NoObjective()


@dataclass(frozen=True)
class StrideConfig(EstimatorConfig):
    """Boundaries at every n-th byte."""

    stride: Count | None = None
    """Bytes per token; by default the whole number nearest to 1 / rate."""

    def __post_init__(self):
        check_bounds(self)

    def build(self, context: Context) -> AbstractEstimator:
        return Stride(chunker=context.chunker, stride=round(1 / context.rate) if self.stride is None else self.stride)


@dataclass(frozen=True)
class CharactersConfig(EstimatorConfig):
    """Boundaries at UTF-8 characters; --rate has no effect."""

    outermost_only: ClassVar[bool] = True

    every: Count = 1
    """Characters per token, white space and punctuation among them."""
    at: Literal["last", "first"] = "last"
    """The byte of a character at which a token closes."""

    def __post_init__(self):
        check_bounds(self)

    def build(self, context: Context) -> AbstractEstimator:
        return Characters(chunker=context.chunker, every=self.every, at=self.at)


@dataclass(frozen=True)
class IsotropicConfig(EstimatorConfig):
    """A byte-level baseline: every byte is a token."""

    token_level: bool = True
    """Run the token level at every byte; without it only the windowed byte-level blocks remain."""

    @property
    def makes_tokens(self) -> bool:
        return self.token_level

    def build(self, context: Context) -> AbstractEstimator:
        return Isotropic(chunker=context.chunker)
