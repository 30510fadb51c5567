"""A table of the runs in a folder: `python -m experiments.runs runs/ --html runs.html`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from matplotlib.figure import Figure

from experiments.command import command_line
from experiments.comparison.page import html_table, legend
from experiments.config.errors import ConfigError, require
from experiments.launch import program
from experiments.reporting.display import Display
from experiments.reporting.listing import ListedRun, differing_settings, find_runs
from experiments.reporting.markdown import table
from experiments.reporting.pictures import inline_svg
from experiments.reporting.report import html_page
from experiments.terminal import escaped, write_output
from unet.files.saving import write_atomically

COLUMNS = {"name": "run", "state": "state", "progress": "steps", "bpb": "bits per byte", "rate": "rate"}


@dataclass(frozen=True)
class RunsConfig:
    """List the runs in folders: how far they are, their held-out bits per byte and rate, and the settings in which they differ.

    Nothing is loaded or computed, and runs that train are not disturbed.
    """

    folders: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs, or with runs anywhere in them."""
    html: Path | None = None
    """Page to write, with the table and the curves of all runs over each other."""
    overwrite: bool = False
    """Replace the page where it is there already."""


def rows_of(runs: Sequence[ListedRun]) -> tuple[dict[str, str], list[dict[str, str]]]:
    """The headings by column name, and a row for each run."""
    settings = differing_settings(runs)
    rows = []
    for run in runs:
        own = {"name": run.name, "state": run.state, "progress": run.progress}
        own |= {"bpb": _number(run.bpb, 4), "rate": _number(run.rate, 3)}
        rows.append(own | {name: run.settings.get(name, "–") for name in settings})
    return {**COLUMNS, **{name: name for name in settings}}, rows


def markdown(columns: Mapping[str, str], rows: Sequence[Mapping[str, str]]) -> str:
    """The table as text."""

    def cell(text: str) -> str:
        return escaped(text).replace("|", "\\|")

    return table([*columns.values()], [[cell(row[name]) for name in columns] for row in rows])


def curves_figure(runs: Sequence[ListedRun]) -> Figure:
    """Held-out bits per byte over training bytes, all runs over each other."""
    figure = Figure(figsize=(9, 4.6), dpi=130, layout="constrained")
    axes = figure.subplots()
    drawn = [run for run in runs if run.curve]
    for number, run in enumerate(drawn):
        x, y = zip(*run.curve, strict=True)
        style = ("-", "--", ":", "-.")[number // 10 % 4]
        axes.plot(x, y, marker=".", linewidth=1.2, linestyle=style, color=f"C{number % 10}", label=legend(run.name))
    if drawn:
        lowest = min(bpb for run in drawn for _, bpb in run.curve)
        axes.set_ylim(lowest - 0.05, max(lowest + 1.0, *(run.curve[-1][1] + 0.05 for run in drawn)))
        axes.legend(fontsize=7, frameon=False)
    axes.set_xlabel("training bytes / 10⁶")
    axes.set_ylabel("held-out bits per byte")
    axes.grid(alpha=0.25)
    return figure


def page(title: str, runs: Sequence[ListedRun]) -> str:
    """A self-contained page with the table and the curves."""
    curves = inline_svg(curves_figure(runs), "Held-out bits per byte of all runs over training bytes")
    columns, rows = rows_of(runs)
    plain = [{name: escaped(text) for name, text in row.items()} for row in rows]
    return html_page(
        title,
        f"""<p class="quiet">{len(runs)} runs; settings are those in which they differ.</p>
{html_table(columns, plain)}
<h2>Curves</h2>
{curves}
<p class="quiet">A point is a validation.</p>""",
    )


def list_runs(config: RunsConfig, display: Display) -> None:
    """Print the table and write the page. Raises `ConfigError` for folders without a run."""
    require(bool(config.folders), "name a folder with runs, such as runs/")
    runs = [run for folder in config.folders for run in find_runs(folder)]
    where = ", ".join(str(folder) for folder in config.folders)
    require(bool(runs), f"{where} holds no run: there is no config.json of one in it, nor in what it holds")
    if config.html is not None and not config.overwrite and config.html.exists():
        raise ConfigError(f"{config.html} is there already: replace it (--overwrite) or name another --html")
    if config.html is not None and config.html.is_dir():
        raise ConfigError(f"--html {config.html} is a folder: name a file")
    write_output(markdown(*rows_of(runs)))
    if config.html is not None:
        write_atomically(config.html, page(f"Runs in {where}", runs))
        display.note(f"see {config.html}")


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code."""
    return command_line(RunsConfig, list_runs, "experiments.runs", sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    program(main)
