"""The page and the curves of a comparison: `report.html` and `curves.png`."""

from __future__ import annotations

import html
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from data import Split
from experiments.comparison.finished import FinishedRun
from experiments.comparison.intervals import ALIKE
from experiments.comparison.pairs import Curve
from experiments.comparison.study import Head
from experiments.config.plugins import load_model, modules_of
from experiments.config.settings import RunConfig
from experiments.evaluation.byte_results import LocalPass
from experiments.reporting.pictures import inline_svg
from experiments.reporting.report import html_page
from experiments.reporting.shading import readable, shade
from unet.shading.characters import Character, clusters
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


def curves_figure(curves: Curves, reference: str | None) -> Figure:
    """Held-out bits per byte over training FLOPs (score-function paper, figure 10) and over training bytes, and differences to
    the reference over bytes, paired by seed. Lines are means over seeds, bands their standard errors."""
    finished = {name: runs for name, runs in curves.items() if runs and min(map(len, runs.values()))}
    compared = reference in finished and len(finished) > 1
    figure = Figure(figsize=(14.2 if compared else 10.5, 4.2), dpi=130, layout="constrained")
    by_flops, by_bytes, *differences = figure.subplots(1, 3 if compared else 2)
    by_bytes.sharey(by_flops)
    for name, runs in finished.items():
        points = _points(runs)
        for axes, column in ((by_flops, 0), (by_bytes, 1)):
            _band(axes, points[..., column].mean(axis=0), points[..., 2], name, finished)
        for axes in differences:
            if name != reference and (shared := sorted(runs.keys() & finished[str(reference)].keys())):
                own, other = ({seed: of[seed] for seed in shared} for of in (runs, finished[str(reference)]))
                x, above = _differences(_points(own), _points(other))
                _band(axes, x, above, name, finished)
    if finished:
        lowest = min(float(_points(runs)[..., 2].mean(axis=0).min()) for runs in finished.values())
        by_flops.set_ylim(lowest - 0.05, lowest + 1.0)
    by_flops.set_xlabel("training FLOPs")
    by_flops.set_ylabel("held-out bits per byte, means over seeds")
    by_bytes.set_xlabel("training bytes / 10⁶")
    for axes in differences:
        axes.axhline(0.0, color="#333333", linewidth=0.8, linestyle="--", label=legend(f"{reference} (reference)"))
        axes.set_title("bits per byte minus those of the reference, paired by seed", fontsize=10)
        axes.set_xlabel("training bytes / 10⁶")
        # Where both have hardly begun they differ most, and it means least.
        drawn = np.concatenate([line.get_ydata()[len(line.get_ydata()) // 3 :] for line in axes.get_lines()])
        room = 1.3 * float(np.abs(drawn).max()) or 0.1
        axes.set_ylim(-room, room)
    for axes in (by_flops, by_bytes, *differences):
        axes.grid(alpha=0.25)
    if finished:
        by_bytes.legend(fontsize=8, frameon=False)
    return figure


def _points(runs: Mapping[int, Curve]) -> Float[np.ndarray, "seeds validations 3"]:
    """The curves of all seeds, as far as the shortest goes."""
    length = min(map(len, runs.values()))
    return np.array([curve[:length] for curve in runs.values()])


def _differences(
    own: Float[np.ndarray, "seeds validations 3"], other: Float[np.ndarray, "seeds others 3"]
) -> tuple[Float[np.ndarray, " places"], Float[np.ndarray, "seeds places"]]:
    """Training bytes, and for each seed the bits per byte minus those of the other, which are interpolated between validations;
    only where both have been trained."""
    x = own[0, :, 1]
    inside = (x >= other[0, 0, 1]) & (x <= other[0, -1, 1])
    above = [mine[:, 2] - np.interp(x, its[:, 1], its[:, 2]) for mine, its in zip(own, other, strict=True)]
    return x[inside], np.array(above)[:, inside]


def _band(
    axes: Axes, x: Float[np.ndarray, " places"], y: Float[np.ndarray, "seeds places"], name: str, names: Collection[str]
) -> None:
    number = list(names).index(name)
    style = {"color": f"C{number % 10}", "linestyle": "-" if number < 10 else "--"}
    mean = y.mean(axis=0)
    axes.plot(x, mean, marker=".", linewidth=1.2, label=legend(name), **style)
    if len(y) > 1:
        error = y.std(axis=0, ddof=1) / np.sqrt(len(y))
        axes.fill_between(x, mean - error, mean + error, color=style["color"], alpha=0.18, linewidth=0)


def shaded_texts(runs: Mapping[str, FinishedRun], split: Split) -> dict[str, list[list[Character]]]:
    """The first held-out rows, shaded by the boundary probabilities of each run, from a document or a word on."""
    rows = split.held_out_rows(TEXT_ROWS * split.length)[:TEXT_ROWS]
    return {
        name: [
            readable(text)
            for text in shade(LocalPass(load_model(run.folder, modules_of(run.config)).model), rows, seed=0)
        ]
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
    curves: Figure,
    texts: Mapping[str, Sequence[Sequence[Character]]],
    reference: str | None,
) -> str:
    """The content of `report.html`, a self-contained page."""
    title = head.title or f"Estimators on {common.dataset}"
    drawn = inline_svg(
        curves, "Held-out bits per byte over training FLOPs and over bytes, and differences to the reference"
    )
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
<div class="wide">{drawn}</div>
<p class="quiet">Lines are means over seeds, bands the standard errors of these means. FLOPs: 6 per parameter and byte or
token.</p>
<h2>The same held-out text</h2>
{same_texts(texts, reference)}""",
    )


def same_texts(texts: Mapping[str, Sequence[Sequence[Character]]], reference: str | None) -> str:
    """Each text by all methods, one below the other, with the boundaries marked in which they differ from the reference, or from
    the first method where the reference has no text."""
    first = reference if reference in texts else next(iter(texts), None)
    if first is None:
        return "<p>No run whose model is here.</p>"
    shown, notes, others = [], [], []
    for number, wanted in enumerate(texts[first]):
        for name in (first, *(name for name in texts if name != first)):
            own = texts[name][number]
            comparable = name != first and [one.text for one in own] == [one.text for one in wanted]
            # As many as are underlined: by what is drawn as one sign.
            signs = zip(clusters(own), clusters(wanted), strict=False)
            differing = sum((a.depth > 0) != (b.depth > 0) for a, b in signs)
            count = f": {differing} boundaries other than in {first}" if comparable else ""
            shown.append(own)
            notes.append(f"Text {number + 1}, {name}{count}")
            others.append(wanted if comparable else None)
    about = (
        f"Underlined: where a token ends in one of {html.escape(first)} and the method at hand, and not in the other."
    )
    return f'<p class="quiet">{about}</p>{fragment(shown, notes, others)}'
