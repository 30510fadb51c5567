"""A progress bar with the time left."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from experiments.reporting.display import Display


@contextmanager
def progress_bar(display: Display, total: int) -> Generator[Callable[[str, int], None], None, None]:
    """Shows how many of `total` bytes are done while it is open; the function takes what is at work and how many more are
    done."""
    columns = TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn("{task.fields[state]}")
    with Progress(*columns, TimeRemainingColumn(), console=display.console, transient=True) as bar:
        task = bar.add_task("evaluating", total=total, state="")

        def advance(what: str, bytes: int) -> None:
            bar.update(task, advance=bytes, description=what)
            done = bar.tasks[task].completed
            bar.update(task, state=f"{done / 1e6:.2f} of {total / 1e6:.2f} MB")

        yield advance
