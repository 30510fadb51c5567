"""Boundaries dropped in training because a sequence had more than its capacity: counted, and reported where they are too many."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from unet.losses import level_prefix

TOLERATED = 0.005
"""Fraction of the boundaries of a level that may be dropped without a warning."""
FIRST_STEPS = 10
"""Steps before a running training is judged: fewer have too few boundaries for a share of them."""

Record = Mapping[str, float | int | str | None]
"""A line of `metrics.jsonl`."""


class DroppedBoundaries:
    """Counts, level by level, the boundaries drawn in training and those dropped."""

    def __init__(self, levels: int):
        self._drawn, self._dropped, self._steps = [0.0] * levels, [0.0] * levels, 0

    @classmethod
    def so_far(cls, records: Iterable[Record], levels: int) -> DroppedBoundaries:
        """The counts that the last line of `metrics.jsonl` with a `record` has: those of a run that goes on."""
        counted = cls(levels)
        for record in records:
            drawn, dropped = (
                [record.get(f"{level_prefix(level)}{what}_so_far") for level in range(levels)]
                for what in ("drawn", "dropped")
            )
            numbers = [value for value in (*drawn, *dropped) if isinstance(value, int | float)]
            if isinstance(step := record.get("step"), int) and levels and len(numbers) == 2 * levels:
                counted._steps = step
                counted._drawn, counted._dropped = numbers[:levels], numbers[levels:]
        return counted

    def add(self, record: Record) -> None:
        """Count the boundaries of a step, in units of its bytes."""
        around = 1.0
        for level in range(len(self._drawn)):
            rate, overflow = record[f"{level_prefix(level)}rate"], record[f"{level_prefix(level)}overflow"]
            assert isinstance(rate, float)
            assert isinstance(overflow, float)
            self._drawn[level] += around * (rate + overflow)
            self._dropped[level] += around * overflow
            around *= rate
        self._steps += 1

    @property
    def record(self) -> dict[str, float | int | None]:
        """The counts over all steps so far, for a line of `metrics.jsonl`, which need not have a line for every step."""
        counts: dict[str, float | int | None] = {}
        for level, (drawn, dropped) in enumerate(zip(self._drawn, self._dropped, strict=True)):
            counts |= {f"{level_prefix(level)}drawn_so_far": drawn, f"{level_prefix(level)}dropped_so_far": dropped}
        return counts

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
            f"{shares} of the boundaries{inside} were dropped in training, beyond the capacity: more than the {TOLERATED:.1%} "
            "that change nothing; name a larger --capacity-slack"
        )

    @property
    def early_warning(self) -> str | None:
        """The same while training goes on, once there have been a few steps."""
        return self.warning if self._steps >= FIRST_STEPS else None
