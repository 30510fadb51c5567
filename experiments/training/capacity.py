"""Capacities in training: the most tokens per sequence at each level."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from data import Split
from estimators import AbstractRouter, Bernoulli, Layout, SamplingOptions
from estimators.routers.constrained import Constrained
from experiments.config.settings import RunConfig
from experiments.evaluation.evaluate import stack_rows
from experiments.training.target import TargetSchedule
from unet.language_model import AbstractLanguageModel
from unet.ops import boundary_scan
from unet.tokens.batch import padded_length

MEASURED_BYTES = 2**21
"""Held-out text, at most, that the boundaries of a rule are counted on."""


def in_positions(config: RunConfig, model: AbstractLanguageModel, split: Split) -> RunConfig:
    """The run with the length of a sequence in positions that the model reads: bytes or, counted on held-out text, the most
    tokens of a sequence, rounded up (`padded_length`)."""
    if not config.reads_tokens:
        return config
    rows = split.held_out_rows(min(config.evaluation.bytes, MEASURED_BYTES))
    stacked = {name: np.stack([row[name] for row in rows]) for name in ("bytes", "segments", "mask")}
    most = int(np.max(np.sum(model.inputs(stacked)["tokens"].mask, axis=1)))
    return dataclasses.replace(config, length=padded_length(most, config.length))


def training_capacities(
    config: RunConfig, router: AbstractRouter | None, split: Split, begun: float = 0.0
) -> tuple[int, ...]:
    """The capacities of the first level that a training step chooses from; boundaries beyond the largest are dropped. `begun`:
    the rate that the router has learned before these steps, such as that of a teacher.

    See `rated_capacities` for a router with a target rate. A rule without one is measured on held-out text, and the largest
    capacity is a quarter more than the most tokens of a sequence there.
    """
    if router is None:
        return (config.length,)
    if router.rate is not None and not isinstance(router, Constrained):
        return rated_capacities(config, router, begun)
    rows = split.held_out_rows(min(config.evaluation.bytes, MEASURED_BYTES))
    layout = stack_rows(rows, len(rows))
    if router.rate is not None and isinstance(router, Constrained):
        return constrained_capacities(config, router, layout, begun)
    nothing = jnp.zeros((*layout.bytes.shape, 1), jnp.float32)
    drawn = jnp.sum(router(nothing, layout, SamplingOptions(boundary_scan)).actions, axis=1)
    return _spread(config, float(jnp.mean(drawn)), 1.25 * float(jnp.max(drawn)))


def rated_capacities(config: RunConfig, router: AbstractRouter, begun: float = 0.0) -> tuple[int, ...]:
    """The same for a router with a target rate: up to `capacity_slack` times the boundaries expected at that rate and, where the
    router draws more at first, at its initial rate or at the one that it has `begun` with. Raises `ValueError` for a router
    without a rate."""
    if router.rate is None:
        raise ValueError("a router without a rate has to be measured on text")
    held = max(router.rate, TargetSchedule.of(config).highest) * config.length
    first = max(router.initial_rate or 0.0, begun) * config.length
    slack = 1.0 if router.rate == 1.0 else config.capacity_slack
    capacities = _spread(config, held, slack * held)
    most = _rounded(config, slack * first)
    if most <= capacities[-1]:
        return capacities
    return (most,) if config.buckets == 1 else (*capacities, most)


def constrained_capacities(
    config: RunConfig, router: Constrained, layout: Layout, begun: float = 0.0
) -> tuple[int, ...]:
    """The same for a constrained router with a target rate, which is a share of the bytes that are free. How many boundaries come
    out is measured: under the same constraints, independent ones are drawn on the text of `layout` at the target rate, and at
    the rate of the untrained router or the one `begun` with. The largest capacity is that many times `capacity_slack`, or a
    quarter more than the most of a sequence there."""

    def counted(rate: float) -> tuple[float, float]:
        stand_in = dataclasses.replace(router, router=Bernoulli(min(rate, 0.999)))
        options = SamplingOptions(boundary_scan, jax.random.key(0))
        drawn = jnp.sum(stand_in(jnp.zeros((*layout.bytes.shape, 1)), layout, options).actions, axis=1)
        mean = float(jnp.mean(drawn))
        return mean, max(config.capacity_slack * mean, 1.25 * float(jnp.max(drawn)))

    own = router.router
    expected, bound = counted(max(own.rate or 0.0, TargetSchedule.of(config).highest))
    capacities, most = _spread(config, expected, bound), 0
    if first := max(own.initial_rate or 0.0, begun):
        most = _rounded(config, counted(first)[1])
    if most <= capacities[-1]:
        return capacities
    return (most,) if config.buckets == 1 else (*capacities, most)


def inner_capacities(config: RunConfig, routers: Sequence[AbstractRouter], bound: int) -> tuple[int, ...]:
    """The capacities of the levels inside the first, whose largest is `bound`.

    For a router with a target rate `capacity_slack` times the boundaries expected at the target rates or at the initial ones,
    whichever are more; for one without, as many as there can be."""
    held = first = float(config.length)
    bounds = [bound]
    for number, router in enumerate(routers):
        # Where the rate of the first level is scheduled, the highest it is ever asked for.
        scheduled = TargetSchedule.of(config).highest if number == 0 else 0.0
        held *= 1.0 if router.rate is None else max(router.rate, scheduled)
        first *= 1.0 if router.initial_rate is None else max(router.initial_rate, scheduled)
        most = bounds[-1] if router.rate is None else _rounded(config, config.capacity_slack * max(held, first))
        if number:
            bounds.append(min(bounds[-1], most))
    return tuple(bounds[1:])


def _spread(config: RunConfig, expected: float, bound: float) -> tuple[int, ...]:
    """`buckets` capacities in equal ratios from a little over `expected` to `bound`."""
    values = np.geomspace(bound, min(1.03 * expected, bound), config.buckets)
    return tuple(sorted({_rounded(config, value) for value in values}))


def _rounded(config: RunConfig, value: float) -> int:
    """Up to a multiple of 4, at most the bytes of a sequence."""
    return min(config.length, 4 * math.ceil(value / 4 - 1e-9))
