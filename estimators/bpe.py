"""Boundaries where the tokens of a byte-pair encoding begin."""

from __future__ import annotations

from collections.abc import Sequence

from estimators.base import (
    AbstractChunker,
    AbstractEstimator,
    AbstractObjective,
    AbstractRouter,
)
from estimators.objectives import Imitation, NoObjective
from estimators.routers import Guided, PrefixRouter, PrefixTree


class BPEGuided(AbstractEstimator):
    """Boundaries from a byte-pair encoding: the strongest fixed boundaries in the score-function paper."""

    router: AbstractRouter
    chunker: AbstractChunker
    objective: AbstractObjective

    def __init__(self, vocabulary: Sequence[bytes], *, chunker: AbstractChunker, rate: float | None = None):
        """`rate` is the fraction of bytes at which tokens of the vocabulary begin (see `find_size`), if known."""
        self.router = PrefixRouter(PrefixTree(vocabulary), rate)
        self.chunker, self.objective = chunker, NoObjective()


class Distilled(AbstractEstimator):
    """A `student` policy that learns a `guide`'s boundaries by cross-entropy while the model trains on them.

    In evaluation and generation the student draws the boundaries, without the guide.
    """

    router: AbstractRouter
    chunker: AbstractChunker
    objective: AbstractObjective

    def __init__(
        self, student: AbstractRouter, guide: AbstractRouter, *, chunker: AbstractChunker, weight: float = 0.1
    ):
        """`weight` multiplies the cross-entropy."""
        self.router, self.chunker, self.objective = Guided(student, guide), chunker, Imitation(weight)
