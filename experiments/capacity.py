"""How many token rows a training step has room for."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from data import Split
from estimators import AbstractRouter, Draw
from experiments.config import RunConfig
from experiments.evaluate import stack_rows
from experiments.target import TargetSchedule
from unet.ops import boundary_scan


def slack_capacities(config: RunConfig, rate: float) -> tuple[int, ...]:
    """The token rows per sequence that a step can choose from, where `rate` is held: up to `capacity_slack` times the
    expected count."""
    expected = max(rate, TargetSchedule.of(config).highest) * config.length
    slack = 1.0 if rate == 1.0 else config.capacity_slack
    return _sizes(config, expected, slack * expected)


def _sizes(config: RunConfig, expected: float, bound: float) -> tuple[int, ...]:
    """`buckets` sizes in equal ratios from a little over `expected` to `bound`, multiples of 4."""
    sizes = np.geomspace(bound, min(1.03 * expected, bound), config.buckets)
    return tuple(sorted({min(config.length, 4 * math.ceil(size / 4 - 1e-9)) for size in sizes}))


def training_capacities(config: RunConfig, router: AbstractRouter | None, split: Split) -> tuple[int, ...]:
    """The token rows per sequence that a step in training can choose from; the largest is the bound.

    `capacity_slack` times the expected count. A rule that aims at no rate is measured on held-out text instead, and its bound
    is a quarter more than the fullest row needed there.
    """
    length = config.length
    if router is None:
        return (length,)
    if router.rate is not None:
        return slack_capacities(config, router.rate)
    rows = split.held_out_rows(config.evaluation.bytes)
    layout = stack_rows(rows, len(rows))
    nothing = jnp.zeros((*layout.bytes.shape, 1))
    drawn = jnp.sum(router(nothing, layout, Draw(boundary_scan)).actions, axis=1)
    return _sizes(config, float(jnp.mean(drawn)), 1.25 * float(jnp.max(drawn)))


def inner_capacities(config: RunConfig, routers: Sequence[AbstractRouter], bound: int) -> tuple[int, ...]:
    """The token rows per sequence of the levels inside the first, which has at most `bound`: `capacity_slack` times the expected
    count where a router aims at a rate, and as many as there can be where it does not."""
    expected, bounds = float(config.length), [bound]
    for number, router in enumerate(routers):
        # Where the rate of the first level is scheduled, the highest it is ever asked for.
        scheduled = TargetSchedule.of(config).highest if number == 0 else 0.0
        expected *= 1.0 if router.rate is None else max(router.rate, scheduled)
        most = bounds[-1] if router.rate is None else 4 * math.ceil(config.capacity_slack * expected / 4 - 1e-9)
        if number:
            bounds.append(min(bounds[-1], most))
    return tuple(bounds[1:])
