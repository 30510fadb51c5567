"""Tries subjects in processes of their own, and goes on with the next input where one ends its process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

MOST_CRASHES = 20


@dataclass(frozen=True)
class Failure:
    """What is wrong with how one input was read."""

    subject: str
    number: int
    problem: str

    def __str__(self) -> str:
        return f"{self.subject}, input {self.number}: {self.problem}"


def failures(
    names: Sequence[str], folder: Path, count: int, seed: int = 0, module: str = "tests.hostile.subjects"
) -> list[Failure]:
    """What is wrong with how `count` mutations of each of the subjects `names` of `module` are read. Inputs at fault are kept in
    `folder`."""
    found: list[Failure] = []
    todo = [f"{name}:0" for name in names]
    for _ in range(MOST_CRASHES):
        (folder / "at").unlink(missing_ok=True)
        arguments = [sys.executable, "-m", "tests.hostile.child", module, str(folder), str(count), str(seed), *todo]
        process = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
        found += [Failure(**json.loads(line)) for line in process.stdout.splitlines()]
        if process.returncode == 0:
            return found
        at = folder / "at"
        if not at.exists() or not (position := at.read_text().strip()):
            raise RuntimeError(f"no input was tried: {process.stderr[-2000:]}")
        name, _, number = position.partition(":")
        found.append(
            Failure(name, int(number), f"it ended the process ({process.returncode}): {process.stderr[-300:]}")
        )
        todo = [f"{name}:{int(number) + 1}", *todo[_index(todo, name) + 1 :]]
    return found

    raise RuntimeError(f"more than {MOST_CRASHES} inputs ended the process, the last being {found[-1]}")


def _index(todo: Sequence[str], name: str) -> int:
    return next(index for index, one in enumerate(todo) if one.partition(":")[0] == name)
