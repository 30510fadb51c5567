"""Statistics of a few independent repetitions: paired differences, confidence intervals of means, ratios and medians, Holm's
correction, curves at equal cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import bdtr, stdtr, stdtrit

CONFIDENCE = 0.95
"""Confidence level of all intervals."""
ALIKE = "≈"
"""Marks a difference in a table that is not distinguishable from none: its interval contains no difference, or is undefined."""


@dataclass(frozen=True)
class Difference:
    """Paired differences between two methods, one for each seed, and a t-test of their mean.

    `half_width`: half the width of the Student-t confidence interval of the mean. `t`: the mean divided by its standard error.
    `p`: the two-sided p value for a mean of zero. `mean` is NaN without seeds, the others are NaN with fewer than two. If all
    differences are equal, the interval is a point and t is infinite; if they are all zero, t is NaN and p = 1.
    """

    seeds: tuple[int, ...]
    values: tuple[float, ...]
    mean: float
    half_width: float
    t: float
    p: float

    @property
    def low(self) -> float:
        """The lower end of the interval."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """The upper end of the interval."""
        return self.mean + self.half_width

    @property
    def distinguishable(self) -> bool:
        """Whether the interval is defined and does not contain zero."""
        return self.half_width < abs(self.mean)


def t_quantile(count: int, confidence: float = CONFIDENCE) -> float:
    """The t with P(|T| < t) = `confidence`, for T with `count` - 1 degrees of freedom.

    Source: Student, *The Probable Error of a Mean*, 1908.

    Raises `ValueError` for fewer than two.
    """
    if count < 2:
        raise ValueError(f"an interval needs at least two independent values; got {count}")
    return float(stdtrit(count - 1, 0.5 * (1.0 + confidence)))


def paired_difference(
    larger: Mapping[int, float], smaller: Mapping[int, float], confidence: float = CONFIDENCE
) -> Difference:
    """The differences `larger` - `smaller` over the seeds for which both have a finite number.

    d_s = larger_s - smaller_s; mean d; half width t(n-1, (1 + confidence) / 2) · sd(d) / √n with the sample's standard
    deviation (divisor n - 1); t = d / (sd(d) / √n) and p = 2 P(T > |t|) for T with n - 1 degrees of freedom. Source: Student,
    *The Probable Error of a Mean*, 1908.
    """
    seeds = tuple(
        seed for seed in larger if seed in smaller and math.isfinite(larger[seed]) and math.isfinite(smaller[seed])
    )
    values = tuple(larger[seed] - smaller[seed] for seed in seeds)
    count = len(values)
    mean = sum(values) / count if count else math.nan
    if count < 2:
        return Difference(seeds, values, mean, math.nan, math.nan, math.nan)
    error = float(np.std(values, ddof=1)) / math.sqrt(count)
    half_width = t_quantile(count, confidence) * error
    t = mean / error if error else math.copysign(math.inf, mean) if mean else math.nan
    p = 1.0 if math.isnan(t) else 2 * float(stdtr(count - 1, -abs(t)))
    return Difference(seeds, values, mean, half_width, t, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, which control the family-wise error rate (Holm, 1979).

    With p_(1) ≤ … ≤ p_(m): max over j ≤ i of min(1, (m - j + 1) p_(j)). NaN stays NaN and does not count in m.
    """
    order = sorted((number for number, p in enumerate(p_values) if not math.isnan(p)), key=lambda n: p_values[n])
    adjusted, largest = list(p_values), 0.0
    for rank, number in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[number]))
        adjusted[number] = largest
    return adjusted


@dataclass(frozen=True)
class AtEqualCost:
    """The values of two curves at the same `cost`."""

    cost: float
    first: float
    second: float


def at_equal_cost(first: Sequence[tuple[float, float]], second: Sequence[tuple[float, float]]) -> AtEqualCost | None:
    """The values of two curves at the largest cost that both reach, by linear interpolation.

    A curve is a sequence of (cost, value) in ascending order of cost. None if a curve is empty or begins beyond that cost, since
    nothing is extrapolated.
    """
    if not first or not second:
        return None
    cost = min(first[-1][0], second[-1][0])
    if cost < max(first[0][0], second[0][0]):
        return None
    return AtEqualCost(cost, *(_interpolated(curve, cost) for curve in (first, second)))


def _interpolated(curve: Sequence[tuple[float, float]], cost: float) -> float:
    costs, values = np.array(curve, float).T
    return float(np.interp(cost, costs, values))


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """A distribution-free confidence interval of the median, from two order statistics.

    The interval from the k-th smallest to the k-th largest of n values contains the median with probability 1 - 2 P(X < k), X
    binomial (n, ½). k is the largest with a probability of at least `confidence`. NaN if there is none (n < 6 for 0.95).
    """
    count, ordered = len(values), sorted(values)
    depth = 0
    while depth < count // 2 and 1 - 2 * float(bdtr(depth, count, 0.5)) >= confidence:
        depth += 1
    return (ordered[depth - 1], ordered[count - depth]) if depth else (math.nan, math.nan)


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its 95 % interval. All three are NaN if the estimate is undefined."""

    mean: float
    low: float
    high: float

    def holds(self, value: float) -> bool:
        """Whether the interval contains `value`; True for an undefined interval."""
        return not (value < self.low or value > self.high)


UNDEFINED = Interval(math.nan, math.nan, math.nan)


def mean_interval(values: Sequence[float]) -> Interval:
    r"""$\bar x \pm t_{n-1}\,s/\sqrt n$ of n independent values; `UNDEFINED` if one is not finite.

    Raises `ValueError` for fewer than two.
    """
    quantile = t_quantile(len(values))
    if not all(math.isfinite(value) for value in values):
        return UNDEFINED
    mean = math.fsum(values) / len(values)
    half = quantile * math.sqrt(_covariance(values, values) / len(values))
    return Interval(mean, mean - half, mean + half)


RESAMPLES = 2000
"""Resamples of a bootstrap interval."""


def bootstrap_interval(values: Sequence[float], sizes: Sequence[float], seed: int = 0) -> Interval:
    r"""The ratio of sums $\sum_d v_d / \sum_d n_d$ over independent units d, with its percentile bootstrap interval.

    The units, each with its v and n, are resampled with replacement `RESAMPLES` times; the ends are the quantiles of the
    resampled ratios. Source: Efron & Tibshirani, *An Introduction to the Bootstrap*, 1993, chapter 13. Below two units the
    interval is NaN; without units so is the ratio.
    """
    v, n = np.asarray(values, float), np.asarray(sizes, float)
    if not len(v) or not n.sum():
        return UNDEFINED
    estimate = float(v.sum() / n.sum())
    if len(v) < 2:
        return Interval(estimate, math.nan, math.nan)
    generator, ratios = np.random.default_rng(seed), []
    at_once = max(1, 2**22 // len(v))
    for first in range(0, RESAMPLES, at_once):
        size = (min(at_once, RESAMPLES - first), len(v))
        drawn = generator.integers(0, len(v), size)
        ratios.append(v[drawn].sum(axis=1) / n[drawn].sum(axis=1))
    tail = (1.0 - CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(ratios), [tail, 1.0 - tail])
    return Interval(estimate, float(low), float(high))


def geometric_interval(values: Sequence[float]) -> Interval:
    """Interval of the geometric mean: the exponential of `mean_interval` of the logarithms. `UNDEFINED` if a value is not
    positive and finite. Raises `ValueError` for fewer than two values."""
    of_logs = mean_interval([math.log(value) if 0.0 < value < math.inf else math.nan for value in values])
    return Interval(math.exp(of_logs.mean), math.exp(of_logs.low), math.exp(of_logs.high))


def ratio_interval(above: Sequence[float], below: Sequence[float]) -> Interval | None:
    r"""The ratio of the means of paired values, mean(above) / mean(below), with Fieller's interval (1954).

    With y = `above` and x = `below`, the interval is all r for which $|\bar y - r\bar x|$ is at most $t_{n-1}$ times its standard
    error. None if $\bar x$ itself is within $t_{n-1}$ standard errors of 0: the interval is then unbounded.
    Raises `ValueError` for fewer than two pairs.
    """
    scale = t_quantile(len(below)) ** 2 / len(below)
    x, y = (math.fsum(values) / len(values) for values in (below, above))
    # (ȳ - r x̄)² ≤ t²/n (s_yy - 2 r s_xy + r² s_xx), a quadratic in r.
    quadratic = x * x - scale * _covariance(below, below)
    linear = x * y - scale * _covariance(below, above)
    constant = y * y - scale * _covariance(above, above)
    if not quadratic > 0.0:
        return None
    root = math.sqrt(max(linear * linear - quadratic * constant, 0.0))
    return Interval(y / x, (linear - root) / quadratic, (linear + root) / quadratic)


def _covariance(one: Sequence[float], other: Sequence[float]) -> float:
    first, second = (math.fsum(values) / len(values) for values in (one, other))
    return math.fsum((a - first) * (b - second) for a, b in zip(one, other, strict=True)) / (len(one) - 1)
