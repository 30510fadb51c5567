"""Boundaries before bytes that a small language model does not foresee (BLT)."""

from __future__ import annotations

from estimators.base import (
    AbstractChunker,
    AbstractEstimator,
    AbstractObjective,
    AbstractRouter,
)
from estimators.objectives import NoObjective
from estimators.routers import EntropyRouter


class Entropy(AbstractEstimator):
    """A token closes where the next byte is hard to predict (BLT)."""

    router: AbstractRouter
    chunker: AbstractChunker
    objective: AbstractObjective

    def __init__(self, router: EntropyRouter, *, chunker: AbstractChunker):
        """`router` has the byte model and the rule."""
        self.router, self.chunker, self.objective = router, chunker, NoObjective()
