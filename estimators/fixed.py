"""Boundary rules without training: the baselines that a learned policy has to beat."""

from __future__ import annotations

from typing import Literal

from estimators.base import (
    AbstractChunker,
    AbstractEstimator,
    AbstractObjective,
    AbstractRouter,
)
from estimators.objectives import NoObjective
from estimators.routers import EveryNth, RuleRouter, Thinned, UniformRouter
from estimators.routers.rules import character_first, character_last, every_byte, spacelike, whitespace


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

    router: AbstractRouter
    chunker: AbstractChunker
    objective: AbstractObjective

    def __init__(self, *, chunker: AbstractChunker):
        self.router, self.chunker, self.objective = RuleRouter(whitespace, 0), chunker, NoObjective()


class Spacelike(AbstractEstimator):
    """Tokens end where SpaceByte applies its global blocks."""

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
