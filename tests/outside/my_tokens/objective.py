"""An objective with settings of its own: the score function with a reward for staying undecided.

python -m experiments.run --estimator exploring --exploring.entropy-weight 0.01 --sfe.policy-weight 0.02 --policy.window 3
"""

import dataclasses
from dataclasses import dataclass, field

import equinox as eqx

from estimators import (
    AbstractEstimator,
    AbstractObjective,
    Context,
    Estimator,
    EstimatorConfig,
    ObjectiveInputs,
    ObjectiveOutput,
    PolicySettings,
    ScoreFunctionSettings,
)
from estimators.equations import bernoulli_entropy, masked_mean


class Exploring(AbstractObjective):
    r"""$L - \lambda\,\mathrm{mean}_i H(p_i)$ for another objective's loss L; H in nats."""

    objective: AbstractObjective
    weight: float = eqx.field(static=True)

    @property
    def needs_early_exit(self) -> bool:
        return self.objective.needs_early_exit

    def __call__(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        output = self.objective(inputs)
        entropy = masked_mean(bernoulli_entropy(inputs.boundaries.logits), inputs.boundaries.decided)
        return dataclasses.replace(output, loss=output.loss - self.weight * entropy)


@dataclass(frozen=True)
class ExploringConfig(EstimatorConfig):
    """A windowed policy that is rewarded for staying undecided."""

    entropy_weight: float = 1e-3
    """Weight of the policy's mean entropy."""
    sfe: ScoreFunctionSettings = field(default_factory=ScoreFunctionSettings)
    policy: PolicySettings = field(default_factory=PolicySettings)

    def __post_init__(self):
        if not self.entropy_weight >= 0:
            raise ValueError(f"entropy-weight cannot be negative; got {self.entropy_weight}")

    def build(self, context: Context) -> AbstractEstimator:
        objective = Exploring(self.sfe.objective(context), self.entropy_weight)
        return Estimator(self.policy.router(context), context.chunker, objective)
