"""The score-function estimator: boundaries drawn by a policy, the policy trained by the likelihood that followed."""

from __future__ import annotations

from estimators.base import AbstractChunker, AbstractEstimator, AbstractObjective, AbstractRouter
from estimators.objectives import ScoreFunctionObjective
from estimators.reductions import AbstractReduction, BatchCentre, Discount, EarlyExit
from estimators.routers import WindowedPolicy


class ScoreFunction(AbstractEstimator):
    """Dauncey and Wattenhofer's estimator (SFE eq. 10-22): `WindowedPolicy` under `ScoreFunctionObjective`.

    Works with any chunker, since no gradient has to pass through the downsampling. The defaults are the paper's; `window`
    counts past boundaries, so the paper's "filter 8" is 7.
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
        reductions: tuple[AbstractReduction, ...] = (EarlyExit(), Discount(), BatchCentre()),
        window: int = 7,
        scale: float = 16.0,
        cap: float = 6.0,
        policy_weight: float = 1e-2,
        rate_weight: float = 1e-2,
    ):
        """`dim` is the width of the encoder's states; see `WindowedPolicy` and `ScoreFunctionObjective` for the rest."""
        self.router = WindowedPolicy(dim, window=window, target_rate=target_rate, scale=scale, cap=cap)
        self.chunker = chunker
        self.objective = ScoreFunctionObjective(reductions, target_rate, policy_weight, rate_weight)
