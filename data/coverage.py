"""How much of the training documents a protocol can ever show."""

from __future__ import annotations

import math
from dataclasses import dataclass

from data.rows import Protocol

LITTLE = 0.5
"""Share of the bytes below which a run names the setting that would show more."""


def shown_bytes(size: int, length: int, protocol: Protocol) -> int:
    """Of the `size` bytes of a document, BOS not counted, how many some row of `length` can show, in whatever epoch.

    cut: the first `length` - 1 behind the BOS, and none of a document too short for a row; crop and pack: all.
    """
    if protocol == "cut":
        return length - 1 if size + 1 >= length else 0
    return size


@dataclass(frozen=True)
class Coverage:
    """Counts over training documents: all of them, those that give no row, their bytes without BOS, and the bytes that some
    row can show."""

    documents: int = 0
    left_out: int = 0
    bytes: int = 0
    shown: int = 0

    def plus(self, size: int, length: int, protocol: Protocol) -> Coverage:
        """The counts with another document of `size` bytes."""
        shown = shown_bytes(size, length, protocol)
        left_out = self.left_out + (shown == 0)
        return Coverage(self.documents + 1, left_out, self.bytes + size, self.shown + shown)

    @property
    def share(self) -> float:
        """`shown` of `bytes`; NaN before the first byte."""
        return self.shown / self.bytes if self.bytes else math.nan

    def sentence(self, name: str, length: int, protocol: Protocol, *, so_far: bool) -> str:
        """What to tell the user of the data set `name`; `so_far` where these are the documents read up to now."""
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
