"""`metrics.jsonl`, one JSON object a line, in order of `step`."""

from __future__ import annotations

import abc
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import final

from experiments.config.errors import ConfigError
from experiments.config.structure import Flat, flat, parsed
from experiments.training.run_dir import METRICS
from unet.files.saving import write_atomically

Record = Mapping[str, float | int | str | None]


def read_metrics(folder: Path) -> Iterator[Flat]:
    """The records of a run in order; a last line that was cut off by a crash is left out. Raises `ConfigError` for a damaged
    line."""
    for number, line in enumerate(_lines(folder), start=1):
        try:
            yield _record(line)
        except ValueError as error:
            raise ConfigError(
                f"{folder / METRICS} is damaged in line {number} ({error}): delete that line to read the others"
            ) from None


def undamaged_metrics(folder: Path) -> tuple[list[Flat], int]:
    """The records whose lines are as they were written, and how many others there are."""
    records, damaged = [], 0
    for line in _lines(folder):
        try:
            records.append(_record(line))
        except ValueError:
            damaged += 1
    return records, damaged


def _lines(folder: Path) -> Iterator[bytes]:
    path = folder / METRICS
    if not path.exists():
        return
    with path.open("rb") as stream:
        for line in stream:
            # A power loss leaves zeros where the end of a file was not yet on the disk.
            if line.endswith(b"\n") and line.strip(b"\0\n"):
                yield line


def _record(line: bytes) -> Flat:
    """A line of the log. Raises `ValueError` for anything else."""
    record = flat(parsed(line))
    for name in ("step", "bytes"):
        if not isinstance(value := record.get(name), int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"its {name} is no whole number")
    return record


class AbstractMetricsLog(abc.ABC):
    """The log of a run that trains. `kept` are the records of the steps that it goes on from, `damaged` is the number of lines
    that cannot be read."""

    kept: list[Flat]
    damaged: int

    @abc.abstractmethod
    def write(self, record: Record) -> OSError | None:
        """Append one record and hand it to the operating system. A record that this refuses is kept, to be written with the next;
        returns the error."""

    @abc.abstractmethod
    def sync(self) -> None:
        """Return once every record is on the disk. Raises `OSError`."""

    @abc.abstractmethod
    def content(self) -> bytes:
        """All of the log, with the records that could not be written."""

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of the file."""


@final
class ForeignMetricsLog(AbstractMetricsLog):
    """The log of a run that another process writes."""

    def __init__(self, folder: Path, keep_steps: int):
        self.kept, self.damaged = _up_to(folder, keep_steps)

    def write(self, record: Record) -> OSError | None:
        return None

    def sync(self) -> None:
        pass

    def content(self) -> bytes:
        return b""

    def close(self) -> None:
        pass


@final
class MetricsLog(AbstractMetricsLog):
    """The log of a run that this process writes. Nothing is lost where it cannot be written for a while: `sync` says so."""

    def __init__(self, folder: Path, keep_steps: int):
        """Opens the log, dropping records of steps after `keep_steps`, which a resumed run writes again."""
        self.kept, self.damaged = _up_to(folder, keep_steps)
        write_atomically(folder / METRICS, "".join(json.dumps(record) + "\n" for record in self.kept))
        self._file = os.open(folder / METRICS, os.O_RDWR | os.O_APPEND)
        self._pending = b""

    def write(self, record: Record) -> OSError | None:
        plain = {name: None if _undefined(value) else value for name, value in record.items()}
        self._pending += json.dumps(plain).encode() + b"\n"
        try:
            self._write_pending()
        except OSError as error:
            return error
        return None

    def sync(self) -> None:
        self._write_pending()
        os.fsync(self._file)

    def content(self) -> bytes:
        return os.pread(self._file, os.fstat(self._file).st_size, 0) + self._pending

    def close(self) -> None:
        os.close(self._file)

    def _write_pending(self) -> None:
        while self._pending:
            self._pending = self._pending[os.write(self._file, self._pending) :]


def _up_to(folder: Path, steps: int) -> tuple[list[Flat], int]:
    """`undamaged_metrics` without what came after so many steps."""
    records, damaged = undamaged_metrics(folder)
    return [record for record in records if _step(record) <= steps], damaged


def _undefined(value: float | int | str | None) -> bool:
    """JSON has neither NaN nor infinity."""
    return isinstance(value, float) and not math.isfinite(value)


def _step(record: Record) -> int:
    step = record["step"]
    assert isinstance(step, int)
    return step
