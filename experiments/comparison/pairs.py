"""Every two methods of a comparison against each other, seed by seed, at equal bytes and at equal FLOPs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from experiments.comparison.intervals import ALIKE, CONFIDENCE, Difference, at_equal_cost, holm, paired_difference
from experiments.config.settings import EstimatorName

Names = tuple[EstimatorName, EstimatorName]
Curve = Sequence[tuple[float, float, float]]
"""FLOPs spent, megabytes read and held-out bits per byte at each validation."""


@dataclass(frozen=True)
class Pair:
    """Two methods: how far the bits per byte of the `first` lie below those of the `second`, after the same bytes and at the same
    training `flops` (one a seed of `equal_flops`); p values adjusted for all pairs of the table by Holm's rule."""

    first: EstimatorName
    second: EstimatorName
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


def every_pair(names: Sequence[EstimatorName], last: EstimatorName) -> list[Names]:
    """All pairs in the order of `names`, with `last` the second of its pairs."""
    pairs = itertools.combinations(names, 2)
    return [(second, first) if first == last else (first, second) for first, second in pairs]


def compare_pairs(
    pairs: Sequence[Names],
    bpb: Mapping[EstimatorName, Mapping[int, float]],
    curves: Mapping[EstimatorName, Mapping[int, Curve]],
) -> list[Pair]:
    """Each of `pairs` from the final bits per byte and the curves of its methods, by seed; nothing of one without runs."""
    below = [paired_difference(bpb.get(second, {}), bpb.get(first, {})) for first, second in pairs]
    equal = [_at_equal_flops(curves.get(first, {}), curves.get(second, {})) for first, second in pairs]
    adjusted = holm([one.p for one in below])
    equal_adjusted = holm([one.p for one, _ in equal])
    return [
        Pair(*names, below[n], adjusted[n], equal[n][0], equal_adjusted[n], equal[n][1])
        for n, names in enumerate(pairs)
    ]


def _at_equal_flops(first: Mapping[int, Curve], second: Mapping[int, Curve]) -> tuple[Difference, tuple[float, ...]]:
    """How far the first curves lie below the second, and where each seed's were read."""
    found = {
        seed: at
        for seed in first
        if seed in second and (at := at_equal_cost(_by_flops(first[seed]), _by_flops(second[seed]))) is not None
    }
    above = {seed: at.second for seed, at in found.items()}
    difference = paired_difference(above, {seed: at.first for seed, at in found.items()})
    return difference, tuple(found[seed].cost for seed in difference.seeds)


def _by_flops(curve: Curve) -> list[tuple[float, float]]:
    return [(flops, bpb) for flops, _, bpb in curve]


def text_of(difference: Difference, digits: int = 4) -> str:
    """As in a table: the mean, its interval, and the mark where they tell nothing apart; a dash without a seed."""
    if not difference.values:
        return "–"
    if len(difference.values) == 1:
        return f"{difference.mean:+.{digits}f} (one seed) {ALIKE}"
    mark = "" if difference.distinguishable else f" {ALIKE}"
    return f"{difference.mean:+.{digits}f} [{difference.low:+.{digits}f}, {difference.high:+.{digits}f}]{mark}"


def pair_cells(pair: Pair) -> dict[str, str]:
    """The table's text for one pair, by column."""
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
    """What a reader of the differences has to know; `gains` are those that stand in the table of methods."""
    differences = [*(pair.below for pair in pairs), *gains]
    if not any(one.values for one in differences):
        return []
    notes = [
        f"In brackets: the {CONFIDENCE:.0%} Student-t interval of the mean difference, seed by seed; a positive difference is a "
        f"gain of the first. {ALIKE} Not distinguishable: the interval contains 0, or there is none. Seeds differ in "
        "parameters, order of data and boundaries, not in the held-out text."
    ]
    if any(len(one.values) == 1 for one in differences):
        notes.append("One seed has no interval and tells nothing apart: name more --seeds.")
    if len(pairs) > 1:
        notes.append(
            f"Each interval is for its pair alone: of {len(pairs)} pairs without any difference, "
            f"{len(pairs) * (1 - CONFIDENCE):.2g} would be expected to look distinguishable. p, Holm is adjusted for all of them."
        )
    if pairs:
        notes.append(
            "At equal FLOPs: both curves of a seed, between validations linearly, at the most training FLOPs that both runs "
            "reached. The one that costs more a byte is read before its end, where its learning rate has not come down all "
            "the way, which counts against it."
        )
    short = [pair for pair in pairs if len(pair.equal_flops.values) < len(pair.below.values)]
    if short:
        names = ", ".join(f"{pair.first}:{pair.second}" for pair in short)
        notes.append(
            f"Not for every seed at equal FLOPs ({names}): one run ended before the other was first validated; "
            "--evaluation.times validates more often."
        )
    return notes


def difference_json(difference: Difference) -> dict[str, object]:
    """Everything about a difference by name, its interval and its mark included."""
    return {
        **asdict(difference),
        "low": difference.low,
        "high": difference.high,
        "distinguishable": difference.distinguishable,
    }


def pair_json(pair: Pair) -> dict[str, object]:
    """Everything about a pair by name."""
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
