"""The plots of a run's report: its curves, and what its tokens are like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.config.settings import RunConfig
from experiments.evaluation.byte_classes import BYTE_CLASSES, byte_classes
from experiments.evaluation.measures import LONGEST
from experiments.training.metrics_log import read_metrics
from unet.shading.characters import Character

INVALID = "\N{REPLACEMENT CHARACTER}"


def curves_figure(folder: Path, config: RunConfig) -> Figure:
    """The figure of bits per byte, boundary rate and agreement with white space over training bytes."""
    records = list(read_metrics(folder))
    figure = Figure(figsize=(10, 3.1), dpi=130, layout="constrained")
    loss, rate, agreement = figure.subplots(1, 3)
    _curve(loss, records, "bpb", "#bbbbbb", "training", smooth=25)
    _curve(loss, records, "val_bpb", "#c0392b", "held out", marker="o")
    _curve(loss, records, "val_early_bpb", "#2980b9", "held out, early exit", marker="o")
    held_out = [record["val_bpb"] for record in records if isinstance(record.get("val_bpb"), float)]
    if held_out:
        loss.set_ylim(min(held_out) - 0.2, max(held_out[0] + 0.2, min(held_out) + 1.5))
    loss.set_title("bits per byte")
    _curve(rate, records, "rate", "#bbbbbb", "training", smooth=25)
    _curve(rate, records, "val_rate", "#c0392b", "held out", marker="o")
    if config.constrain:
        _curve(rate, records, "val_free_rate", "#8e44ad", "held out, of free bytes", marker="o")
    if not config.reads_tokens:
        rate.axhline(config.rate, color="#333333", linewidth=0.8, linestyle="--", label="target")
    rate.set_ylim(0, None)
    rate.set_title("fraction of bytes with a boundary")
    _curve(agreement, records, "val_whitespace_auc", "#333333", "AUC of p", marker="o")
    _curve(agreement, records, "val_whitespace_f1", "#c0392b", "F1, p > 0.5", marker="o")
    _curve(agreement, records, "val_whitespace_sampled_f1", "#2980b9", "F1, sampled", marker="o")
    agreement.set_ylim(-0.02, 1.02)
    agreement.set_title("agreement with white space")
    for axes in (loss, rate, agreement):
        axes.set_xlabel("training bytes / 10⁶")
        axes.grid(alpha=0.25)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8, frameon=False)
    return figure


def _curve(
    axes: Axes,
    records: Sequence[dict[str, float | int | str | None]],
    name: str,
    colour: str,
    label: str,
    *,
    marker: str | None = None,
    smooth: int = 1,
) -> None:
    points = [
        (num_bytes / 1e6, value)
        for record in records
        if isinstance(value := record.get(name), int | float) and isinstance(num_bytes := record["bytes"], int | float)
    ]
    if not points:
        return
    x, y = np.array(points).T
    window = min(smooth, len(y))
    y = np.convolve(y, np.ones(window) / window, mode="valid")
    axes.plot(x[window - 1 :], y, color=colour, label=label, marker=marker, markersize=3, linewidth=1.2)


def tokens_figure(shaded: Sequence[Sequence[Character]]) -> Figure:
    """How long the outermost tokens of some texts are, what bytes of each class cost, and how often a token ends after them.

    The first and the last token of a text may be cut and are left out. A character of several bytes counts with all of them.
    """
    figure = Figure(figsize=(10, 3.1), dpi=130, layout="constrained")
    lengths, bits, ends = figure.subplots(1, 3)
    sizes = np.minimum(token_lengths(shaded), LONGEST)
    if sizes.size:
        counts = np.bincount(sizes, minlength=LONGEST + 1)[1:]
        lengths.bar(np.arange(1, LONGEST + 1), counts / counts.sum(), width=0.9, color="#2980b9")
    lengths.set_title(f"lengths of tokens, bytes ({LONGEST}: or more)")
    table = by_class(shaded)
    where = np.arange(len(table))
    bits.bar(where, [one.bits for one in table.values()], color="#d35400")
    bits.set_title("bits per byte, by class")
    ends.bar(where, [one.ends for one in table.values()], color="#c0392b")
    ends.set_title("fraction with a boundary after it")
    for axes in (bits, ends):
        labels = [f"{name}\n{one.share:.0%}" for name, one in table.items()]
        axes.set_xticks(where, [label.replace("UTF-8 ", "UTF-8\n") for label in labels], fontsize=7)
    for axes in (lengths, bits, ends):
        axes.grid(axis="y", alpha=0.25)
    return figure


def token_lengths(shaded: Sequence[Sequence[Character]]) -> Int[np.ndarray, " tokens"]:
    """The bytes of each outermost token that is whole: not the first and the last of a text."""
    found: list[int] = []
    for text in shaded:
        sizes = {one.token: one.token_bytes for one in text if one.token is not None}
        found += [sizes[token] for token in sorted(sizes)[1:-1]]
    return np.array(found, np.int64)


@dataclass(frozen=True)
class OfClass:
    """Of the bytes of a class: their share of all bytes, mean bits, and how many have a boundary after them."""

    share: float
    bits: float
    ends: float


def by_class(shaded: Sequence[Sequence[Character]]) -> dict[str, OfClass]:
    """Figures of the classes of bytes that occur; a character is of the class of its first byte."""
    known = [one for text in shaded for one in text if one.text not in ("▪", INVALID)]
    if not known:
        return {}
    contents = [one.text.encode("utf-8", "replace") for one in known]
    sizes = np.array([len(content) for content in contents])
    classes = byte_classes(np.array([content[0] for content in contents], np.uint8))
    bits = np.nan_to_num([one.bits for one in known])
    closed = np.array([one.depth > 0 for one in known])
    found = {}
    for number, name in enumerate(BYTE_CLASSES):
        own = classes == number
        if own.any():
            count = sizes[own].sum()
            name = "UTF-8" if name == "UTF-8 lead" else name
            found[name] = OfClass(
                float(count / sizes.sum()), float(bits[own].sum() / count), float(closed[own].sum() / count)
            )
    return found
