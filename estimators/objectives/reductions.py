"""Variance reductions of the score-function estimator: each is one step from log-probabilities to advantages.

"SFE" is Dauncey and Wattenhofer, "You can learn tokenization end-to-end with reinforcement learning".
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree, Shaped

from estimators.base import ObjectiveInputs
from estimators.bounds import Positive, Share, Weight, check_bounds
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
    r"""The credit of each action: rewards, then returns, then advantages, as the reductions turn one into the next.

    `rewards_i` belongs to the prediction made at position i. `returns_i` sums the rewards from position i on; None until a step
    has summed them. `loss` is the sum of the steps' own weighted losses. `centred_by` names the step that has centred returns
    across sequences, if any.

    `weights_i` is $\rho_i = \prod_{k \le i} \pi(a_k)/\mu(a_k)$ if another policy $\mu$ drew the boundaries; None stands for 1.
    Rewards are stored unweighted; each is multiplied by its weight when they are summed. A baseline b is subtracted from
    returns as $\rho_i b_i$: under $\mu$, $E[\nabla\log\pi(a_i)\,\rho_i b_i]$ is 0, and $E[\nabla\log\pi(a_i)\,b_i]$ is not. Steps
    build their result with `dataclasses.replace`, which keeps the fields they do not use.
    """

    rewards: Float[Array, "batch length"]
    returns: Float[Array, "batch length"] | None
    loss: Float[Array, ""]
    weights: Float[Array, "batch length"] | None
    centred_by: str | None = eqx.field(static=True, default=None)

    def weighted(self, values: Float[Array, "batch length"]) -> Float[Array, "batch length"]:
        r"""$\rho_i$ times each value, as for rewards that are summed and baselines that are subtracted."""
        return values if self.weights is None else self.weights * values

    def discounted(self, discount: float, inputs: ObjectiveInputs) -> Float[Array, "batch length"]:
        r"""$G_i = \sum_{j \ge i} \gamma^{j-i} \rho_j r_j$ to the end of the document."""
        return discounted_returns(self.weighted(self.rewards), discount, inputs.continues)

    def summed(self, inputs: ObjectiveInputs) -> Float[Array, "batch length"]:
        """The returns; if no step has summed the rewards yet, their undiscounted sums to the end of the document."""
        return self.discounted(1.0, inputs) if self.returns is None else self.returns

    def unsummed(self, by: str) -> Float[Array, "batch length"]:
        """The rewards, for the step `by`. Raises `ValueError` if they have been summed already."""
        if self.returns is not None:
            raise ValueError(f"{by} works on rewards: it must stand before every step that works on returns")
        return self.rewards

    def compared(self, by: str, returns: Float[Array, "batch length"]) -> Credit:
        """The credit with `returns` that the step `by` has centred across sequences.

        Raises `ValueError` if another step has done so before: returns of other sequences then depend on this one's actions,
        which would bias the gradient.
        """
        if self.centred_by is not None:
            raise ValueError(
                f"{by} after {self.centred_by} would centre returns that already depend on each other: leave one of the two out"
            )
        return dataclasses.replace(self, returns=returns, centred_by=by)


class AbstractReduction(eqx.Module):
    """One step that reduces the variance of the credit."""

    @property
    @abstractmethod
    def needs_early_exit(self) -> bool:
        """Whether it reads `ObjectiveInputs.early_log_prob`."""

    @abstractmethod
    def __call__(self, credit: Credit, inputs: ObjectiveInputs) -> Credit:
        """The reduced credit."""


class EarlyExit(AbstractReduction):
    r"""Rewards relative to a prediction made without the token level (SFE eq. 11-12).

    $r_i = \log p(x_{i+1}) - \log p^{early}(x_{i+1})$. The early head is trained on $\lambda_{early}$ (`weight`) times its mean
    negative log-likelihood (eq. 21-22), in a hierarchy by the outermost level that needs it. Unbiased: the early prediction at
    position $i + j$ does not depend on $a_i$.
    """

    weight: Weight = eqx.field(static=True, default=0.1)
    """Weight of the early head's own loss (eq. 22)."""

    def __check_init__(self):
        check_bounds(self)

    @property
    def needs_early_exit(self) -> bool:
        return True

    def __call__(self, credit: Credit, inputs: ObjectiveInputs) -> Credit:
        rewards, early = credit.unsummed("EarlyExit"), inputs.early_log_prob
        if early is None:
            raise ValueError(
                "EarlyExit needs early_log_prob in its ObjectiveInputs: build the model with an early head"
            )
        weight = self.weight if inputs.trains_early_exit else 0.0
        loss = credit.loss - weight * masked_mean(early, inputs.mask)
        return dataclasses.replace(credit, rewards=jnp.where(inputs.mask, rewards - early, 0.0), loss=loss)


class Discount(AbstractReduction):
    r"""Returns discounted by $\gamma$ (SFE eq. 13). Biased for $\gamma < 1$."""

    factor: Share = eqx.field(static=True, default=0.99)
    """Discount of rewards per byte (eq. 13); 1 leaves discounting out."""

    def __check_init__(self):
        check_bounds(self)

    @property
    def needs_early_exit(self) -> bool:
        return False

    def __call__(self, credit: Credit, inputs: ObjectiveInputs) -> Credit:
        credit.unsummed("Discount")
        return dataclasses.replace(credit, returns=credit.discounted(self.factor, inputs))


class BatchCentre(AbstractReduction):
    """Returns relative to the batch mean at the same position (SFE eq. 14).

    As in the paper, the expected gradient shrinks by (B - 1)/B, because the mean includes the sequence's own return;
    `leave_one_out=True` takes the mean of the others and is unbiased. With a batch of one, centred returns are
    0, or with `leave_one_out` as they were. If another
    policy drew the boundaries, the mean is that of `weighted_batch_centred`, and the same holds.
    """

    leave_one_out: bool = eqx.field(static=True, default=False)
    """Compare with the mean of the other sequences, without the sequence itself."""
    over: Literal["batch", "shard"] = eqx.field(static=True, default="batch")
    """Where devices share a batch: compare with the sequences of all of them, or (shard) of the same device alone, which shrinks
    the expected gradient by (B - D)/B on D devices."""

    @property
    def needs_early_exit(self) -> bool:
        return False

    def __call__(self, credit: Credit, inputs: ObjectiveInputs) -> Credit:
        centred = _centred(
            credit.summed(inputs),
            inputs.mask,
            credit.weights,
            leave_one_out=self.leave_one_out,
            whole_batch=self.over == "batch",
        )
        return credit.compared("BatchCentre", centred)


def rows_for_each_device(tree: PyTree) -> int:
    """The rows (sequences times samples) that each device must have of a batch that several share, for the reductions in `tree`:
    with one, returns minus the mean of those of the same device are all zero."""
    steps = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, BatchCentre))
    alone = [one.over == "shard" and not one.leave_one_out for one in steps if isinstance(one, BatchCentre)]
    return 2 if any(alone) else 1


class SampleCentre(AbstractReduction):
    """Returns relative to those of the other samples for the same sequence: k-sample leave-one-out (Kool et al. 2019; RLOO).

    Unbiased, since the samples are independent given the sequence; weighted as in `BatchCentre`. Needs a training step that
    samples boundaries 2 or more times for each encoder pass (`ObjectiveInputs.samples`); raises `ValueError` otherwise.
    """

    @property
    def needs_early_exit(self) -> bool:
        return False

    def __call__(self, credit: Credit, inputs: ObjectiveInputs) -> Credit:
        if inputs.samples < 2:
            raise ValueError(f"SampleCentre compares samples for one sequence: draw 2 or more; got {inputs.samples}")
        returns = credit.summed(inputs)

        def apart(rows: Shaped[Array, "batch length"]) -> Shaped[Array, "samples sequences length"]:
            return jnp.swapaxes(rows.reshape(-1, inputs.samples, rows.shape[1]), 0, 1)

        weights = None if credit.weights is None else apart(credit.weights)

        def one(returns: Array, mask: Array, weights: Array | None) -> Array:
            # All samples for a sequence are on one device.
            return _centred(returns, mask, weights, leave_one_out=True, whole_batch=False)

        centred = jax.vmap(one, 1, 1)(apart(returns), apart(inputs.mask), weights)
        return credit.compared("SampleCentre", jnp.swapaxes(centred, 0, 1).reshape(returns.shape))


class Critic(AbstractReduction):
    r"""Returns relative to a linear critic: $G_i - \rho_i v_i$, $v_i = w \cdot X_i + b$.

    Unbiased: a control variate, since the encoder's states $X_i$ do not depend on the actions. The critic learns the policy's
    expected return by regression, $\lambda\,\mathrm{mean}_i\,\rho_i (v_i - G_i/\rho_i)^2$ (`value_loss`, λ is `loss_weight`),
    without gradient to the encoder. $\rho$ is 1 if the policy itself drew the boundaries.
    """

    weight: Float[Array, " dim"]
    bias: Float[Array, ""]
    loss_weight: Weight = eqx.field(static=True)
    """Weight of the critic's own loss."""

    def __check_init__(self):
        check_bounds(self)

    def __init__(self, dim: int, loss_weight: float = 1.0):
        """`dim` is the width of the encoder's states. The critic starts at zero."""
        self.weight, self.bias = jnp.zeros(dim, jnp.float32), jnp.zeros((), jnp.float32)
        self.loss_weight = loss_weight

    @property
    def needs_early_exit(self) -> bool:
        return False

    def values(self, inputs: ObjectiveInputs) -> Float[Array, "batch length"]:
        """v, and 0 where `inputs.mask` is False."""
        hidden = jax.lax.stop_gradient(inputs.hidden).astype(jnp.float32)
        return jnp.where(inputs.mask, hidden @ self.weight + self.bias, 0.0)

    def regression(
        self,
        returns: Float[Array, "batch length"],
        inputs: ObjectiveInputs,
        weights: Float[Array, "batch length"] | None,
    ) -> Float[Array, ""]:
        """The critic's own loss, times `loss_weight`."""
        return self.loss_weight * value_loss(self.values(inputs), returns, inputs.mask, weights)

    def __call__(self, credit: Credit, inputs: ObjectiveInputs) -> Credit:
        returns = credit.summed(inputs)
        values = jax.lax.stop_gradient(self.values(inputs))
        loss = credit.loss + self.regression(returns, inputs, credit.weights)
        return dataclasses.replace(credit, returns=returns - credit.weighted(values), loss=loss)


class GeneralisedAdvantage(AbstractReduction):
    r"""Generalised advantage estimation (Schulman et al. 2016, eq. 16), in place of `Discount` and `Critic`.

    $A_i = \sum_{l \ge 0} (\gamma\lambda)^l \rho_{i+l} \delta_{i+l}$, $\delta_i = r_i + \gamma v_{i+1} - v_i$, with $v$ the linear
    `critic`, trained on the discounted returns. With $\lambda = 1$ this is exactly `Discount` followed by `Critic` if the policy
    itself drew the boundaries ($\rho = 1$), and has the same expectation otherwise. A smaller $\lambda$ relies more on the
    critic for distant rewards: less variance, and a bias from the critic's errors.
    """

    critic: Critic
    discount: Share = eqx.field(static=True)
    """Discount of rewards per byte."""
    decay: Share = eqx.field(static=True)
    """Lambda: the decay of advantages; a smaller one relies more on the critic."""

    def __check_init__(self):
        check_bounds(self)

    def __init__(self, dim: int, discount: float = 0.99, decay: float = 0.95, loss_weight: float = 1.0):
        r"""`discount` is γ and `decay` λ; `loss_weight` is the weight of the critic's own loss. Raises `ValueError` for a
        discount or decay outside [0, 1]."""
        self.critic, self.discount, self.decay = Critic(dim, loss_weight), discount, decay

    @property
    def needs_early_exit(self) -> bool:
        return False

    def __call__(self, credit: Credit, inputs: ObjectiveInputs) -> Credit:
        rewards = credit.unsummed("GeneralisedAdvantage")
        values = jax.lax.stop_gradient(self.critic.values(inputs))
        advantages = generalised_advantages(
            rewards, values, self.discount, self.decay, inputs.continues, credit.weights
        )
        regression = self.critic.regression(credit.discounted(self.discount, inputs), inputs, credit.weights)
        return dataclasses.replace(credit, returns=advantages, loss=credit.loss + regression)


class ImportanceWeight(AbstractReduction):
    r"""Importance-weighted rewards, for boundaries drawn by another policy.

    $\rho_j r_j$ with $\rho_j = \prod_{k \le j} \pi(a_k)/\mu(a_k)$ over the document's actions so far (per-decision importance
    sampling, Precup et al. 2000). Unbiased for every behaviour policy $\mu$ whose support covers that of $\pi$. The weights are
    stored in the credit, so that later baselines are weighted too; `EarlyExit` may come before or after.

    The variance of the product grows exponentially with the number of actions. `clip` bounds the weights of rewards and
    baselines to $\min(\rho_j, c)$. That is biased: weight above the bound is lost, and
    $E[\nabla\log\pi(a_i) \min(\rho_i, c)\,b]$ is no longer 0.

    The weights cover the actions of this level only. The language model, the policies of other levels and the rate loss are
    not reweighted; the mean probability in the rate loss is over histories drawn by $\mu$. Raises `ValueError` if the
    boundaries have no `behaviour_log_prob`, if rewards have been summed already, and if it is used twice.
    """

    clip: Positive | None = eqx.field(static=True, default=None)
    """Upper bound of importance weights; None leaves them unbounded and unbiased."""

    def __check_init__(self):
        check_bounds(self)

    @property
    def needs_early_exit(self) -> bool:
        return False

    def __call__(self, credit: Credit, inputs: ObjectiveInputs) -> Credit:
        credit.unsummed("ImportanceWeight")
        boundaries = inputs.boundaries
        if boundaries.behaviour_log_prob is None:
            raise ValueError("ImportanceWeight needs boundaries drawn by an OffPolicy router")
        if credit.weights is not None:
            raise ValueError("ImportanceWeight is listed twice, which would weight every reward twice: leave one out")
        weights = importance_weights(
            boundaries.logits, boundaries.actions, boundaries.behaviour_log_prob, boundaries.decided, boundaries.starts
        )
        weights = weights if self.clip is None else jnp.minimum(weights, self.clip)
        return dataclasses.replace(credit, weights=jax.lax.stop_gradient(weights))


def _centred(
    returns: Float[Array, "batch length"],
    mask: Bool[Array, "batch length"],
    weights: Float[Array, "batch length"] | None,
    *,
    leave_one_out: bool,
    whole_batch: bool,
) -> Float[Array, "batch length"]:
    """Returns minus a baseline from the other sequences."""
    if weights is None:
        return batch_centred(returns, mask, leave_one_out, whole_batch)
    return weighted_batch_centred(returns, weights, mask, leave_one_out, whole_batch)
