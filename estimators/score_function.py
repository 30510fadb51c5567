"""The score-function estimator: a policy draws boundaries and is trained by policy gradient on the log-likelihood."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from estimators.base import AbstractChunker, AbstractEstimator, AbstractObjective, AbstractRouter, Estimator
from estimators.bounds import Positive, check_bounds
from estimators.objectives import ScoreFunctionObjective
from estimators.objectives.reductions import AbstractReduction, BatchCentre, Discount, EarlyExit, ImportanceWeight
from estimators.routers import Bernoulli, CosineRouter, OffPolicy, WindowedPolicy
from estimators.sections import MLPSettings, PolicySettings, ScoreFunctionSettings
from estimators.settings import Context, EstimatorConfig


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


@dataclass(frozen=True)
class UnderScoreFunction(EstimatorConfig):
    """A router under the score-function objective."""

    sfe: ScoreFunctionSettings = field(default_factory=ScoreFunctionSettings)

    @abstractmethod
    def router(self, context: Context) -> AbstractRouter:
        """The router."""

    def build(self, context: Context) -> AbstractEstimator:
        return Estimator(self.router(context), context.chunker, self.sfe.objective(context))


@dataclass(frozen=True)
class ScoreFunctionConfig(UnderScoreFunction):
    """The score-function estimator: a windowed policy that learns which boundaries raise the likelihood."""

    policy: PolicySettings = field(default_factory=PolicySettings)

    def router(self, context: Context) -> AbstractRouter:
        return self.policy.router(context)


@dataclass(frozen=True)
class SmoothedConfig(ScoreFunctionConfig):
    """The same with H-Net's smoothing of tokens, which passes a second gradient to the policy."""

    default_chunker: ClassVar[str] = "smooth"


@dataclass(frozen=True)
class OffPolicyConfig(ScoreFunctionConfig):
    """Boundaries drawn independently at the target rate; importance weights train the policy on them."""

    section: ClassVar[str] = "offpolicy"

    clip: Positive | None = 1.0
    """Upper bound of importance weights; None leaves them unbounded and unbiased."""

    def __post_init__(self):
        check_bounds(self)

    def build(self, context: Context) -> AbstractEstimator:
        router = OffPolicy(self.router(context), Bernoulli(context.rate))
        return Estimator(router, context.chunker, self.sfe.objective(context, (ImportanceWeight(self.clip),)))


@dataclass(frozen=True)
class CosineConfig(UnderScoreFunction):
    """H-Net's cosine router, sampled."""

    def router(self, context: Context) -> AbstractRouter:
        return CosineRouter(context.dim, target_rate=context.rate)


@dataclass(frozen=True)
class MLPConfig(UnderScoreFunction):
    """A perceptron that scores each position alone."""

    mlp: MLPSettings = field(default_factory=MLPSettings)

    def router(self, context: Context) -> AbstractRouter:
        return self.mlp.router(context)
