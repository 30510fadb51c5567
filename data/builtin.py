"""Text that comes with every Python installation: its documentation and its source code."""

from __future__ import annotations

import ast
import re
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from data.documents import AbstractSource, DataError, Shard, checked_utf8

_NOT_LIBRARY = frozenset({"site-packages", "__pycache__", "test", "tests", "idle_test"})
_BLANK_LINES = re.compile(r"\n\s*\n")


def library_files() -> list[Path]:
    """The Python files of the standard library, without tests, sorted. Raises `DataError` if there are none."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in root.rglob("*.py") if not _NOT_LIBRARY.intersection(path.relative_to(root).parts))
    if not files:
        raise DataError(f"there is no Python source of the standard library in {root}; name another data set")
    return files


class StandardLibraryCode(AbstractSource):
    """The source code of the standard library, one document per file (about 12 MB)."""

    @property
    def name(self) -> str:
        return "stdlib"

    @property
    def streamed(self) -> bool:
        return False

    def shards(self) -> Sequence[Shard]:
        return [Shard("stdlib", sum(path.stat().st_size for path in library_files()))]

    def documents(self, shard: Shard) -> Iterator[bytes]:
        for path in library_files():
            content = path.read_bytes()
            if content:
                yield checked_utf8(content, str(path))


class StandardLibraryDocs(AbstractSource):
    """English prose: the docstrings of the standard library, one document per module, and the topics of pydoc, one
    document each (about 2 MB).

    Line breaks inside paragraphs are removed: each paragraph is one line, with single spaces between words.
    """

    @property
    def name(self) -> str:
        return "docs"

    @property
    def streamed(self) -> bool:
        return False

    def shards(self) -> Sequence[Shard]:
        return [Shard("docs", 0)]

    def documents(self, shard: Shard) -> Iterator[bytes]:
        for path in library_files():
            text = as_prose("\n\n".join(_docstrings(path)))
            if text:
                yield text.encode()
        # Imported only when needed: the module holds half a megabyte of text.
        from pydoc_data.topics import topics

        for _, text in sorted(topics.items()):
            yield as_prose(text).encode()


def as_prose(text: str) -> str:
    """`text` with every paragraph on one line and single spaces between words."""
    paragraphs = (" ".join(paragraph.split()) for paragraph in _BLANK_LINES.split(text))
    return "\n".join(paragraph for paragraph in paragraphs if paragraph)


def _docstrings(path: Path) -> Iterator[str]:
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, documented):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring
