"""Straight-through Gumbel: relaxed samples whose gradient passes through the pooling."""

from __future__ import annotations

from jaxtyping import PRNGKeyArray

from estimators.base import AbstractChunker, AbstractEstimator, AbstractObjective, AbstractRouter
from estimators.objectives import BinomialPrior
from estimators.routers import MLPRouter


class StraightThroughGumbel(AbstractEstimator):
    """Nawrot et al., "Efficient transformers with dynamic token pooling", as in the authors' code.

    `MLPRouter` draws the boundaries and `BinomialPrior` trains their rate. The chunker should be
    `unet.Chunker(MeanPool(…), Distribute())`, which passes the gradient of the means to the samples. Biased: the gradient is
    that of the relaxed samples.
    """

    router: AbstractRouter
    chunker: AbstractChunker
    objective: AbstractObjective

    def __init__(
        self,
        dim: int,
        *,
        chunker: AbstractChunker,
        target_rate: float = 0.2,
        inner: int | None = None,
        temperature: float = 0.5,
        prior_weight: float = 1.0,
        key: PRNGKeyArray,
    ):
        """`dim` is the width of the encoder's states; see `MLPRouter` and `BinomialPrior` for the rest."""
        self.router = MLPRouter(dim, inner, target_rate=target_rate, temperature=temperature, key=key)
        self.chunker = chunker
        self.objective = BinomialPrior(target_rate, prior_weight)
