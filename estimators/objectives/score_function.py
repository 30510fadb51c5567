"""The policy gradient of the likelihood, with a rate target.

"SFE" is Dauncey and Wattenhofer, "You can learn tokenization end-to-end with reinforcement learning".
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from estimators.base import AbstractObjective, ObjectiveInputs, ObjectiveOutput
from estimators.bounds import Rate, Weight, check_bounds
from estimators.equations import (
    action_log_prob,
    bernoulli_entropy,
    masked_mean,
    policy_loss,
    rate_loss,
)
from estimators.objectives.rate import aimed_rate
from estimators.objectives.reductions import AbstractReduction, Credit


class ScoreFunctionObjective(AbstractObjective):
    r"""Policy-gradient loss, rate loss, and the losses of the variance reductions (SFE eq. 22).

    $\lambda_\pi L_\pi + \lambda_{target} L_{target} + \sum$ of the losses of `reductions`. The reductions are applied in order,
    each to the result of the one before. Without any, the return of an action is the summed log-probability of the rest of its
    document. Raises `ValueError` for reductions in an invalid order.
    """

    reductions: tuple[AbstractReduction, ...] = eqx.field(converter=tuple)
    target_rate: Rate = eqx.field(static=True)
    policy_weight: Weight = eqx.field(static=True, default=1e-2)
    rate_weight: Weight = eqx.field(static=True, default=1e-2)

    def __check_init__(self):
        check_bounds(self)

    @property
    def needs_early_exit(self) -> bool:
        return any(reduction.needs_early_exit for reduction in self.reductions)

    def credit(self, inputs: ObjectiveInputs) -> Credit:
        """The credit of each action after all reductions."""
        rewards = jax.lax.stop_gradient(jnp.where(inputs.mask, inputs.log_prob, 0.0))
        credit = Credit(rewards, None, jnp.zeros((), jnp.float32), None)
        for reduction in self.reductions:
            credit = reduction(credit, inputs)
        return credit

    def advantages(self, inputs: ObjectiveInputs) -> Float[Array, "batch length"]:
        """The advantages of the policy loss, without gradient."""
        return jax.lax.stop_gradient(self.credit(inputs).summed(inputs))

    def __call__(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        boundaries = inputs.boundaries
        credit = self.credit(inputs)
        advantages = jax.lax.stop_gradient(credit.summed(inputs))
        log_prob = action_log_prob(boundaries.logits, boundaries.actions)
        policy = policy_loss(log_prob, advantages, boundaries.decided, boundaries.deciding)
        target = aimed_rate(self.target_rate, inputs)
        rate = rate_loss(boundaries.logits, boundaries.probs, target, boundaries.decided)
        metrics = {
            "policy_loss": policy,
            "rate_loss": rate,
            "policy_entropy": masked_mean(bernoulli_entropy(boundaries.logits), boundaries.decided),
            "advantage_rms": jnp.sqrt(masked_mean(advantages**2, boundaries.decided)),
        }
        return ObjectiveOutput(self.policy_weight * policy + self.rate_weight * rate + credit.loss, metrics)
