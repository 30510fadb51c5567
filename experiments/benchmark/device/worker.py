"""One part of `experiments.bench gpu` in a process of its own: a kernel that hangs or breaks the device ends that part alone.

`python -m experiments.benchmark.device.worker REQUEST` runs it. Results are lines of JSON, each written as soon as it is there.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict

import jax

from data import DataError
from experiments.benchmark.cards import peak_of
from experiments.benchmark.device import kernels, models, pytorch
from experiments.benchmark.device.asked import Asked, Item, Result
from experiments.config.errors import ConfigError
from experiments.config.structure import parsed, structured
from experiments.training.run_dir import json_text

PACKAGES = ("jax", "jaxlib", "tokamax", "torch", "h-net-dynamic-chunking")


class Line(TypedDict):
    """What a part says. `kind`: the `device` that it is on, an item that is `planned`, `done`, `failed` or `skipped` for lack of
    time, or that the whole part is `missing` something, with the `why`."""

    kind: Literal["device", "planned", "done", "failed", "skipped", "missing"]
    name: str
    why: str
    result: Result


Say = Callable[[Line], None]


def items_of(part: str, asked: Asked) -> list[Item]:
    """What a part measures. Raises `ModuleNotFoundError` where it needs a package that is not installed."""
    plain = {
        "kernels": kernels.items,
        "generation": models.generation_items,
        "profile": models.profile_items,
        "capacities": models.capacity_items,
        "chunking": pytorch.chunking_items,
        "PyTorch": pytorch.torch_step_items,
        "PyTorch chunking": pytorch.torch_chunking_items,
    }
    by_model = {f"step of {model}": functools.partial(models.step_items, model) for model in asked.models}
    return {**plain, **by_model}[part](asked)


def device() -> Result:
    """The card and the versions."""
    one = jax.devices()[0]
    found: dict[str, str | float | None] = {
        "card": one.device_kind,
        "driver": _driver(),
        "python": sys.version.split()[0],
    }
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    peak = peak_of(one.device_kind)
    return found | {"peak TFLOP/s in bfloat16, dense": None if peak is None else peak / 1e12}


def _driver() -> str | None:
    """The version of NVIDIA's driver and the card's limits, as its tool says; None where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=driver_version,memory.total,power.limit", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.splitlines()[0] if done.returncode == 0 and done.stdout else None


def measure(items: Iterable[Item], say: Say, deadline: float, clock: Callable[[], float] = time.time) -> None:
    """Measure the items one after another until `deadline`. One is skipped where less time is left than the slowest of those
    before it took, half of that counting: the first compiles for all."""
    items, slowest = list(items), 0.0
    for item in items:
        say(Line(kind="planned", name=item.name, why="", result={}))
    for item in items:
        started = clock()
        if started + slowest / 2 > deadline:
            say(Line(kind="skipped", name=item.name, why="no time was left for it", result={}))
            continue
        try:
            say(Line(kind="done", name=item.name, why="", result=item.run()))
        # Whatever the device or a package raises, the other items are measured.
        except Exception as error:
            say(Line(kind="failed", name=item.name, why=_in_one_line(error), result={}))
        slowest = max(slowest, clock() - started)


def _in_one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def run_part(part: str, asked: Asked, say: Say, deadline: float) -> None:
    """All of a part, in this process."""
    try:
        items = items_of(part, asked)
    except (ModuleNotFoundError, ConfigError, DataError) as error:
        what = f"{error.name} is not installed" if isinstance(error, ModuleNotFoundError) else str(error)
        say(Line(kind="missing", name=part, why=what, result={}))
        return
    measure(items, say, deadline)


@dataclass(frozen=True)
class Request:
    """What a process is to do: a part, until `deadline` (by `time.time`), after which it has `grace` seconds to end, and the file
    that it appends its lines to."""

    part: str
    asked: Asked
    lines: Path
    deadline: float
    grace: float


def main(path: str) -> None:
    """Do what the request in the file at `path` says."""
    request = structured(parsed(Path(path).read_bytes()), Request)
    parent = os.getppid()

    def watch() -> None:
        # A call into the device cannot be interrupted.
        while os.getppid() == parent and time.time() < request.deadline + request.grace:
            time.sleep(0.5)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
    with request.lines.open("a") as stream:

        def say(line: Line) -> None:
            stream.write(json.dumps(json.loads(json_text(line))) + "\n")
            stream.flush()

        say(Line(kind="device", name=request.part, why="", result=device()))
        run_part(request.part, request.asked, say, request.deadline)


if __name__ == "__main__":
    # Not the module that was started, whose classes are others.
    from experiments.benchmark.device import worker

    worker.main(sys.argv[1])
