"""What the laboratory finds: numbers of one model, and their intervals over models."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from experiments.comparison.intervals import Interval, geometric_interval, mean_interval, ratio_interval

Number = TypeVar("Number", float, Interval)


@dataclass(frozen=True)
class Finding(Generic[Number]):
    """An estimator against the gradient g of one objective: on one model, or, as intervals, over models.

    `bias`: |E[ĝ] - g| / |g|; `scale`: the factor c that makes c·g nearest to E[ĝ]; `cosine` between the two; `variance` of one
    sample, trace over texts and decisions, relative to that of the paper's estimator on the same model; `snr`:
    |E[ĝ]|² / variance; `gain`: the part of the SNR that points along g, cosine² · snr with the cosine's sign, for each pass of
    the token level and what follows it (`cost`), relative to that of the paper's estimator on the same model. The last three
    are NaN for an estimator without noise. Over models `variance` and `snr` are geometric means.
    """

    name: str
    model: str
    objective: str
    bias: Number
    scale: Number
    cosine: Number
    variance: Number
    snr: Number
    gain: Number
    cost: float


FindingSummary = Finding[Interval]


@dataclass(frozen=True)
class Flow:
    """Where one estimator led on one model: a loss over time in nats per byte, price included, averaged over texts (and over
    paths, where there is noise).

    The loss is that of the flow's `objective`: the expected loss of drawn boundaries, or the loss of greedy ones. `start` and
    `end` are its first and last values, `best` the loss of the best string of each text, found by trying all, `greedy` that of
    the string of greedy actions at the end, with probabilities of 0 and 1, and `rate` the rate there. `closed` is the share of
    the way from the start to the best that the greedy string has gone: 1 for the best policy, below 0 for one worse than the
    start.
    """

    name: str
    model: str
    objective: str
    times: tuple[float, ...]
    losses: tuple[float, ...]
    start: float
    end: float
    greedy: float
    best: float
    rate: float
    closed: float


@dataclass(frozen=True)
class FlowSummary:
    """The same over models. `lead`: how much more of the way was closed than by the flow of `against`, model by model."""

    name: str
    model: str
    objective: str
    start: Interval
    end: Interval
    greedy: Interval
    best: Interval
    rate: Interval
    closed: Interval
    against: str
    lead: Interval


@dataclass(frozen=True)
class Noise:
    """Of one set of variance reductions, for one model of ordinary size and one batch: the variance of the gradient of the
    policy's weights (trace); what is left of its squared mean without what noise adds to it, `signal`, which can come out
    below 0; and the `flops` of a training step relative to one draw."""

    name: str
    variance: float
    signal: float
    flops: float


@dataclass(frozen=True)
class NoiseSummary:
    """The same over models. `variance`: relative to the paper's, model by model (geometric mean); `snr`: signal / variance of
    a step; `gain`: the SNR for each FLOP relative to the paper's, None where the paper's could be 0."""

    name: str
    variance: Interval
    snr: Interval
    gain: Interval | None


def over_sets(findings: Sequence[Finding[float]]) -> Finding[float]:
    """One estimator on several sets of texts of one model: means, of `variance` and `snr` geometric ones."""

    def mean(values: Sequence[float]) -> float:
        return math.fsum(values) / len(values)

    def geometric(values: Sequence[float]) -> float:
        return math.exp(mean([math.log(value) for value in values])) if min(values) > 0.0 else math.nan

    return _averaged(findings, mean, geometric)


def summarise_findings(models: Sequence[Sequence[Finding[float]]]) -> list[FindingSummary]:
    """One summary for each estimator, from the findings of each model in the same order."""
    return [_averaged(of, mean_interval, geometric_interval) for of in zip(*models, strict=True)]


def _averaged(
    findings: Sequence[Finding[float]],
    mean: Callable[[Sequence[float]], Number],
    geometric: Callable[[Sequence[float]], Number],
) -> Finding[Number]:
    first = findings[0]
    numbers = {
        name: (geometric if name in ("variance", "snr") else mean)([getattr(one, name) for one in findings])
        for name in ("bias", "scale", "cosine", "variance", "snr", "gain")
    }
    return Finding(first.name, first.model, first.objective, cost=first.cost, **numbers)


def summarise_flows(models: Sequence[Sequence[Flow]], against: Sequence[int]) -> list[FlowSummary]:
    """One summary for each flow, from the flows of each model in the same order; `against` has the number of the flow that
    each is compared with."""
    summaries = []
    for of, number in zip(zip(*models, strict=True), against, strict=True):
        other = [flows[number] for flows in models]
        summaries.append(
            FlowSummary(
                of[0].name,
                of[0].model,
                of[0].objective,
                *(
                    mean_interval([getattr(one, field) for one in of])
                    for field in ("start", "end", "greedy", "best", "rate", "closed")
                ),
                against=other[0].name,
                lead=mean_interval([mine.closed - its.closed for mine, its in zip(of, other, strict=True)]),
            )
        )
    return summaries


def summarise_noise(models: Sequence[Sequence[Noise]]) -> list[NoiseSummary]:
    """One summary for each set of reductions, from those of each model in the same order, the paper's first."""
    papers = [noises[0] for noises in models]
    return [
        NoiseSummary(
            of[0].name,
            geometric_interval([one.variance / paper.variance for one, paper in zip(of, papers, strict=True)]),
            mean_interval([one.signal / one.variance for one in of]),
            ratio_interval(
                [one.signal / one.variance / one.flops for one in of],
                [paper.signal / paper.variance / paper.flops for paper in papers],
            ),
        )
        for of in zip(*models, strict=True)
    ]
