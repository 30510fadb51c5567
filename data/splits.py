"""Which split of a data set a file is, by its name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

SplitName = Literal["training", "validation", "test"]

_WORDS: dict[SplitName, tuple[str, ...]] = {
    "training": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "heldout"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def named_split(path: str) -> SplitName | None:
    """The split that `path`, written with slashes, names: `test-0001.parquet`, `validation/a.jsonl`; None where it names none.

    A folder or file names a split with one of its words (between dots, dashes, underscores, spaces and digits), the first of
    them that is one; the innermost part of the path that names a split decides.
    """
    for part in reversed(PurePosixPath(path).parts):
        for word in re.split(r"[^a-z]+", re.sub(r"held[-_ .]?out", "heldout", part.lower())):
            for name, words in _WORDS.items():
                if word in words:
                    return name
    return None


@dataclass(frozen=True)
class Splits:
    """The files of a data set by what they are for: `training`, `held_out` (those named as its validation split or, where there
    are none, its test split) and `unused` (the test split beside a validation split)."""

    training: tuple[str, ...]
    held_out: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    @classmethod
    def of(cls, paths: Iterable[str]) -> Splits:
        """Sort `paths` by the splits that they name; those that name none train."""
        named: dict[SplitName | None, list[str]] = {}
        for path in paths:
            named.setdefault(named_split(path), []).append(path)
        training = tuple(path for name in (None, "training") for path in named.get(name, ()))
        validation, test = tuple(named.get("validation", ())), tuple(named.get("test", ()))
        return cls(tuple(sorted(training)), validation or test, test if validation else ())

    def notes(self, name: str) -> tuple[str, ...]:
        """What to tell the user of the data set `name`; nothing where no file is named as a held-out split."""
        if not self.held_out:
            return ()
        held_out = (
            f"{len(self.held_out):,} file(s) of {name} named as a held-out split ({self.held_out[0]} …) never train"
        )
        unused = f"; {len(self.unused):,} of its test split ({self.unused[0]} …) are not read" if self.unused else ""
        return (f"{held_out} and are what is held out{unused}",)
