"""The page and the picture of a comparison: `report.html` and `curves.png`."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from data import Split
from experiments.comparison.finished import FinishedRun
from experiments.comparison.intervals import ALIKE
from experiments.comparison.pairs import Curve
from experiments.comparison.study import Head
from experiments.config.plugins import load_model, modules_of
from experiments.config.settings import RunConfig
from experiments.reporting.report import html_page, picture
from experiments.reporting.shading import shade
from unet.shading.characters import Character
from unet.shading.html import fragment

TEXT_ROWS = 3
"""Number of held-out rows shown in the report."""

Curves = Mapping[str, Mapping[int, Curve]]


@dataclass(frozen=True)
class Table:
    """A table: its title, its headings by column name, and its rows."""

    title: str
    columns: Mapping[str, str]
    rows: Sequence[Mapping[str, str]]


def html_table(columns: Mapping[str, str], rows: Sequence[Mapping[str, str]]) -> str:
    """A table in HTML. Differences that are not distinguishable from zero are grey."""

    def cell(text: str) -> str:
        kind = ' class="quiet"' if text.endswith(ALIKE) else ""
        return f"<td{kind}>{html.escape(text.replace('`', ''))}</td>"

    head = "".join(f"<th>{html.escape(text.replace('`', ''))}</th>" for text in columns.values())
    body = "".join("<tr>" + "".join(cell(row[name]) for name in columns) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


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
            axes.plot(mean[:, column], mean[:, 2], marker=".", linewidth=1.2, label=legend(name), **style)
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


def legend(name: str) -> str:
    """A name as matplotlib shows it: a dollar would begin a formula, and what begins with an underscore is left out."""
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def page(
    head: Head,
    common: RunConfig,
    tables: Sequence[Table],
    notes: Sequence[str],
    curves: bytes,
    texts: Mapping[str, Sequence[Sequence[Character]]],
) -> str:
    """The content of `report.html`, a self-contained page."""
    title, encoded = head.title or f"Estimators on {common.dataset}", base64.b64encode(curves).decode()
    count = max(map(len, texts.values()), default=0)
    shaded = [(f"Text {number + 1}, {name}", of[number]) for number in range(count) for name, of in texts.items()]
    about = f"<p>{html.escape(head.about)}</p>" if head.about else ""
    shown = "".join(
        (f"<h2>{html.escape(table.title)}</h2>\n" if table.title else "") + html_table(table.columns, table.rows)
        for table in tables
    )
    return html_page(
        title,
        f"""<p class="quiet">{html.escape(common.model)}, {common.length} bytes x {common.batch} sequences a step,
{common.total_steps * common.bytes_per_step / 1e6:.2f} MB of training text, target rate {common.rate:g}</p>
{about}
{shown}
{"".join(f"<p>{html.escape(note)}</p>" for note in notes)}
<h2>Curves</h2>
<img alt="Held-out bits per byte over training FLOPs and over bytes" src="data:image/png;base64,{encoded}">
<p class="quiet">Thick lines are means over seeds, thin lines are single seeds.</p>
<h2>The same held-out text</h2>
{fragment([text for _, text in shaded], [name for name, _ in shaded])}""",
    )
