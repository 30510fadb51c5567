"""Generated texts on standard output: on a terminal what can be shown there, elsewhere their bytes as they are."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from experiments.terminal import write_output
from unet import Generation, utf8
from unet.shading.characters import MARKS, visible

Parts = Iterator[tuple[bytes, bool, str]]


class AbstractTexts(ABC):
    """Writes texts, one or several. `marks`: whether to mark characters that end a token."""

    def __init__(self, marks: bool):
        self.marks = marks

    @abstractmethod
    def write(self, texts: Sequence[Generation]) -> None:
        """Write texts that have ended, each with a line end behind it; several with their numbers above them."""

    @abstractmethod
    def grow(self, texts: Sequence[Generation]) -> None:
        """Write what texts have become so far."""

    @contextmanager
    def growing(self, count: int) -> Iterator[None]:
        """Around the calls of `grow` for so many texts."""
        yield


class PlainTexts(AbstractTexts):
    """Bytes as they are, for a file or a pipe; marks in UTF-8. Only a single text grows, several come when all have ended."""

    def __init__(self, marks: bool):
        super().__init__(marks)
        self._written = 0

    def write(self, texts: Sequence[Generation]) -> None:
        for number, text in enumerate(texts, start=1):
            heading = f" {number} ".center(80, "─") + "\n" if len(texts) > 1 else ""
            write_output(heading.encode() + content_of(text, marks=self.marks) + b"\n")

    def grow(self, texts: Sequence[Generation]) -> None:
        ended = all(text.piece.finish is not None for text in texts)
        if len(texts) == 1:
            content = content_of(texts[0], marks=self.marks) + (b"\n" if ended else b"")
            write_output(content[self._written :])
            self._written = len(content)
        elif ended:
            self.write(texts)


class ShownTexts(AbstractTexts):
    """Characters on a terminal, prompts and marks dim, and nothing that a terminal acts on. Several texts grow side by side."""

    def __init__(self, marks: bool):
        super().__init__(marks)
        self._console = Console(highlight=False, soft_wrap=True, emoji=False)
        self._live: Live | None = None
        self._printed = 0

    def write(self, texts: Sequence[Generation]) -> None:
        for number, text in enumerate(texts, start=1):
            if len(texts) > 1:
                self._console.rule(f"{number}", style="dim")
            self._console.print(shown(text, marks=self.marks))

    @contextmanager
    def growing(self, count: int) -> Iterator[None]:
        if count == 1:
            yield
            self._console.print()
            return
        with Live(console=self._console, auto_refresh=False, vertical_overflow="visible") as self._live:
            yield

    def grow(self, texts: Sequence[Generation]) -> None:
        content = [shown(text, marks=self.marks) for text in texts]
        if self._live is not None:
            numbered = (Text(f"{number}  ", style="dim").append(text) for number, text in enumerate(content, start=1))
            self._live.update(Group(*numbered), refresh=True)
            return
        self._console.print(content[0][self._printed :], end="")
        self._console.file.flush()
        self._printed = len(content[0])


def standard_output(*, marks: bool) -> AbstractTexts:
    """What writes texts to standard output as it is now."""
    return ShownTexts(marks) if sys.stdout is not None and sys.stdout.isatty() else PlainTexts(marks)


def content_of(text: Generation, *, marks: bool) -> bytes:
    """The bytes of a prompt and of its continuation, without an incomplete last character while that goes on. `marks`: whether to
    mark characters that end a token."""
    return b"".join(content + mark.encode() for content, _, mark in _parts(text, marks))


def shown(text: Generation, *, marks: bool) -> Text:
    """The same for a terminal: the prompt dim, U+FFFD for invalid bytes, control characters as pictures of them."""
    result = Text()
    for content, of_prompt, mark in _parts(text, marks):
        result.append(visible(content.decode("utf-8", errors="replace")), style="dim" if of_prompt else "")
        result.append(mark, style="dim cyan")
    return result


def _parts(text: Generation, marks: bool) -> Parts:
    """The bytes of each character, whether it is of the prompt, and the mark behind it, if any."""
    content = text.prompt + text.piece.bytes
    end = len(content) if text.piece.finish is not None else max(utf8.whole_characters(content), len(text.prompt))
    closed = np.concatenate([text.prompt_boundary_depth, text.piece.boundary_depth])
    for first, last in utf8.character_spans(content[:end]):
        depth = int(closed[first:last].max())
        mark = MARKS[min(depth, len(MARKS)) - 1] if marks and depth else ""
        yield content[first:last], first < len(text.prompt), mark
