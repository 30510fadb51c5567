"""What the laboratory writes: tables in Markdown, and the figure."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from experiments.comparison.intervals import Interval
from experiments.laboratory.results import FindingSummary, Flow, FlowSummary, NoiseSummary
from experiments.reporting.markdown import table
from experiments.reporting.pictures import picture

ABSENT = "–"


def gradient_table(found: Sequence[FindingSummary]) -> str:
    """Bias, variance and signal-to-noise of every estimator."""
    head = "estimator, model, against, bias, scale, cosine, variance, SNR, gain, cost"
    rows = []
    for one in found:
        exactly = [plus_minus(value) for value in (one.bias, one.scale, one.cosine)]
        factors = [bounds(value) for value in (one.variance, one.snr)]
        cells = (one.name, one.model, one.objective, *exactly, *factors, plus_minus(one.gain), f"{one.cost:g}")
        rows.append(cells)
    return table(head.split(", "), rows)


def flow_table(found: Sequence[FlowSummary]) -> str:
    """Where every flow ended; losses in nats per byte, price included."""
    head = "flow, model, loss of, start, end, greedy string, best string, rate, way closed, compared with, lead"
    rows = []
    for one in found:
        losses = (one.start, one.end, one.greedy, one.best)
        numbers = [plus_minus(value) for value in (*losses, one.rate, one.closed)]
        itself = one.against == one.name
        lead = (ABSENT, ABSENT) if itself else (one.against, plus_minus(one.lead))
        rows.append((one.name, one.model, one.objective, *numbers, *lead))
    return table(head.split(", "), rows)


def noise_table(found: Sequence[NoiseSummary]) -> str:
    """Variance ratios in a model of ordinary size."""
    head = "reductions, variance, SNR of a step, SNR per FLOP"
    rows = []
    for one in found:
        gain = "no ratio" if one.gain is None else bounds(one.gain)
        rows.append((one.name, bounds(one.variance), plus_minus(one.snr), gain))
    return table(head.split(", "), rows)


def plus_minus(value: Interval) -> str:
    """`0.983 ± 0.004`, to two digits of the half-width."""
    if math.isnan(value.mean):
        return ABSENT
    half = value.high - value.mean
    if half < 5e-5:
        return f"{value.mean:.4f}" if abs(value.mean) >= 5e-5 else f"{value.mean:.1g}"
    places = min(max(1 - math.floor(math.log10(half)), 0), 4)
    return f"{value.mean:.{places}f} ± {half:.{places}f}"


def bounds(value: Interval) -> str:
    """`347 (120 to 1000)`, for factors."""
    if math.isnan(value.mean):
        return ABSENT
    if value.high == value.low:
        return _short(value.mean)
    return f"{_short(value.mean)} ({_short(value.low)} to {_short(value.high)})"


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) >= 1e-4 else f"{value:.1g}"


def flow_picture(
    expected: Sequence[Sequence[Flow]], summaries: Sequence[FlowSummary], paths: Sequence[Sequence[Flow]]
) -> bytes:
    """Loss above that of the best strings over time, means over models: each chunker's flows, then the noisy ones; and the
    way that each flow closed, with its interval."""
    figure = Figure(figsize=(15, 8.4), dpi=110, layout="constrained")
    axes = figure.subplots(2, 3)
    panels = {
        ("distribute", "drawn"): "select, distribute",
        ("mean", "drawn"): "means of groups",
        ("smooth", "drawn"): "select, smooth: loss of drawn boundaries",
        ("smooth", "greedy"): "select, smooth: loss of greedy boundaries",
    }
    for part, (kind, title) in zip(axes.flat, panels.items(), strict=False):
        for of in zip(*expected, strict=True):
            if (of[0].model, of[0].objective) == kind:
                reference = "gradient" in of[0].name
                style = {"color": "black", "linestyle": "--"} if reference else {}
                begin = 0 if kind[0] == "smooth" else 1
                part.plot(of[0].times[begin:], _above(of)[begin:], label=of[0].name, **style)
        part.set(title=title, xscale="linear" if kind[0] == "smooth" else "log")
    for of in zip(*paths, strict=True):
        axes[1, 1].plot(of[0].times, _above(of), label=of[0].name, linewidth=0.9)
    axes[1, 1].set_title("stochastic gradient descent")
    for part in axes.flat[:5]:
        part.axhline(0.0, color="#888888", linewidth=0.8)
        part.set(xlabel="time", ylabel="nats per byte above the best string")
        part.grid(alpha=0.25)
        if part.get_legend_handles_labels()[0]:
            # Room for the names above the lines.
            part.set_ylim(top=1.6 * part.get_ylim()[1])
            part.legend(fontsize=6, frameon=False, loc="upper right")
    closed = [one.closed for one in summaries]
    places = np.arange(len(closed))[::-1]
    errors = [[one.mean - one.low for one in closed], [one.high - one.mean for one in closed]]
    last = axes[1, 2]
    last.errorbar([one.mean for one in closed], places, xerr=errors, fmt="o", markersize=3, linewidth=1)
    last.set_yticks(places, [f"{one.model}: {one.name}" for one in summaries], fontsize=6)
    last.set(title="way closed", xlabel="share, with its 95 % interval")
    last.axvline(1.0, color="#888888", linewidth=0.8)
    last.axvline(0.0, color="#888888", linewidth=0.8)
    last.grid(alpha=0.25)
    return picture(figure)


def _above(of: Sequence[Flow]) -> np.ndarray:
    """The mean over models of the loss above the best string's."""
    return np.mean([np.asarray(one.losses) - one.best for one in of], axis=0)
