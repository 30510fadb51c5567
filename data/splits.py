"""Training, validation and test splits of a data set, recognised by the names of its files."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

SplitName = Literal["training", "validation", "test"]
Part = Literal["training", "held-out", "test"]
"""What a source reads of a data set whose files are named as splits."""

_WORDS: dict[SplitName, tuple[str, ...]] = {
    "training": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "heldout"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def named_split(path: str) -> SplitName | None:
    """The split named by `path` (with slashes), such as `test-0001.parquet` or `validation/a.jsonl`; None if it names none.

    A file or folder names a split by the first of its words that is in `_WORDS`; words are runs of ASCII letters. The
    innermost part of the path that names a split decides.
    """
    for part in reversed(PurePosixPath(path).parts):
        for word in re.split(r"[^a-z]+", re.sub(r"held[-_ .]?out", "heldout", part.lower())):
            for name, words in _WORDS.items():
                if word in words:
                    return name
    return None


@dataclass(frozen=True)
class Splits:
    """The files of a data set by use: `training`, `held_out` (the validation split; without one, the test split) and `test`."""

    training: tuple[str, ...]
    held_out: tuple[str, ...] = ()
    test: tuple[str, ...] = ()

    @classmethod
    def of(cls, paths: Iterable[str]) -> Splits:
        """Groups `paths` by the splits they name; paths that name none are for training."""
        named: dict[SplitName | None, list[str]] = {}
        for path in paths:
            named.setdefault(named_split(path), []).append(path)
        training = tuple(path for name in (None, "training") for path in named.get(name, ()))
        validation, test = tuple(named.get("validation", ())), tuple(named.get("test", ()))
        return cls(tuple(sorted(training)), validation or test, test)

    def of_part(self, part: Part) -> tuple[str, ...]:
        """The files of one part."""
        return {"training": self.training, "held-out": self.held_out, "test": self.test}[part]

    def notes(self, name: str) -> tuple[str, ...]:
        """Notes to the user about the data set `name`, if any file is named as a held-out split."""
        if not self.held_out:
            return ()
        held_out = f"{len(self.held_out):,} file(s) of {name} named as a held-out split ({self.held_out[0]} …)"
        apart = self.test != self.held_out and self.test
        test = f"; {len(apart):,} of its test split ({apart[0]} …) are for evaluation only" if apart else ""
        return (f"{held_out} are the held-out text and are never used for training{test}",)
