"""The jobs of one model, each as what its thread does."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

from experiments.exploring.documents import Request, answer, continued
from experiments.exploring.held import HeldModel
from experiments.exploring.passes import (
    Asked,
    WindowMemory,
    boundaries_in,
    continuation,
    program_of,
    prompt_of,
)
from experiments.exploring.worker import Job
from experiments.scoring.models import OpenModel
from unet import TextBoundaries

KEPT_ANSWERS = 4
"""Texts of which a model's boundaries are kept."""
SECONDS = 0.1
"""Between two messages on how far a pass is."""


class Asking:
    """What may be asked of a model. All of its methods run in the thread of the model."""

    def __init__(self, held: HeldModel, context: int):
        self._held, self._context = held, context
        self._kept: OrderedDict[tuple[int | None, Asked], TextBoundaries] = OrderedDict()
        self._windows = WindowMemory()
        self._programs: set[tuple[object, ...]] = set()

    def boundaries(self, job: Job, request: Request, step: int | None) -> None:
        """Sends what the model makes of the text."""
        opened = self._opened(job, step)
        found = self._found(job, opened, request.asked)
        job.check()
        job.send({"state": "done", "step": opened.step, **answer(found, job.check)})

    def found(self, job: Job, request: Request, step: int | None) -> None:
        """Sends the same as `TextBoundaries`, and the name of the model."""
        opened = self._opened(job, step)
        job.send({"state": "done", "name": opened.name, "found": self._found(job, opened, request.asked)})

    def continuation(self, job: Job, request: Request, step: int | None) -> None:
        """Sends how the model goes on, again and again until it has ended."""
        opened = self._opened(job, step)
        temperature, most = float(request.number("temperature", 1.0)), int(request.number("max_bytes", 256))
        prompt = prompt_of(request.asked.content)
        job.send({"state": "prompt", "left_out": len(request.asked.content) - len(prompt)})
        program = ("continue", len(prompt).bit_length(), request.asked.boundaries)
        self._announce(job, program)
        known = 0
        for piece in continuation(opened, request.asked, max_bytes=most, temperature=temperature):
            job.check()
            self._programs.add(program)
            message = continued(piece, known)
            job.send({"state": "done" if piece.finish is not None else "working", **message})
            # The last sign may grow: an accent may follow.
            known = max(known, message["count"] - 1)

    def _opened(self, job: Job, step: int | None) -> OpenModel:
        if not self._held.is_open(step):
            job.send({"state": "opening"})
        opened = self._held.at(step)
        job.check()
        return opened

    def _found(self, job: Job, opened: OpenModel, asked: Asked) -> TextBoundaries:
        """From memory, or from a pass that says how far it is."""
        key = opened.step, asked
        if key not in self._kept:
            program = program_of(asked, self._context)
            self._announce(job, program)
            self._kept[key] = boundaries_in(
                opened, asked, self._context, self._windows, _progress(job, len(asked.content))
            )
            self._programs.add(program)
        self._kept.move_to_end(key)
        while len(self._kept) > KEPT_ANSWERS:
            self._kept.popitem(last=False)
        return self._kept[key]

    def _announce(self, job: Job, program: tuple[object, ...]) -> None:
        if program not in self._programs:
            job.send({"state": "compiling"})


def _progress(job: Job, size: int) -> Callable[[int], None]:
    done, last = 0, time.monotonic()

    def advance(positions: int) -> None:
        nonlocal done, last
        job.check()
        done += positions
        if time.monotonic() - last >= SECONDS:
            last = time.monotonic()
            job.send({"state": "working", "fraction": round(min(1.0, done / max(1, size)), 3)})

    return advance
