"""Several real processes over loopback, made by forking, which spares them their imports.

`python -m tests.several FOLDER SCENARIO …`

Prints one JSON object: for every scenario the exit codes of its processes, what they wrote, and how many seconds passed from what
was done to one of them to the end of the last other.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from data import DataError
from experiments import run
from experiments.command import exit_code
from experiments.config.sections import DistributedConfig
from experiments.processes.agreement import require_shared
from experiments.processes.membership import Membership
from experiments.reporting.display import Display
from experiments.training import data as training_data
from experiments.training import train
from tests.hostile.forked import write_corpus
from tests.recorded import Recorded

SMALL = (
    *("--unet.dim", "8", "--unet.heads", "2", "--unet.main-layers", "1", "--unet.window", "4", "--estimator", "sfe"),
    *("--length", "16", "--batch", "4", "--steps", "20", "--buckets", "1", "--log-seconds", "0"),
    *("--evaluation.bytes", "64", "--evaluation.times", "1", "--checkpoint.times", "2"),
)
"""Twenty steps, with checkpoints at the tenth and the last."""


SHARED = ("--mesh.data", "4")
"""Every one of two processes is two devices."""
DIVIDED = ("--mesh.data", "1", "--mesh.fsdp", "4", "--mesh.whole-below", "0")
"""Every process holds a quarter of the parameters."""
WHOLE = ("--mesh.data", "-1", "--mesh.fsdp", "1", "--mesh.whole-below", "16384")
"""The defaults."""


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return trial.getsockname()[1]


class Children:
    """Processes that do `work(index)`, and what they write."""

    def __init__(self, folder: Path, count: int, work: Callable[[int], int]):
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"log-{index}" for index in range(count)]
        self.pids = [self._fork(index, work) for index in range(count)]

    def _fork(self, index: int, work: Callable[[int], int]) -> int:
        pid = os.fork()
        if not pid:
            self._work(index, work)
        return pid

    def _work(self, index: int, work: Callable[[int], int]) -> None:
        code = 99
        try:
            log = os.open(self.logs[index], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            code = work(index)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def ended(self, stopped: int | None = None) -> dict[str, object]:
        """How they ended. The one that was `stopped` does not end by itself: it is killed once the others have."""
        codes: dict[int, int] = {}
        ends: dict[int, float] = {}
        while len(codes) < len(self.pids):
            if stopped is not None and stopped not in codes and len(codes) == len(self.pids) - 1:
                os.kill(self.pids[stopped], signal.SIGKILL)
            pid, status = os.wait()
            index = self.pids.index(pid)
            codes[index], ends[index] = os.waitstatus_to_exitcode(status), time.time()
        output = [log.read_text(errors="replace") for log in self.logs]
        marks = [log.with_name("mark") for log in self.logs[:1]]
        begun = float(marks[0].read_text()) if marks[0].exists() else None
        rest = [end for index, end in ends.items() if index != stopped]
        seconds = None if begun is None else max(rest) - begun
        return {"codes": [codes[index] for index in range(len(codes))], "output": output, "seconds": seconds}


def trained(
    folder: Path,
    count: int,
    arguments: Sequence[str],
    at: Mapping[int, tuple[int, signal.Signals]] | None = None,
    after: Callable[[int], None] = lambda index: None,
) -> dict[str, object]:
    """`experiments.run` in `count` processes; each of those in `at` sends itself a signal when it begins a step. `after` is
    called with the index of each at its end."""
    port, several = free_port(), count > 1
    flags = (
        "--distributed.coordinator",
        f"127.0.0.1:{port}",
        "--distributed.processes",
        str(count),
        "--distributed.timeout",
        "10",
    )

    def work(index: int) -> int:
        if at and index in at:
            _signal_at(*at[index], folder)
        own = (*flags, "--distributed.index", str(index)) if several else ("--devices", "1")
        code = run.main([*arguments, *own])
        after(index)
        return code

    return Children(folder, count, work).ended()


def _signal_at(step: int, number: signal.Signals, folder: Path) -> None:
    usual = train.Session.train_step

    def train_step(session: train.Session, asked: int):
        if session.step + 1 == step:
            (folder / "mark").write_text(str(time.time()))
            os.kill(os.getpid(), number)
        return usual(session, asked)

    train.Session.train_step = train_step  # type: ignore[bad-assignment]  # in this process only


def chain(folder: Path) -> dict[str, object]:
    """A run that two processes begin until one is asked to stop, four go on with until one is killed, each with a part of the
    parameters, and one ends; and the same run in one process."""
    folder.mkdir(parents=True)
    corpus, out = str(write_corpus(folder / "text.jsonl")), folder / "chain"
    again = ("--resume", "--out", str(out))
    return {
        "whole": trained(folder / "whole-logs", 1, [*SMALL, "--dataset", corpus, "--out", str(folder / "whole")]),
        "two": trained(
            folder / "two", 2, [*SMALL, *SHARED, "--dataset", corpus, "--out", str(out)], {1: (4, signal.SIGTERM)}
        ),
        "saved": sorted(path.name for path in (out / "checkpoints").iterdir()),
        "four": trained(folder / "four", 4, (*again, *DIVIDED), {2: (13, signal.SIGKILL)}),
        "kept": sorted(path.name for path in (out / "checkpoints").iterdir()),
        "one": trained(folder / "one", 1, (*again, *WHOLE)),
    }


def stream(folder: Path) -> dict[str, object]:
    """A run on a stream with a vocabulary of its own, in two processes and in one, and the shards that each process opened."""
    source, folder_of = Recorded(shards=400), {"two": 2, "one": 1}
    training_data.open_source = lambda name, **settings: source  # type: ignore[bad-assignment]  # in this process only
    steps = ("--estimator", "bpe", "--bpe.vocabulary", "260", "--steps", "6", "--checkpoint.times", "1")
    given = (*SMALL, *steps, "--dataset", "recorded", "--data.held-out", "0.2", "--data.lanes", "2")
    found: dict[str, object] = {}
    for name, count in folder_of.items():

        def opened(index: int, out: Path = folder / name) -> None:
            out.with_name(f"{out.name}-opened-{index}").write_text(json.dumps(source.opened))

        arguments = (*given, "--out", str(folder / name))
        found[name] = trained(folder / f"{name}-logs", count, arguments, after=opened)
        logs = [folder / f"{name}-opened-{index}" for index in range(count)]
        found[f"{name} opened"] = [json.loads(log.read_text()) for log in logs]
    return found


ACTS: dict[str, tuple[int, Callable[[], object]]] = {
    "killed": (1, lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "frozen": (1, lambda: os.kill(os.getpid(), signal.SIGSTOP)),
    "leader-killed": (0, lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "leader-frozen": (0, lambda: os.kill(os.getpid(), signal.SIGSTOP)),
    "stuck": (1, lambda: threading.Event().wait()),
    "computing": (1, lambda: threading.Event().wait()),
    "failing": (1, lambda: _fail()),
    "well": (1, lambda: None),
    "twice": (1, lambda: None),
}
"""What one of several processes does while the others wait for it, by name; and which."""


def _fail() -> None:
    raise DataError("its data are gone")


def meeting(folder: Path, name: str, count: int = 3) -> dict[str, object]:
    """Processes that do nothing but meet, until one of them does something else."""
    port, (who, act) = free_port(), ACTS[name]

    def work(index: int) -> int:
        display = Display()
        membership = Membership(display)
        place, patience = 1 if name == "twice" and index else index, 2.0 if name in ("stuck", "computing") else 60.0
        config = DistributedConfig(f"127.0.0.1:{port}", count, place, wait=6.0, timeout=3.0, patience=patience)

        def command() -> None:
            # One that fails at once has nothing to go on from.
            with membership.joined(config, resumable=lambda: name != "failing") as processes:
                processes.require_same("folder", str(folder).encode())
                display.note(f"codes {processes.codes(10 + index)}")
                if index == who:
                    (folder / "mark").write_text(str(time.time()))
                    act()
                if name == "computing":
                    with processes.together():
                        threading.Event().wait(60)
                processes.codes(index)

        with membership.ending() as end:
            end.code = exit_code(display, command)
        return end.code

    return Children(folder, count, work).ended(who if name in ("frozen", "leader-frozen") else None)


STARTS: dict[str, tuple[int, ...]] = {"alone": (0,), "unreachable": (1,)}
"""Of two processes those that are started, by name of what is the matter."""


def start(folder: Path, name: str) -> dict[str, object]:
    """A command of two processes, one of which never comes."""
    port = free_port()
    flags = (
        "--distributed.coordinator",
        f"127.0.0.1:{port}",
        "--distributed.processes",
        "2",
        "--distributed.wait",
        "1",
    )
    arguments = ("--dataset", str(folder / "none"), "--out", str(folder / "out"), *flags)
    return Children(folder, 1, lambda _: run.main([*arguments, "--distributed.index", str(STARTS[name][0])])).ended()


def apart(folder: Path) -> dict[str, object]:
    """Two processes whose folders are not the same."""
    port = free_port()

    def work(index: int) -> int:
        membership = Membership(display := Display())
        config = DistributedConfig(f"127.0.0.1:{port}", 2, index, timeout=10.0)

        def command() -> None:
            (own := folder / f"own-{index}").mkdir()
            with membership.joined(config) as processes:
                require_shared(own, processes, patience=0.1)

        with membership.ending() as end:
            end.code = exit_code(display, command)
        return end.code

    return Children(folder, 2, work).ended()


def main() -> None:
    """The program."""
    folder, found = Path(sys.argv[1]), {}
    for name in sys.argv[2:]:
        inside = folder / name
        if name == "chain":
            found[name] = chain(inside)
        elif name == "stream":
            found[name] = stream(inside)
        elif name == "apart":
            found[name] = apart(inside)
        else:
            found[name] = start(inside, name) if name in STARTS else meeting(inside, name)
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
