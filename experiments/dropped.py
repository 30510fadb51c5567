"""Boundaries for which training had no token row left: counted, and reported where they are too many."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

TOLERATED = 0.005
"""Share of the boundaries of a level that may be dropped without a word."""
FIRST_STEPS = 10
"""Steps before a running training is judged: fewer have too few boundaries for a share of them."""

Record = Mapping[str, float | int | str | None]
"""A line of `metrics.jsonl`."""


class DroppedBoundaries:
    """Counts, level by level, the boundaries drawn in training and those dropped."""

    def __init__(self, levels: int):
        self._drawn, self._dropped, self._steps = [0.0] * levels, [0.0] * levels, 0

    @classmethod
    def of(cls, records: Iterable[Record], levels: int) -> DroppedBoundaries:
        """Those of the training steps among some lines of `metrics.jsonl`."""
        counted = cls(levels)
        for record in records:
            counted.add(record)
        return counted

    def add(self, record: Record) -> None:
        """Count a step; a line that is none, such as that of a validation, counts nothing. A step's boundaries are in units of
        its bytes."""
        around = 1.0
        for level in range(len(self._drawn)):
            prefix = "" if level == 0 else f"level{level}_"
            rate, overflow = record.get(f"{prefix}rate"), record.get(f"{prefix}overflow")
            if not isinstance(rate, float) or not isinstance(overflow, float):
                return
            self._drawn[level] += around * (rate + overflow)
            self._dropped[level] += around * overflow
            around *= rate
        self._steps += 1

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of each level's boundaries that was dropped, the outermost level first."""
        return tuple(lost / max(drawn, 1e-30) for lost, drawn in zip(self._dropped, self._drawn, strict=True))

    @property
    def warning(self) -> str | None:
        """One sentence where a level lost more than half a per cent of its boundaries; None else."""
        if max(self.shares, default=0.0) <= TOLERATED:
            return None
        shares = " and ".join(f"{share:.1%}" for share in self.shares)
        inside = " of the levels of tokens, the outermost first," if len(self.shares) > 1 else ""
        return (
            f"{shares} of the boundaries{inside} found no token row and were dropped in training, more than the {TOLERATED:.1%} "
            "that change nothing: give them room with a larger --capacity-slack"
        )

    @property
    def early_warning(self) -> str | None:
        """The same while training goes on, once there have been a few steps."""
        return self.warning if self._steps >= FIRST_STEPS else None
