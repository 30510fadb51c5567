"""Variance reductions of the score function: each one step on the way from likelihood to advantage.

"SFE" is Dauncey and Wattenhofer, "You can learn tokenization end-to-end with reinforcement learning".
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from estimators.base import Signal
from estimators.equations import (
    batch_centred,
    discounted_returns,
    generalised_advantages,
    importance_weights,
    masked_mean,
    value_loss,
    weighted_batch_centred,
)


class Credit(eqx.Module):
    r"""What each decision is credited with, on its way from likelihood to advantage.

    `rewards_i` belongs to the prediction made at row i; `returns_i` is what followed the decision at row i, None until the
    rewards have been summed. `loss` gathers what the steps themselves have to learn, already weighted. `centred_by` names the
    step that has compared the sequences with each other, if one has.

    `weights_i` is $\rho_i = \prod_{k \le i} \pi(a_k)/\mu(a_k)$ where another policy $\mu$ drew the boundaries; None stands for 1.
    Rewards carry no weight until they are summed, each then its own. A baseline b is subtracted from returns as $\rho_i b_i$:
    under the draws of $\mu$, $E[\nabla\log\pi(a_i)\,\rho_i b_i]$ is 0 and $E[\nabla\log\pi(a_i)\,b_i]$ is not. A step makes its
    result by `dataclasses.replace`, so that it keeps what it does not know of.
    """

    rewards: Float[Array, "batch length"]
    returns: Float[Array, "batch length"] | None
    loss: Float[Array, ""]
    weights: Float[Array, "batch length"] | None
    centred_by: str | None = eqx.field(static=True, default=None)

    def weighted(self, values: Float[Array, "batch length"]) -> Float[Array, "batch length"]:
        r"""$\rho_i$ times the value of each row: how rewards are summed and baselines subtracted."""
        return values if self.weights is None else self.weights * values

    def discounted(self, discount: float, signal: Signal) -> Float[Array, "batch length"]:
        r"""$G_i = \sum_{j \ge i} \gamma^{j-i} \rho_j r_j$ to the end of the document."""
        return discounted_returns(self.weighted(self.rewards), discount, signal.continues)

    def summed(self, signal: Signal) -> Float[Array, "batch length"]:
        """The returns; where nothing has summed the rewards yet, all of them to the end of the document (a discount of 1)."""
        return self.discounted(1.0, signal) if self.returns is None else self.returns

    def unsummed(self, by: str) -> Float[Array, "batch length"]:
        """The rewards. Raises `ValueError`, naming the step `by` that wants them, where they have been summed already."""
        if self.returns is not None:
            raise ValueError(f"{by} changes or sums rewards: it must stand before every step that works on returns")
        return self.rewards

    def compared(self, by: str, returns: Float[Array, "batch length"]) -> Credit:
        """With `returns` that the step `by` has made relative to those of other sequences.

        Raises `ValueError` where that has been done already: the credit of the others then holds the sequence's own draws.
        """
        if self.centred_by is not None:
            raise ValueError(
                f"{by} after {self.centred_by} would compare sequences whose credit already holds each other's draws: leave "
                "one of the two out"
            )
        return dataclasses.replace(self, returns=returns, centred_by=by)


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
        return dataclasses.replace(credit, rewards=jnp.where(signal.mask, rewards - early, 0.0), loss=loss)


class Discount(AbstractReduction):
    r"""Returns that forget at the rate $\gamma$ (SFE eq. 13). Biased for $\gamma < 1$: consequences far away are discounted."""

    discount: float = eqx.field(static=True, default=0.99)

    def __check_init__(self):
        _require_share("a discount", self.discount)

    @property
    def needs_early_exit(self) -> bool:
        return False

    def __call__(self, credit: Credit, signal: Signal) -> Credit:
        credit.unsummed("Discount")
        return dataclasses.replace(credit, returns=credit.discounted(self.discount, signal))


class BatchCentre(AbstractReduction):
    """Returns relative to the batch's mean at the same row (SFE eq. 14).

    As in the paper the expected gradient shrinks by (B - 1)/B, because the mean holds the sequence's own return;
    `leave_one_out=True` takes the mean of the others and is unbiased. A batch of one learns nothing from centred returns.
    Where another policy drew, the mean is the weighted one of `weighted_batch_centred`, and both statements hold as they are.
    """

    leave_one_out: bool = eqx.field(static=True, default=False)

    @property
    def needs_early_exit(self) -> bool:
        return False

    def __call__(self, credit: Credit, signal: Signal) -> Credit:
        centred = _centred(credit.summed(signal), signal.mask, credit.weights, self.leave_one_out)
        return credit.compared("BatchCentre", centred)


class SampleCentre(AbstractReduction):
    """Returns relative to those of the other draws for the same sequence: k-sample leave-one-out (Kool et al. 2019; RLOO).

    Unbiased, since the draws are independent given the sequence; weighted as in `BatchCentre`. Needs `Signal.samples` of 2 or
    more, that is a training step that draws boundaries that often for every encoder pass; raises `ValueError` otherwise.
    """

    @property
    def needs_early_exit(self) -> bool:
        return False

    def __call__(self, credit: Credit, signal: Signal) -> Credit:
        if signal.samples < 2:
            raise ValueError(f"SampleCentre compares draws for one sequence: draw 2 or more; got {signal.samples}")
        returns = credit.summed(signal)

        def apart(rows: Shaped[Array, "batch length"]) -> Shaped[Array, "samples sequences length"]:
            return jnp.swapaxes(rows.reshape(-1, signal.samples, rows.shape[1]), 0, 1)

        weights = None if credit.weights is None else apart(credit.weights)
        centred = jax.vmap(lambda r, m, w: _centred(r, m, w, True), 1, 1)(apart(returns), apart(signal.mask), weights)
        return credit.compared("SampleCentre", jnp.swapaxes(centred, 0, 1).reshape(returns.shape))


class Critic(AbstractReduction):
    r"""Returns relative to what a linear critic expects of them: $G_i - \rho_i v_i$, $v_i = w \cdot X_i + b$.

    A control variate: $X_i$ are the encoder's states, which no action has touched, so nothing is biased. The critic learns
    by regression, $\lambda\,\mathrm{mean}_i\,\rho_i (v_i - G_i/\rho_i)^2$ (`value_loss`), the return that the policy itself would
    expect; neither its error nor its gradient reaches the encoder. $\rho$ is 1 where the policy drew.
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

    def regression(
        self, returns: Float[Array, "batch length"], signal: Signal, weights: Float[Array, "batch length"] | None
    ) -> Float[Array, ""]:
        """The critic's own loss, weighted."""
        return self.loss_weight * value_loss(self.values(signal), returns, signal.mask, weights)

    def __call__(self, credit: Credit, signal: Signal) -> Credit:
        returns = credit.summed(signal)
        values = jax.lax.stop_gradient(self.values(signal))
        loss = credit.loss + self.regression(returns, signal, credit.weights)
        return dataclasses.replace(credit, returns=returns - credit.weighted(values), loss=loss)


class GeneralisedAdvantage(AbstractReduction):
    r"""Generalised advantage estimation (Schulman et al. 2016, eq. 16), in the place of `Discount` and `Critic`.

    $A_i = \sum_{l \ge 0} (\gamma\lambda)^l \rho_{i+l} \delta_{i+l}$, $\delta_i = r_i + \gamma v_{i+1} - v_i$, with $v$ the linear
    `critic`, which learns to expect the discounted returns. $\lambda = 1$ is exactly `Discount` followed by `Critic` where
    the policy drew ($\rho = 1$), and has the same expectation where another did; a smaller one trusts the critic with what
    lies far ahead, for less variance and as much bias as the critic is wrong.
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
        advantages = generalised_advantages(
            rewards, values, self.discount, self.decay, signal.continues, credit.weights
        )
        regression = self.critic.regression(credit.discounted(self.discount, signal), signal, credit.weights)
        return dataclasses.replace(credit, returns=advantages, loss=credit.loss + regression)


class ImportanceWeight(AbstractReduction):
    r"""Rewards of boundaries that another policy drew, weighted to stand for the policy's own.

    $\rho_j r_j$ with $\rho_j = \prod_{k \le j} \pi(a_k)/\mu(a_k)$ over the decisions of the document so far (per-decision
    importance sampling, Precup et al. 2000): unbiased, whatever the behaviour $\mu$, as long as it may draw what $\pi$ may. The
    weights go with the credit, so that every baseline after it is weighted as well, and `EarlyExit` may come before or after.

    The product's variance grows exponentially with the decisions in it; `clip` bounds the weights from above,
    $\min(\rho_j, c)$, wherever they are used, rewards and baselines alike. That is biased: what exceeds the bound is lost,
    and $E[\nabla\log\pi(a_i) \min(\rho_i, c)\,b]$ is no longer 0.

    The weights are those of this level's own decisions. Everything else learns from the boundaries as they were drawn: the
    language model, the policies of other levels, and the rate loss, whose mean probability is that along histories of $\mu$.
    Raises `ValueError` where the boundaries carry no `behaviour_log_prob`, where rewards have been summed already, and where
    it stands twice.
    """

    clip: float | None = eqx.field(static=True, default=None)

    @property
    def needs_early_exit(self) -> bool:
        return False

    def __call__(self, credit: Credit, signal: Signal) -> Credit:
        credit.unsummed("ImportanceWeight")
        boundaries = signal.boundaries
        if boundaries.behaviour_log_prob is None:
            raise ValueError("ImportanceWeight needs boundaries drawn by an OffPolicy router")
        if credit.weights is not None:
            raise ValueError(
                "ImportanceWeight stands there twice, which would weight every reward twice: leave one out"
            )
        weights = importance_weights(
            boundaries.logits, boundaries.actions, boundaries.behaviour_log_prob, boundaries.decided, boundaries.starts
        )
        weights = weights if self.clip is None else jnp.minimum(weights, self.clip)
        return dataclasses.replace(credit, weights=jax.lax.stop_gradient(weights))


def _centred(
    returns: Float[Array, "batch length"],
    mask: Bool[Array, "batch length"],
    weights: Float[Array, "batch length"] | None,
    leave_one_out: bool,
) -> Float[Array, "batch length"]:
    """Returns relative to those of the other sequences."""
    if weights is None:
        return batch_centred(returns, mask, leave_one_out)
    return weighted_batch_centred(returns, weights, mask, leave_one_out)


def _require_share(what: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{what} lies between 0 and 1; got {value}")
