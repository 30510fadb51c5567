"""Variance reductions of the score function: each one step on the way from likelihood to advantage.

"SFE" is Dauncey and Wattenhofer, "You can learn tokenization end-to-end with reinforcement learning".
"""

from __future__ import annotations

from abc import abstractmethod

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from estimators.base import Signal
from estimators.equations import batch_centred, discounted_returns, importance_weights, masked_mean


class Credit(eqx.Module):
    """What each decision is credited with, on its way from likelihood to advantage.

    `rewards_i` belongs to the prediction made at row i; `returns_i` is what followed the decision at row i, None until the
    rewards have been summed. `loss` gathers what the steps themselves have to learn, already weighted.
    """

    rewards: Float[Array, "batch length"]
    returns: Float[Array, "batch length"] | None
    loss: Float[Array, ""]

    def summed(self, signal: Signal) -> Float[Array, "batch length"]:
        """The returns; where nothing has summed them yet, all rewards to the end of the document (a discount of 1)."""
        if self.returns is None:
            return discounted_returns(self.rewards, 1.0, signal.continues)
        return self.returns

    def unsummed(self, by: str) -> Float[Array, "batch length"]:
        """The rewards. Raises `ValueError`, naming the step `by` that wants them, where they have been summed already."""
        if self.returns is not None:
            raise ValueError(f"{by} changes or sums rewards: it must stand before every step that works on returns")
        return self.rewards


class AbstractReduction(eqx.Module):
    """One step that makes the credit of a decision less noisy."""

    @property
    @abstractmethod
    def needs_early_exit(self) -> bool:
        """Whether it reads `Signal.early_log_lik`."""

    @abstractmethod
    def __call__(self, credit: Credit, signal: Signal) -> Credit:
        """The reduced credit."""


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
        rewards, early = credit.unsummed("EarlyExit"), signal.early_log_lik
        if early is None:
            raise ValueError("EarlyExit needs early_log_lik in its Signal: build the model with an early head")
        loss = credit.loss - self.weight * masked_mean(early, signal.mask)
        return Credit(jnp.where(signal.mask, rewards - early, 0.0), None, loss)


class Discount(AbstractReduction):
    r"""Returns that forget at the rate $\gamma$ (SFE eq. 13). Biased for $\gamma < 1$: consequences far away are discounted."""

    discount: float = eqx.field(static=True, default=0.99)

    def __check_init__(self):
        _require_share("a discount", self.discount)

    @property
    def needs_early_exit(self) -> bool:
        return False

    def __call__(self, credit: Credit, signal: Signal) -> Credit:
        rewards = credit.unsummed("Discount")
        return Credit(rewards, discounted_returns(rewards, self.discount, signal.continues), credit.loss)


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
        return Credit(credit.rewards, batch_centred(returns, signal.mask, self.leave_one_out), credit.loss)


class SampleCentre(AbstractReduction):
    """Returns relative to those of the other draws for the same sequence: k-sample leave-one-out (Kool et al. 2019; RLOO).

    Unbiased, since the draws are independent given the sequence. Needs `Signal.samples` of 2 or more, that is a training
    step that draws boundaries that often for every encoder pass; raises `ValueError` otherwise.
    """

    @property
    def needs_early_exit(self) -> bool:
        return False

    def __call__(self, credit: Credit, signal: Signal) -> Credit:
        if signal.samples < 2:
            raise ValueError(f"SampleCentre compares draws for one sequence: draw 2 or more; got {signal.samples}")
        returns = credit.summed(signal)

        def apart(rows: Array) -> Array:
            return jnp.swapaxes(rows.reshape(-1, signal.samples, rows.shape[1]), 0, 1)

        centred = jax.vmap(lambda r, m: batch_centred(r, m, True), 1, 1)(apart(returns), apart(signal.mask))
        return Credit(credit.rewards, jnp.swapaxes(centred, 0, 1).reshape(returns.shape), credit.loss)


class Critic(AbstractReduction):
    r"""Returns relative to what a linear critic expects of them: $G_i - v_i$, $v_i = w \cdot X_i + b$.

    A control variate: $X_i$ are the encoder's states, which no action has touched, so nothing is biased. The critic learns
    by regression, $\lambda\,\mathrm{mean}_i (v_i - G_i)^2$; neither its error nor its gradient reaches the encoder.
    """

    weight: Float[Array, " dim"]
    bias: Float[Array, ""]
    loss_weight: float = eqx.field(static=True)

    def __init__(self, dim: int, loss_weight: float = 1.0):
        """The critic of states of width `dim` starts by expecting nothing."""
        self.weight, self.bias, self.loss_weight = jnp.zeros(dim), jnp.zeros(()), loss_weight

    @property
    def needs_early_exit(self) -> bool:
        return False

    def values(self, signal: Signal) -> Float[Array, "batch length"]:
        """v, 0 where there is no prediction to be rewarded for."""
        hidden = jax.lax.stop_gradient(signal.hidden).astype(jnp.float32)
        return jnp.where(signal.mask, hidden @ self.weight + self.bias, 0.0)

    def regression(self, target: Float[Array, "batch length"], signal: Signal) -> Float[Array, ""]:
        """The critic's own loss, weighted."""
        error = self.values(signal) - jax.lax.stop_gradient(target)
        return self.loss_weight * masked_mean(error**2, signal.mask)

    def __call__(self, credit: Credit, signal: Signal) -> Credit:
        returns = credit.summed(signal)
        values = jax.lax.stop_gradient(self.values(signal))
        loss = credit.loss + self.regression(returns, signal)
        return Credit(credit.rewards, returns - values, loss)


class GeneralisedAdvantage(AbstractReduction):
    r"""Generalised advantage estimation (Schulman et al. 2016, eq. 16), in the place of `Discount` and `Critic`.

    $A_i = \sum_{l \ge 0} (\gamma\lambda)^l \delta_{i+l}$, $\delta_i = r_i + \gamma v_{i+1} - v_i$, with $v$ the linear
    `critic`, which learns to expect the discounted returns. $\lambda = 1$ is exactly `Discount` followed by `Critic`; a
    smaller one trusts the critic with what lies far ahead, for less variance and as much bias as the critic is wrong.
    """

    critic: Critic
    discount: float = eqx.field(static=True)
    decay: float = eqx.field(static=True)

    def __init__(self, dim: int, discount: float = 0.99, decay: float = 0.95, loss_weight: float = 1.0):
        r"""`discount` is γ and `decay` λ. Raises `ValueError` for either outside [0, 1]."""
        _require_share("a discount", discount)
        _require_share("the decay of advantages", decay)
        self.critic, self.discount, self.decay = Critic(dim, loss_weight), discount, decay

    @property
    def needs_early_exit(self) -> bool:
        return False

    def __call__(self, credit: Credit, signal: Signal) -> Credit:
        rewards = credit.unsummed("GeneralisedAdvantage")
        values = jax.lax.stop_gradient(self.critic.values(signal))
        after = jnp.where(signal.continues, jnp.roll(values, -1, axis=1), 0.0)
        errors = rewards + self.discount * after - values
        advantages = discounted_returns(errors, self.discount * self.decay, signal.continues)
        target = discounted_returns(rewards, self.discount, signal.continues)
        return Credit(rewards, advantages, credit.loss + self.critic.regression(target, signal))


class ImportanceWeight(AbstractReduction):
    r"""Rewards of boundaries that another policy drew, weighted to stand for the policy's own.

    $r_j \prod_{k \le j} \pi(a_k)/\mu(a_k)$ over the decisions of the document so far (per-decision importance sampling,
    Precup et al. 2000): unbiased, whatever the behaviour $\mu$, as long as it may draw what $\pi$ may. The product's
    variance grows exponentially with the decisions in it; `clip` bounds it from above and biases what it bounds. Raises
    `ValueError` where the boundaries carry no `behaviour_log_prob`.
    """

    clip: float | None = eqx.field(static=True, default=None)

    @property
    def needs_early_exit(self) -> bool:
        return False

    def __call__(self, credit: Credit, signal: Signal) -> Credit:
        rewards, boundaries = credit.unsummed("ImportanceWeight"), signal.boundaries
        if boundaries.behaviour_log_prob is None:
            raise ValueError("ImportanceWeight needs boundaries drawn by an OffPolicy router")
        weights = importance_weights(
            boundaries.logits, boundaries.actions, boundaries.behaviour_log_prob, boundaries.decided, boundaries.starts
        )
        weights = weights if self.clip is None else jnp.minimum(weights, self.clip)
        return Credit(rewards * jax.lax.stop_gradient(weights), None, credit.loss)


def _require_share(what: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{what} lies between 0 and 1; got {value}")
