"""The training loss: next-byte log-probabilities, and the objectives of all token levels."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from estimators.base import AbstractObjective, Layout, ObjectiveInputs, ObjectiveOutput
from estimators.equations import masked_mean
from estimators.sharding import batch_shards, batch_sum
from unet.experts import ExpertLoss
from unet.hierarchy import Level, repeated, without_copies
from unet.likelihood import continues, log_prob_of, next_logprobs
from unet.ops import token_of
from unet.ops.rows import add_at


class Prediction(eqx.Module):
    """Logits of the next byte at each position, those of the early-exit head if there is one, and the levels of the hierarchy.

    `early_logits` depend on no boundary, so all samples of a sequence (adjacent in the batch) share one row of them.
    `early_positions`, if given: their positions, the same in every sequence. `experts`: in training the loss of mixtures of
    experts, if there are any.
    """

    logits: Float[Array, "batch length vocab"]
    early_logits: Float[Array, "sequences positions vocab"] | None
    levels: tuple[Level, ...]
    early_positions: Int[Array, " positions"] | None = None
    experts: ExpertLoss | None = None


class LossOutput(eqx.Module):
    """The `loss` to minimise, which is the mean negative log-probability in nats per byte plus the objectives' losses, and
    numbers to log.

    `log_prob` is the mean log-probability per predicted byte, `early_log_prob` that of the early-exit head (None without one),
    `rate` the fraction of valid bytes with a boundary (0 without a token level), `overflow` the fraction of valid bytes whose
    boundary was dropped, `padding` the fraction of the outermost token level's capacity that held no token. `metrics` holds
    what the objectives report, by name, and of a constrained level the `free_rate`. For inner levels its names begin with
    `level1_…`, and it also holds their `rate` and `overflow`, as fractions of the positions of the level around.
    """

    loss: Float[Array, ""]
    log_prob: Float[Array, ""]
    early_log_prob: Float[Array, ""] | None
    rate: Float[Array, ""]
    overflow: Float[Array, ""]
    padding: Float[Array, ""]
    metrics: dict[str, Float[Array, ""]]
    target_of: Float[Array, ""] | None = None

    @property
    def free_rate(self) -> Float[Array, ""]:
        r"""The fraction of bytes with a boundary that was drawn, kept or dropped, among those where no constraint forces or
        forbids one: $\sum_{i \notin C} a_i / \sum_{i \notin C} 1$ over valid bytes, C the `Boundaries.constrained`. It is what a
        target rate asks for; without constraints, `rate + overflow`. Of a model of tokens, the same for the level inside the
        tokenizer (`target_of`)."""
        if self.target_of is not None:
            return self.target_of
        return self.metrics.get("free_rate", self.rate + self.overflow)


def early_log_prob(prediction: Prediction, layout: Layout) -> Float[Array, "batch length"] | None:
    r"""$\log p^{early}(x_{i+1} \mid x_{\le i})$ in nats, float32; None without an early-exit head.

    If the head predicted only at some positions, the others get the mean over these. The result is subtracted from rewards and
    depends on no action either way, so policy gradients stay unbiased. Its mean over all positions equals the mean over the
    predicted ones, so the gradient of the early-exit head stays unbiased too (except that padding and packing make it a ratio
    of two random numbers).
    """
    logits, positions = prediction.early_logits, prediction.early_positions
    if logits is None:
        return None
    samples = layout.bytes.shape[0] // logits.shape[0]
    layout = without_copies(layout, samples)
    if positions is None:
        return repeated(next_logprobs(logits, layout.bytes), samples)
    log_prob = log_prob_of(logits, jnp.roll(layout.bytes, -1, axis=1)[:, positions])
    mean = masked_mean(log_prob, continues(layout)[:, positions])
    return repeated(jnp.broadcast_to(mean, layout.bytes.shape).at[:, positions].set(log_prob), samples)


class Reward(eqx.Module):
    """The reward of each position of a level: the sums of `log_prob` and `early_log_prob` over the predictions made while it
    was the latest position of its level, and the number of these that are `scored`."""

    log_prob: Float[Array, "batch length"]
    early_log_prob: Float[Array, "batch length"] | None
    scored: Int[Array, "batch length"]

    def of_tokens(self, level: Level, tokens: int) -> Reward:
        """The rewards of the `tokens` tokens that `level` makes of these positions. Each is the sum from the position that closed
        the token to the one before the next token closes."""
        index = token_of(level.boundaries.actions)
        # Positions before the first token belong to none.
        index = jnp.where(index < 0, tokens, index)
        return jax.tree.map(lambda values: add_at(index, values, tokens), self)

    def scaled(self, factor: Float[Array, ""]) -> Reward:
        """The same with log-probabilities multiplied by a factor."""
        early = None if self.early_log_prob is None else factor * self.early_log_prob
        return Reward(factor * self.log_prob, early, self.scored)


def byte_rewards(prediction: Prediction, layout: Layout) -> Reward:
    """The log-probabilities of the next bytes, 0 where there is none to score."""
    scored = continues(layout)
    log_prob, early = next_logprobs(prediction.logits, layout.bytes), early_log_prob(prediction, layout)
    return Reward(
        jnp.where(scored, log_prob, 0.0),
        None if early is None else jnp.where(scored, early, 0.0),
        scored.astype(jnp.int32),
    )


def objective_inputs(
    reward: Reward,
    levels: Sequence[Level],
    objectives: Sequence[AbstractObjective],
    *,
    target_rate: Float[Array, ""] | None,
    samples: int,
) -> list[ObjectiveInputs]:
    """The inputs of each level's objective, the outermost first; `reward` is that of the bytes.

    The outermost level is rewarded byte by byte. At an inner level each position is a chunk. Its reward is the sum of the
    log-probabilities of all predictions made while it was the latest chunk of its level: from the byte that closed it to the
    byte before the next one closes. These sums are scaled by the number of deciding positions at this level over the number of
    deciding bytes. Policy losses take the mean over decisions, so a nat then has the same weight at every level: each policy
    gradient is that of the same sum of log-probabilities, divided by the same number of bytes.

    Log-probabilities carry no gradient, so no objective can train the language model through them. The exception is the
    early-exit head: the first level that needs its log-probabilities trains it (`trains_early_exit`). They depend on no action
    of any level, so their sums are valid baselines.
    """
    inputs: list[ObjectiveInputs] = []
    reward = Reward(jax.lax.stop_gradient(reward.log_prob), reward.early_log_prob, reward.scored)
    trains_early_exit = True
    target_rates = [target_rate, *[None] * len(levels)]
    for number, (level, objective) in enumerate(zip(levels, objectives, strict=True)):
        scaled = reward.scaled(_deciding(level) / _deciding(levels[0]))
        inputs.append(
            ObjectiveInputs(
                level.boundaries,
                level.hidden,
                scaled.log_prob,
                scaled.early_log_prob,
                mask=reward.scored > 0,
                continues=continues(level.layout),
                target_rate=target_rates[number],
                samples=samples,
                trains_early_exit=trains_early_exit,
            )
        )
        if objective.needs_early_exit:
            reward, trains_early_exit = jax.lax.stop_gradient(reward), False
        if number + 1 < len(levels):
            reward = reward.of_tokens(level, levels[number + 1].hidden.shape[1])
    return inputs


def _deciding(level: Level) -> Float[Array, ""]:
    """The number of positions at which a policy decides or, if a rule decides, that are free to close a token."""
    # A constraint leaves positions that a policy could have decided at a rule, too, which decides nothing.
    counted = level.boundaries.decided, level.boundaries.deciding, level.layout.free
    decided, deciding, free = batch_sum([jnp.sum(one) for one in counted])
    count = jnp.where(decided > 0, deciding, free)
    return jnp.maximum(count, 1).astype(jnp.float32)


def level_prefix(level: int) -> str:
    """What the names of a level's metrics begin with: `level1_` and so on inside, nothing for the outermost level (0)."""
    return f"level{level}_" if level else ""


def losses(
    prediction: Prediction,
    objectives: Sequence[AbstractObjective],
    layout: Layout,
    *,
    target_rate: Float[Array, ""] | None = None,
    samples: int = 1,
    capacity: int | None = None,
) -> LossOutput:
    r"""The language-model loss plus the objectives' losses of all levels (SFE eq. 22; H-Net eq. 10, one loss for each stage) and
    the balance losses of mixtures of experts.

    $-\mathrm{mean}_i \log p(x_{i+1} \mid x_{\le i}) + \sum_s L_s$ in nats per byte. `capacity`: tokens per sequence that the
    outermost token level could hold (None: as many as there are bytes).
    """
    reward = byte_rewards(prediction, layout)
    count = jnp.maximum(batch_sum(jnp.sum(reward.scored)), 1).astype(jnp.float32)
    log_prob = batch_sum(jnp.sum(reward.log_prob)) / count
    inputs = objective_inputs(reward, prediction.levels, objectives, target_rate=target_rate, samples=samples)
    outputs = [objective(one) for objective, one in zip(objectives, inputs, strict=True)]
    early = None if reward.early_log_prob is None else batch_sum(jnp.sum(reward.early_log_prob)) / count
    loss = sum((output.loss for output in outputs), -log_prob)
    if prediction.experts is None:
        return _summary(loss, log_prob, early, outputs, prediction.levels, layout, capacity)
    summary = _summary(loss + prediction.experts.loss, log_prob, early, outputs, prediction.levels, layout, capacity)
    return dataclasses.replace(summary, metrics={**summary.metrics, **prediction.experts.metrics})


def _summary(
    loss: Float[Array, ""],
    log_prob: Float[Array, ""],
    early_log_prob: Float[Array, ""] | None,
    outputs: Sequence[ObjectiveOutput],
    levels: Sequence[Level],
    layout: Layout,
    capacity: int | None,
) -> LossOutput:
    """The loss, and the numbers to log beside it."""
    positions = jnp.maximum(batch_sum(jnp.sum(layout.mask)), 1).astype(jnp.float32)
    token_positions = layout.bytes.shape[0] * batch_shards() * (capacity or layout.bytes.shape[1])
    if not levels:
        zero = jnp.zeros((), jnp.float32)
        return LossOutput(loss, log_prob, early_log_prob, rate=zero, overflow=zero, padding=zero, metrics={})
    metrics: dict[str, Float[Array, ""]] = {}
    for number, (level, output) in enumerate(zip(levels, outputs, strict=True)):
        sums = batch_sum([jnp.sum(part) for part in (level.lengths, level.overflow)])
        tokens, dropped = (total.astype(jnp.float32) for total in sums)
        fractions = {"rate": tokens / positions, "overflow": dropped / positions}
        if level.boundaries.constrained is not None:
            free = level.layout.mask & ~level.boundaries.constrained
            fractions["free_rate"] = masked_mean(level.drawn.astype(jnp.float32), free)
        metrics |= {level_prefix(number) + name: value for name, value in {**output.metrics, **fractions}.items()}
        positions = tokens
    # Counted in integers: 1 - used / size may round to less than 0, where a compiler multiplies by a rounded reciprocal.
    padding = (token_positions - batch_sum(jnp.sum(levels[0].lengths))).astype(jnp.float32) / token_positions
    rate, overflow = metrics.pop("rate"), metrics.pop("overflow")
    return LossOutput(loss, log_prob, early_log_prob, rate, overflow, padding, metrics)
