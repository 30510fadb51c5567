"""The page of an evaluation: `report.html`, self-contained, its plots as `evaluation.png`, and `evaluation.json`."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.config.errors import ConfigError
from experiments.evaluation.byte_scores import ByteScores
from experiments.evaluation.measures import LONGEST
from experiments.reporting.pictures import inline_svg, picture
from experiments.reporting.report import html_page
from experiments.scoring.results import ModelResult
from experiments.scoring.tables import (
    Evaluation,
    Table,
    agreement_table,
    boundary_table,
    class_table,
    drift_table,
    likelihood_table,
    pair_table,
    repeated_table,
    summary,
)
from unet.files.saving import write_atomically
from unet.shading.characters import characters
from unet.shading.html import fragment

FILES = ("report.html", "evaluation.png", "evaluation.json")

SHADED_BYTES = 1200
"""Text that the page shows with boundaries."""

COLOURS = ("#c0392b", "#2980b9", "#27ae60", "#8e44ad", "#d35400", "#16a085", "#7f8c8d", "#f1c40f")


def write_page(folder: Path, evaluation: Evaluation, scores: Sequence[ByteScores], found: str) -> None:
    """Write all files to `folder`, which is made; `found`: the results as JSON. Raises `ConfigError` where that fails."""
    plots = plots_figure(evaluation)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / FILES[1], picture(plots))
        write_atomically(folder / FILES[2], found)
        write_atomically(folder / FILES[0], page(evaluation, scores, plots))
    except OSError as error:
        raise ConfigError(f"--report {folder} cannot be written to: {error.strerror}") from None


def page(evaluation: Evaluation, scores: Sequence[ByteScores], plots: Figure) -> str:
    """The content of `report.html`."""
    bounded = [one for one in evaluation.models if one.boundaries is not None]
    sections = [f'<p class="quiet">{html.escape(summary(evaluation))}</p>', _html(likelihood_table(evaluation))]
    sections.append(inline_svg(plots, "The results as plots"))
    if evaluation.pairs:
        sections += [
            "<h2>Differences</h2><p>Bits per byte of the first model minus those of the second on the same documents, with the "
            "95 % bootstrap interval over documents (≈: not told apart). Boundaries that differ: of those of either, the "
            "fraction that the other has not.</p>",
            _html(pair_table(evaluation.pairs)),
        ]
    if bounded:
        sections += [
            "<h2>Boundaries</h2><p>Enrichment: mean bits of the bytes that begin a chunk, divided by those of all bytes.</p>",
            _html(boundary_table(bounded)),
            "<h2>Agreement</h2>",
            _html(agreement_table(bounded)),
        ]
        sections += _shaded(evaluation, scores)
    sections += [
        "<h2>Classes of bytes</h2>",
        _html(class_table(evaluation.models, "classes", "class")),
        _html(class_table(evaluation.models, "scripts", "script")),
    ]
    if any(one.repeated for one in evaluation.models):
        sections += ["<h2>One string repeated: bits per byte, rate</h2>", _html(repeated_table(evaluation.models))]
    if evaluation.drift:
        sections += ["<h2>From one checkpoint to the next</h2>", _html(drift_table(evaluation.drift))]
    return html_page(f"Evaluation on {evaluation.text.name}", "\n".join(sections))


def _html(content: Table) -> str:
    """A table of Markdown cells as HTML."""
    head, rows = content

    def cell(text: str) -> str:
        return re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(text))

    parts = ["<tr>" + "".join(f"<th>{cell(one)}</th>" for one in head) + "</tr>"]
    parts += ["<tr>" + "".join(f"<td>{cell(one)}</td>" for one in row) + "</tr>" for row in rows]
    return f'<div class="wide"><table>{"".join(parts)}</table></div>'


def _shaded(evaluation: Evaluation, scores: Sequence[ByteScores]) -> list[str]:
    """The beginning of the first document with the boundaries of each model."""
    size = min(SHADED_BYTES, len(evaluation.text.documents[0]))
    texts, notes = [], []
    for result, of in zip(evaluation.models, scores, strict=True):
        if result.levels:
            bits = of.log_prob[0, :size] / -np.log(2.0)
            texts.append(characters(evaluation.text.values[:size], of.prob[0, :size], of.depth[0, :size], bits))
            notes.append(result.name)
    return ["<h2>Text</h2>", fragment(texts, notes)]


def plots_figure(evaluation: Evaluation) -> Figure:
    """Bits per byte, lengths of chunks, bits and boundaries by class of byte."""
    figure = Figure(figsize=(11, 7.2), dpi=130, layout="constrained")
    bits, lengths, bits_by_class, rate_by_class = figure.subplots(2, 2).flat
    _plot_bits(bits, evaluation.models)
    _plot_lengths(lengths, evaluation.models)
    _plot_classes(bits_by_class, evaluation.models, "bpb", "bits of a byte, by class")
    _plot_classes(rate_by_class, evaluation.models, "rate", "fraction with a boundary after it, by class")
    for axes in (lengths, bits_by_class, rate_by_class):
        axes.grid(alpha=0.25)
    handles, labels = bits_by_class.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4), fontsize=8, frameon=False)
    return figure


def _label(result: ModelResult) -> str:
    """The end of a long name. Matplotlib would read a dollar sign as the start of a formula."""
    name = result.name if len(result.name) <= 36 else f"…{result.name[-35:]}"
    return name.replace("$", "\\$")


def _plot_bits(axes: Axes, models: Sequence[ModelResult]) -> None:
    places = np.arange(len(models))
    for place, one in zip(places, models, strict=True):
        error = one.likelihood.bpb_error
        half = 1.96 * error if np.isfinite(error) else 0.0
        axes.errorbar(one.likelihood.bpb, place, xerr=half, fmt="o", color=_colour(int(place)), capsize=3)
        if np.isfinite(one.likelihood.early_bpb):
            axes.plot(one.likelihood.early_bpb, place, "|", color=_colour(int(place)), markersize=10)
    axes.set_yticks(places, [_label(one) for one in models], fontsize=8)
    axes.set_ylim(len(models) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.25)
    axes.set_title("bits per byte ± 1.96 standard errors; bar: early exit", fontsize=10)


def _plot_lengths(axes: Axes, models: Sequence[ModelResult]) -> None:
    for place, one in enumerate(models):
        if one.boundaries is not None and sum(one.boundaries.chunks.histogram):
            counts = np.array(one.boundaries.chunks.histogram)
            axes.step(np.arange(1, LONGEST + 1), counts / counts.sum(), where="mid", color=_colour(place))
    axes.set_xlabel(f"bytes ({LONGEST}: {LONGEST} or more)")
    axes.set_title("lengths of chunks", fontsize=10)


def _plot_classes(axes: Axes, models: Sequence[ModelResult], value: str, title: str) -> None:
    names = list(models[0].classes)
    width = 0.8 / len(models)
    for place, one in enumerate(models):
        heights = [getattr(one.classes[name], value) for name in names]
        where = np.arange(len(names)) + (place - (len(models) - 1) / 2) * width
        axes.bar(where, heights, width, color=_colour(place), label=_label(one))
    axes.set_xticks(np.arange(len(names)), [name.replace(" ", "\n") for name in names], fontsize=8)
    axes.set_title(title, fontsize=10)


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]
