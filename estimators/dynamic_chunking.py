"""H-Net's dynamic chunking: boundaries where neighbouring states differ, trained through smoothed upsampling."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from estimators.base import AbstractChunker, AbstractEstimator, AbstractObjective, AbstractRouter
from estimators.bounds import Weight, check_bounds
from estimators.objectives import RatioObjective
from estimators.routers import CosineRouter, Greedy
from estimators.sections import MLPSettings
from estimators.settings import Context, EstimatorConfig, Learns


class DynamicChunking(AbstractEstimator):
    """One stage of Hwang, Wang and Gu, "Dynamic chunking for end-to-end hierarchical sequence modeling" (H-Net eq. 4-10).

    The greedy actions of a `CosineRouter`, with the rate trained by `RatioObjective`. The chunker should be
    `unet.Chunker(Select(), Smooth())`, which passes gradients to the probabilities. For the paper's ablations, turn off
    smoothing or the straight-through confidence in the chunker, or pass another `router` (direct prediction).
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
        ratio_weight: float = 0.03,
        router: AbstractRouter | None = None,
    ):
        """`dim` is the width of the encoder's states; `router` replaces the cosine router."""
        self.router = Greedy(CosineRouter(dim, target_rate=target_rate) if router is None else router)
        self.chunker = chunker
        self.objective = RatioObjective(target_rate, ratio_weight)


@dataclass(frozen=True)
class DynamicChunkingConfig(EstimatorConfig):
    """H-Net's dynamic chunking."""

    section: ClassVar[str] = "hnet"
    default_chunker: ClassVar[str] = "smooth"
    learns_through: ClassVar[Learns | None] = "probs"

    routing: Literal["cosine", "direct"] = "cosine"
    """Boundaries where neighbouring states differ, or scored from each state alone by the perceptron of --mlp."""
    ratio_weight: Weight = 0.03
    """Weight of the ratio loss (H-Net eq. 10)."""
    mlp: MLPSettings = field(default_factory=MLPSettings)

    def __post_init__(self):
        check_bounds(self)

    def build(self, context: Context) -> AbstractEstimator:
        # Greedy actions: with probabilities below one half there would be no boundary to learn from.
        direct = self.mlp.router(context, start=0.5) if self.routing == "direct" else None
        return DynamicChunking(
            context.dim,
            chunker=context.chunker,
            target_rate=context.rate,
            ratio_weight=self.ratio_weight,
            router=direct,
        )
