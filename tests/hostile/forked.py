"""Commands in processes that are made by forking, which spares them their imports, and what the runs that they leave hold."""

from __future__ import annotations

import json
import os
import random
import signal
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.numpy

from experiments import compare, evaluate, export, run

MAINS: dict[str, Callable[[Sequence[str]], int]] = {
    "run": run.main,
    "compare": compare.main,
    "export": export.main,
    "evaluate": evaluate.main,
}
SMALL = (
    *("--unet.dim", "8", "--unet.heads", "2", "--unet.main-layers", "1", "--unet.window", "4", "--estimator", "sfe"),
    *("--length", "16", "--batch", "4", "--steps", "4", "--devices", "1", "--buckets", "1"),
    *("--evaluation.bytes", "64", "--evaluation.times", "1", "--checkpoint.times", "2"),
)
"""A run of seconds, with two checkpoints."""
TIMES = ("seconds", "bytes_per_second")


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code, negative for a signal, its CPU seconds, and what it printed."""

    code: int
    seconds: float
    output: str


def in_child(
    name: str,
    arguments: Sequence[str],
    log: Path,
    *,
    killed_after: float | None = None,
    before: Callable[[], object] = lambda: None,
    after: Callable[[], object] = lambda: None,
) -> Ended:
    """Run a command in a process of its own, which calls `before` and `after` and is killed after `killed_after` seconds of CPU
    time."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            before()
            if killed_after is not None:
                # Nothing handles it: the process ends at once, as by SIGKILL. CPU time does not depend on what else is running.
                signal.signal(signal.SIGPROF, signal.SIG_DFL)
                signal.setitimer(signal.ITIMER_PROF, killed_after)
            code = MAINS[name](list(arguments))
            after()
        except SystemExit as stopped:
            code = stopped.code if isinstance(stopped.code, int) else 98
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status, usage = os.wait4(pid, 0)
    output = log.read_text(errors="replace") if log.exists() else ""
    return Ended(os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, output)


def left_by(folder: Path) -> dict[str, object]:
    """What a run leaves that has to be the same every time."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "names": sorted(path.name for path in folder.iterdir()),
        "checkpoints": sorted(path.name for path in (folder / "checkpoints").iterdir()),
        "metrics": [{name: value for name, value in line.items() if name not in TIMES} for line in lines],
        "summary": {name: value for name, value in summary.items() if name not in (*TIMES, "dataset")},
        "model": weights(folder),
    }


def weights(folder: Path) -> dict[str, bytes]:
    """The arrays of a model, as bytes."""
    arrays = safetensors.numpy.load((folder / "model.safetensors").read_bytes())
    return {name: value.tobytes() for name, value in arrays.items()}


def write_corpus(path: Path) -> Path:
    """Forty documents of words."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 6))) for _ in range(50)]
    path.write_text("".join(json.dumps({"text": " ".join(rng.choices(words, k=40))}) + "\n" for _ in range(40)))
    return path
