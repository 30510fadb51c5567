"""Each equation as one pure function. Arrays are `batch length`; log-probabilities are in nats; everything is float32.

"SFE" is Dauncey and Wattenhofer, "You can learn tokenization end-to-end with reinforcement learning"; "H-Net" is
Hwang, Wang and Gu, "Dynamic chunking for end-to-end hierarchical sequence modeling"; "DPT" is Nawrot et al., "Efficient
transformers with dynamic token pooling"; "BLT" is Pagnoni et al., "Byte latent transformer: patches scale better than tokens".
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from estimators.sharding import batch_shards, batch_sum, other_shards_sum


def logit(prob: float) -> float:
    r"""$\mathrm{logit}(p) = \log p - \log(1-p)$ of a Python number. Raises `ValueError` unless it is strictly between 0 and 1."""
    if not 0.0 < prob < 1.0:
        raise ValueError(f"a rate or probability must lie strictly between 0 and 1; got {prob}")
    return math.log(prob) - math.log1p(-prob)


def soft_cap(logits: Float[Array, "*shape"], cap: float | None) -> Float[Array, "*shape"]:
    r"""$c\,\tanh(l/c)$: close to l for $|l| \ll c$, never beyond $\pm c$ (Gemma 2; SFE eq. 19). Without a cap, l itself."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def windowed_logits(
    projections: Float[Array, "batch length lags"],
    actions: Bool[Array, "batch length"],
    starts: Bool[Array, "batch length"],
) -> Float[Array, "batch length"]:
    r"""Logits of a policy that sees its last w actions, given all actions (SFE eq. 17).

    $l_i = q_{i,0} + \sum_{j=1}^{w} a_{i-j}\, q_{i,j}$ with q the `projections` and w = `lags` - 1. Actions of earlier
    documents, before the latest True of `starts`, do not count.
    """
    logits = projections[..., 0]
    length = actions.shape[1]
    memory, fresh = actions, starts
    for tap in range(1, projections.shape[-1]):
        if tap >= length:
            break
        # After j shifts `memory_i` is a_{i-j}, or False if a document starts at one of positions i-j+1 .. i.
        memory = jnp.pad(memory[:, :-1], ((0, 0), (1, 0))) & ~fresh
        logits = logits + jnp.where(memory, projections[..., tap], 0.0)
    return logits


def action_log_prob(
    logits: Float[Array, "batch length"], actions: Bool[Array, "batch length"]
) -> Float[Array, "batch length"]:
    r"""$\log\pi(a_i)$ of Bernoulli actions with logits $l_i$: $\log\sigma(l)$ for 1, $\log\sigma(-l)$ for 0 (SFE eq. 16)."""
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

    `rewards_i` is the reward of the prediction made at position i. Where `continues_i` is False, the sum stops after position
    i, so that no document is credited with the rewards of the next.
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
    whole_batch: bool = True,
) -> Float[Array, "batch length"]:
    r"""$A_{b,i} = G_{b,i} - \bar G_i$, $\bar G_i$ the mean over sequences valid at position i (SFE eq. 14); 0 where masked.

    The mean includes the sequence's own return, which scales the expected policy gradient by $(n-1)/n$ for n valid
    sequences. With `leave_one_out` it is over the other sequences, which is unbiased; where only one sequence is valid, its
    return is then left as it is.

    Where devices share the batch, the mean is over the sequences of all of them, or without `whole_batch` over those of this
    device alone: n is then their number, so that with B sequences on D devices the factor is $(B - D)/B$ rather than
    $(B - 1)/B$, and `leave_one_out` is as unbiased.
    """
    valid = jnp.ones(returns.shape, returns.dtype) if mask is None else mask.astype(returns.dtype)
    count, total = jnp.sum(valid, axis=0, keepdims=True), jnp.sum(returns * valid, axis=0, keepdims=True)
    count, total = batch_sum((count, total)) if whole_batch else (count, total)
    if leave_one_out:
        baseline = (total - returns) / jnp.maximum(count - 1.0, 1.0)
        baseline = jnp.where(count > 1.0, baseline, 0.0)
    else:
        baseline = total / jnp.maximum(count, 1.0)
    return (returns - baseline) * valid


LEAST_WEIGHT = 1e-12
"""Lower bound of importance weights in denominators. Smaller ones belong to actions that the policy hardly ever takes, and a
baseline is unbiased whatever its value."""


def weighted_batch_centred(
    returns: Float[Array, "batch length"],
    weights: Float[Array, "batch length"],
    mask: Bool[Array, "batch length"],
    leave_one_out: bool = False,
    whole_batch: bool = True,
) -> Float[Array, "batch length"]:
    r"""$A_{b,i} = G_{b,i} - \rho_{b,i}\,\sum_{c \ne b} G_{c,i} / \sum_{c \ne b} \rho_{c,i}$ over valid sequences; 0 where masked.

    `returns` are sums of weighted rewards, $G_i = \sum_{j \ge i} \gamma^{j-i} \rho_j r_j$; `weights` are the probability ratios
    $\rho_i$ up to position i. If another policy drew the actions, $E[\nabla\log\pi(a_i)\,\rho_i b]$ is 0 for any b that depends
    neither on $a_i$ nor on its consequences, whereas $E[\nabla\log\pi(a_i)\,b]$ is not. The quotient is the self-normalised
    importance sampling estimate, from the other sequences alone, of the policy's expected return: the baseline adds no bias.

    Without `leave_one_out` the result is multiplied by $(n - 1)/n$ for n valid sequences: the sequence's own return counts 1/n
    in the baseline, and the expected gradient shrinks as in `batch_centred`. Weights of 1 give `batch_centred`. As there, where
    only one sequence is valid, its return is left as it is with `leave_one_out`, and 0 without. `whole_batch` is as there, too.
    """
    valid = mask.astype(returns.dtype)
    count = jnp.sum(valid, axis=0, keepdims=True)
    count = batch_sum(count) if whole_batch else count
    others = _sum_of_others(weights * valid, whole_batch)
    baseline = _sum_of_others(returns * valid, whole_batch) / jnp.maximum(others, LEAST_WEIGHT)
    share = 1.0 if leave_one_out else (count - 1.0) / jnp.maximum(count, 1.0)
    return share * (returns - weights * baseline) * valid


def _sum_of_others(values: Float[Array, "batch length"], whole_batch: bool) -> Float[Array, "batch length"]:
    """At each position, the sum over the other sequences, of the `whole_batch` or of this device. Sums of those before and after,
    rather than the total minus the sequence's own value, avoid cancellation next to a large value."""
    before = jnp.pad(jnp.cumsum(values, axis=0)[:-1], ((1, 0), (0, 0)))
    after = jnp.pad(jnp.cumsum(values[::-1], axis=0)[:-1], ((1, 0), (0, 0)))[::-1]
    elsewhere = other_shards_sum(jnp.sum(values, axis=0)) if whole_batch else 0.0
    return before + after + elsewhere


def generalised_advantages(
    rewards: Float[Array, "batch length"],
    values: Float[Array, "batch length"],
    discount: float,
    decay: float,
    continues: Bool[Array, "batch length"],
    weights: Float[Array, "batch length"] | None = None,
) -> Float[Array, "batch length"]:
    r"""$A_i = \sum_{l \ge 0} (\gamma\lambda)^l \rho_{i+l} \delta_{i+l}$, $\delta_j = r_j + \gamma v_{j+1} - v_j$.

    Schulman et al. 2016, eq. 16. `values` are v, `discount` γ, `decay` λ; sums end where `continues` is False. `weights` are
    the probability ratios ρ up to each position if another policy drew the actions (None: 1). Errors δ are weighted by them as
    rewards are (Precup et al. 2000), which gives their expectation under the policy and leaves errors of 0 at 0.
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
    r"""$\mathrm{mean}_i\,\rho_i (v_i - G_i/\rho_i)^2$ over the positions of `mask`; without `weights` ρ is 1.

    `returns` are sums of weighted rewards, $G_i = \sum_{j \ge i} \gamma^{j-i} \rho_j r_j$. $G_i/\rho_i$ keeps the weights of what
    follows position i; the factor ρ is the weight of reaching it. The gradient $2 (\rho_i v_i - G_i)$ has, under the behaviour's
    draws, the expectation of $2 (v_i - G_i)$ under the policy, so that v learns the policy's expected return. With clipped
    weights it learns $E[G_i]/E[\rho_i]$. No gradient passes through returns and weights.
    """
    returns = jax.lax.stop_gradient(returns)
    if weights is None:
        return masked_mean((values - returns) ** 2, mask)
    weights = jax.lax.stop_gradient(weights)
    return masked_mean(weights * (values - returns / jnp.maximum(weights, LEAST_WEIGHT)) ** 2, mask)


def masked_mean(values: Float[Array, "*shape"], mask: Bool[Array, "*shape"]) -> Float[Array, ""]:
    """The mean of `values` where `mask` is True; 0 for an empty mask."""
    total, count = batch_sum((jnp.sum(jnp.where(mask, values, 0.0)), jnp.sum(mask)))
    return total / jnp.maximum(count, 1).astype(values.dtype)


def policy_loss(
    action_log_prob: Float[Array, "batch length"],
    advantages: Float[Array, "batch length"],
    mask: Bool[Array, "batch length"],
    among: Bool[Array, "batch length"] | None = None,
) -> Float[Array, ""]:
    r"""$L_\pi = -\frac1n \sum_i \log\pi(a_i)\,\mathrm{sg}(A_i)$ over the positions i of `mask` (SFE eq. 15).

    The paper writes a sum; divided by n, the weight of the term depends neither on the length nor on the batch size. n is the
    number of positions of `among`, which holds those of `mask` (None: `mask` itself).
    """
    terms = jnp.where(mask, action_log_prob * jax.lax.stop_gradient(advantages), 0.0)
    return -masked_mean(terms, mask if among is None else among)


def rate_loss(
    logits: Float[Array, "batch length"],
    probs: Float[Array, "batch length"],
    target: float | Float[Array, ""],
    mask: Bool[Array, "batch length"],
) -> Float[Array, ""]:
    r"""$L_{target} = \bar l\cdot\mathrm{sg}(\bar p - \pi_{target})$, means over the positions of `mask` (SFE eq. 20).

    Every logit gets the same gradient, proportional to the mean probability's distance from the target rate.
    """
    return masked_mean(logits, mask) * jax.lax.stop_gradient(masked_mean(probs, mask) - target)


def start_of(starts: Bool[Array, "batch length"]) -> Int[Array, "batch length"]:
    """The index at which the document of each position starts: the latest True of `starts`, or 0."""
    place = jnp.arange(starts.shape[1])[None, :]
    return jax.lax.cummax(jnp.where(starts, place, 0), axis=1)


def importance_weights(
    logits: Float[Array, "batch length"],
    actions: Bool[Array, "batch length"],
    behaviour_log_prob: Float[Array, "batch length"],
    decided: Bool[Array, "batch length"],
    starts: Bool[Array, "batch length"],
) -> Float[Array, "batch length"]:
    r"""$\rho_j = \prod_{k \le j} \pi(a_k)/\mu(a_k)$ over the `decided` positions k of j's document (Precup et al. 2000).

    `behaviour_log_prob` is $\log\mu(a_k)$; the product restarts at `starts`.
    """
    log_ratio = jnp.where(decided, action_log_prob(logits, actions) - behaviour_log_prob, 0.0)
    total = jnp.cumsum(log_ratio, axis=1)
    before = jnp.take_along_axis(total - log_ratio, start_of(starts), axis=1)
    return jnp.exp(total - before)


NEVER = 2**30
"""A chunk size that no text reaches."""


def chunk_sizes(
    actions: Bool[Array, "batch length"],
    starts: Bool[Array, "batch length"],
    before: Int[Array, " batch"] | None = None,
) -> Int[Array, "batch length"]:
    r"""$s_i = i - \max\{k < i : a_k = 1\}$: the size of the chunk that a boundary at position i would close, i included.

    Counting restarts where `starts` is True, at 1. `before` is the size of the chunk that is open before the first position
    (None: 0).
    """
    place = jnp.arange(actions.shape[1], dtype=jnp.int32)[None, :]
    first = jnp.zeros(actions.shape[:1], jnp.int32) if before is None else -before
    opened = jnp.concatenate([first[:, None], jnp.where(actions, place + 1, -NEVER)[:, :-1]], axis=1)
    return place + 1 - jax.lax.cummax(jnp.where(starts, place, opened), axis=1)


def within_limits(
    drawn: Bool[Array, "*shape"],
    sizes: Int[Array, "*shape"],
    least: Int[Array, "*shape"],
    most: Int[Array, "*shape"],
) -> Bool[Array, "*shape"]:
    r"""$a_i = 1[s_i \ge m_i]\,(d_i \lor 1[s_i \ge n_i])$: draws d within limits on the sizes s of the chunks they close.

    A boundary is forbidden where the chunk has fewer than $m_i$ (`least`) positions. Elsewhere one is forced where it has $n_i$
    (`most`) or more. A position is free where neither holds: there $a_i = d_i$.
    """
    return (sizes >= least) & (drawn | (sizes >= most))


def rate_with_longest(rate: float, longest: int) -> float:
    r"""$\pi / (1 - (1 - \pi)^n)$: the rate of boundaries that are drawn with probability π where they are free, and forced in
    chunks of n = `longest` positions (the mean of a geometric variable that is cut at n, inverted)."""
    return -rate / math.expm1(longest * math.log1p(-rate)) if rate < 1.0 else 1.0


def rate_with_shortest(rate: float, shortest: int) -> float:
    r"""$1 / (m - 1 + 1/\pi)$: the rate of boundaries that are drawn with probability π in chunks of m = `shortest` positions or
    more."""
    return 1.0 / (shortest - 1 + 1.0 / rate)


def gumbel_sigmoid(
    logits: Float[Array, "batch length"], uniforms: Float[Array, "batch length"], temperature: float
) -> Float[Array, "batch length"]:
    r"""$\sigma\big((l + \mathrm{logit}(u)) / \tau\big)$: a relaxed Bernoulli draw (Maddison et al. 2017; DPT).

    For uniform u it exceeds one half with probability $\sigma(l)$; u of exactly 0 or 1 gives 0 or 1.
    """
    return jax.nn.sigmoid((logits + jnp.log(uniforms) - jnp.log1p(-uniforms)) / temperature)


def straight_through(hard: Shaped[Array, "*shape"], soft: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Exactly the value of `hard`, with the gradient of `soft` (Bengio et al. 2013)."""
    return jax.lax.stop_gradient(hard).astype(soft.dtype) + (soft - jax.lax.stop_gradient(soft))


def binomial_prior_loss(
    hard: Float[Array, "batch length"],
    prior: float | Float[Array, ""],
    mask: Bool[Array, "batch length"] | None = None,
) -> Float[Array, ""]:
    r"""$-\mathrm{mean}_b \log \mathrm{Binomial}(n_b, \pi)(\sum_i h_{b,i}) / n_b$ in nats per position (DPT; authors' code).

    $n_b$ is the number of positions in `mask`; a sequence without any contributes 0. Differentiable in `hard`, since the
    binomial coefficient is written with gamma functions.
    """
    mask = jnp.ones(hard.shape, bool) if mask is None else mask
    n = jnp.sum(mask, axis=1).astype(hard.dtype)
    k = jnp.sum(jnp.where(mask, hard, 0.0), axis=1)
    gammaln = jax.scipy.special.gammaln
    coefficient = gammaln(n + 1.0) - gammaln(k + 1.0) - gammaln(n - k + 1.0)
    log_prob = coefficient + k * jnp.log(prior) + (n - k) * jnp.log1p(-prior)
    return -batch_sum(jnp.sum(log_prob / jnp.maximum(n, 1.0))) / (n.shape[0] * batch_shards())


def routing_probability(
    query: Float[Array, "batch length dim"],
    key: Float[Array, "batch length dim"],
    starts: Bool[Array, "batch length"] | None = None,
) -> Float[Array, "batch length"]:
    r"""$p_t = \tfrac12\big(1 - \cos(q_{t-1}, k_t)\big)$, the dissimilarity of neighbours; 1 at `starts` (H-Net eq. 4).

    As in the released code, the query comes from the previous position; the paper has $q_t$ and $k_{t-1}$, which only swaps
    the two projections. Without `starts`, only position 0 starts a document. In float32, within [0, 1].
    """
    if starts is None:
        starts = jnp.zeros(query.shape[:2], bool).at[:, 0].set(True)

    def unit(rows: Float[Array, "batch length dim"]) -> Float[Array, "batch length dim"]:
        rows = rows.astype(jnp.float32)
        # As in torch.nn.functional.normalize; the gradient of the square root is infinite at 0.
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
    r"""$\frac{N}{N-1}\big((N-1) F G + (1-F)(1-G)\big)$ with N = `chunk_size`, the target bytes per chunk (H-Net eq. 10).

    F is the mean of `actions`, which carries no gradient, and G the mean of `probs`, over the positions of `mask`. The loss is
    1 where F = G = 1/N.
    """
    mask = jnp.ones(probs.shape, bool) if mask is None else mask
    drawn = masked_mean(actions.astype(probs.dtype), mask)
    expected = masked_mean(probs, mask)
    both = (chunk_size - 1.0) * drawn * expected + (1.0 - drawn) * (1.0 - expected)
    return chunk_size / (chunk_size - 1.0) * both


def stage_multipliers(chunk_sizes: Sequence[float], widths: Sequence[int], bytes_per_token: float) -> list[float]:
    r"""$\lambda^s = \sqrt{N^{GPT} \cdot \prod_{i \ge s} N^i / \prod_i N^i \cdot D^S / D^s}$ with $N^S = 1$ (H-Net eq. 11).

    The learning-rate multiplier of each stage, the outermost first: `chunk_sizes` N of the stages with a chunker, `widths` D of
    all stages, `bytes_per_token` $N^{GPT}$ of a common tokenizer.
    """
    return [
        math.sqrt(bytes_per_token / math.prod(chunk_sizes[:stage]) * widths[-1] / width)
        for stage, width in enumerate(widths)
    ]


def embedding_matching_loss(
    vectors: Float[Array, "batch tokens dim"],
    wanted: Float[Array, "batch tokens dim"],
    mask: Bool[Array, "batch tokens"],
) -> Float[Array, ""]:
    r"""$\sum_m \lVert z_m - e_m\rVert^2 / \sum_m \lVert e_m\rVert^2$ over the tokens m of `mask`, with z the `vectors` that enter
    the main network of a hierarchy and e the embeddings that a model of tokens has there (H-Net appendix F).

    The paper says "L2 loss" and gives a weight for the embeddings of one model. Divided by the size of the embeddings, a weight
    means the same for every model: vectors of zero have a loss of 1. No gradient passes through `wanted`.
    """
    wanted = jax.lax.stop_gradient(wanted.astype(jnp.float32))
    inside = mask[..., None]
    errors = jnp.sum(jnp.where(inside, (vectors.astype(jnp.float32) - wanted) ** 2, 0.0))
    sizes = jnp.sum(jnp.where(inside, wanted**2, 0.0))
    return errors / jnp.maximum(sizes, 1e-30)


def byte_matching_loss(
    wanted: Float[Array, "batch length 256"],
    log_probs: Float[Array, "batch length 256"],
    mask: Bool[Array, "batch length"],
) -> Float[Array, ""]:
    r"""$\mathrm{mean}_i \sum_b q_i(b) \log (q_i(b) / p_i(b))$ in nats, over the bytes i of `mask`: the divergence of the next
    byte as a model expects it (`log_probs`, $\log p$) from what a teacher expects (`wanted`, q); 0 for an empty mask.

    No gradient passes through `wanted`. (Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network", at a
    temperature of 1.)
    """
    wanted = jax.lax.stop_gradient(wanted.astype(jnp.float32))
    logs = jnp.log(jnp.where(wanted > 0, wanted, 1.0)) - log_probs.astype(jnp.float32)
    divergence = jnp.sum(jnp.where(wanted > 0, wanted * logs, 0.0), axis=-1)
    return jnp.sum(jnp.where(mask, divergence, 0.0)) / jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0)


def confidence(
    probs: Float[Array, "batch length"], actions: Bool[Array, "batch length"]
) -> Float[Array, "batch length"]:
    """The probability of the action taken: p where a boundary was drawn, 1 - p elsewhere (H-Net eq. 6)."""
    return jnp.where(actions, probs, 1.0 - probs)


def entropy(logits: Float[Array, "*shape vocab"]) -> Float[Array, "*shape"]:
    r"""$-\sum_v p_v \log p_v$ in nats for $p = \mathrm{softmax}(l)$, in float32 (BLT)."""
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)


def patch_over_threshold(
    entropies: Float[Array, "*shape"], document_positions: Int[Array, "*shape"], threshold: float | Float[Array, ""]
) -> Bool[Array, "*shape"]:
    r"""$i = 0 \lor H_i > \theta_g$: whether a patch ends at position i of its document (BLT, global threshold).

    $H_i$ is the entropy in nats of the next-byte prediction at position i; `document_positions` is i. The released code marks
    the byte i + 1 that starts a patch. Position 0 is BOS, which is a patch of its own.
    """
    return (entropies > threshold) | (document_positions == 0)


def patch_on_rise(
    entropies: Float[Array, "*shape"],
    before: Float[Array, "*shape"],
    document_positions: Int[Array, "*shape"],
    threshold: float | Float[Array, ""],
) -> Bool[Array, "*shape"]:
    r"""$i \le 1 \lor H_i - H_{i-1} > \theta_r$: whether a patch ends at position i (BLT, approximate monotonicity).

    `before` is $H_{i-1}$. The released code ignores the entropy at BOS. Position 1 therefore has no difference to compare, and
    a patch always ends there.
    """
    return (entropies - before > threshold) | (document_positions <= 1)


def patch_on_rise_over_threshold(
    entropies: Float[Array, "*shape"],
    before: Float[Array, "*shape"],
    document_positions: Int[Array, "*shape"],
    threshold: float | Float[Array, ""],
    increase: float | Float[Array, ""],
) -> Bool[Array, "*shape"]:
    r"""$i \le 1 \lor i \ne 2 \land H_i > \theta_g \land H_i - H_{i-1} > \theta_r$: whether a patch ends at position i (BLT, both
    rules combined).

    The released code excludes position 2, which follows the first boundary it sets. Everywhere else, one-byte patches may
    follow each other.
    """
    drawn = (entropies > threshold) & (entropies - before > increase) & (document_positions != 2)
    return drawn | (document_positions <= 1)


def bits_per_byte(
    nats: float | Float[Array, ""], num_bytes: int | float | Float[Array, ""]
) -> float | Float[Array, ""]:
    r"""$\mathrm{nats} / (\ln 2\cdot\mathrm{bytes})$ of the summed negative log-likelihood and the number of predicted bytes."""
    return nats / (math.log(2.0) * num_bytes)


def bits_per_byte_error(nats: Float[Array, " documents"], num_bytes: Float[Array, " documents"]) -> Float[Array, ""]:
    r"""Standard error of bits per byte over documents, as of a ratio $R = \sum_d L_d / \sum_d B_d$ (Cochran 1977, section 2.11).

    $\frac{1}{\ln 2\,\sum_d B_d}\sqrt{\frac{n}{n-1}\sum_d (L_d - R B_d)^2}$ for summed negative log-likelihoods L, in nats, and
    predicted bytes B of n independently drawn documents. Documents without predicted bytes do not count; NaN for fewer than
    two others.
    """
    total = jnp.sum(num_bytes)
    count = jnp.sum(num_bytes > 0.0)
    residuals = nats - jnp.sum(nats) / total * num_bytes
    variance = count / (count - 1) * jnp.sum(residuals**2)
    return jnp.where(count > 1, jnp.sqrt(variance) / (math.log(2.0) * total), jnp.nan)
