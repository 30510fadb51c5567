"""Errors about files of models: each is one sentence, whatever the file says."""

from __future__ import annotations

LONGEST = 500
"""Maximum number of characters of an error message."""


def shown(text: object, limit: int = 80) -> str:
    """What a file says, as it may stand in a message: on one line, without control characters, and not longer than `limit`."""
    whole = str(text)
    short = whole if len(whole) <= limit else f"{whole[: limit - 1]}…"
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in short)


class FileError(Exception):
    """What is wrong with a file, in one sentence of at most `LONGEST` characters. What is longer loses its middle."""

    def __init__(self, message: str):
        sentence = shown(message, len(message))
        if len(sentence) > LONGEST:
            sentence = f"{sentence[: LONGEST // 2]}…{sentence[-LONGEST // 2 + 1 :]}"
        super().__init__(sentence)


class LoadError(FileError):
    """What is wrong with the files of a model, where, and what to do about it."""


class LayoutError(FileError):
    """Why something does not fit the released layout, in one sentence."""
