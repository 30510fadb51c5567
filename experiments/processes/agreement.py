"""What all processes have to have alike before they train together."""

from __future__ import annotations

import secrets
import time
from pathlib import Path

from experiments.config.errors import ConfigError
from experiments.processes.processes import AbstractProcesses

_TRIAL = ".shared.tmp"


def require_shared(folder: Path, processes: AbstractProcesses, patience: float = 20.0) -> None:
    """Raise `ConfigError` naming a process that does not see the `folder` that process 0 sees, `patience` seconds after that one
    has put a file there: file systems of networks take a while."""
    if processes.count == 1:
        return
    own, trial = secrets.token_hex(8), folder / _TRIAL
    if processes.leads:
        trial.write_text(own)
    written, there = processes.said(f"{own} {folder}")[0].split(" ", 1)
    ends = time.monotonic() + patience
    while not (seen := _content(trial) == written) and time.monotonic() < ends:
        time.sleep(0.1)
    found = processes.said("" if seen else "no")
    if processes.leads:
        trial.unlink(missing_ok=True)
    if blind := [str(index) for index, answer in enumerate(found) if answer]:
        raise ConfigError(
            f"process {', '.join(blind)} does not see the folder {there} of process 0: --out must be on a file system that all "
            "machines share"
        )


def _content(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
