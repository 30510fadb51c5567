"""Sections: settings that several estimators share."""

from __future__ import annotations

from dataclasses import dataclass, field

from estimators.bounds import Lags, Positive, Samples, Weight, Width, check_bounds
from estimators.equations import logit
from estimators.lookup import Kind
from estimators.objectives import ScoreFunctionObjective
from estimators.objectives.reductions import (
    AbstractReduction,
    BatchCentre,
    Critic,
    Discount,
    EarlyExit,
    GeneralisedAdvantage,
    ImportanceWeight,
    SampleCentre,
)
from estimators.routers import MLPRouter, WindowedPolicy
from estimators.settings import Context

EARLY_EXIT, BATCH_CENTRE, SAMPLE_CENTRE = "early-exit", "batch-centre", "sample-centre"

REDUCTIONS = Kind(
    "--sfe.reductions",
    "caesura.reductions",
    {
        EARLY_EXIT: EarlyExit,
        "discount": Discount,
        "generalised-advantage": GeneralisedAdvantage,
        "critic": Critic,
        BATCH_CENTRE: BatchCentre,
        SAMPLE_CENTRE: SampleCentre,
        "importance-weight": ImportanceWeight,
    },
    (AbstractReduction,),
    frozenset({"dim", "target_rate", "key"}),
)
"""Variance reductions of the score function, by name."""


@dataclass(frozen=True)
class PolicySettings:
    """The windowed policy of the score-function paper."""

    window: Lags = 7
    """Past boundaries that the policy sees; 0 for a policy without memory."""
    scale: Positive = 16.0
    """Divisor of the policy's raw logits (eq. 18); a smaller one makes the policy move faster."""
    cap: Positive = 6.0
    """Bound of the policy's logits in training (eq. 19)."""

    def __post_init__(self):
        check_bounds(self)

    def check(self, rate: float, sequences: int) -> None:
        """Raise `ValueError` for a rate that the policy cannot reach."""
        if abs(logit(rate)) >= self.cap:
            raise ValueError(f"a rate of {rate} lies beyond policy logits capped at {self.cap}: raise --policy.cap")

    def router(self, context: Context) -> WindowedPolicy:
        """The policy."""
        return WindowedPolicy(context.dim, window=self.window, target_rate=context.rate, scale=self.scale, cap=self.cap)


@dataclass(frozen=True)
class ScoreFunctionSettings:
    """The score-function objective."""

    reductions: tuple[str, ...] = field(default=(EARLY_EXIT, "discount", BATCH_CENTRE), metadata={"kind": REDUCTIONS})
    """Variance reductions in the order in which they apply: early-exit, discount, generalised-advantage, critic, batch-centre,
    sample-centre, importance-weight, or package.module:Class. The settings of each are flags of its own."""
    samples: Samples = 1
    """Samples of boundaries for each sequence and encoder pass; sample-centre needs 2 or more."""
    policy_weight: Weight = 1e-2
    """Weight of the policy loss (eq. 22)."""
    rate_weight: Weight | None = None
    """Weight of the loss that holds the rate; by default 0.01, and 0.3 for a chunker that smooths, whose own gradient moves the
    probabilities as much as the policy's."""

    def __post_init__(self):
        check_bounds(self)
        if SAMPLE_CENTRE in self.reductions and self.samples < 2:
            raise ValueError("sample-centre compares samples for one sequence: ask for --sfe.samples 2 or more")

    def check(self, rate: float, sequences: int) -> None:
        """Raise `ValueError` for batches that a reduction can do nothing with."""
        if BATCH_CENTRE in self.reductions and sequences * self.samples < 2:
            raise ValueError(
                "centred returns of a batch of one sequence are all zero: use a larger --batch, or leave batch-centre out of "
                "--sfe.reductions"
            )

    def objective(self, context: Context, first: tuple[AbstractReduction, ...] = ()) -> ScoreFunctionObjective:
        """The objective, with `first` before the reductions asked for. Raises `ValueError` for an impossible order."""
        steps = [*first]
        for name in self.reductions:
            step = context.part(REDUCTIONS, name)
            assert isinstance(step, AbstractReduction)
            steps.append(step)
        weight = self.rate_weight
        if weight is None:
            weight = 0.3 if "probs" in context.chunker.passes_gradient_to else 1e-2
        return ScoreFunctionObjective(tuple(steps), context.rate, self.policy_weight, weight)


@dataclass(frozen=True)
class MLPSettings:
    """The perceptron that scores each position alone."""

    inner: Width | None = None
    """Width of its hidden layer; by default that of the model."""
    temperature: Positive = 0.5
    """Temperature of the relaxed samples."""

    def __post_init__(self):
        check_bounds(self)

    def router(self, context: Context, start: float | None = None) -> MLPRouter:
        """The router; `start`: its first probability, by default the target rate."""
        return MLPRouter(
            context.dim,
            self.inner,
            target_rate=context.rate,
            temperature=self.temperature,
            start=start,
            key=context.key,
        )
