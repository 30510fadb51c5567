"""H-Net's dynamic chunking: boundaries where neighbouring states differ, trained through a smoothed dechunking."""

from __future__ import annotations

from estimators.base import AbstractChunker, AbstractEstimator, AbstractObjective, AbstractRouter
from estimators.objectives import RatioObjective
from estimators.routers import CosineRouter, Likelier


class DynamicChunking(AbstractEstimator):
    """Hwang, Wang and Gu, "Dynamic chunking for end-to-end hierarchical sequence modeling", one stage (H-Net eq. 4-10).

    The likelier action of a `CosineRouter`, held to its rate by `RatioObjective`; the chunker, meant to be
    `unet.SelectSmooth`, passes gradients to the probabilities. The paper's ablations are other pieces in the same places: no
    smoothing or no straight-through confidence in the chunker, another `router` for direct prediction.
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
        """`dim` is the width of the encoder's states; `router` takes the place of the cosine router."""
        self.router = Likelier(CosineRouter(dim, target_rate=target_rate) if router is None else router)
        self.chunker = chunker
        self.objective = RatioObjective(target_rate, ratio_weight)
