"""Intervals from a few models."""

import math
import statistics

import pytest

from experiments.laboratory.intervals import (
    NOTHING,
    Interval,
    geometric_interval,
    mean_interval,
    ratio_interval,
    t_quantile,
)


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
    assert mean_interval([1.0, math.nan]) is NOTHING


def test_factors_are_averaged_as_factors():
    found, inverse = geometric_interval([2.0, 8.0, 4.0]), geometric_interval([0.5, 0.125, 0.25])
    assert found.mean == pytest.approx(4.0)
    assert (inverse.low, inverse.high) == pytest.approx((1 / found.high, 1 / found.low))
    assert math.isnan(geometric_interval([1.0, -1.0]).mean)


def test_the_ends_of_a_ratio_lie_where_the_difference_just_vanishes():
    """Fieller: at its ends y - r x is as far from 0 as its own interval reaches."""
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
