"""Reads mutated inputs in a process of its own: `python -m tests.hostile.child MODULE FOLDER COUNT SEED SUBJECT:FIRST …`.

MODULE has the `SUBJECTS`.

Before each input its subject and number are written to FOLDER/at, so that an input that ends the process can be named. What is
wrong is printed, one JSON object a line, and the inputs themselves are kept in FOLDER.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import sys
from pathlib import Path

from tests.hostile.mutation import mutations
from tests.hostile.subject import Subject
from tests.hostile.trial import guard, what_is_wrong

HANGS_AFTER = 60
"""Seconds after which a process that does not react to its timer is ended."""


def try_subject(subject: Subject, folder: Path, count: int, seed: int, first: int, at: int) -> None:
    """Read `count` mutations, from number `first` on; `at` is an open file for the current position."""
    place = folder / "made"
    place.mkdir(exist_ok=True)
    seeds = subject.seeds(place)
    readings = []
    for number, content in enumerate(seeds):
        inside = folder / f"seed-{number}"
        inside.mkdir(exist_ok=True)
        readings.append(subject.read(inside, content))
    expected = readings[0]
    if subject.checked and any(reading != expected for reading in readings):
        raise ValueError(f"the seeds of {subject.name} must all give the same")
    for number, content in enumerate(mutations(seeds, subject.structure, count, seed)):
        if number < first:
            continue
        os.pwrite(at, f"{subject.name}:{number}".ljust(200).encode(), 0)
        faulthandler.dump_traceback_later(HANGS_AFTER, exit=True)
        problem = what_is_wrong(subject, content, folder / "input", expected)
        if problem is not None:
            kept = folder / f"{subject.name}-{number}"
            kept.write_bytes(content)
            print(json.dumps({"subject": subject.name, "number": number, "problem": problem}), flush=True)
    faulthandler.cancel_dump_traceback_later()


def main(arguments: list[str]) -> None:
    """The program."""
    module, folder, count, seed = arguments[0], Path(arguments[1]), int(arguments[2]), int(arguments[3])
    subjects = importlib.import_module(module).SUBJECTS
    folder.mkdir(parents=True, exist_ok=True)
    at = os.open(folder / "at", os.O_RDWR | os.O_CREAT)
    guard(4 * 2**30)
    for given in arguments[4:]:
        name, _, first = given.partition(":")
        subject = next(subject for subject in subjects if subject.name == name)
        inside = folder / name
        inside.mkdir(exist_ok=True)
        try_subject(subject, inside, count, seed, int(first or 0), at)


if __name__ == "__main__":
    main(sys.argv[1:])
