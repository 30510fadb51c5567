"""One equation, one pure function. Arrays are `batch length`; likelihoods are in nats; everything is float32.

"SFE" below is Dauncey and Wattenhofer, "You can learn tokenization end-to-end with reinforcement learning"; "H-Net" is
Hwang, Wang and Gu, "Dynamic chunking for end-to-end hierarchical sequence modeling"; "DPT" is Nawrot et al., "Efficient
transformers with dynamic token pooling"; "BLT" is Pagnoni et al., "Byte latent transformer: patches scale better than tokens".
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped


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


@functools.partial(jax.jit, static_argnames="discount")
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


LEAST_WEIGHT = 1e-12
"""Importance weights are divided by no less. What has smaller ones happens that rarely under the policy, and a baseline may
be anything."""


def weighted_batch_centred(
    returns: Float[Array, "batch length"],
    weights: Float[Array, "batch length"],
    mask: Bool[Array, "batch length"],
    leave_one_out: bool = False,
) -> Float[Array, "batch length"]:
    r"""$A_{b,i} = G_{b,i} - \rho_{b,i}\,\sum_{c \ne b} G_{c,i} / \sum_{c \ne b} \rho_{c,i}$ over the valid sequences, else 0.

    `returns` are sums of weighted rewards, $G_i = \sum_{j \ge i} \gamma^{j-i} \rho_j r_j$, and `weights` $\rho_i$ the ratio of
    probabilities up to row i. Under another policy's draws $E[\nabla\log\pi(a_i)\,\rho_i b]$ is 0 for a b that depends on neither
    $a_i$ nor what comes of it, and $E[\nabla\log\pi(a_i)\,b]$ is not. The quotient estimates the return that the policy itself
    would expect at row i from the other sequences alone (self-normalised importance sampling), so that nothing is biased.

    Without `leave_one_out` the advantages are $(n - 1)/n$ times these for n valid sequences: the baseline is then a mean in
    which the sequence's own return counts 1/n, and the expected gradient shrinks by as much as without weights. With weights
    of 1 this is `batch_centred`; as there, a row valid in only one sequence keeps its return, or has 0.
    """
    valid = mask.astype(returns.dtype)
    count = jnp.sum(valid, axis=0, keepdims=True)
    baseline = _sum_of_others(returns * valid) / jnp.maximum(_sum_of_others(weights * valid), LEAST_WEIGHT)
    share = 1.0 if leave_one_out else (count - 1.0) / jnp.maximum(count, 1.0)
    return share * (returns - weights * baseline) * valid


def _sum_of_others(values: Float[Array, "batch length"]) -> Float[Array, "batch length"]:
    """At every row the sum over the other sequences, of what stands before and after each. A total minus its own value would
    lose those beside a large one."""
    before = jnp.pad(jnp.cumsum(values, axis=0)[:-1], ((1, 0), (0, 0)))
    after = jnp.pad(jnp.cumsum(values[::-1], axis=0)[:-1], ((1, 0), (0, 0)))[::-1]
    return before + after


def generalised_advantages(
    rewards: Float[Array, "batch length"],
    values: Float[Array, "batch length"],
    discount: float,
    decay: float,
    continues: Bool[Array, "batch length"],
    weights: Float[Array, "batch length"] | None = None,
) -> Float[Array, "batch length"]:
    r"""$A_i = \sum_{l \ge 0} (\gamma\lambda)^l \rho_{i+l} \delta_{i+l}$, $\delta_j = r_j + \gamma v_{j+1} - v_j$.

    Schulman et al. 2016, eq. 16. `values` are v, `discount` γ, `decay` λ; sums end where `continues` is False. Where another
    policy drew, each error is weighted by the ratio ρ of probabilities up to its row (None: 1), as rewards are (Precup et al.
    2000): its expectation is then the policy's own, and errors of 0 stay 0.
    """
    after = jnp.where(continues, jnp.roll(values, -1, axis=1), 0.0)
    errors = rewards + discount * after - values
    errors = errors if weights is None else weights * errors
    return discounted_returns(errors, discount * decay, continues)


def value_loss(
    values: Float[Array, "batch length"],
    returns: Float[Array, "batch length"],
    mask: Bool[Array, "batch length"],
    weights: Float[Array, "batch length"] | None = None,
) -> Float[Array, ""]:
    r"""$\mathrm{mean}_i\,\rho_i (v_i - G_i/\rho_i)^2$ over the rows of `mask`; without `weights` ρ is 1.

    `returns` are sums of weighted rewards, $G_i = \sum_{j \ge i} \gamma^{j-i} \rho_j r_j$: divided by $\rho_i$ they are weighted
    for what follows row i, and ρ weights what led there. The gradient, $2 (\rho_i v_i - G_i)$, has under the behaviour's draws
    the expectation that $2 (v_i - G_i)$ has under the policy's own, so that v learns the return that the policy would expect;
    with clipped weights it learns $E[G_i]/E[\rho_i]$. No gradient passes through returns and weights.
    """
    returns = jax.lax.stop_gradient(returns)
    if weights is None:
        return masked_mean((values - returns) ** 2, mask)
    weights = jax.lax.stop_gradient(weights)
    return masked_mean(weights * (values - returns / jnp.maximum(weights, LEAST_WEIGHT)) ** 2, mask)


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


def start_of(starts: Bool[Array, "batch length"]) -> Int[Array, "batch length"]:
    """The row at which the document of each row starts: the latest True of `starts`, or row 0."""
    place = jnp.arange(starts.shape[1])[None, :]
    return jax.lax.cummax(jnp.where(starts, place, 0), axis=1)


def importance_weights(
    logits: Float[Array, "batch length"],
    actions: Bool[Array, "batch length"],
    behaviour_log_prob: Float[Array, "batch length"],
    decided: Bool[Array, "batch length"],
    starts: Bool[Array, "batch length"],
) -> Float[Array, "batch length"]:
    r"""$\rho_j = \prod_{k \le j} \pi(a_k)/\mu(a_k)$ over the `decided` rows k of the document of row j (Precup et al. 2000).

    `behaviour_log_prob` is $\log\mu(a_k)$; `starts` begins the product anew.
    """
    log_ratio = jnp.where(decided, action_log_prob(logits, actions) - behaviour_log_prob, 0.0)
    total = jnp.cumsum(log_ratio, axis=1)
    before = jnp.take_along_axis(total - log_ratio, start_of(starts), axis=1)
    return jnp.exp(total - before)


def gumbel_sigmoid(
    logits: Float[Array, "batch length"], uniforms: Float[Array, "batch length"], temperature: float
) -> Float[Array, "batch length"]:
    r"""$\sigma\big((l + \mathrm{logit}(u)) / \tau\big)$: a relaxed Bernoulli draw (Maddison et al. 2017; DPT).

    It lies above one half with probability $\sigma(l)$ for uniform u. Uniforms of exactly 0 or 1 give 0 or 1.
    """
    return jax.nn.sigmoid((logits + jnp.log(uniforms) - jnp.log1p(-uniforms)) / temperature)


def straight_through(hard: Shaped[Array, "*shape"], soft: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The value of `hard`, exactly, with the gradient of `soft` (Bengio et al. 2013)."""
    return jax.lax.stop_gradient(hard).astype(soft.dtype) + (soft - jax.lax.stop_gradient(soft))


def binomial_prior_loss(
    hard: Float[Array, "batch length"],
    prior: float | Float[Array, ""],
    mask: Bool[Array, "batch length"] | None = None,
) -> Float[Array, ""]:
    r"""$-\mathrm{mean}_b \log \mathrm{Binomial}(n_b, \pi)(\sum_i h_{b,i}) / n_b$ in nats per row (DPT; authors' code).

    n counts the rows of `mask`. Differentiable in the numbers `hard`, through the gamma functions of the coefficient. A
    sequence without rows counts 0.
    """
    mask = jnp.ones(hard.shape, bool) if mask is None else mask
    n = jnp.sum(mask, axis=1).astype(hard.dtype)
    k = jnp.sum(jnp.where(mask, hard, 0.0), axis=1)
    gammaln = jax.scipy.special.gammaln
    coefficient = gammaln(n + 1.0) - gammaln(k + 1.0) - gammaln(n - k + 1.0)
    log_prob = coefficient + k * jnp.log(prior) + (n - k) * jnp.log1p(-prior)
    return -jnp.mean(log_prob / jnp.maximum(n, 1.0))


def routing_probability(
    query: Float[Array, "batch length dim"],
    key: Float[Array, "batch length dim"],
    starts: Bool[Array, "batch length"] | None = None,
) -> Float[Array, "batch length"]:
    r"""$p_t = \tfrac12\big(1 - \cos(q_{t-1}, k_t)\big)$, how unlike neighbouring rows are; 1 at `starts` (H-Net eq. 4).

    As in the released code the query comes from the row before; the paper writes it the other way round, which only swaps
    the two projections. `starts` None: only row 0 starts. In float32, within [0, 1].
    """
    if starts is None:
        starts = jnp.zeros(query.shape[:2], bool).at[:, 0].set(True)

    def unit(rows: Float[Array, "batch length dim"]) -> Float[Array, "batch length dim"]:
        rows = rows.astype(jnp.float32)
        # As in torch.nn.functional.normalize; the square root needs an argument above 0 for its gradient.
        square = jnp.sum(rows**2, axis=-1, keepdims=True)
        return rows / jnp.sqrt(jnp.maximum(square, 1e-24))

    cosine = jnp.sum(unit(query)[:, :-1] * unit(key)[:, 1:], axis=-1)
    probs = jnp.pad(jnp.clip(0.5 * (1.0 - cosine), 0.0, 1.0), ((0, 0), (1, 0)), constant_values=1.0)
    return jnp.where(starts, 1.0, probs)


def ratio_loss(
    actions: Bool[Array, "batch length"],
    probs: Float[Array, "batch length"],
    chunk_size: float | Float[Array, ""],
    mask: Bool[Array, "batch length"] | None = None,
) -> Float[Array, ""]:
    r"""$\frac{N}{N-1}\big((N-1) F G + (1-F)(1-G)\big)$ with N bytes per chunk wanted (H-Net eq. 10).

    F is the mean of `actions`, which carries no gradient, and G the mean of `probs`, over the rows of `mask`. It is 1 where
    F = G = 1/N.
    """
    mask = jnp.ones(probs.shape, bool) if mask is None else mask
    drawn = masked_mean(actions.astype(probs.dtype), mask)
    expected = masked_mean(probs, mask)
    both = (chunk_size - 1.0) * drawn * expected + (1.0 - drawn) * (1.0 - expected)
    return chunk_size / (chunk_size - 1.0) * both


def stage_multipliers(chunk_sizes: Sequence[float], widths: Sequence[int], bytes_per_token: float) -> list[float]:
    r"""$\lambda^s = \sqrt{N^{GPT} \cdot \prod_{i \ge s} N^i / \prod_i N^i \cdot D^S / D^s}$ with $N^S = 1$ (H-Net eq. 11).

    What the learning rate of each stage is multiplied by, the outermost first: `chunk_sizes` N of the stages that make chunks,
    `widths` D of all of them, `bytes_per_token` $N^{GPT}$ of a usual tokenizer.
    """
    return [
        math.sqrt(bytes_per_token / math.prod(chunk_sizes[:stage]) * widths[-1] / width)
        for stage, width in enumerate(widths)
    ]


def confidence(
    probs: Float[Array, "batch length"], actions: Bool[Array, "batch length"]
) -> Float[Array, "batch length"]:
    """p where a boundary was drawn, 1 - p elsewhere: how sure the router was of what it did (H-Net eq. 6)."""
    return jnp.where(actions, probs, 1.0 - probs)


def entropy(logits: Float[Array, "*shape vocab"]) -> Float[Array, "*shape"]:
    r"""$-\sum_v p_v \log p_v$ in nats for $p = \mathrm{softmax}(l)$, in float32 (BLT)."""
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)


def patch_over_threshold(
    entropies: Float[Array, "*shape"], numbers: Int[Array, "*shape"], threshold: float | Float[Array, ""]
) -> Bool[Array, "*shape"]:
    r"""$i = 0 \lor H_i > \theta_g$: whether a patch ends with row i of its document (BLT, the global rule).

    $H_i$ is the entropy in nats of the prediction that row i makes of the byte after it, `numbers` is i. The program speaks of
    the byte i + 1 with which a patch starts; row 0 is BOS, alone in its patch.
    """
    return (entropies > threshold) | (numbers == 0)


def patch_on_rise(
    entropies: Float[Array, "*shape"],
    before: Float[Array, "*shape"],
    numbers: Int[Array, "*shape"],
    threshold: float | Float[Array, ""],
) -> Bool[Array, "*shape"]:
    r"""$i \le 1 \lor H_i - H_{i-1} > \theta_r$: whether a patch ends with row i (BLT, the rule of approximate monotonicity).

    `before` is $H_{i-1}$. The program leaves out the entropy at BOS, so that row 1 has no rise to go by: its patch ends there.
    """
    return (entropies - before > threshold) | (numbers <= 1)


def patch_on_rise_over_threshold(
    entropies: Float[Array, "*shape"],
    before: Float[Array, "*shape"],
    numbers: Int[Array, "*shape"],
    threshold: float | Float[Array, ""],
    increase: float | Float[Array, ""],
) -> Bool[Array, "*shape"]:
    r"""$i \le 1 \lor i \ne 2 \land H_i > \theta_g \land H_i - H_{i-1} > \theta_r$: whether a patch ends with row i (BLT, both
    rules together).

    Row 2 is excluded in the program, as the one behind the first that is set; patches of one byte may follow one another
    everywhere else.
    """
    drawn = (entropies > threshold) & (entropies - before > increase) & (numbers != 2)
    return drawn | (numbers <= 1)


def bits_per_byte(
    nats: float | Float[Array, ""], num_bytes: int | float | Float[Array, ""]
) -> float | Float[Array, ""]:
    r"""$\mathrm{nats} / (\ln 2\cdot\mathrm{bytes})$: a summed negative log-likelihood over the bytes that were predicted."""
    return nats / (math.log(2.0) * num_bytes)


def bits_per_byte_error(nats: Float[Array, " documents"], num_bytes: Float[Array, " documents"]) -> Float[Array, ""]:
    r"""Standard error over documents of bits per byte, $R = \sum_d L_d / \sum_d B_d$ (of a ratio: Cochran 1977, section 2.11).

    $\frac{1}{\ln 2\,\sum_d B_d}\sqrt{\frac{n}{n-1}\sum_d (L_d - R B_d)^2}$ for the summed negative log-likelihoods L, in nats,
    and the predicted bytes B of n documents drawn independently. Documents without predicted bytes do not count; NaN for
    fewer than two that do.
    """
    total = jnp.sum(num_bytes)
    count = jnp.sum(num_bytes > 0.0)
    residuals = nats - jnp.sum(nats) / total * num_bytes
    variance = count / (count - 1) * jnp.sum(residuals**2)
    return jnp.where(count > 1, jnp.sqrt(variance) / (math.log(2.0) * total), jnp.nan)
