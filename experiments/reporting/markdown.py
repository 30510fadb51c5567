"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table with the column names `head` and these rows."""
    first, *rest = ("| " + " | ".join(map(str, row)) + " |\n" for row in (head, *rows))
    return "".join([first, "|" + "---|" * len(head) + "\n", *rest])
