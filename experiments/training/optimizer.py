"""What moves parameters: AdamW, its schedule, and what it leaves alone."""

from __future__ import annotations

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from estimators import trainable
from estimators.equations import stage_multipliers
from experiments.config.sections import ScheduleConfig
from experiments.config.settings import RunConfig
from unet.wrapped import Adapted

DECAYING = 0.2
"""Share of training at whose end the schedule wsd decays."""

STEEPNESS = 10.0
"""How far an inverse square root falls before it is stretched to end where it should."""


def stages_of(params: PyTree[Float[Array, ...]]) -> PyTree[int]:
    """The stage that each parameter of a model belongs to, 0 the outermost, where embedding and heads are too; routers and
    chunkers belong to the stage whose hidden states they read."""

    def stage(path: tuple[object, ...], leaf: Array) -> int:
        # `.inner` of a hierarchy leads inward, but that of a model of tokens is the model; `.stage` of one that is widened stays.
        path_inward = re.match(r"(?:\.inner)?\.stage((?:\.inner|\.stage)*)(?=\.)", jax.tree_util.keystr(path))
        return 0 if path_inward is None else path_inward.group(1).count(".inner")

    return jax.tree_util.tree_map_with_path(stage, params)


def multipliers(config: RunConfig, params: PyTree[Float[Array, ...]]) -> PyTree[float]:
    """What the learning rate of each parameter is multiplied by (H-Net eq. 11); 1 where the run asks for none."""
    chunks = [1 / level.rate for level in config.levels]
    scale = config.optimizer.stage_multipliers
    widths = list(config.unet.widths[: len(chunks) + 1])
    if config.distill.teacher is not None:
        # The main network is the teacher's, whatever width the run's own would have had.
        main = params.stage.inner
        assert isinstance(main, Adapted)
        widths[-1] = main.token_dim
    each = [1.0] * (len(chunks) + 1) if scale is None else stage_multipliers(chunks, widths, scale)
    return jax.tree.map(lambda stage: each[min(stage, len(each) - 1)], stages_of(params))


def make_schedule(config: RunConfig) -> optax.Schedule:
    """Linear warm-up from 0 to the peak; then a cosine to `final_fraction` of it, or the peak itself until the last fifth of
    training and an inverse square root to that fraction.

    From `schedule.decay_from` on, the same decay from the learning rate that there is then to the end of the run.
    """
    start = config.schedule.decay_from
    if start is not None:
        first = round(start / config.bytes_per_step)
        planned = config.schedule.planned_bytes or config.total_steps * config.bytes_per_step
        # A warm-up that was a share of the run is one of the planned run.
        shortest = 1 if config.optimizer.warmup_bytes is None else config.warmup_steps
        steps = max(planned // config.bytes_per_step, shortest)
        begun = dataclasses.replace(config, bytes=planned, steps=steps, schedule=ScheduleConfig())
        decay = _decay(config, learning_rate(begun, first), max(1, config.total_steps - first))
        return optax.join_schedules([make_schedule(begun), decay], [first])
    optimizer, warmup = config.optimizer, config.warmup_steps
    peak, total = optimizer.learning_rate, max(config.total_steps, warmup + 1)
    if optimizer.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, total, peak * optimizer.final_fraction)
    decaying = max(1, min(round(DECAYING * total), total - warmup))
    parts = [optax.linear_schedule(0.0, peak, warmup), optax.constant_schedule(peak), _decay(config, peak, decaying)]
    return optax.join_schedules(parts, [warmup, total - decaying])


def learning_rate(config: RunConfig, step: int) -> float:
    """The learning rate of a step."""
    return float(np.asarray(make_schedule(config)(step)))


def _decay(config: RunConfig, rate: float, steps: int) -> optax.Schedule:
    """From `rate` to the final learning rate in so many `steps`: a cosine, or an inverse square root stretched to end there."""
    final = config.optimizer.learning_rate * config.optimizer.final_fraction
    last = (1.0 + STEEPNESS) ** -0.5
    cosine = config.optimizer.schedule == "cosine"

    def decayed(step: ArrayLike) -> ArrayLike:
        share = jnp.clip(jnp.asarray(step, jnp.float32) / steps, 0.0, 1.0)
        root = (jax.lax.rsqrt(1.0 + STEEPNESS * share) - last) / (1.0 - last)
        return final + (rate - final) * (0.5 * (1.0 + jnp.cos(jnp.pi * share)) if cosine else root)

    return decayed


def make_optimizer(config: RunConfig, scales: PyTree[float] | None = None) -> optax.GradientTransformation:
    """AdamW behind a clip of the global norm, under `make_schedule`; steps of each parameter times its one of `scales`."""
    settings = config.optimizer
    decays = None if settings.decay == "all" else lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)
    adamw = optax.adamw(
        make_schedule(config), b1=settings.beta1, b2=settings.beta2, weight_decay=settings.weight_decay, mask=decays
    )
    steps = [optax.clip_by_global_norm(settings.clip), optax.masked(adamw, trainable)]
    if scales is not None and any(not math.isclose(scale, 1.0) for scale in jax.tree.leaves(scales)):
        steps.append(optax.stateless(lambda updates, params: jax.tree.map(jnp.multiply, updates, scales)))
    return optax.chain(*steps)
