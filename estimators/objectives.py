"""What trains the router beside the language-model loss.

"SFE" is Dauncey and Wattenhofer, "You can learn tokenization end-to-end with reinforcement learning"; "H-Net" is Hwang,
Wang and Gu, "Dynamic chunking for end-to-end hierarchical sequence modeling"; "DPT" is Nawrot et al., "Efficient
transformers with dynamic token pooling".
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from estimators.base import AbstractObjective, ObjectiveOutput, Signal
from estimators.equations import (
    action_log_prob,
    bernoulli_entropy,
    binomial_prior_loss,
    logit,
    masked_mean,
    policy_loss,
    rate_loss,
    ratio_loss,
)
from estimators.reductions import AbstractReduction, Credit


class ScoreFunctionObjective(AbstractObjective):
    r"""The policy gradient of the likelihood, a rate target, and the losses of the variance reductions (SFE eq. 22).

    $\lambda_\pi L_\pi + \lambda_{target} L_{target} + \sum$ of the losses of `reductions`, which are applied in order, each
    to the credit that the one before it left. Without any, the credit of a decision is the summed log-likelihood of
    everything after it. Raises `ValueError` where the order of the reductions makes no sense.
    """

    reductions: tuple[AbstractReduction, ...]
    target_rate: float = eqx.field(static=True)
    policy_weight: float = eqx.field(static=True, default=1e-2)
    rate_weight: float = eqx.field(static=True, default=1e-2)

    @property
    def needs_early_exit(self) -> bool:
        return any(reduction.needs_early_exit for reduction in self.reductions)

    def credit(self, signal: Signal) -> Credit:
        """What each decision is credited with once every reduction has been applied."""
        rewards = jax.lax.stop_gradient(jnp.where(signal.mask, signal.log_lik, 0.0))
        credit = Credit(rewards, None, jnp.zeros(()), None)
        for reduction in self.reductions:
            credit = reduction(credit, signal)
        return credit

    def advantages(self, signal: Signal) -> Float[Array, "batch length"]:
        """The credit as the policy loss sees it: returns, with no gradient."""
        return jax.lax.stop_gradient(self.credit(signal).summed(signal))

    def __call__(self, signal: Signal) -> ObjectiveOutput:
        boundaries = signal.boundaries
        credit = self.credit(signal)
        advantages = jax.lax.stop_gradient(credit.summed(signal))
        log_prob = action_log_prob(boundaries.logits, boundaries.actions)
        policy = policy_loss(log_prob, advantages, boundaries.decided)
        target = aimed_rate(self.target_rate, signal)
        rate = rate_loss(boundaries.logits, boundaries.probs, target, boundaries.decided)
        metrics = {
            "policy_loss": policy,
            "rate_loss": rate,
            "policy_entropy": masked_mean(bernoulli_entropy(boundaries.logits), boundaries.decided),
            "advantage_rms": jnp.sqrt(masked_mean(advantages**2, boundaries.decided)),
        }
        return ObjectiveOutput(self.policy_weight * policy + self.rate_weight * rate + credit.loss, metrics)


class RatioObjective(AbstractObjective):
    r"""H-Net's ratio loss with $1/\pi_{target}$ bytes per chunk, times `weight` (H-Net eq. 10 and section 3.1).

    It alone holds the rate; what else the router learns reaches it through the chunker.
    """

    target_rate: float = eqx.field(static=True)
    weight: float = eqx.field(static=True, default=0.03)

    def __check_init__(self):
        logit(self.target_rate)

    @property
    def needs_early_exit(self) -> bool:
        return False

    def __call__(self, signal: Signal) -> ObjectiveOutput:
        boundaries = signal.boundaries
        chunk_size = 1.0 / aimed_rate(self.target_rate, signal)
        valid = boundaries.decided | boundaries.starts
        loss = ratio_loss(boundaries.actions, boundaries.probs, chunk_size, valid)
        return ObjectiveOutput(self.weight * loss, {"ratio_loss": loss})


class BinomialPrior(AbstractObjective):
    r"""The negative log-probability, per row, of as many boundaries under $\mathrm{Binomial}(n, \pi_{target})$ (DPT).

    Its gradient passes through `Boundaries.relaxed`. Raises `ValueError` for boundaries without it.
    """

    target_rate: float = eqx.field(static=True)
    weight: float = eqx.field(static=True, default=1.0)

    def __check_init__(self):
        logit(self.target_rate)

    @property
    def needs_early_exit(self) -> bool:
        return False

    def __call__(self, signal: Signal) -> ObjectiveOutput:
        boundaries = signal.boundaries
        if boundaries.relaxed is None:
            raise ValueError("BinomialPrior needs boundaries with a relaxed form, such as MLPRouter draws")
        loss = binomial_prior_loss(boundaries.relaxed, aimed_rate(self.target_rate, signal), boundaries.decided)
        return ObjectiveOutput(self.weight * loss, {"prior_loss": loss})


class Imitation(AbstractObjective):
    r"""Cross-entropy of the router against boundaries that something else drew: $-\lambda\,\mathrm{mean}_i \log\pi(a_i)$.

    With a `Guided` router this distils the guide into a policy that needs it no longer.
    """

    weight: float = eqx.field(static=True, default=0.1)

    @property
    def needs_early_exit(self) -> bool:
        return False

    def __call__(self, signal: Signal) -> ObjectiveOutput:
        boundaries = signal.boundaries
        loss = -masked_mean(action_log_prob(boundaries.logits, boundaries.actions), boundaries.decided)
        return ObjectiveOutput(self.weight * loss, {"imitation_loss": loss})


class NoObjective(AbstractObjective):
    """Nothing to train: the boundaries follow a rule."""

    @property
    def needs_early_exit(self) -> bool:
        return False

    def __call__(self, signal: Signal) -> ObjectiveOutput:
        return ObjectiveOutput(jnp.zeros(()), {})


def aimed_rate(built_for: float, signal: Signal) -> Float[Array, ""]:
    """The rate to aim at now: the one of the signal, or the one that the objective was built for."""
    return jnp.asarray(built_for, jnp.float32) if signal.target_rate is None else signal.target_rate
