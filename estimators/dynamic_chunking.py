"""H-Net's dynamic chunking: boundaries where neighbouring states differ, trained through smoothed upsampling."""

from __future__ import annotations

from estimators.base import AbstractChunker, AbstractEstimator, AbstractObjective, AbstractRouter
from estimators.objectives import RatioObjective
from estimators.routers import CosineRouter, Greedy


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
