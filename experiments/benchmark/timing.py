"""Timing alternatives against each other: in turns, so that a machine's moods fall on all of them alike."""

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
"""One piece of work; the time until all the arrays it returns are there counts."""


@dataclass(frozen=True)
class Timing:
    """Median seconds of one call, and the median over rounds of the baseline's seconds divided by this one's: above 1 is
    faster than the baseline. `low` and `high` hold that median with a confidence of 95 %, NaN where `rounds`, of which
    there were so many of each, are too few."""

    seconds: float
    speedup: float
    rounds: int
    low: float
    high: float

    @property
    def ratio(self) -> str:
        """How fast it is against the baseline, as in a table; `ALIKE` where it cannot be told from as fast."""
        if math.isnan(self.low):
            return f"{self.speedup:.2f} ({self.rounds} rounds) {ALIKE}"
        mark = f" {ALIKE}" if self.low <= 1 <= self.high else ""
        return f"{self.speedup:.2f} [{self.low:.2f}, {self.high:.2f}]{mark}"


def in_turns(works: Mapping[str, Work], *, baseline: str, rounds: int = 5, calls: int = 1) -> dict[str, Timing]:
    """Time every piece of work `rounds` times, `calls` calls at a time, one after another in each round.

    Each is called once before, which compiles it. Raises `ValueError` where `baseline` is none of them.
    """
    if baseline not in works:
        raise ValueError(f"the baseline {baseline!r} is none of {', '.join(works)}")
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
