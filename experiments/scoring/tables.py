"""The results of an evaluation as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from experiments.comparison.intervals import ALIKE, Interval
from experiments.evaluation.byte_scores import Text
from experiments.evaluation.measures import ClassStatistics
from experiments.reporting.markdown import table
from experiments.scoring.results import DriftResult, ModelResult, PairResult
from experiments.scoring.score import Plan

SCRIPTS_SHOWN = 8


@dataclass(frozen=True)
class Evaluation:
    """All results on one text."""

    text: Text
    plan: Plan
    models: Sequence[ModelResult]
    pairs: Sequence[PairResult]
    drift: Sequence[DriftResult]
    perplexity: bool = False


def number(value: float, digits: int = 3) -> str:
    """A number in a table; – if it is not finite."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"


def with_error(value: float, error: float) -> str:
    """Bits per byte with their standard error, if it is defined."""
    return f"{number(value, 4)} ± {number(error, 4)}" if math.isfinite(error) else number(value, 4)


def interval(one: Interval, digits: int = 4) -> str:
    """A difference with its interval. One that is not established is marked."""
    if not math.isfinite(one.low):
        return f"{one.mean:+.{digits}f} {ALIKE}"
    mark = f" {ALIKE}" if one.holds(0.0) else ""
    return f"{one.mean:+.{digits}f} [{one.low:+.{digits}f}, {one.high:+.{digits}f}]{mark}"


def shown(name: str) -> str:
    """A name in a table: a bar would end its cell, a line break its row."""
    return "`" + name.replace("|", "¦").encode("unicode_escape").decode().replace("\\xa6", "¦") + "`"


def markdown(evaluation: Evaluation) -> str:
    """All tables."""
    parts = [summary(evaluation), table(*likelihood_table(evaluation))]
    if evaluation.pairs:
        parts += [
            "Bits per byte of the first model minus those of the second, document by document, with the 95 % bootstrap interval "
            f"over documents ({ALIKE}: not told apart); of the boundaries of either, the fraction that the other has not:",
            table(*pair_table(evaluation.pairs)),
        ]
    bounded = [one for one in evaluation.models if one.boundaries is not None]
    if bounded:
        parts += [
            "Boundaries. Enrichment: mean bits of the bytes that begin a chunk, divided by those of all bytes:",
            table(*boundary_table(bounded)),
            "Agreement: boundaries as predictions of certain bytes, and the F1 of as many uniform boundaries:",
            table(*agreement_table(bounded)),
        ]
    parts += [
        "By class of byte: fraction of the text; for each model, bits of a byte and fraction with a boundary:",
        table(*class_table(evaluation.models, "classes", "class")),
        table(*class_table(evaluation.models, "scripts", "script")),
    ]
    if any(one.repeated for one in evaluation.models):
        parts += ["One string repeated: bits per byte, rate:", table(*repeated_table(evaluation.models))]
    if evaluation.drift:
        parts += [
            "From one checkpoint to the next: of the boundaries of either, the fraction that the other has not; fraction of the "
            "bytes that differ:",
            table(*drift_table(evaluation.drift)),
        ]
    return "\n".join(f"{part.rstrip()}\n" for part in parts)


def summary(evaluation: Evaluation) -> str:
    """The text and the settings in a sentence or two."""
    text, plan = evaluation.text, evaluation.plan
    documents = len(text.documents)
    boundaries = "greedy boundaries"
    if plan.boundaries == "drawn":
        boundaries = f"boundaries drawn with seed {plan.seed}"
        boundaries += f", mean of {plan.samples} samples" if plan.samples > 1 else ""
    return (
        f"{text.name}: {text.bytes:,} bytes in {documents:,} document{'s' if documents > 1 else ''}, in windows of "
        f"{plan.context:,} bytes that move by {plan.stride:,}: but for the start of a document, every byte is predicted from at "
        f"least {plan.context - plan.stride + 1:,} bytes; {boundaries}. ± is the standard error over documents."
    )


Table = tuple[list[str], list[list[str]]]


def likelihood_table(evaluation: Evaluation) -> Table:
    mixture = evaluation.plan.boundaries == "drawn" and evaluation.plan.samples > 1
    perplexity = evaluation.perplexity
    head = [
        "model",
        "bits per byte",
        *(["perplexity per byte"] if perplexity else []),
        "early exit",
        *(["mean of probabilities"] if mixture else []),
    ]
    head += ["rate", "bytes per token", "parameters"]
    rows = []
    for one in evaluation.models:
        likelihood, boundaries = one.likelihood, one.boundaries
        rows.append(
            [
                shown(one.name),
                with_error(likelihood.bpb, likelihood.bpb_error),
                *([number(2.0**likelihood.bpb, 4)] if perplexity else []),
                number(likelihood.early_bpb, 4),
                *([number(likelihood.mixture_bpb, 4)] if mixture else []),
                "–" if boundaries is None else number(boundaries.rate),
                "–" if boundaries is None else " / ".join(number(size, 2) for size in boundaries.bytes_per_token),
                f"{one.parameters:,}",
            ]
        )
    return head, rows


def pair_table(pairs: Iterable[PairResult]) -> Table:
    rows = [
        [
            f"{shown(pair.first)} − {shown(pair.second)}",
            interval(pair.difference),
            "–" if pair.change is None else number(pair.change.changed),
        ]
        for pair in pairs
    ]
    return ["models", "difference", "boundaries that differ"], rows


def boundary_table(models: Iterable[ModelResult]) -> Table:
    head = ["model", "enrichment", "bits at starts", "bits elsewhere", "chunk, bytes", "variation", "longest"]
    rows = []
    for one in models:
        assert one.boundaries is not None
        enrichment, chunks = one.boundaries.enrichment, one.boundaries.chunks
        bits = number(enrichment.start_bits), number(enrichment.other_bits)
        sizes = number(chunks.mean, 2), number(chunks.variation), str(chunks.longest)
        rows.append([shown(one.name), number(enrichment.ratio), *bits, *sizes])
    return head, rows


def agreement_table(models: Iterable[ModelResult]) -> Table:
    head = ["model", "bytes", "of the text", "AUC of p", "precision", "recall", "F1", "F1, uniform"]
    rows = []
    for one in models:
        assert one.boundaries is not None
        for name, fit in one.boundaries.agreement.items():
            values = fit.targets, fit.auc, fit.precision, fit.recall, fit.f1, fit.chance_f1
            rows.append([shown(one.name), name, *map(number, values)])
    return head, rows


def class_table(models: Sequence[ModelResult], kind: str, title: str) -> Table:
    names = list(getattr(models[0], kind))[:SCRIPTS_SHOWN]
    head = [title, "of the text"]
    for one in models:
        head += [f"{shown(one.name)} bits", "boundary"]
    rows = []
    for name in names:
        statistics: list[ClassStatistics] = [getattr(one, kind)[name] for one in models]
        row = [name, number(statistics[0].share)]
        for one, values in zip(models, statistics, strict=True):
            row += [number(values.bpb), number(values.rate) if one.levels else "–"]
        rows.append(row)
    return head, rows


def repeated_table(models: Sequence[ModelResult]) -> Table:
    head = ["model", *(shown(string * 4) for string in models[0].repeated)]
    rows = [
        [shown(one.name), *(f"{number(value.bpb)}, {number(value.rate)}" for value in one.repeated.values())]
        for one in models
    ]
    return head, rows


def drift_table(drift: Iterable[DriftResult]) -> Table:
    rows = [
        [shown(one.run), f"{one.earlier} → {one.later}", number(one.change.changed), number(one.change.bytes)]
        for one in drift
    ]
    return ["run", "steps", "boundaries that changed", "bytes"], rows
