"""Coverage: the fraction of the training text that a protocol can put into training sequences."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass

import numpy as np
from jaxtyping import Int64

from data.rows import Protocol

LITTLE = 0.5
"""Coverage below which the note to the user recommends another protocol."""


def shown_bytes(size: int, length: int, protocol: Protocol) -> int:
    """The number of a document's `size` bytes, without BOS, that can occur in rows of `length` bytes, over all epochs.

    cut: the first `length` - 1, since BOS takes one position; none if the document with BOS is shorter than `length`.
    crop and pack: all of them.
    """
    if protocol == "cut":
        return length - 1 if size + 1 >= length else 0
    return size


@dataclass(frozen=True)
class Coverage:
    """Counts over training documents.

    `documents`: all of them. `left_out`: those that give no row. `bytes`: their bytes without BOS. `shown`: the bytes that can
    occur in rows.
    """

    documents: int = 0
    left_out: int = 0
    bytes: int = 0
    shown: int = 0

    def plus(self, size: int, length: int, protocol: Protocol) -> Coverage:
        """The counts with one more document of `size` bytes, without BOS."""
        shown = shown_bytes(size, length, protocol)
        left_out = self.left_out + (shown == 0)
        return Coverage(self.documents + 1, left_out, self.bytes + size, self.shown + shown)

    @classmethod
    def total(cls, parts: Iterable[Coverage]) -> Coverage:
        """The counts of all documents that are counted in one of the `parts`."""
        return cls(*(sum(counts) for counts in zip(*map(astuple, parts), strict=True)))

    @classmethod
    def of(cls, sizes: Int64[np.ndarray, " documents"], length: int, protocol: Protocol) -> Coverage:
        """The counts of documents of these sizes, without BOS."""
        counts = cls()
        for size, times in zip(*np.unique(sizes, return_counts=True), strict=True):
            one = cls().plus(int(size), length, protocol)
            counts = cls(
                *(total + int(times) * count for total, count in zip(astuple(counts), astuple(one), strict=True))
            )
        return counts

    @property
    def share(self) -> float:
        """The fraction `shown / bytes`; NaN without bytes."""
        return self.shown / self.bytes if self.bytes else math.nan

    def note(self, name: str, length: int, protocol: Protocol, *, so_far: bool) -> str:
        """A note to the user about the data set `name`. `so_far`: only the documents read up to now are counted."""
        scope = " read so far" if so_far else ""
        text = (
            f"the protocol '{protocol}' can show {100 * self.share:.3g} % of the bytes of the {self.documents:,} training "
            f"documents of {name}{scope}"
        )
        if self.left_out:
            text += f"; {self.left_out:,} of them are shorter than {length} bytes and left out"
        if self.share < LITTLE:
            text += "; --data.protocol crop or pack shows all of them"
        return text
