"""Coverage: how much of the training documents a protocol can ever put into training rows."""

from __future__ import annotations

import math
from dataclasses import dataclass

from data.rows import Protocol

LITTLE = 0.5
"""Fraction of the bytes below which a run names the setting that would cover more."""


def shown_bytes(size: int, length: int, protocol: Protocol) -> int:
    """How many of a document's `size` bytes, without BOS, can occur in rows of `length`, over all epochs.

    cut: the first `length` - 1, after the BOS, and none of a document shorter than a row; crop and pack: all.
    """
    if protocol == "cut":
        return length - 1 if size + 1 >= length else 0
    return size


@dataclass(frozen=True)
class Coverage:
    """Counts over training documents: documents, documents that give no row, bytes without BOS, and bytes that can occur in
    rows."""

    documents: int = 0
    left_out: int = 0
    bytes: int = 0
    shown: int = 0

    def plus(self, size: int, length: int, protocol: Protocol) -> Coverage:
        """The counts after another document of `size` bytes."""
        shown = shown_bytes(size, length, protocol)
        left_out = self.left_out + (shown == 0)
        return Coverage(self.documents + 1, left_out, self.bytes + size, self.shown + shown)

    @property
    def share(self) -> float:
        """The fraction `shown / bytes`; NaN without bytes."""
        return self.shown / self.bytes if self.bytes else math.nan

    def sentence(self, name: str, length: int, protocol: Protocol, *, so_far: bool) -> str:
        """A note to the user about the data set `name`; `so_far` if it counts only the documents read up to now."""
        read = " read so far" if so_far else ""
        said = (
            f"the protocol '{protocol}' can show {100 * self.share:.3g} % of the bytes of the {self.documents:,} training "
            f"documents of {name}{read}"
        )
        if self.left_out:
            said += f"; {self.left_out:,} of them are shorter than {length} bytes and left out"
        if self.share < LITTLE:
            said += "; --data.protocol crop or pack shows all of them"
        return said
