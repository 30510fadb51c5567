"""A disk that fills at every change of a run's files in turn: `python -m tests.hostile.full_disk`. Needs Linux and a C compiler.

From the n-th change on the folder and those beside it are full; folders for temporary files are not. The run must end with one
sentence and exit code 1, and once there is room again it must go on, and leave what an undisturbed one leaves.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.hostile.forked import SMALL, in_child, left_by, write_corpus

SOURCE = Path(__file__).with_suffix(".c")


def _with_shim(folder: Path) -> None:
    """Start this process again with the functions of the C library in between."""
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "full_disk.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE), "-ldl"], check=True)
    environment = {**os.environ, "LD_PRELOAD": str(library), "JAX_PLATFORMS": "cpu"}
    os.execve(sys.executable, [sys.executable, "-m", "tests.hostile.full_disk", *sys.argv[1:]], environment)


def _trial(
    folder: Path, given: list[str], change: int, expected: dict[str, object], overwrite: bool
) -> tuple[str, list[str]]:
    """What the run said, and what was wrong."""
    disk, log, shim = folder / "disk", folder / "log", ctypes.CDLL(None)
    out, elsewhere = disk / "run", folder / "elsewhere"
    for path in (disk, elsewhere):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
    if overwrite:
        shutil.copytree(folder / "old", out)

    def fill() -> None:
        os.environ["TMPDIR"] = str(elsewhere)
        shim.disk_full_from(str(disk).encode(), ctypes.c_long(change))

    flags = ["--overwrite"] if overwrite else []
    ended = in_child("run", [*given, *flags, "--out", str(out)], log, before=fill)
    if ended.code == 0 and left_by(out) == expected:
        # The number of changes that a checkpoint takes differs by a few.
        return "it was done before the disk was full", []
    errors = [line for line in ended.output.splitlines() if line.startswith("error: ")]
    wrong = []
    if ended.code != 1 or len(errors) != 1 or "Traceback" in ended.output:
        wrong.append(f"it ended with {ended.code}: {ended.output[-1500:]}")
    error = errors[0] if errors else ""
    old = overwrite and (out / "config.json").exists() and '"seed": 1' in (out / "config.json").read_text()
    goes_on = (out / "config.json").exists() and not old
    if re.search("with --resume(?! --out)", error) and not goes_on:
        wrong.append(f"nothing to resume: {error}")
    again = in_child("run", [*(["--resume"] if goes_on else [*given, *flags]), "--out", str(out)], log)
    if again.code or left_by(out) != expected:
        wrong.append(f"once there was room: {again.code}, {again.output[-600:]}")
    if rescued := re.search(r"--resume --out (\S*elsewhere\S*?)(?:,|$)", error):
        again = in_child("run", ["--resume", "--out", rescued[1]], log)
        # Of the checkpoints there is the one that was rescued.
        found = left_by(Path(rescued[1])) if again.code == 0 else {}
        if {**found, "checkpoints": expected["checkpoints"]} != expected:
            wrong.append(f"from where it was rescued: {again.code}, {again.output[-600:]}")
    return error, wrong


def main() -> int:
    """Prints what every run said, and returns 1 if one was not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=1, help="the first change to try")
    parser.add_argument("--every", type=int, default=1, help="try every so many changes")
    parser.add_argument("--folder", type=Path, default=Path(".cache/full_disk"))
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    if "full_disk.so" not in os.environ.get("LD_PRELOAD", ""):
        _with_shim(folder)
    given = ["--dataset", str(write_corpus(folder / "text.jsonl")), *SMALL]
    counted = folder / "counted"

    shim = ctypes.CDLL(None)
    shim.disk_changes.restype = ctypes.c_long
    where = str(folder / "whole").encode()

    for name in ("old", "whole"):
        shutil.rmtree(folder / name, ignore_errors=True)
    in_child("run", [*given, "--seed", "1", "--out", str(folder / "old")], folder / "log")
    in_child(
        "run",
        [*given, "--out", str(folder / "whole")],
        folder / "log",
        before=lambda: shim.disk_full_from(where, ctypes.c_long(0)),
        after=lambda: counted.write_text(str(shim.disk_changes())),
    )
    expected, total, failed = left_by(folder / "whole"), int(counted.read_text()), 0
    print(f"{total} changes", flush=True)
    changes = range(arguments.first, total + 1, arguments.every)
    for change in changes:
        error, wrong = _trial(folder, given, change, expected, overwrite=bool(change // arguments.every % 2))
        failed += bool(wrong)
        print(f"{change}: {error}", *(f"  FAILED: {one}" for one in wrong), sep="\n", flush=True)
    print(f"{failed} of {len(changes)} runs were not as they must be")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
