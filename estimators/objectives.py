"""What trains the router beside the language-model loss: the score function and its variance reductions, or nothing.

"SFE" is Dauncey and Wattenhofer, "You can learn tokenization end-to-end with reinforcement learning".
"""

from __future__ import annotations

from abc import abstractmethod

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from estimators.base import AbstractObjective, ObjectiveOutput, Signal
from estimators.equations import (
    action_log_prob,
    batch_centred,
    bernoulli_entropy,
    discounted_returns,
    masked_mean,
    policy_loss,
    rate_loss,
)


class Credit(eqx.Module):
    """What each decision is credited with, on its way from likelihood to advantage.

    `rewards_i` belongs to the prediction made at row i; `returns_i` is what followed the decision at row i, None until a
    `Discount` has summed the rewards.
    """

    rewards: Float[Array, "batch length"]
    returns: Float[Array, "batch length"] | None = None

    def summed(self, signal: Signal) -> Float[Array, "batch length"]:
        """The returns; where nothing has summed them yet, all rewards to the end of the document (a discount of 1)."""
        if self.returns is None:
            return discounted_returns(self.rewards, 1.0, signal.continues)
        return self.returns


class AbstractReduction(eqx.Module):
    """One step that makes the credit of a decision less noisy."""

    @property
    @abstractmethod
    def needs_early_exit(self) -> bool:
        """Whether it reads `Signal.early_log_lik`."""

    @abstractmethod
    def __call__(self, credit: Credit, signal: Signal) -> Credit:
        """The reduced credit."""

    @abstractmethod
    def loss(self, signal: Signal) -> Float[Array, ""]:
        """What training this reduction itself adds to the loss, already weighted; 0 where there is nothing to train."""


class EarlyExit(AbstractReduction):
    r"""Rewards relative to a prediction that never saw the tokens (SFE eq. 11-12).

    $r_i = \log p(x_{i+1}) - \log p^{early}(x_{i+1})$. The early head learns from $\lambda_{early}$ times its own mean
    negative log-likelihood (eq. 21-22). Unbiased: the early prediction made at row $i + j$ does not depend on $a_i$.
    """

    weight: float = eqx.field(static=True, default=0.1)

    @property
    def needs_early_exit(self) -> bool:
        return True

    def __call__(self, credit: Credit, signal: Signal) -> Credit:
        if credit.returns is not None:
            raise ValueError("EarlyExit changes rewards: it must stand before Discount and BatchCentre")
        return Credit(jnp.where(signal.mask, credit.rewards - _early(signal), 0.0))

    def loss(self, signal: Signal) -> Float[Array, ""]:
        return -self.weight * masked_mean(_early(signal), signal.mask)


class Discount(AbstractReduction):
    r"""Returns that forget at the rate $\gamma$ (SFE eq. 13). Biased for $\gamma < 1$: consequences far away are discounted."""

    discount: float = eqx.field(static=True, default=0.99)

    def __check_init__(self):
        if not 0.0 <= self.discount <= 1.0:
            raise ValueError(f"a discount lies between 0 and 1; got {self.discount}")

    @property
    def needs_early_exit(self) -> bool:
        return False

    def __call__(self, credit: Credit, signal: Signal) -> Credit:
        if credit.returns is not None:
            raise ValueError("Discount sums rewards: it must stand before BatchCentre, and only once")
        return Credit(credit.rewards, discounted_returns(credit.rewards, self.discount, signal.continues))

    def loss(self, signal: Signal) -> Float[Array, ""]:
        return jnp.zeros(())


class BatchCentre(AbstractReduction):
    """Returns relative to the batch's mean at the same row (SFE eq. 14).

    As in the paper the expected gradient shrinks by (B - 1)/B, because the mean holds the sequence's own return;
    `leave_one_out=True` takes the mean of the others and is unbiased. A batch of one learns nothing from centred returns.
    """

    leave_one_out: bool = eqx.field(static=True, default=False)

    @property
    def needs_early_exit(self) -> bool:
        return False

    def __call__(self, credit: Credit, signal: Signal) -> Credit:
        returns = credit.summed(signal)
        return Credit(credit.rewards, batch_centred(returns, signal.mask, self.leave_one_out))

    def loss(self, signal: Signal) -> Float[Array, ""]:
        return jnp.zeros(())


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

    def advantages(self, signal: Signal) -> Float[Array, "batch length"]:
        """What each decision is credited with once every reduction has been applied."""
        credit = Credit(jnp.where(signal.mask, signal.log_lik, 0.0))
        for reduction in self.reductions:
            credit = reduction(credit, signal)
        return jax.lax.stop_gradient(credit.summed(signal))

    def __call__(self, signal: Signal) -> ObjectiveOutput:
        boundaries = signal.boundaries
        advantages = self.advantages(signal)
        log_prob = action_log_prob(boundaries.logits, boundaries.actions)
        policy = policy_loss(log_prob, advantages, boundaries.decided)
        rate = rate_loss(boundaries.logits, boundaries.probs, self.target_rate, boundaries.decided)
        loss = self.policy_weight * policy + self.rate_weight * rate
        for reduction in self.reductions:
            loss = loss + reduction.loss(signal)
        metrics = {
            "policy_loss": policy,
            "rate_loss": rate,
            "policy_entropy": masked_mean(bernoulli_entropy(boundaries.logits), boundaries.decided),
            "advantage_rms": jnp.sqrt(masked_mean(advantages**2, boundaries.decided)),
        }
        return ObjectiveOutput(loss, metrics)


class NoObjective(AbstractObjective):
    """Nothing to train: the boundaries follow a rule."""

    @property
    def needs_early_exit(self) -> bool:
        return False

    def __call__(self, signal: Signal) -> ObjectiveOutput:
        return ObjectiveOutput(jnp.zeros(()), {})


def _early(signal: Signal) -> Float[Array, "batch length"]:
    if signal.early_log_lik is None:
        raise ValueError("EarlyExit needs early_log_lik in its Signal: build the model with an early head")
    return signal.early_log_lik
