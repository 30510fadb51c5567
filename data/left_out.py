"""Counts of what readers leave out of a data set, for notes to the user."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Literal

Kind = Literal["bases", "rows", "NUL", "open end"]
"""What is counted: unknown bases and gaps, rows without text, documents with NUL bytes (kept), files that end within a line."""

Count = Callable[[Kind, int], None]
"""Called with a kind and by how many its count grows."""

_SENTENCES: dict[Kind, str] = {
    "bases": "{count:,} unknown bases and gaps (N, ., -, *) of {name} were skipped so far",
    "rows": "{count:,} row(s) of {name} without text (null, or no such field) were left out so far",
    "NUL": "{count:,} document(s) of {name} so far have NUL bytes, which are kept",
    "open end": "{count:,} file(s) of {name} end without a line end, as a file does that was cut short",
}


def ignored(kind: Kind, count: int) -> None:
    """Counts nothing."""


class LeftOut:
    """The counts of each shard of a data set. Reading a shard again counts nothing twice."""

    def __init__(self):
        self._earlier: dict[str, Counter[Kind]] = {}
        self._now: dict[str, Counter[Kind]] = {}

    def of(self, shard: str) -> Count:
        """The function that counts for one reading of a shard."""
        # The maximum of both: the shard may have been read further before than it is now.
        self._earlier[shard] = self._earlier.get(shard, Counter()) | self._now.get(shard, Counter())
        # All kinds from the start: notes may be wanted while another thread reads.
        counts = self._now[shard] = Counter(dict.fromkeys(_SENTENCES, 0))

        def count(kind: Kind, number: int) -> None:
            counts[kind] += number

        return count

    def notes(self, name: str) -> tuple[str, ...]:
        """A note to the user for every count of the data set `name` that is not 0."""
        shards = list(self._now.items())
        total = sum((self._earlier[shard] | counts for shard, counts in shards), Counter())
        return tuple(text.format(count=total[kind], name=name) for kind, text in _SENTENCES.items() if total[kind])
