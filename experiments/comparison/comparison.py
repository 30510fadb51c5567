"""What a comparison leaves: `table.md`, `table.json`, `curves.png` and `report.html`."""

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
from experiments.config.settings import EstimatorName, RunConfig
from experiments.reporting.display import Display
from experiments.reporting.markdown import table as markdown_table
from experiments.reporting.report import html_page, picture, scale, shaded_html
from experiments.reporting.shading import Character, shade
from experiments.training.data import load_split
from experiments.training.dropped import TOLERATED
from experiments.training.run_dir import json_text, write_atomically
from unet.files.saving import load

REFERENCE: EstimatorName = "uniform"
MISSED = 0.1
"""How far a rate may be from its target, relatively, before it is flagged: more tokens buy better bits per byte."""
TEXT_ROWS = 3


@dataclass(frozen=True)
class Measured:
    """A mean over `n` seeds and its standard error (NaN for one seed)."""

    mean: float
    error: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Measured:
        """Of one value a seed."""
        error = float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
        return cls(float(np.mean(values)), error, len(values))

    def text(self, digits: int = 3, unit: float = 1.0) -> str:
        """As in a table; a dash where it is not known."""
        if math.isnan(self.mean):
            return "–"
        error = "" if math.isnan(self.error) else f" ± {self.error / unit:.{digits}f}"
        return f"{self.mean / unit:.{digits}f}{error}"


@dataclass(frozen=True)
class Line:
    """One estimator of the table, over its seeds. `numbers`: those of `MEASURED` by name; `gain`: how far its bits per byte lie
    below the reference's, seed by seed; the rates of all levels, the outermost first, and what was asked for, which one may have
    `missed`."""

    estimator: EstimatorName
    seeds: tuple[int, ...]
    numbers: Mapping[str, Measured]
    gain: Difference
    val_rates: tuple[Measured, ...]
    target_rates: tuple[float, ...]
    missed: bool
    parameters: int

    def json(self) -> dict[str, object]:
        """As `table.json` keeps it."""
        own = {name: value for name, value in asdict(self).items() if name != "numbers"}
        return {**own, **asdict(self)["numbers"], "gain": difference_json(self.gain)}


MEASURED = (
    *("val_bpb", "val_bpb_greedy", "val_bpb_as_trained", "val_whitespace_auc", "val_whitespace_f1"),
    *("val_whitespace_sampled_f1", "flops_per_byte", "layer_flops_per_byte", "bytes_per_second", "seconds"),
    "dropped_fraction",
)
"""Numbers of summaries that a line has the means of."""

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


Curves = Mapping[EstimatorName, Mapping[int, Curve]]


def write_comparison(out: Path, runs: Runs, pairs: Sequence[Names], common: RunConfig, display: Display) -> list[Line]:
    """Write everything into `out` from finished runs; returns the lines of the table of methods."""
    curves = {name: {run.seed: run.curve for run in own} for name, own in runs.items()}
    lines = table(runs)
    compared = compare_pairs(pairs, {name: bits_per_byte(own) for name, own in runs.items()}, curves)
    notes = [*remarks(lines), *pair_remarks(compared, [line.gain for line in lines])]
    tables = [markdown(COLUMNS, [cells(line) for line in lines])]
    if compared:
        tables.append(markdown(PAIR_COLUMNS, [pair_cells(pair) for pair in compared]))
    write_atomically(out / "table.json", json_text(everything(lines, compared, runs, notes)))
    write_atomically(out / "table.md", "\n".join([*tables, "\n\n".join(notes)]) + "\n")
    drawn = curves_picture(curves)
    write_atomically(out / "curves.png", drawn)
    split = load_split(common)
    at_hand = {name: [run.folder for run in own if run.folder is not None] for name, own in runs.items()}
    texts = side_by_side({name: folders[0] for name, folders in at_hand.items() if folders}, split)
    write_atomically(out / "report.html", page(common, lines, compared, notes, drawn, texts))
    for text in (*tables, *split.notes, *notes, f"see {out / 'report.html'}"):
        display.note(text)
    return lines


def everything(lines: Sequence[Line], pairs: Sequence[Pair], runs: Runs, notes: Sequence[str]) -> dict[str, object]:
    """The content of `table.json`: both tables in full, and each run's settings, summary and curve."""
    methods = [{**line.json(), "runs": [run.json() for run in runs[line.estimator]]} for line in lines]
    return {
        "reference": REFERENCE,
        "confidence": CONFIDENCE,
        "methods": methods,
        "pairs": [pair_json(pair) for pair in pairs],
        "notes": list(notes),
    }


def bits_per_byte(runs: Sequence[FinishedRun]) -> dict[int, float]:
    """Held-out bits per byte by seed."""
    return {run.seed: run.value("val_bpb") for run in runs}


def table(methods: Runs) -> list[Line]:
    """One line an estimator, in the order given."""
    reference = bits_per_byte(methods.get(REFERENCE, ()))
    lines = []
    for name, runs in methods.items():

        def measured(key: str, runs: Sequence[FinishedRun] = runs) -> Measured:
            return Measured.of([run.value(key) for run in runs])

        inside = sorted(key.removesuffix("target_rate") for key in runs[0].summary if key.endswith("_target_rate"))
        rates = tuple(measured(f"val_{level}rate") for level in ("", *inside))
        targets = tuple(runs[0].value(f"{level}target_rate") for level in ("", *inside))
        lines.append(
            Line(
                estimator=name,
                seeds=tuple(run.seed for run in runs),
                numbers={key: measured(key) for key in MEASURED},
                gain=paired_difference({} if name == REFERENCE else reference, bits_per_byte(runs)),
                val_rates=rates,
                target_rates=targets,
                missed=any(abs(rate.mean / target - 1) > MISSED for rate, target in zip(rates, targets, strict=True)),
                parameters=int(runs[0].value("parameters")),
            )
        )
    return lines


def cells(line: Line) -> dict[str, str]:
    """The table's text for one estimator, by column."""
    numbers = line.numbers
    return {
        "estimator": f"`{line.estimator}`",
        "val_bpb": numbers["val_bpb"].text(4),
        "gain": text_of(line.gain),
        "val_rates": " / ".join(rate.text(3) for rate in line.val_rates) + (" †" if line.missed else ""),
        **{name: numbers[name].text(3) for name in MEASURED if name.startswith("val_whitespace")},
        "flops_per_byte": f"{numbers['flops_per_byte'].mean / 1e6:.2f}",
        "layer_flops_per_byte": f"{numbers['layer_flops_per_byte'].mean / 1e6:.2f}",
        "bytes_per_second": f"{numbers['bytes_per_second'].mean / 1e3:.1f}",
        "seconds": f"{numbers['seconds'].mean:.0f}",
        "dropped_fraction": numbers["dropped_fraction"].text(3, 0.01),
        "parameters": f"{line.parameters:,}",
        "seeds": ", ".join(map(str, line.seeds)),
    }


def markdown(columns: Mapping[str, str], rows: Sequence[Mapping[str, str]]) -> str:
    """A table in Markdown; `columns` are the headings by name."""
    return markdown_table([*columns.values()], [[row[name] for name in columns] for row in rows])


def html_table(columns: Mapping[str, str], rows: Sequence[Mapping[str, str]]) -> str:
    """The same as HTML, differences that are none in a quiet colour."""

    def cell(text: str) -> str:
        kind = ' class="quiet"' if text.endswith(ALIKE) else ""
        return f"<td{kind}>{html.escape(text.replace('`', ''))}</td>"

    head = "".join(f"<th>{html.escape(text.replace('`', ''))}</th>" for text in columns.values())
    body = "".join("<tr>" + "".join(cell(row[name]) for name in columns) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def remarks(lines: Sequence[Line]) -> list[str]:
    """What a reader of the table has to know."""
    notes = [
        "Bits per byte of held-out text with sampled boundaries; ± is the standard error of a mean over the seeds named in its "
        "row. Whether two methods differ, only their difference seed by seed can tell."
    ]
    missed = [line for line in lines if line.missed]
    if missed:
        names = ", ".join(
            f"{line.estimator} {' / '.join(f'{rate.mean:.3f}' for rate in line.val_rates)} for "
            f"{' / '.join(f'{target:g}' for target in line.target_rates)}"
            for line in missed
        )
        notes.append(
            f"† Missed its target rate by more than {MISSED:.0%} ({names}): more tokens buy better bits per byte, and fewer "
            "cost some. --target.control moves an estimator's own target towards the rate asked for, the faster the larger it is."
        )
    if crowded := [line for line in lines if line.numbers["dropped_fraction"].mean > TOLERATED]:
        names = ", ".join(f"{line.estimator} {line.numbers['dropped_fraction'].mean:.1%}" for line in crowded)
        notes.append(f"Too many boundaries were dropped in training ({names}): name a larger --capacity-slack.")
    for line in lines:
        own, greedy, trained = (line.numbers[f"val_bpb{kind}"] for kind in ("", "_greedy", "_as_trained"))
        if not math.isnan(trained.mean):
            notes.append(
                f"{line.estimator} was trained on boundaries that another router drew: {trained.text(4)} bits per byte with "
                f"those, {own.text(4)} with its own, drawn, and {greedy.text(4)} with its own, greedy."
            )
    return notes


def curves_picture(curves: Curves) -> bytes:
    """Held-out bits per byte over the training FLOPs spent (score-function paper, figure 10) and over bytes, as a PNG: the
    means over seeds and, faint, each seed."""
    figure = Figure(figsize=(10.5, 4.2), dpi=130, layout="constrained")
    by_flops, by_bytes = figure.subplots(1, 2, sharey=True)
    lowest: list[float] = []
    for number, (name, runs) in enumerate(curves.items()):
        length = min(map(len, runs.values()))
        if not length:
            continue
        points = np.array([part[:length] for part in runs.values()])
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


def side_by_side(folders: Mapping[EstimatorName, Path], split: Split) -> dict[EstimatorName, list[list[Character]]]:
    """The same held-out rows, shaded by each run."""
    rows = split.held_out_rows(TEXT_ROWS * split.length)[:TEXT_ROWS]
    return {name: shade(load(folder).model, rows, seed=0) for name, folder in folders.items()}


def page(
    common: RunConfig,
    lines: Sequence[Line],
    pairs: Sequence[Pair],
    notes: Sequence[str],
    curves: bytes,
    texts: Mapping[EstimatorName, Sequence[Sequence[Character]]],
) -> str:
    """One self-contained page."""
    title, encoded = f"Estimators on {common.dataset}", base64.b64encode(curves).decode()
    blocks = []
    for number in range(max(map(len, texts.values()), default=0)):
        blocks.append(f"<h3>Text {number + 1}</h3>")
        for name, shaded in texts.items():
            blocks.append(f'<p class="quiet">{name}</p><pre class="text">{shaded_html(shaded[number])}</pre>')
    remarks_html = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    paired = ""
    if pairs:
        paired = "<h2>Pairs</h2>\n" + html_table(PAIR_COLUMNS, [pair_cells(pair) for pair in pairs])
    return html_page(
        title,
        f"""<p class="quiet">{html.escape(common.model)}, {common.length} bytes x {common.batch} sequences a step,
{common.total_steps * common.bytes_per_step / 1e6:.2f} MB of training text, target rate {common.rate:g}</p>
{html_table(COLUMNS, [cells(line) for line in lines])}
{paired}
{remarks_html}
<h2>Curves</h2>
<img alt="Held-out bits per byte over training FLOPs and over bytes" src="data:image/png;base64,{encoded}">
<p class="quiet">Means over seeds, and faint, where there are several, each seed.</p>
<h2>The same held-out text</h2>
<p>Boundary probability at each character, {scale()}. A line at the right of a character is a boundary that was drawn.</p>
{"".join(blocks)}""",
    )
