"""The report of a run: `report.html`, a self-contained page, and `boundaries.png`."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from experiments.config.settings import RunConfig
from experiments.reporting.summary import Summary, target_rates
from experiments.terminal import escaped
from experiments.training.metrics_log import read_metrics
from unet.files.saving import write_atomically
from unet.losses import level_prefix
from unet.shading.characters import Character, colour_of
from unet.shading.html import fragment

PICTURE_COLUMNS, PICTURE_LINES = 96, 26
"""Size of `boundaries.png`, in characters."""

STYLE = """
:root { color-scheme: light dark; --line: #8884; --quiet: #777; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p.quiet, figcaption { color: var(--quiet); margin-top: .2rem; }
table { border-collapse: collapse; }
td { padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--line); }
td + td { font-variant-numeric: tabular-nums; }
img { max-width: 100%; height: auto; background: white; border-radius: 4px; }
.wide { overflow-x: auto; } .wide th { text-align: left; padding-right: .8rem; }
.wide th, .wide td { white-space: nowrap; } td.quiet { color: var(--quiet); }
"""


def write_report(folder: Path, config: RunConfig, summary: Summary, shaded: Sequence[Sequence[Character]]) -> None:
    """Write both files to `folder`, whose `metrics.jsonl` and `config.json` are read. `shaded`: held-out text."""
    write_atomically(folder / "boundaries.png", boundaries_picture(shaded))
    write_atomically(folder / "report.html", report_page(folder, config, summary, shaded))


def report_page(folder: Path, config: RunConfig, summary: Summary, shaded: Sequence[Sequence[Character]]) -> str:
    """The content of `report.html`: a table of results, shaded held-out text, curves and settings."""
    title = f"{config.estimator} on {config.dataset}"
    curves = base64.b64encode(curves_picture(folder, config)).decode()
    texts = fragment(shaded, [f"Text {number}" for number in range(1, len(shaded) + 1)])
    settings = html.escape((folder / "config.json").read_text())
    return html_page(
        title,
        f"""<p class="quiet">{_subtitle(config, summary)}</p>
<table>{"".join(_result_rows(config, summary))}</table>
<h2>Held-out text</h2>
<p class="quiet">▪ is the start of a document.</p>
{texts}
<h2>Curves</h2>
<img alt="Bits per byte, boundary rate and agreement with white space over training bytes" src="data:image/png;base64,{curves}">
<h2>Settings</h2>
<details><summary>config.json</summary><pre>{settings}</pre></details>""",
    )


def html_page(title: str, body: str) -> str:
    """A self-contained HTML page with this title and body."""
    # The name of a data set may be that of a file that is no UTF-8.
    title = escaped(title)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
{body}
</body></html>
"""


def boundaries_picture(shaded: Sequence[Sequence[Character]], title: str = "Held-out text") -> bytes:
    """A PNG of texts with the boundary probability of each character as its background colour."""
    lines = _wrapped(shaded)[:PICTURE_LINES]
    height = 0.24 * len(lines) + 0.45
    figure = Figure(figsize=(0.105 * PICTURE_COLUMNS + 0.3, height), dpi=140)
    axes = figure.add_axes((0.01, 0.08 / height, 0.98, 1 - 0.45 / height))
    axes.set_xlim(0, PICTURE_COLUMNS)
    axes.set_ylim(len(lines), 0)
    axes.axis("off")
    figure.suptitle(
        f"{title}: boundary probability at each character, blue 0, red 1; bars are boundaries",
        fontsize=9,
        y=1 - 0.1 / height,
    )
    for y, line in enumerate(lines):
        for x, character in enumerate(line):
            colour = tuple(channel / 255 for channel in colour_of(character.prob))
            axes.add_patch(Rectangle((x, y + 0.06), 1, 0.88, facecolor=colour, linewidth=0))
            if character.depth:
                axes.add_patch(Rectangle((x + 0.86, y + 0.06), 0.14, 0.88, facecolor="#333333", linewidth=0))
            axes.text(
                x + 0.45, y + 0.53, _printable(character.text), ha="center", va="center", fontsize=8, family="monospace"
            )
    return picture(figure)


def curves_picture(folder: Path, config: RunConfig) -> bytes:
    """A PNG of bits per byte, boundary rate and agreement with white space over training bytes."""
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
    return picture(figure)


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


def _wrapped(shaded: Sequence[Sequence[Character]]) -> list[list[Character]]:
    lines: list[list[Character]] = []
    for characters in shaded:
        line: list[Character] = []
        for character in characters:
            line.append(character)
            if character.text == "\n" or len(line) == PICTURE_COLUMNS:
                lines.append(line)
                line = []
        lines.append(line)
    return [line for line in lines if line]


def _printable(text: str) -> str:
    if text == "\n":
        return "↵"
    # Matplotlib interprets a dollar sign as the start of a formula.
    return "\\$" if text == "$" else text if text.isprintable() else "·"


def _subtitle(config: RunConfig, summary: Summary) -> str:
    return html.escape(
        f"{config.model}, {summary['parameters']:,} parameters, {config.length} bytes x {config.batch} sequences a step, "
        f"{_number(summary['bytes'], 1e6, 2)} MB of training text, seed {config.seed}"
    )


def _result_rows(config: RunConfig, summary: Summary) -> Iterable[str]:
    rows = [
        (
            "Held-out bits per byte ± standard error over documents",
            f"{_number(summary['val_bpb'])} ± {_number(summary['val_bpb_error'])}",
        ),
        ("… of the early exit", _number(summary["val_early_bpb"])),
        *(
            (f"… with {boundaries}", _number(summary[name]))
            for name, boundaries in (
                ("val_bpb_greedy", "its own boundaries, greedy instead of sampled"),
                ("val_bpb_as_trained", "the boundaries it is trained on"),
            )
            if summary.get(name) is not None
        ),
        ("Boundary rate, target", f"{_number(summary['val_rate'], digits=3)}, {_target(summary['target_rate'])}"),
        *(
            [("… of the bytes that constraints leave free", _number(summary["val_free_rate"], digits=3))]
            if config.constrain
            else []
        ),
        *(
            (
                f"… at inner level {level}, target",
                f"{_number(summary[f'val_{level_prefix(level)}rate'], digits=3)}, {_target(target)}",
            )
            for level, target in enumerate(target_rates(config))
            if level
        ),
        ("White space: AUC of p", _number(summary["val_whitespace_auc"])),
        (
            "White space: F1 of boundaries with p > 0.5, of sampled ones",
            f"{_number(summary['val_whitespace_f1'], digits=3)}, {_number(summary['val_whitespace_sampled_f1'], digits=3)}",
        ),
        (
            "Spacelike: F1 of boundaries with p > 0.5, of sampled ones",
            f"{_number(summary['val_spacelike_f1'], digits=3)}, {_number(summary['val_spacelike_sampled_f1'], digits=3)}",
        ),
        ("Policy entropy, nats per decision", _number(summary["val_policy_entropy"])),
        ("Fraction of boundaries dropped in training", _number(summary["dropped_fraction"], digits=5)),
        ("Epochs", _number(summary["epochs"], digits=2)),
        ("Fraction of the training text that can occur in batches", _number(summary["shown_fraction"], digits=3)),
        ("Training speed, kB/s", _number(summary["bytes_per_second"], 1e3, 1)),
        ("Training time, s", _number(summary["seconds"], digits=0)),
    ]
    return (f"<tr><td>{name}</td><td>{value}</td></tr>" for name, value in rows)


def _target(rate: float | int | str | None) -> str:
    return "that of the tokenizer" if rate is None else f"{rate:g}"


def _number(value: float | int | str | None, unit: float = 1.0, digits: int = 4) -> str:
    return f"{value / unit:.{digits}f}" if isinstance(value, int | float) else "–"


def picture(figure: Figure) -> bytes:
    """A figure as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
