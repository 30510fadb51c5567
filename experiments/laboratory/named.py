"""Estimators by name: small models are trained with each, and the gradient of their routers is measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic

import jax
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from data import Split
from experiments.comparison.intervals import Interval, geometric_interval, mean_interval
from experiments.laboratory.measure import GradientReport, measure, trains_router
from experiments.laboratory.report import ABSENT, bounds, plus_minus
from experiments.laboratory.results import Number
from experiments.laboratory.subjects import make_optimizer, train
from experiments.reporting.markdown import table
from unet import UNet

NUMBERS = ("rate", "bias", "scale", "cosine", "regulariser", "error", "variance", "snr")


@dataclass(frozen=True)
class Candidate:
    """An estimator to be measured: `build` makes a new model with it, `samples` is the number of draws for each text."""

    name: str
    build: Callable[[PRNGKeyArray], UNet]
    samples: int = 1


@dataclass(frozen=True)
class Measured(Generic[Number]):
    """The numbers of a `GradientReport`: of one model, or, as intervals, over models.

    `parameters`: trained parameters of the router; `draws`: how the mean was taken, on all models. `regulariser` and `error`
    are lengths, relative to that of the part of the gradient that depends on likelihoods. Over models `variance` and `snr` are
    geometric means. NaN: undefined on some model.
    """

    name: str
    parameters: int
    draws: str
    rate: Number
    bias: Number
    scale: Number
    cosine: Number
    regulariser: Number
    error: Number
    variance: Number
    snr: Number


def examine(
    candidate: Candidate, split: Split, texts: Int[Array, "models sets texts length"], *, steps: int, seed: int
) -> list[Measured[float]]:
    """Train a model of each seed for `steps` steps on its own loss, unless there is nothing to measure, and measure it on each
    of its sets of texts: means over sets, one result for each model."""
    optimizer, found = make_optimizer(steps), []
    for number, sets in enumerate(texts):
        key = jax.random.fold_in(jax.random.key(seed), number)
        keys = jax.random.split(key, 2 + len(sets))
        model = candidate.build(keys[0])
        if trains_router(model):
            model = train(model, split, optimizer=optimizer, seed=seed + number, key=keys[1], samples=candidate.samples)
        reports = [
            measure(model, rows, own, samples=candidate.samples) for rows, own in zip(sets, keys[2:], strict=True)
        ]
        found.append(_averaged(candidate.name, reports))
    return found


def _averaged(name: str, reports: Sequence[GradientReport]) -> Measured[float]:
    """One model's numbers, means over its sets of texts."""

    def mean(values: Sequence[float]) -> float:
        return float(np.mean(values))

    sizes = [float(np.linalg.norm(report.task)) for report in reports]
    kinds = " and ".join(sorted({report.draws for report in reports}))
    numbers = {
        name: mean([getattr(one, name) for one in reports]) for name in NUMBERS if name not in ("regulariser", "error")
    }
    relative = {
        "regulariser": [float(np.linalg.norm(one.regulariser)) for one in reports],
        "error": [one.error for one in reports],
    }
    shares = {
        name: mean([one / size if size else np.nan for one, size in zip(values, sizes, strict=True)])
        for name, values in relative.items()
    }
    return Measured(name, reports[0].parameters, kinds, **numbers, **shares)


def summarise(models: Sequence[Measured[float]]) -> Measured[Interval]:
    """Means over models with their intervals."""
    geometric = ("variance", "snr")
    numbers = {
        name: (geometric_interval if name in geometric else mean_interval)([getattr(one, name) for one in models])
        for name in NUMBERS
    }
    kinds = " and ".join(sorted({one.draws for one in models}))
    return Measured(models[0].name, models[0].parameters, kinds, **numbers)


def measured_table(found: Sequence[Measured[Interval]]) -> str:
    """One line for each estimator."""
    head = "estimator, parameters, rate, bias, scale, cosine, variance, SNR, regulariser, mean"
    rows: list[tuple[str, ...]] = []
    for one in found:
        if not one.parameters:
            rows.append((one.name, "0", plus_minus(one.rate), *[ABSENT] * 6, "no parameters to train"))
            continue
        numbers = [plus_minus(value) for value in (one.rate, one.bias, one.scale, one.cosine)]
        how = f"{one.draws}, error {bounds(one.error)}" if one.error.mean > 0.0 else one.draws
        factors = [bounds(value) for value in (one.variance, one.snr)]
        rows.append((one.name, str(one.parameters), *numbers, *factors, plus_minus(one.regulariser), how))
    return table(head.split(", "), rows)
