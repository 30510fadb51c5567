"""The output files of a comparison: `table.md`, `table.json`, `curves.png` and `report.html`."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from data import Split
from estimators.registry import BASELINE
from experiments.comparison.finished import FinishedRun, Runs
from experiments.comparison.intervals import ALIKE, CONFIDENCE, Difference, paired_difference
from experiments.comparison.pairs import (
    PAIR_COLUMNS,
    Curve,
    Names,
    Pair,
    compare_pairs,
    difference_json,
    pair_cells,
    pair_json,
    pair_remarks,
    text_of,
)
from experiments.config.plugins import load_model, modules_of
from experiments.config.settings import RunConfig
from experiments.reporting.display import Display
from experiments.reporting.markdown import table as markdown_table
from experiments.reporting.report import html_page, picture
from experiments.reporting.shading import shade
from experiments.training.data import load_split
from experiments.training.dropped import TOLERATED
from experiments.training.run_dir import json_text
from unet.files.saving import write_atomically
from unet.shading.characters import Character
from unet.shading.html import fragment

REFERENCE = BASELINE
"""The estimator that gains are relative to."""
RATE_TOLERANCE = 0.1
"""Relative deviation from the target rate above which a method is flagged: more tokens give better bits per byte."""
TEXT_ROWS = 3
"""Number of held-out rows shown in the report."""


@dataclass(frozen=True)
class MeanAndError:
    """A mean over `n` seeds and its standard error, which is NaN for one seed."""

    mean: float
    error: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> MeanAndError:
        """From one value per seed. The error is sd / √n, with the sample standard deviation."""
        error = float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
        return cls(float(np.mean(values)), error, len(values))

    def text(self, digits: int = 3, unit: float = 1.0) -> str:
        """The text for a table, in multiples of `unit`; a dash if the mean is undefined."""
        if math.isnan(self.mean):
            return "–"
        error = "" if math.isnan(self.error) else f" ± {self.error / unit:.{digits}f}"
        return f"{self.mean / unit:.{digits}f}{error}"


@dataclass(frozen=True)
class MethodResult:
    """Results of one estimator over its seeds.

    `numbers`: the values of `MEASURED` by name. `gain`: the reference's bits per byte minus its own, paired by seed.
    `val_rates`, `target_rates`: measured and target rates of all levels, the outermost first. `missed`: whether a rate
    differs from its target by more than `RATE_TOLERANCE`. A target under constraints is one of the bytes that they leave free.
    """

    estimator: str
    seeds: tuple[int, ...]
    numbers: Mapping[str, MeanAndError]
    gain: Difference
    val_rates: tuple[MeanAndError, ...]
    target_rates: tuple[float, ...]
    missed: bool
    parameters: int

    def json(self) -> dict[str, object]:
        """The entry in `table.json`, without runs."""
        own = {name: value for name, value in asdict(self).items() if name != "numbers"}
        return {**own, **asdict(self)["numbers"], "gain": difference_json(self.gain)}


MEASURED = (
    *("val_bpb", "val_bpb_greedy", "val_bpb_as_trained", "val_whitespace_auc", "val_whitespace_f1"),
    *("val_whitespace_sampled_f1", "flops_per_byte", "layer_flops_per_byte", "bytes_per_second", "seconds"),
    *("dropped_fraction", "val_free_rate"),
)
"""Entries of `summary.json` that are averaged over seeds."""

COLUMNS: dict[str, str] = {
    "estimator": "estimator",
    "val_bpb": "bits per byte",
    "gain": f"below `{REFERENCE}`, {CONFIDENCE:.0%} interval",
    "val_rates": "rate",
    "val_whitespace_auc": "AUC of p",
    "val_whitespace_f1": "F1, p > 0.5",
    "val_whitespace_sampled_f1": "F1, sampled",
    "flops_per_byte": "MFLOP/byte",
    "layer_flops_per_byte": "… by layers",
    "bytes_per_second": "kB/s",
    "seconds": "seconds",
    "dropped_fraction": "dropped, %",
    "parameters": "parameters",
    "seeds": "seeds",
}


Curves = Mapping[str, Mapping[int, Curve]]


def write_comparison(
    out: Path, runs: Runs, pairs: Sequence[Names], common: RunConfig, display: Display
) -> list[MethodResult]:
    """Write all output files to `out` and print the tables. Returns the results of the methods."""
    curves = {name: {run.seed: run.curve for run in own} for name, own in runs.items()}
    methods = method_results(runs)
    compared = compare_pairs(pairs, {name: bits_per_byte(own) for name, own in runs.items()}, curves)
    notes = [*remarks(methods), *pair_remarks(compared, [method.gain for method in methods])]
    tables = [markdown(COLUMNS, [cells(method) for method in methods])]
    if compared:
        tables.append(markdown(PAIR_COLUMNS, [pair_cells(pair) for pair in compared]))
    write_atomically(out / "table.json", json_text(table_json(methods, compared, runs, notes)))
    write_atomically(out / "table.md", "\n".join([*tables, "\n\n".join(notes)]) + "\n")
    picture_of_curves = curves_picture(curves)
    write_atomically(out / "curves.png", picture_of_curves)
    split = load_split(common)
    here = {name: [run for run in own if run.folder is not None] for name, own in runs.items()}
    texts = shaded_texts({name: own[0] for name, own in here.items() if own}, split)
    write_atomically(out / "report.html", page(common, methods, compared, notes, picture_of_curves, texts))
    for text in (*tables, *split.notes, *notes, f"see {out / 'report.html'}"):
        display.note(text)
    return methods


def table_json(
    methods: Sequence[MethodResult], pairs: Sequence[Pair], runs: Runs, notes: Sequence[str]
) -> dict[str, object]:
    """The content of `table.json`: both tables in full, and the settings, summary and curve of each run."""
    entries = [{**method.json(), "runs": [run.json() for run in runs[method.estimator]]} for method in methods]
    return {
        "reference": REFERENCE,
        "confidence": CONFIDENCE,
        "methods": entries,
        "pairs": [pair_json(pair) for pair in pairs],
        "notes": list(notes),
    }


def bits_per_byte(runs: Sequence[FinishedRun]) -> dict[int, float]:
    """Held-out bits per byte by seed."""
    return {run.seed: run.value("val_bpb") for run in runs}


def _of_free(rates: Sequence[MeanAndError], runs: Sequence[FinishedRun]) -> list[MeanAndError]:
    """The rates that targets ask for: under constraints those of free bytes. Of constrained levels inside the first they are not
    known (NaN)."""
    config, unknown = runs[0].config, MeanAndError.of([math.nan])
    first = MeanAndError.of([run.value("val_free_rate") for run in runs]) if config.constrain else rates[0]
    return [first, *(unknown if config.inner_constrain else rate for rate in rates[1:])]


def method_results(runs: Runs) -> list[MethodResult]:
    """The results of each estimator, in the order of `runs`."""
    reference = bits_per_byte(runs.get(REFERENCE, ()))
    methods = []
    for name, own in runs.items():

        def measured(key: str, own: Sequence[FinishedRun] = own) -> MeanAndError:
            return MeanAndError.of([run.value(key) for run in own])

        inner = sorted(key.removesuffix("target_rate") for key in own[0].summary if key.endswith("_target_rate"))
        rates = tuple(measured(f"val_{level}rate") for level in ("", *inner))
        targets = tuple(own[0].value(f"{level}target_rate") for level in ("", *inner))
        methods.append(
            MethodResult(
                estimator=name,
                seeds=tuple(run.seed for run in own),
                numbers={key: measured(key) for key in MEASURED},
                gain=paired_difference({} if name == REFERENCE else reference, bits_per_byte(own)),
                val_rates=rates,
                target_rates=targets,
                missed=any(
                    abs(rate.mean / target - 1) > RATE_TOLERANCE
                    for rate, target in zip(_of_free(rates, own), targets, strict=True)
                ),
                parameters=int(own[0].value("parameters")),
            )
        )
    return methods


def cells(method: MethodResult) -> dict[str, str]:
    """The table cells of one estimator, by column."""
    numbers = method.numbers
    return {
        "estimator": f"`{method.estimator}`",
        "val_bpb": numbers["val_bpb"].text(4),
        "gain": text_of(method.gain),
        "val_rates": _rates(method) + (" †" if method.missed else ""),
        **{name: numbers[name].text(3) for name in MEASURED if name.startswith("val_whitespace")},
        "flops_per_byte": f"{numbers['flops_per_byte'].mean / 1e6:.2f}",
        "layer_flops_per_byte": f"{numbers['layer_flops_per_byte'].mean / 1e6:.2f}",
        "bytes_per_second": f"{numbers['bytes_per_second'].mean / 1e3:.1f}",
        "seconds": f"{numbers['seconds'].mean:.0f}",
        "dropped_fraction": numbers["dropped_fraction"].text(3, 0.01),
        "parameters": f"{method.parameters:,}",
        "seeds": ", ".join(map(str, method.seeds)),
    }


def markdown(columns: Mapping[str, str], rows: Sequence[Mapping[str, str]]) -> str:
    """A table in Markdown. `columns`: the headings by column name."""
    return markdown_table([*columns.values()], [[row[name] for name in columns] for row in rows])


def html_table(columns: Mapping[str, str], rows: Sequence[Mapping[str, str]]) -> str:
    """A table in HTML. Differences that are not distinguishable from zero are grey."""

    def cell(text: str) -> str:
        kind = ' class="quiet"' if text.endswith(ALIKE) else ""
        return f"<td{kind}>{html.escape(text.replace('`', ''))}</td>"

    head = "".join(f"<th>{html.escape(text.replace('`', ''))}</th>" for text in columns.values())
    body = "".join("<tr>" + "".join(cell(row[name]) for name in columns) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _rates(method: MethodResult) -> str:
    """The rates of all levels, and under constraints that of the free bytes."""
    free = method.numbers["val_free_rate"]
    of_free = "" if math.isnan(free.mean) else f" ({free.text(3)} of free bytes)"
    first, *inner = (rate.text(3) for rate in method.val_rates)
    return " / ".join([first + of_free, *inner])


def remarks(methods: Sequence[MethodResult]) -> list[str]:
    """Notes for readers of the table."""
    notes = [
        "Bits per byte of held-out text with sampled boundaries. ± is the standard error of the mean over the seeds in the row. "
        "Only paired differences over seeds can tell whether two methods differ."
    ]
    missed = [method for method in methods if method.missed]
    if missed:
        names = ", ".join(
            f"{method.estimator} {_rates(method)} for {' / '.join(f'{target:g}' for target in method.target_rates)}"
            for method in missed
        )
        notes.append(
            f"† Missed its target rate by more than {RATE_TOLERANCE:.0%} ({names}). More tokens give better bits per byte, fewer "
            "give worse. --target.control adjusts an estimator's own target until the rate is the target rate; larger is faster."
        )
    if overfull := [method for method in methods if method.numbers["dropped_fraction"].mean > TOLERATED]:
        names = ", ".join(f"{method.estimator} {method.numbers['dropped_fraction'].mean:.1%}" for method in overfull)
        notes.append(f"Too many boundaries were dropped in training ({names}): set a larger --capacity-slack.")
    for method in methods:
        own, greedy, trained = (method.numbers[f"val_bpb{kind}"] for kind in ("", "_greedy", "_as_trained"))
        if not math.isnan(trained.mean):
            notes.append(
                f"{method.estimator} was trained on boundaries that another router drew: {trained.text(4)} bits per byte with "
                f"those, {own.text(4)} with its own, sampled, and {greedy.text(4)} with its own, greedy."
            )
    return notes


def curves_picture(curves: Curves) -> bytes:
    """A PNG with held-out bits per byte over training FLOPs (score-function paper, figure 10) and over training bytes. Thick
    lines are means over seeds, thin ones single seeds."""
    figure = Figure(figsize=(10.5, 4.2), dpi=130, layout="constrained")
    by_flops, by_bytes = figure.subplots(1, 2, sharey=True)
    lowest: list[float] = []
    for number, (name, runs) in enumerate(curves.items()):
        length = min(map(len, runs.values()))
        if not length:
            continue
        points = np.array([curve[:length] for curve in runs.values()])
        mean = points.mean(axis=0)
        lowest.append(float(mean[:, 2].min()))
        style = {"color": f"C{number % 10}", "linestyle": "-" if number < 10 else "--"}
        for axes, column in ((by_flops, 0), (by_bytes, 1)):
            axes.plot(mean[:, column], mean[:, 2], marker=".", linewidth=1.2, label=name, **style)
            for seed in points if len(points) > 1 else ():
                axes.plot(seed[:, column], seed[:, 2], linewidth=0.5, alpha=0.35, **style)
    if lowest:
        by_flops.set_ylim(min(lowest) - 0.05, min(lowest) + 1.0)
    by_flops.set_xlabel("training FLOPs (6 per parameter and byte or token)")
    by_flops.set_ylabel("held-out bits per byte, means over seeds")
    by_bytes.set_xlabel("training bytes / 10⁶")
    for axes in (by_flops, by_bytes):
        axes.grid(alpha=0.25)
    by_bytes.legend(fontsize=8, frameon=False)
    return picture(figure)


def shaded_texts(runs: Mapping[str, FinishedRun], split: Split) -> dict[str, list[list[Character]]]:
    """The first held-out rows, shaded by the boundary probabilities of each run."""
    rows = split.held_out_rows(TEXT_ROWS * split.length)[:TEXT_ROWS]
    return {
        name: shade(load_model(run.folder, modules_of(run.config)).model, rows, seed=0)
        for name, run in runs.items()
        if run.folder is not None
    }


def page(
    common: RunConfig,
    methods: Sequence[MethodResult],
    pairs: Sequence[Pair],
    notes: Sequence[str],
    curves: bytes,
    texts: Mapping[str, Sequence[Sequence[Character]]],
) -> str:
    """The content of `report.html`, a self-contained page."""
    title, encoded = f"Estimators on {common.dataset}", base64.b64encode(curves).decode()
    blocks = []
    for number in range(max(map(len, texts.values()), default=0)):
        blocks.append(f"<h3>Text {number + 1}</h3>")
        blocks.append(fragment([shaded[number] for shaded in texts.values()], list(texts)))
    remarks_html = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    paired = ""
    if pairs:
        paired = "<h2>Pairs</h2>\n" + html_table(PAIR_COLUMNS, [pair_cells(pair) for pair in pairs])
    return html_page(
        title,
        f"""<p class="quiet">{html.escape(common.model)}, {common.length} bytes x {common.batch} sequences a step,
{common.total_steps * common.bytes_per_step / 1e6:.2f} MB of training text, target rate {common.rate:g}</p>
{html_table(COLUMNS, [cells(method) for method in methods])}
{paired}
{remarks_html}
<h2>Curves</h2>
<img alt="Held-out bits per byte over training FLOPs and over bytes" src="data:image/png;base64,{encoded}">
<p class="quiet">Thick lines are means over seeds, thin lines are single seeds.</p>
<h2>The same held-out text</h2>
{"".join(blocks)}""",
    )
