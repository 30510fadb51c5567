"""How the task files in `files/cute` judge answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def same(document: Mapping[str, str], results: Sequence[str]) -> dict[str, float]:
    """Whether the answer is the expected one, but for white space around it."""
    return {"acc": float(results[0].strip() == document["answer"].strip())}


def same_words(document: Mapping[str, str], results: Sequence[str]) -> dict[str, float]:
    """The same for tasks on words, where case does not matter."""
    return {"acc": float(results[0].strip().lower() == document["answer"].strip().lower())}
