"""Commands killed at random moments, and done again: `python -m tests.hostile.kills --kills 100`.

A run that goes on must leave, bit for bit, what an undisturbed one leaves; a run that was to be replaced must be there until the
new one has a checkpoint; an export and a comparison that are done again must be as if nothing had happened. For hours rather than
for the tests, which kill at a few chosen moments.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from experiments.training.run_dir import has_checkpoint
from tests.hostile.forked import SMALL, TIMES, Ended, in_child, left_by, weights, write_corpus

ASIDE = ("", "replaced", ".moving.tmp")
"""Where the files of a run may be that is being replaced."""


@dataclass(frozen=True)
class Undisturbed:
    """A command that nothing disturbed: what it left, and how long it took."""

    left: object
    seconds: float


class Trials:
    """Kills in `folder`, drawn with `seed`."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.rng = folder, random.Random(seed)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        corpus = str(write_corpus(folder / "text.jsonl"))
        self.given = ("--dataset", corpus, *SMALL)
        self.compared = (
            *("--estimators", "uniform", "sfe", "--seeds", "0", "--dataset", corpus),
            *_without("--estimator"),
        )
        old = ("--seed", "1", "--out", str(folder / "old"))
        self._done("run", *self.given, *old)
        # Not the first one, which compiles.
        self.whole = self._undisturbed("run", left_by, *self.given, "--out", str(folder / "whole"))
        self.exported = self._undisturbed("export", _exported, str(folder / "whole"), "--to", str(folder / "exported"))
        self.evaluated = (
            str(folder / "whole"),
            *("--split", "all", "--context", "16", "--stride", "8", "--samples", "2"),
        )
        self.scored = self._undisturbed("evaluate", _evaluation, *self._evaluation_in(folder / "scored"))
        self._done("compare", *self.compared, "--out", str(folder / "warm"))
        self.table = self._undisturbed("compare", _table, *self.compared, "--out", str(folder / "table"))

    def run(self) -> Iterator[str]:
        """A new run."""
        out = self._out()
        yield self._killed("run", self.whole, *self.given, "--out", str(out))
        again = ("--resume",) if (out / "config.json").exists() else self.given
        self._done("run", *again, "--out", str(out))
        _same(left_by(out), self.whole.left)

    def overwrite(self) -> Iterator[str]:
        """A run that replaces another."""
        out, old = self._out(), self.folder / "old"
        shutil.copytree(old, out)
        command = (*self.given, "--overwrite", "--out", str(out))
        yield self._killed("run", self.whole, *command)
        files = [path.relative_to(old) for path in old.rglob("*") if path.is_file()]
        kept = all(any(_equal(out / place / path, old / path) for place in ASIDE) for path in files)
        if not kept and not has_checkpoint(out):
            raise AssertionError("neither the old run nor a checkpoint of the new one is there")
        there = json.loads(text) if (text := _text(out / "config.json")) else {}
        self._done("run", *(("--resume", "--out", str(out)) if there.get("seed") == 0 else command))
        _same(left_by(out), self.whole.left)

    def export(self) -> Iterator[str]:
        """An export."""
        out = self._out()
        command = (str(self.folder / "whole"), "--to", str(out))
        yield self._killed("export", self.exported, *command)
        complete = (out / "model.safetensors").exists() and not (out / ".export.tmp").exists()
        if not complete:
            self._done("export", *command)
        _same(_exported(out), self.exported.left)

    def evaluate(self) -> Iterator[str]:
        """An evaluation, with everything that it can write."""
        out = self._out()
        command = self._evaluation_in(out)
        yield self._killed("evaluate", self.scored, *command)
        # What was written already is not written over unless that is asked for.
        written = (out / "bytes.parquet").exists() or any((out / "page").glob("[!.]*"))
        self._done("evaluate", *(("--overwrite",) if written else ()), *command)
        _same(_evaluation(out), self.scored.left)

    def compare(self) -> Iterator[str]:
        """A comparison, whose runs are killed with it, or go on alone and are waited for."""
        out = self._out()
        command = (*self.compared, "--out", str(out))
        # Most of its time is that of its runs.
        moment = self.rng.uniform(0.0, self.table.seconds)
        too = self.rng.random() < 0.5
        pid = _start("compare", command, self.folder / "log")
        yield f"after {moment:.2f} s" + (" with its runs" if too else "")
        time.sleep(moment)
        # The comparison, and not its runs, which have sessions of their own.
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        for child in _processes(out):
            if too:
                os.kill(child, signal.SIGKILL)
        while _processes(out):
            time.sleep(0.1)
        self._done("compare", *command)
        _same(_table(out), self.table.left)

    def _evaluation_in(self, out: Path) -> tuple[str, ...]:
        out.mkdir()
        files = ("--per-byte", str(out / "bytes.parquet"), "--report", str(out / "page"), "--cache", str(out))
        return *self.evaluated, *files

    def _killed(self, name: str, whole: Undisturbed, *command: str) -> str:
        moment = self.rng.uniform(0.0, whole.seconds)
        ended = in_child(name, command, self.folder / "log", killed_after=moment)
        if ended.code not in (-signal.SIGPROF, 0):
            raise AssertionError(f"the command ended with {ended.code}: {ended.output[-400:]}")
        return f"after {moment:.2f} s of CPU time" + ("" if ended.code else ", too late")

    def _done(self, name: str, *command: str) -> Ended:
        ended = in_child(name, command, self.folder / "log")
        if ended.code:
            raise AssertionError(f"{name} {' '.join(command)} ended with {ended.code}: {ended.output[-600:]}")
        return ended

    def _undisturbed(self, name: str, left: Callable[[Path], object], *command: str) -> Undisturbed:
        begun = time.monotonic()
        seconds = self._done(name, *command).seconds
        return Undisturbed(left(Path(command[-1])), time.monotonic() - begun if name == "compare" else seconds)

    def _out(self) -> Path:
        out = self.folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        return out


KINDS: tuple[Callable[[Trials], Iterator[str]], ...] = (
    *(Trials.run, Trials.overwrite, Trials.export, Trials.evaluate, Trials.overwrite),
    *(Trials.run, Trials.evaluate, Trials.run, Trials.overwrite, Trials.compare),
)


def _without(flag: str) -> list[str]:
    place = SMALL.index(flag)
    return [*SMALL[:place], *SMALL[place + 2 :]]


def _start(name: str, command: tuple[str, ...], log: Path) -> int:
    """The process that does a command."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            in_child(name, command, log)
        finally:
            os._exit(0)
    return pid


def _processes(folder: Path) -> list[int]:
    """The processes at work on a folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if (
            entry.name.isdigit()
            and int(entry.name) != os.getpid()
            and f"{folder}/".encode() in _bytes(entry / "cmdline")
        ):
            found.append(int(entry.name))
    return found


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _text(path: Path) -> str:
    return _bytes(path).decode()


def _equal(one: Path, other: Path) -> bool:
    return one.is_file() and filecmp.cmp(one, other, shallow=False)


def _exported(folder: Path) -> object:
    names = sorted(path.name for path in folder.iterdir())
    return names, weights(folder), (folder / "README.md").read_text(), (folder / "config.json").read_text()


def _evaluation(folder: Path) -> object:
    names = sorted(path.name for path in (folder / "page").iterdir())
    found = json.loads((folder / "page" / "evaluation.json").read_text())
    # The settings say where to write.
    return names, {**found, "settings": None}, (folder / "bytes.parquet").read_bytes()


def _table(folder: Path) -> object:
    """The table of a comparison without what depends on time and place."""

    def plain(value: object) -> object:
        if isinstance(value, dict):
            return {name: plain(inner) for name, inner in value.items() if name not in (*TIMES, "out", "dataset")}
        return [plain(inner) for inner in value] if isinstance(value, list) else value

    return plain(json.loads((folder / "table.json").read_text()))


def _same(found: object, expected: object) -> None:
    if found != expected:
        differing = expected
        if isinstance(found, dict) and isinstance(expected, dict):
            differing = {name: (found.get(name), value) for name, value in expected.items() if found.get(name) != value}
        raise AssertionError(f"it left something else: {str(differing)[:600]}")


def main() -> int:
    """Prints every kill, and returns 1 if one did harm."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path(".cache/kills"))
    given = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    trials, failed = Trials(given.folder.absolute(), given.seed), 0
    print(
        f"a run takes {trials.whole.seconds:.1f} s of CPU time, an export {trials.exported.seconds:.1f} s", flush=True
    )
    for number in range(given.kills):
        kind, moment = KINDS[number % len(KINDS)], ""
        try:
            for moment in kind(trials):
                print(f"{number}: {kind.__name__} killed {moment}", flush=True)
        except AssertionError as error:
            failed += 1
            print(f"  FAILED: {error}", flush=True)
            shutil.copytree(trials.folder / "out", trials.folder / f"failed-{number}", dirs_exist_ok=True)
    print(f"{given.kills} kills, {failed} did harm")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
