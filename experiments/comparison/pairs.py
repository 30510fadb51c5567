"""Paired comparisons of two methods over seeds, after the same training bytes and after the same training FLOPs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from experiments.comparison.intervals import ALIKE, CONFIDENCE, Difference, at_equal_cost, holm, paired_difference

Names = tuple[str, str]
Curve = Sequence[tuple[float, float, float]]
"""Training FLOPs, training megabytes and held-out bits per byte at each validation."""


@dataclass(frozen=True)
class Pair:
    """Paired comparison of two methods.

    `below`: bits per byte of the `second` minus those of the `first`, at the end of training. `equal_flops`: the same difference
    after the same training FLOPs, which are `flops` (one number for each seed of `equal_flops`). `below_holm`,
    `equal_flops_holm`: p values adjusted for all pairs of the table by Holm's method.
    """

    first: str
    second: str
    below: Difference
    below_holm: float
    equal_flops: Difference
    equal_flops_holm: float
    flops: tuple[float, ...]


PAIR_COLUMNS: dict[str, str] = {
    "pair": "pair",
    "below": f"bits per byte, {CONFIDENCE:.0%} interval",
    "p": "p",
    "holm": "p, Holm",
    "equal_flops": f"at equal FLOPs, {CONFIDENCE:.0%} interval",
    "equal_holm": "p, Holm",
    "seeds": "seeds",
}


def every_pair(names: Sequence[str], last: str | None) -> list[Names]:
    """All pairs in the order of `names`. In its pairs, `last` is the second."""
    pairs = itertools.combinations(names, 2)
    return [(second, first) if first == last else (first, second) for first, second in pairs]


def compare_pairs(
    pairs: Sequence[Names],
    bpb: Mapping[str, Mapping[int, float]],
    curves: Mapping[str, Mapping[int, Curve]],
) -> list[Pair]:
    """Compare each of `pairs`. `bpb`, `curves`: final bits per byte and curve of each seed, by method. A pair has no differences
    if one of its methods has no runs."""
    below = [paired_difference(bpb.get(second, {}), bpb.get(first, {})) for first, second in pairs]
    equal = [_at_equal_flops(curves.get(first, {}), curves.get(second, {})) for first, second in pairs]
    adjusted = holm([one.p for one in below])
    equal_adjusted = holm([one.p for one, _ in equal])
    return [
        Pair(*names, below[n], adjusted[n], equal[n][0], equal_adjusted[n], equal[n][1])
        for n, names in enumerate(pairs)
    ]


def _at_equal_flops(first: Mapping[int, Curve], second: Mapping[int, Curve]) -> tuple[Difference, tuple[float, ...]]:
    """The differences second - first of the curves at equal FLOPs, and these FLOPs, for each seed."""
    matched = {
        seed: at
        for seed in first
        if seed in second and (at := at_equal_cost(_by_flops(first[seed]), _by_flops(second[seed]))) is not None
    }
    above = {seed: at.second for seed, at in matched.items()}
    difference = paired_difference(above, {seed: at.first for seed, at in matched.items()})
    return difference, tuple(matched[seed].cost for seed in difference.seeds)


def _by_flops(curve: Curve) -> list[tuple[float, float]]:
    return [(flops, bpb) for flops, _, bpb in curve]


def text_of(difference: Difference, digits: int = 4) -> str:
    """The text for a table: the mean, its interval, and `ALIKE` if it is not distinguishable from zero; a dash without seeds."""
    if not difference.values:
        return "–"
    if len(difference.values) == 1:
        return f"{difference.mean:+.{digits}f} (one seed) {ALIKE}"
    mark = "" if difference.distinguishable else f" {ALIKE}"
    return f"{difference.mean:+.{digits}f} [{difference.low:+.{digits}f}, {difference.high:+.{digits}f}]{mark}"


def pair_cells(pair: Pair) -> dict[str, str]:
    """The table cells of one pair, by column."""
    return {
        "pair": f"`{pair.first}` below `{pair.second}`",
        "below": text_of(pair.below),
        "p": _probability(pair.below.p),
        "holm": _probability(pair.below_holm),
        "equal_flops": text_of(pair.equal_flops),
        "equal_holm": _probability(pair.equal_flops_holm),
        "seeds": ", ".join(map(str, pair.below.seeds)) or "–",
    }


def pair_remarks(pairs: Sequence[Pair], gains: Sequence[Difference]) -> list[str]:
    """Notes for readers of the differences. `gains`: the differences in the table of methods."""
    differences = [*(pair.below for pair in pairs), *gains]
    if not any(one.values for one in differences):
        return []
    notes = [
        f"In brackets: the {CONFIDENCE:.0%} Student-t interval of the mean paired difference over seeds. A positive difference "
        f"means that the first is better. {ALIKE} Not distinguishable: the interval contains 0, or there is none. Seeds differ "
        "in parameters, data order and boundaries, not in the held-out text."
    ]
    if any(len(one.values) == 1 for one in differences):
        notes.append("One seed gives no interval, so nothing is distinguishable: use more --seeds.")
    if len(pairs) > 1:
        notes.append(
            f"The intervals are not adjusted for multiple comparisons: of {len(pairs)} pairs without any difference, "
            f"{len(pairs) * (1 - CONFIDENCE):.2g} would be expected to look distinguishable. p, Holm is adjusted."
        )
    if pairs:
        notes.append(
            "At equal FLOPs: both curves of a seed, interpolated linearly between validations, at the most training FLOPs that "
            "both runs reached. For the method with more FLOPs per byte this is before the end of its run, where its learning "
            "rate has not fully decayed. This is a disadvantage for it."
        )
    short = [pair for pair in pairs if len(pair.equal_flops.values) < len(pair.below.values)]
    if short:
        names = ", ".join(f"{pair.first}:{pair.second}" for pair in short)
        notes.append(
            f"Not for every seed at equal FLOPs ({names}): one run ended before the first validation of the other. "
            "--evaluation.times validates more often."
        )
    return notes


def difference_json(difference: Difference) -> dict[str, object]:
    """The entry of a difference in `table.json`."""
    return {
        **asdict(difference),
        "low": difference.low,
        "high": difference.high,
        "distinguishable": difference.distinguishable,
    }


def pair_json(pair: Pair) -> dict[str, object]:
    """The entry of a pair in `table.json`."""
    return {
        "first": pair.first,
        "second": pair.second,
        "below": {**difference_json(pair.below), "p_holm": pair.below_holm},
        "equal_flops": {
            **difference_json(pair.equal_flops),
            "p_holm": pair.equal_flops_holm,
            "flops": list(pair.flops),
        },
    }


def _probability(p: float) -> str:
    if math.isnan(p):
        return "–"
    return "<0.001" if p < 0.001 else f"{p:.3f}"
