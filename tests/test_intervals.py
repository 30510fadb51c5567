"""Paired differences, intervals and curves at equal cost, against values computed by hand and by scipy.stats."""

import math
import statistics

import numpy as np
import pytest
from scipy import stats

from experiments.comparison.intervals import (
    UNDEFINED,
    Interval,
    at_equal_cost,
    bootstrap_interval,
    geometric_interval,
    holm,
    mean_interval,
    median_interval,
    paired_difference,
    ratio_interval,
    t_quantile,
)


def by_seed(*values):
    return dict(enumerate(values))


def test_a_paired_difference_by_hand():
    """Differences 1, 2, 3: mean 2, standard deviation 1; t of 2 degrees of freedom is 4.302653 at 97.5 %, and its cumulative
    distribution ½ + t / (2 √(2 + t²))."""
    found = paired_difference(by_seed(11.0, 22.0, 33.0), by_seed(10.0, 20.0, 30.0))
    assert (found.seeds, found.values, found.mean) == ((0, 1, 2), (1.0, 2.0, 3.0), 2.0)
    assert found.half_width == pytest.approx(4.30265273 / math.sqrt(3))
    assert found.t == pytest.approx(2 * math.sqrt(3))
    assert found.p == pytest.approx(1 - found.t / math.sqrt(2 + found.t**2))
    assert (found.low, found.high) == pytest.approx((2 - 2.48413772, 2 + 2.48413772))
    assert not found.distinguishable
    assert paired_difference(by_seed(11.0, 22.0, 33.0), by_seed(10.0, 20.0, 30.0), confidence=0.9).distinguishable


@pytest.mark.parametrize("count", [2, 3, 6, 12])
def test_intervals_and_p_values_are_those_of_scipy(count):
    rng = np.random.default_rng(count)
    first, second = rng.normal(size=(2, count)).tolist()
    found, other = paired_difference(by_seed(*first), by_seed(*second)), stats.ttest_rel(first, second)
    interval = other.confidence_interval(0.95)
    assert (found.t, found.p, found.low, found.high) == pytest.approx((*other, interval.low, interval.high))
    assert found.distinguishable == (other.pvalue < 0.05)


def test_seeds_are_paired_by_name_and_only_those_of_both_count():
    found = paired_difference({2: 1.0, 0: 5.0, 7: 1.0, 3: math.nan}, {0: 3.0, 3: 1.0, 2: 2.0, 9: 0.0})
    assert (found.seeds, found.values) == ((2, 0), (-1.0, 2.0))


def test_equal_differences_are_a_point():
    found = paired_difference(by_seed(1.5, 2.5), by_seed(1.0, 2.0))
    assert (found.mean, found.half_width, found.t, found.p) == (0.5, 0.0, math.inf, 0.0)
    assert found.distinguishable
    same = paired_difference(by_seed(1.5, 2.5), by_seed(1.5, 2.5))
    assert (same.mean, same.half_width, same.p) == (0.0, 0.0, 1.0)
    assert math.isnan(same.t)
    assert not same.distinguishable


@pytest.mark.parametrize("values", [(), (3.0,)])
def test_too_few_seeds_tell_nothing_apart(values):
    found = paired_difference(by_seed(*values), by_seed(*(0.0 for _ in values)))
    assert found.values == values
    assert found.mean == 3.0 if values else math.isnan(found.mean)
    assert all(math.isnan(one) for one in (found.half_width, found.t, found.p))
    assert not found.distinguishable


def test_holm_by_hand():
    """Four hypotheses: .01 · 4, .02 · 3, then .03 · 2 and .04 · 1; no adjusted value is below the one before it."""
    assert holm([0.04, 0.01, math.nan, 0.03, 0.02]) == pytest.approx([0.06, 0.04, math.nan, 0.06, 0.06], nan_ok=True)
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([]) == []


def test_straight_curves_are_read_exactly():
    """The first is 10 - 2x up to x = 3, the second 9 - x up to x = 8: at 3 they are 4 and 6."""
    first, second = [(x, 10 - 2 * x) for x in (0.0, 1.0, 3.0)], [(x, 9 - x) for x in (0.5, 2.0, 7.0, 8.0)]
    at = at_equal_cost(first, second)
    assert at is not None
    assert (at.cost, at.first, at.second) == (3.0, 4.0, 6.0)
    back = at_equal_cost(second, first)
    assert back is not None
    assert (back.cost, back.first, back.second) == (3.0, 6.0, 4.0)


def test_nothing_is_extrapolated():
    early = [(1.0, 2.0), (2.0, 1.0)]
    assert at_equal_cost(early, [(2.5, 2.0), (9.0, 1.0)]) is None
    assert at_equal_cost(early, []) is None
    at = at_equal_cost(early, [(2.0, 3.0), (9.0, 1.0)])
    assert at is not None
    assert (at.first, at.second) == (1.0, 3.0)


def test_an_interval_of_the_median():
    """The range of 6 values misses the median with probability 2 · 2⁻⁶, that of 5 with 2 · 2⁻⁵ > 5 %, the second to the eighth
    of 9 with 2 · 10 · 2⁻⁹."""
    assert median_interval([3.0, 1.0, 2.0, 6.0, 5.0, 4.0]) == (1, 6)
    assert all(map(math.isnan, median_interval([1.0, 2.0, 3.0, 4.0, 5.0])))
    assert median_interval([float(value) for value in range(1, 10)]) == (2, 8)
    assert median_interval([float(value) for value in range(1, 9)]) == (1, 8)


@pytest.mark.parametrize(("count", "quantile"), [(2, 12.706205), (3, 4.302653), (5, 2.776445), (31, 2.042272)])
def test_quantiles_are_those_of_the_tables(count, quantile):
    assert t_quantile(count) == pytest.approx(quantile, rel=1e-6)


def test_one_value_has_no_interval():
    with pytest.raises(ValueError, match="at least two"):
        mean_interval([1.0])


def test_the_interval_of_a_mean():
    found = mean_interval([1.0, 2.0, 6.0])
    assert found.mean == 3.0
    assert found.high - 3.0 == pytest.approx(4.302653 * math.sqrt(7.0 / 3), rel=1e-6)
    assert 3.0 - found.low == pytest.approx(found.high - 3.0)
    assert found.holds(0.0)
    assert not found.holds(10.0)
    assert mean_interval([1.0, math.nan]) is UNDEFINED


def test_factors_are_averaged_as_factors():
    found, inverse = geometric_interval([2.0, 8.0, 4.0]), geometric_interval([0.5, 0.125, 0.25])
    assert found.mean == pytest.approx(4.0)
    assert (inverse.low, inverse.high) == pytest.approx((1 / found.high, 1 / found.low))
    assert math.isnan(geometric_interval([1.0, -1.0]).mean)


def test_the_ends_of_a_ratio_lie_where_the_difference_just_vanishes():
    """Fieller: at the ends of the interval, an end of the interval of y - r x is 0."""
    above, below = [2.3, 1.9, 2.6, 2.0], [1.0, 1.3, 1.2, 0.9]
    found = ratio_interval(above, below)
    assert found is not None
    assert found.mean == pytest.approx(statistics.mean(above) / statistics.mean(below))
    assert found.low < found.mean < found.high
    for ratio in (found.low, found.high):
        difference = mean_interval([y - ratio * x for y, x in zip(above, below, strict=True)])
        assert min(abs(difference.low), abs(difference.high)) == pytest.approx(0.0, abs=1e-9)


def test_a_ratio_to_what_could_be_zero_is_none():
    assert ratio_interval([1.0, 1.1, 0.9], [0.1, -0.05, 0.02]) is None
    assert ratio_interval([3.0, 6.0, 9.3], [1.0, 2.0, 3.1]) is None
    exactly = ratio_interval([3.0, 3.3, 2.7], [1.0, 1.1, 0.9])
    assert isinstance(exactly, Interval)
    assert (exactly.mean, exactly.low, exactly.high) == pytest.approx((3.0, 3.0, 3.0))


def test_a_bootstrap_interval_is_of_a_ratio_of_sums():
    # The ratio is the same for every unit, and so for every resample.
    assert bootstrap_interval([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) == Interval(2.0, 2.0, 2.0)
    rng = np.random.default_rng(0)
    values, sizes = rng.normal(size=400), rng.uniform(1, 5, 400)
    got = bootstrap_interval(values.tolist(), sizes.tolist())
    assert got.mean == pytest.approx(values.sum() / sizes.sum())
    # Of a linearised ratio, the standard error is that of the mean of its residuals.
    error = np.std(values - got.mean * sizes, ddof=1) / np.sqrt(400) / sizes.mean()
    assert got.high - got.mean == pytest.approx(1.96 * error, rel=0.1)
    assert got.mean - got.low == pytest.approx(1.96 * error, rel=0.1)
    assert bootstrap_interval(values.tolist(), sizes.tolist()) == got
    assert bootstrap_interval(values.tolist(), sizes.tolist(), seed=1) != got


def test_a_bootstrap_interval_needs_two_units():
    got = bootstrap_interval([3.0], [2.0])
    assert (got.mean, math.isnan(got.low)) == (1.5, True)
    assert math.isnan(bootstrap_interval([], []).mean)
