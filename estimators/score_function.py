"""The score-function estimator: a policy draws boundaries and is trained by policy gradient on the log-likelihood."""

from __future__ import annotations

from collections.abc import Sequence

from estimators.base import AbstractChunker, AbstractEstimator, AbstractObjective, AbstractRouter
from estimators.objectives import ScoreFunctionObjective
from estimators.objectives.reductions import AbstractReduction, BatchCentre, Discount, EarlyExit
from estimators.routers import WindowedPolicy


class ScoreFunction(AbstractEstimator):
    """Dauncey and Wattenhofer's estimator (SFE eq. 10-22): `WindowedPolicy` trained by `ScoreFunctionObjective`.

    Works with any chunker, since no gradient needs to pass through the downsampling. The defaults are the paper's. `window`
    counts past actions, so the paper's "filter 8" is a window of 7.
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
        reductions: Sequence[AbstractReduction] = (EarlyExit(), Discount(), BatchCentre()),
        window: int = 7,
        scale: float = 16.0,
        cap: float = 6.0,
        policy_weight: float = 1e-2,
        rate_weight: float = 1e-2,
    ):
        """`dim` is the width of the encoder's states; see `WindowedPolicy` and `ScoreFunctionObjective` for the rest."""
        self.router = WindowedPolicy(dim, window=window, target_rate=target_rate, scale=scale, cap=cap)
        self.chunker = chunker
        self.objective = ScoreFunctionObjective(tuple(reductions), target_rate, policy_weight, rate_weight)
