"""95 % intervals from a few independent repetitions, such as models of different seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from experiments.intervals import t_quantile


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its 95 % interval. All three are NaN where there is nothing to estimate."""

    mean: float
    low: float
    high: float

    def holds(self, value: float) -> bool:
        """Whether `value` cannot be told from the estimate; True where there is none."""
        return not (value < self.low or value > self.high)


NOTHING = Interval(math.nan, math.nan, math.nan)


def mean_interval(values: Sequence[float]) -> Interval:
    r"""$\bar x \pm t_{n-1}\,s/\sqrt n$ of n independent values; `NOTHING` where one is not finite.

    Raises `ValueError` for fewer than two.
    """
    quantile = t_quantile(len(values))
    if not all(math.isfinite(value) for value in values):
        return NOTHING
    mean = math.fsum(values) / len(values)
    half = quantile * math.sqrt(_covariance(values, values) / len(values))
    return Interval(mean, mean - half, mean + half)


def geometric_interval(values: Sequence[float]) -> Interval:
    """`mean_interval` of the logarithms, taken back: for ratios, whose errors multiply. `NOTHING` where one is not positive."""
    of_logs = mean_interval([math.log(value) if 0.0 < value < math.inf else math.nan for value in values])
    return Interval(math.exp(of_logs.mean), math.exp(of_logs.low), math.exp(of_logs.high))


def ratio_interval(above: Sequence[float], below: Sequence[float]) -> Interval | None:
    r"""The ratio of two means of noisy, paired values, with Fieller's interval (1954); None where `below` could be 0.

    All r for which $\bar y - r\bar x$ is no further from 0 than $t_{n-1}$ of its standard errors. Where the mean of `below` is
    itself not further from 0 than that, these r have no bounds: there is no ratio to speak of.
    Raises `ValueError` for fewer than two pairs.
    """
    scale = t_quantile(len(below)) ** 2 / len(below)
    x, y = (math.fsum(values) / len(values) for values in (below, above))
    # (ȳ - r x̄)² ≤ t²/n (s_yy - 2 r s_xy + r² s_xx), a quadratic in r.
    square = x * x - scale * _covariance(below, below)
    middle = x * y - scale * _covariance(below, above)
    rest = y * y - scale * _covariance(above, above)
    if not square > 0.0:
        return None
    root = math.sqrt(max(middle * middle - square * rest, 0.0))
    return Interval(y / x, (middle - root) / square, (middle + root) / square)


def _covariance(one: Sequence[float], other: Sequence[float]) -> float:
    first, second = (math.fsum(values) / len(values) for values in (one, other))
    return math.fsum((a - first) * (b - second) for a, b in zip(one, other, strict=True)) / (len(one) - 1)
