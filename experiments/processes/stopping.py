"""How several processes agree about the step that is their last."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.processes.processes import AbstractProcesses

_LACKING = 1 << 16
"""In a code: there is no batch. The rest is the number of a signal."""


@dataclass(frozen=True)
class Stop:
    """The signal that asked process `index` to stop."""

    signal_number: int
    index: int


class AgreedStop(Exception):
    """All processes of a run stop after the same step, and have saved."""


class StoppedError(Exception):
    """The processes were asked to stop before a step that they could not take, and everything is saved."""

    def __init__(self, stop: Stop):
        super().__init__()
        self.stop = stop


def meet(processes: AbstractProcesses, asked: int, *, lacks_batch: bool) -> tuple[Stop | None, list[int]]:
    """What asked the first of the processes that was asked to stop, and those that have no batch.

    Each says what signal it was `asked` by, 0 for none, and all learn the same: what one says at a step, all do at that step.
    """
    codes = processes.codes(asked + (_LACKING if lacks_batch else 0))
    stops = [Stop(code % _LACKING, index) for index, code in enumerate(codes) if code % _LACKING]
    return (stops[0] if stops else None), [index for index, code in enumerate(codes) if code >= _LACKING]
