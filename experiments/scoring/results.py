"""What is known of models after their evaluation on a text."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from experiments.comparison.intervals import Interval, bootstrap_interval
from experiments.evaluation.byte_classes import BYTE_CLASSES, byte_classes, scripts_of
from experiments.evaluation.byte_scores import ByteScores, Text
from experiments.evaluation.measures import (
    Change,
    ChunkLengths,
    ClassStatistics,
    Enrichment,
    Fit,
    Likelihood,
    bits_of,
    boundary_change,
    boundary_enrichment,
    boundary_rate,
    bytes_per_token,
    chunk_lengths,
    class_statistics,
    fit,
    likelihood,
)
from experiments.scoring.models import OpenModel

Targets = Mapping[str, Bool[np.ndarray, " bytes"]]


@dataclass(frozen=True)
class Repeated:
    """Bits per byte and boundary rate of a text of one string repeated."""

    bpb: float
    rate: float


@dataclass(frozen=True)
class BoundaryResult:
    """What the boundaries of a model are like: see `docs/evaluation.md`."""

    rate: float
    bytes_per_token: tuple[float, ...]
    enrichment: Enrichment
    chunks: ChunkLengths
    agreement: Mapping[str, Fit]


@dataclass(frozen=True)
class ModelResult:
    """The results of one model. `boundaries`: None without a token level."""

    name: str
    step: int | None
    digest: str
    parameters: int
    levels: int
    likelihood: Likelihood
    boundaries: BoundaryResult | None
    classes: Mapping[str, ClassStatistics]
    scripts: Mapping[str, ClassStatistics]
    repeated: Mapping[str, Repeated]


@dataclass(frozen=True)
class PairResult:
    """Bits per byte of one model minus those of another on the same documents, with the bootstrap interval over documents, and
    how their boundaries differ (None if one has no token level)."""

    first: str
    second: str
    difference: Interval
    change: Change | None


@dataclass(frozen=True)
class DriftResult:
    """How the boundaries of a run changed from one checkpoint to the next."""

    run: str
    earlier: int
    later: int
    change: Change


@dataclass(frozen=True)
class TextClasses:
    """The classes and the scripts of the bytes of a text."""

    classes: Int[np.ndarray, " bytes"]
    scripts: Int[np.ndarray, " bytes"]
    script_names: tuple[str, ...]

    @classmethod
    def of(cls, text: Text) -> TextClasses:
        numbers: dict[str, int] = {}
        parts = []
        for document in text.documents:
            scripts, names = scripts_of(document)
            parts.append(np.array([numbers.setdefault(name, len(numbers)) for name in names])[scripts])
        return cls(byte_classes(text.values), np.concatenate(parts), tuple(numbers))


def model_result(
    opened: OpenModel,
    scores: ByteScores,
    text: Text,
    classes: TextClasses,
    targets: Targets,
    repeated: Mapping[str, Repeated],
) -> ModelResult:
    """The results of a model with these scores. `targets`: the bytes that boundaries are compared with."""
    boundaries = None
    if opened.levels:
        boundaries = BoundaryResult(
            boundary_rate(scores),
            bytes_per_token(scores),
            boundary_enrichment(scores, text),
            chunk_lengths(scores, text),
            {name: fit(scores, text, wanted) for name, wanted in targets.items()},
        )
    by_script = class_statistics(scores, classes.scripts, classes.script_names)
    return ModelResult(
        opened.name,
        opened.step,
        opened.digest,
        opened.parameters,
        opened.levels,
        likelihood(scores, text),
        boundaries,
        class_statistics(scores, classes.classes, BYTE_CLASSES),
        dict(sorted(by_script.items(), key=lambda item: -item[1].share)),
        repeated,
    )


def repeated_results(scores: ByteScores, text: Text, strings: Sequence[str]) -> dict[str, Repeated]:
    """The results of each document of a text whose documents are the `strings`, repeated."""
    results = {}
    for number, string in enumerate(strings):
        own = text.document == number
        nats = -float(scores.log_prob[:, own].mean(axis=0, dtype=np.float64).sum())
        free = scores.free[:, own]
        drawn = scores.boundaries[:, own] & free
        results[string] = Repeated(bits_of(nats, int(own.sum())), float(drawn.sum() / free.sum()))
    return results


def pair_results(
    results: Sequence[ModelResult], scores: Sequence[ByteScores], text: Text, seed: int
) -> list[PairResult]:
    """Every pair of models, in order."""
    pairs = []
    for (first, of_first), (second, of_second) in itertools.combinations(zip(results, scores, strict=True), 2):
        nats = first.likelihood.document_nats - second.likelihood.document_nats
        change = boundary_change(of_first, of_second) if first.levels and second.levels else None
        difference = bootstrap_interval((nats / np.log(2.0)).tolist(), list(map(float, text.sizes)), seed)
        pairs.append(PairResult(first.name, second.name, difference, change))
    return pairs


def drift_results(run: str, steps: Sequence[int], scores: Sequence[ByteScores]) -> list[DriftResult]:
    """How the boundaries changed between the checkpoints of a run."""
    stored = list(zip(steps, scores, strict=True))
    return [
        DriftResult(run, earlier, later, boundary_change(of_earlier, of_later))
        for (earlier, of_earlier), (later, of_later) in itertools.pairwise(stored)
    ]
