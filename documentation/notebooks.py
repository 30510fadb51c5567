"""Notebooks as pages: an extension of Python-Markdown, in which the line `!notebook PATH` stands for the cells of a notebook.

Its paths are relative to the current folder. Outputs are left out: notebooks are kept without.
"""

from __future__ import annotations

from pathlib import Path

from markdown import Extension, Markdown
from markdown.preprocessors import Preprocessor

from documentation.cells import cells

COMMAND = "!notebook "


def as_markdown(path: Path) -> str:
    """The notebook as a page."""
    parts = [f"```python\n{text}\n```" if kind == "code" else text for kind, text in cells(path)]
    return "\n\n".join(parts)


class _Notebooks(Preprocessor):
    def run(self, lines: list[str]) -> list[str]:
        shown: list[str] = []
        for line in lines:
            named = line.startswith(COMMAND)
            shown += as_markdown(Path(line.removeprefix(COMMAND).strip())).split("\n") if named else [line]
        return shown


class Notebooks(Extension):
    """Registers the notebooks, before blocks of code are found."""

    def extendMarkdown(self, md: Markdown) -> None:
        md.preprocessors.register(_Notebooks(md), "notebooks", 200)


def makeExtension(**options: object) -> Notebooks:
    """What Python-Markdown asks for."""
    return Notebooks(**options)
