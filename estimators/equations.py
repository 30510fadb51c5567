"""One equation, one pure function. Arrays are `batch length`; likelihoods are in nats; everything is float32.

"SFE" below is Dauncey and Wattenhofer, "You can learn tokenization end-to-end with reinforcement learning".
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def logit(prob: float) -> float:
    r"""$\mathrm{logit}(p) = \log p - \log(1-p)$, of a Python number strictly between 0 and 1.

    Raises `ValueError` outside that interval.
    """
    if not 0.0 < prob < 1.0:
        raise ValueError(f"a probability strictly between 0 and 1 has a logit; got {prob}")
    return math.log(prob) - math.log1p(-prob)


def soft_cap(logits: Float[Array, "*shape"], cap: float) -> Float[Array, "*shape"]:
    r"""$c\,\tanh(l/c)$: close to the identity for $|l| \ll c$, never beyond $\pm c$ (Gemma 2; SFE eq. 19)."""
    return cap * jnp.tanh(logits / cap)


def windowed_logits(
    projections: Float[Array, "batch length taps"],
    actions: Bool[Array, "batch length"],
    starts: Bool[Array, "batch length"],
) -> Float[Array, "batch length"]:
    r"""Logits of a policy with memory, for actions that are already known (SFE eq. 17).

    $l_i = q_{i,0} + \sum_{j=1}^{w} a_{i-j}\, q_{i,j}$ with $q = $ `projections` and $w = $ `taps` - 1. An action counts only
    while its document lasts: none from before the latest True of `starts` does.
    """
    logits = projections[..., 0]
    length = actions.shape[1]
    memory, fresh = actions, starts
    for tap in range(1, projections.shape[-1]):
        if tap >= length:
            break
        # After j shifts `memory_i` is a_{i-j}, cleared where a document began in rows i-j+1 .. i.
        memory = jnp.pad(memory[:, :-1], ((0, 0), (1, 0))) & ~fresh
        logits = logits + jnp.where(memory, projections[..., tap], 0.0)
    return logits


def action_log_prob(
    logits: Float[Array, "batch length"], actions: Bool[Array, "batch length"]
) -> Float[Array, "batch length"]:
    r"""$\log\pi(a_i)$ of Bernoulli actions with log-odds $l_i$: $\log\sigma(l)$ for 1, $\log\sigma(-l)$ for 0 (SFE eq. 16)."""
    return jax.nn.log_sigmoid(jnp.where(actions, logits, -logits))


def bernoulli_entropy(logits: Float[Array, "batch length"]) -> Float[Array, "batch length"]:
    r"""$-p\log p - (1-p)\log(1-p)$ in nats, for $p = \sigma(l)$; exact for large $|l|$."""
    return -jax.nn.sigmoid(logits) * jax.nn.log_sigmoid(logits) - jax.nn.sigmoid(-logits) * jax.nn.log_sigmoid(-logits)


def discounted_returns(
    rewards: Float[Array, "batch length"],
    discount: float,
    continues: Bool[Array, "batch length"] | None = None,
) -> Float[Array, "batch length"]:
    r"""$G_i = \sum_{j \ge 0} \gamma^j r_{i+j}$ (SFE eq. 13, whose $R_{i+1}$ is our $r_i$).

    `rewards_i` is the reward of the prediction made at row i. Where `continues_i` is False the sum stops after row i, so
    that no reward crosses from one document into the one before it.
    """
    decay = jnp.full(rewards.shape, discount, rewards.dtype)
    if continues is not None:
        decay = jnp.where(continues, decay, 0.0)

    def compose(later, earlier):
        decay_later, sum_later = later
        decay_earlier, sum_earlier = earlier
        return decay_later * decay_earlier, sum_earlier + decay_earlier * sum_later

    return jax.lax.associative_scan(compose, (decay, rewards), reverse=True, axis=1)[1]


def batch_centred(
    returns: Float[Array, "batch length"],
    mask: Bool[Array, "batch length"] | None = None,
    leave_one_out: bool = False,
) -> Float[Array, "batch length"]:
    r"""$A_{b,i} = G_{b,i} - \bar G_i$ with $\bar G_i$ the mean over the valid sequences at row i (SFE eq. 14); 0 where masked.

    The mean holds the sequence's own return, which scales the expected policy gradient by $(n-1)/n$ for n valid
    sequences. With `leave_one_out` the mean is over the other sequences, which is unbiased; a row valid in only one
    sequence then keeps its return, since nothing can be subtracted.
    """
    valid = jnp.ones(returns.shape, returns.dtype) if mask is None else mask.astype(returns.dtype)
    count = jnp.sum(valid, axis=0, keepdims=True)
    total = jnp.sum(returns * valid, axis=0, keepdims=True)
    if leave_one_out:
        baseline = (total - returns) / jnp.maximum(count - 1.0, 1.0)
        baseline = jnp.where(count > 1.0, baseline, 0.0)
    else:
        baseline = total / jnp.maximum(count, 1.0)
    return (returns - baseline) * valid


def masked_mean(values: Float[Array, "*shape"], mask: Bool[Array, "*shape"]) -> Float[Array, ""]:
    """The mean of `values` where `mask` is True; 0 where it is True nowhere."""
    return jnp.sum(jnp.where(mask, values, 0.0)) / jnp.maximum(jnp.sum(mask), 1).astype(values.dtype)


def policy_loss(
    action_log_prob: Float[Array, "batch length"],
    advantages: Float[Array, "batch length"],
    mask: Bool[Array, "batch length"],
) -> Float[Array, ""]:
    r"""$L_\pi = -\mathrm{mean}_i\,\log\pi(a_i)\,\mathrm{sg}(A_i)$ over the rows of `mask` (SFE eq. 15).

    A mean where the paper writes a sum, so that the weight of the term depends on neither length nor batch. No gradient
    passes through the advantages.
    """
    return -masked_mean(action_log_prob * jax.lax.stop_gradient(advantages), mask)


def rate_loss(
    logits: Float[Array, "batch length"],
    probs: Float[Array, "batch length"],
    target: float | Float[Array, ""],
    mask: Bool[Array, "batch length"],
) -> Float[Array, ""]:
    r"""$L_{target} = \bar l\cdot\mathrm{sg}(\bar p - \pi_{target})$, means over the rows of `mask` (SFE eq. 20).

    The same pressure on every logit, in proportion to how far the mean probability is from the target rate.
    """
    return masked_mean(logits, mask) * jax.lax.stop_gradient(masked_mean(probs, mask) - target)


def bits_per_byte(
    nats: float | Float[Array, ""], num_bytes: int | float | Float[Array, ""]
) -> float | Float[Array, ""]:
    r"""$\mathrm{nats} / (\ln 2\cdot\mathrm{bytes})$: a summed negative log-likelihood over the bytes that were predicted."""
    return nats / (math.log(2.0) * num_bytes)
