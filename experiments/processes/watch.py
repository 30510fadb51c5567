"""Who of several processes has died, hangs or has failed, told from the signs of life that they give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Sign:
    """A sign of life: its number, and how often the process has met the others so far."""

    number: int
    meetings: int

    def written(self) -> str:
        """As text."""
        return f"{self.number} {self.meetings}"

    @classmethod
    def read(cls, text: str) -> Sign:
        """From its text."""
        number, meetings = text.split(" ")
        return cls(int(number), int(meetings))


@dataclass(frozen=True)
class Waiting:
    """The meeting that a process waits at: its number, since when, and whether it is one of `files`, which may be slow."""

    meeting: int
    since: float
    files: bool = False


class Watch:
    """What process `index` knows of the others. Times are seconds of any clock that only goes forward."""

    def __init__(self, index: int, names: Sequence[str], *, timeout: float, patience: float, now: float):
        """`names`: what every process is called in a sentence. `timeout`, `patience`: as in `DistributedConfig`."""
        self._index, self._names, self._timeout, self._patience = index, names, timeout, patience
        self._seen: dict[int, tuple[Sign | None, float]] = dict.fromkeys(range(len(names)), (None, now))
        self._last = now
        self._all_came: tuple[int, float] | None = None

    def verdict(
        self,
        now: float,
        signs: Mapping[int, Sign],
        failed: Mapping[int, str],
        waiting: Waiting | None = None,
    ) -> str | None:
        """One sentence that names the process for which the others have to end; None while all is well.

        `signs`: the latest of each. `failed`: what those say who fail. `waiting`: what this process waits at.
        """
        others = [other for other in range(len(self._names)) if other != self._index]
        for other in others:
            if other in failed:
                return f"{self._names[other]} has failed ({failed[other]})"
        # Where this process itself did not run for a while, the others' silence tells nothing.
        away = now - self._last > self._timeout / 2
        self._last = now
        for other in others:
            sign, since = self._seen[other]
            if away or signs.get(other) != sign:
                self._seen[other] = (signs.get(other), now)
            elif now - since > self._timeout:
                return f"{self._names[other]} has died or hangs: it gave no sign of life for {self._timeout:g} s"
        return None if waiting is None else self._waited(now, signs, waiting, others)

    def _waited(self, now: float, signs: Mapping[int, Sign], waiting: Waiting, others: Sequence[int]) -> str | None:
        """The same where only what takes too long can be told."""
        came = [other for other in others if other in signs and signs[other].meetings == waiting.meeting]
        if len(came) < len(others) or waiting.files:
            self._all_came = None
        elif self._all_came is None or self._all_came[0] != waiting.meeting:
            self._all_came = waiting.meeting, now
        elif now - self._all_came[1] > self._patience:
            return (
                f"all {len(self._names)} processes have been in the same exchange for {self._patience:g} s: one of their "
                "devices, or the network between them, hangs"
            )
        if now - waiting.since > self._patience:
            for other in others:
                if other in signs and signs[other].meetings < waiting.meeting:
                    return f"{self._names[other]} hangs: the others have waited for it for {self._patience:g} s"
        return None
