"""Straight-through Gumbel: relaxed samples whose gradient passes through the pooling."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from jaxtyping import PRNGKeyArray

from estimators.base import AbstractChunker, AbstractEstimator, AbstractObjective, AbstractRouter
from estimators.bounds import Weight, check_bounds
from estimators.objectives import BinomialPrior
from estimators.routers import MLPRouter
from estimators.sections import MLPSettings
from estimators.settings import Context, EstimatorConfig, Learns


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


@dataclass(frozen=True)
class GumbelConfig(EstimatorConfig):
    """Straight-through Gumbel: relaxed samples whose gradient passes through the means of groups."""

    default_pool: ClassVar[str] = "mean"
    learns_through: ClassVar[Learns | None] = "relaxed"

    mlp: MLPSettings = field(default_factory=MLPSettings)
    prior_weight: Weight = 1.0
    """Weight of the binomial prior."""

    def __post_init__(self):
        check_bounds(self)

    def build(self, context: Context) -> AbstractEstimator:
        return StraightThroughGumbel(
            context.dim,
            chunker=context.chunker,
            target_rate=context.rate,
            inner=self.mlp.inner,
            temperature=self.mlp.temperature,
            prior_weight=self.prior_weight,
            key=context.key,
        )
