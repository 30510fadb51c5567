"""Interleaved timing of alternatives, so that fluctuations of the machine affect all of them equally."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
from jaxtyping import Array, PyTree

from experiments.comparison.intervals import ALIKE, median_interval

Work = Callable[[], PyTree[Array]]
"""A function to time, until all arrays that it returns are ready."""


@dataclass(frozen=True)
class Timing:
    """Result of a timing.

    `seconds`: median time of one call. `speedup`: median over rounds of the baseline's time divided by this one's. `rounds`:
    number of rounds. `low`, `high`: the 95 % confidence interval of `speedup`; NaN if there are too few rounds.
    """

    seconds: float
    speedup: float
    rounds: int
    low: float
    high: float

    @property
    def ratio(self) -> str:
        """The speedup and its interval for a table, with `ALIKE` if it is not distinguishable from 1."""
        if math.isnan(self.low):
            return f"{self.speedup:.2f} ({self.rounds} rounds) {ALIKE}"
        mark = f" {ALIKE}" if self.low <= 1 <= self.high else ""
        return f"{self.speedup:.2f} [{self.low:.2f}, {self.high:.2f}]{mark}"


def dispatched(work: Work, calls: int) -> Work:
    """A function that gives the device `calls` calls of `work` before anything waits for one of them."""
    return lambda: [work() for _ in range(calls)]


def time_interleaved(works: Mapping[str, Work], *, baseline: str, rounds: int = 5, calls: int = 1) -> dict[str, Timing]:
    """Time each function once per round, with `calls` consecutive calls. Within a round, the functions follow one another.

    Each function is called once before, to compile it. Raises `ValueError` if `baseline` is not in `works`.
    """
    if baseline not in works:
        raise ValueError(f"the baseline {baseline!r} is not one of {', '.join(works)}")
    for work in works.values():
        jax.block_until_ready(work())
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            started = time.perf_counter()
            for _ in range(calls):
                jax.block_until_ready(work())
            seconds[name].append((time.perf_counter() - started) / calls)
    timings = {}
    for name, times in seconds.items():
        ratios = [b / own for b, own in zip(seconds[baseline], times, strict=True)]
        low, high = median_interval(ratios)
        timings[name] = Timing(statistics.median(times), statistics.median(ratios), rounds, low, high)
    return timings
