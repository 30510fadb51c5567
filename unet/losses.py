"""What a prediction is trained with: the likelihood, and the objectives of all levels of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from estimators.base import AbstractObjective, Layout, Signal
from unet.likelihood import continues, log_lik_of, next_byte_log_lik
from unet.ops import token_of
from unet.ops.rows import add_at
from unet.stage import Level


class Prediction(eqx.Module):
    """Logits of the next byte at each row, the early head's where it was asked for, and the levels of the hierarchy.

    `early_rows`, where given, are those that the early head predicted at, the same in every sequence.
    """

    logits: Float[Array, "batch length vocab"]
    early_logits: Float[Array, "batch rows vocab"] | None
    levels: tuple[Level, ...]
    early_rows: Int[Array, " rows"] | None = None


class LossOutput(eqx.Module):
    """`loss` to descend: the mean negative log-likelihood in nats per byte plus the objectives' losses; and what to watch.

    `log_lik` is the mean log-likelihood per predicted byte, `early_log_lik` that of the early head (NaN without one),
    `rate` the share of valid bytes with a boundary, `overflow` the share of valid bytes whose boundary was dropped, `padding`
    the share of the token level's rows that held no token; `metrics` holds what each level's objective reports, and for inner
    levels their own `rate` and `overflow`, as shares of the rows of the level around.
    """

    loss: Float[Array, ""]
    log_lik: Float[Array, ""]
    early_log_lik: Float[Array, ""]
    rate: Float[Array, ""]
    overflow: Float[Array, ""]
    padding: Float[Array, ""]
    metrics: tuple[dict[str, Float[Array, ""]], ...]


def early_log_lik(prediction: Prediction, layout: Layout) -> Float[Array, "batch length"] | None:
    r"""$\log p^{early}(x_{i+1} \mid x_{\le i})$ in nats and float32; None where there is no early head.

    Where it predicted at some rows only, the mean over those stands for it at the others. What it stands for is subtracted
    from rewards and depends on no action either way, so that gradients of the policy stay unbiased; the mean over all rows
    is that over the rows predicted at, so that those of the early head do as well (but for padding and packing, which make
    it a ratio of two random numbers).
    """
    if prediction.early_logits is None or prediction.early_rows is None:
        return None if prediction.early_logits is None else next_byte_log_lik(prediction.early_logits, layout.bytes)
    rows = prediction.early_rows
    there = log_lik_of(prediction.early_logits, jnp.roll(layout.bytes, -1, axis=1)[:, rows])
    scored = continues(layout)[:, rows]
    mean = jnp.sum(jnp.where(scored, there, 0.0)) / jnp.maximum(jnp.sum(scored), 1).astype(jnp.float32)
    return jnp.broadcast_to(mean, layout.bytes.shape).at[:, rows].set(there)


class Reward(eqx.Module):
    """What each row of a level is rewarded with: `log_lik` and `early_log_lik` of the predictions made while it was the last
    row, and the number of these that are `scored`."""

    log_lik: Float[Array, "batch length"]
    early_log_lik: Float[Array, "batch length"] | None
    scored: Int[Array, "batch length"]

    def inside(self, level: Level, tokens: int) -> Reward:
        """The rewards of the token rows that `level` makes of these rows: each the sum over the rows from the one that closed
        it to the one before the next closes."""
        index = token_of(level.boundaries.actions)
        # Rows before the first token are in none.
        index = jnp.where(index < 0, tokens, index)
        return jax.tree.map(lambda values: add_at(index, values, tokens), self)

    def scaled(self, factor: Float[Array, ""]) -> Reward:
        """With likelihoods times a factor."""
        early = None if self.early_log_lik is None else factor * self.early_log_lik
        return Reward(factor * self.log_lik, early, self.scored)


def losses(
    prediction: Prediction,
    objectives: Sequence[AbstractObjective],
    layout: Layout,
    *,
    target_rate: Float[Array, ""] | None = None,
    samples: int = 1,
    capacity: int | None = None,
) -> LossOutput:
    r"""The language-model loss plus the losses of the objectives of all levels (SFE eq. 22; H-Net eq. 10, one loss a stage).

    The outermost level is rewarded byte by byte. A row of an inner level is a chunk, and its reward the log-likelihood of all
    predictions made while it was the last chunk of its level: those at the bytes from the one that closed it to the one
    before the next closes. These sums are scaled by the rows that decide at its level over the bytes that decide (or, where the
    outermost level is a rule, could), so that the mean over decisions, which policy losses take, weighs a nat as it does at the
    outermost level: at every level the policy gradient is that of the same sum of log-likelihoods, divided by the same number
    of bytes. An early prediction depends on no
    action of any level, so that the same sums of it are a baseline at all of them; the early head learns from the first level
    that has one.

    `capacity`: the rows for each sequence that the outermost token level had (None: as many as there are bytes).
    """
    scored = continues(layout)
    count = jnp.maximum(jnp.sum(scored), 1).astype(jnp.float32)
    log_lik = next_byte_log_lik(prediction.logits, layout.bytes)
    early = early_log_lik(prediction, layout)

    def mean(values: Float[Array, "batch length"]) -> Float[Array, ""]:
        return jnp.sum(jnp.where(scored, values, 0.0)) / count

    loss = -mean(log_lik)
    metrics: list[dict[str, Float[Array, ""]]] = []
    reward, mask, follows = Reward(log_lik, early, scored.astype(jnp.int32)), scored, scored
    rows = valid = jnp.maximum(jnp.sum(layout.mask), 1).astype(jnp.float32)
    deciding = jnp.ones(())
    for number, (objective, level) in enumerate(zip(objectives, prediction.levels, strict=True)):
        tokens = jnp.sum(level.lengths).astype(jnp.float32)
        dropped = jnp.sum(level.overflow).astype(jnp.float32)
        decided = jnp.maximum(jnp.sum(level.boundaries.decided), 1).astype(jnp.float32)
        here = reward
        if number == 0:
            # A rule decides nothing; the bytes that are free to close a token stand for those that decide.
            free = jnp.maximum(jnp.sum(layout.free), 1).astype(jnp.float32)
            deciding = jnp.where(jnp.any(level.boundaries.decided), decided, free)
        else:
            here, mask, follows = reward.scaled(decided / deciding), reward.scored > 0, continues(level.layout)
        signal = Signal(
            level.boundaries,
            level.hidden,
            here.log_lik,
            here.early_log_lik,
            mask,
            follows,
            target_rate if number == 0 else None,
            samples,
        )
        output = objective(signal)
        loss = loss + output.loss
        metrics.append(
            output.metrics if number == 0 else {**output.metrics, "rate": tokens / rows, "overflow": dropped / rows}
        )
        if objective.needs_early_exit:
            reward = jax.lax.stop_gradient(reward)
        if number + 1 < len(prediction.levels):
            if number == 0:
                reward = jax.tree.map(lambda values: jnp.where(scored, values, jnp.zeros((), values.dtype)), reward)
            reward = reward.inside(level, prediction.levels[number + 1].hidden.shape[1])
        rows = tokens
    if not prediction.levels:
        tokens, overflow, room = valid, jnp.zeros(()), valid
    else:
        outer = prediction.levels[0]
        tokens = jnp.sum(outer.lengths).astype(jnp.float32)
        overflow = jnp.sum(outer.overflow).astype(jnp.float32)
        room = jnp.asarray(layout.bytes.shape[0] * (capacity or layout.bytes.shape[1]), jnp.float32)
    return LossOutput(
        loss=loss,
        log_lik=mean(log_lik),
        early_log_lik=jnp.full((), jnp.nan) if early is None else mean(early),
        rate=tokens / valid,
        overflow=overflow / valid,
        padding=1.0 - tokens / room,
        metrics=tuple(metrics),
    )
