"""All that is worth measuring on a GPU, in one command and within so many minutes."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, TextIO

from estimators.bounds import Count, Length, Sequences, Within
from experiments.benchmark.device.asked import Asked, Compute
from experiments.benchmark.device.gathered import Gathered, Part
from experiments.benchmark.device.worker import Request
from experiments.benchmark.measurement import AbstractMeasurement
from experiments.config.errors import require, require_bounds
from experiments.config.presets import PRESETS
from experiments.reporting.display import Display
from experiments.training.run_dir import json_text, make_folder, write_atomically
from unet.config import UNetConfig
from unet.decoding.generate import CHUNK

GRACE = 2.0
"""Seconds that a part has to end by itself when its time is over."""
POLL = 0.25
"""Seconds between looks at what a part has written."""


@dataclass(frozen=True, kw_only=True)
class Gpu(AbstractMeasurement):
    """All of it on one GPU: kernels against XLA, training steps with and without them, PyTorch, generation, a profile. The report
    is written after every result, so that one that is stopped has what was done."""

    cpu_devices: ClassVar[int] = 1
    minutes: Annotated[float, Within(0.01, 10_000)] = 8.0
    """Time for all of it, which is kept: what does not fit is skipped, and the report says so."""
    out: Path = Path("performance-gpu.md")
    """The report; the same as JSON is beside it."""
    models: tuple[str, ...] = ("18M", "90M", "147M")
    """Presets to measure, smallest first."""
    dataset: str = "stdlib"
    """Text to work on: anything that --dataset of experiments.run takes."""
    batch: Sequences | None = 16
    """Sequences per step."""
    length: Length | None = None
    """Bytes per sequence, instead of the preset's."""
    compute: Compute = "bfloat16"
    """Dtype of the matrix products of models."""
    rounds: Annotated[int, Within(1, 10_000)] = 5
    """Times that every alternative is measured, in turns; medians are reported."""
    calls: Count = 3
    """Calls that each measurement takes together."""
    generated: Annotated[int, Within(2 * CHUNK, 1_000_000)] = 256
    """Bytes of each text that is generated. The first of those that are written together do not count."""
    batches: tuple[Sequences, ...] = (1, 16, 64)
    """Texts that are generated together."""
    parts: tuple[str, ...] = ()
    """Parts to measure, by default all: kernels, step of MODEL, PyTorch, generation, profile, capacities, chunking, PyTorch
    chunking."""

    def __post_init__(self):
        require_bounds(self)

    @property
    def shares(self) -> dict[str, float]:
        """The parts in their order, with their shares of the time; what one leaves is for those after it."""
        all_steps = 0.34
        steps = {f"step of {name}": all_steps / len(self.models) for name in reversed(self.models)}
        shares = {"kernels": 0.2, **steps, "PyTorch": 0.16, "generation": 0.12, "profile": 0.06, "capacities": 0.08}
        shares |= {"chunking": 0.02, "PyTorch chunking": 0.02}
        return {name: share for name, share in shares.items() if not self.parts or name in self.parts}

    @property
    def asked(self) -> Asked:
        """What the parts are asked to measure."""
        return Asked(
            models=self.models,
            dataset=self.dataset,
            batch=self.batch,
            length=self.length,
            compute=self.compute,
            rounds=self.rounds,
            calls=self.calls,
            generated=self.generated,
            batches=self.batches,
        )

    def check(self) -> None:
        """Raises `ConfigError` for what cannot be measured."""
        for name in self.models:
            known = [preset for preset, run in PRESETS.items() if isinstance(run.unet, UNetConfig)]
            require(name in known, f"--models {name} is none of {', '.join(known)}")
        require(bool(self.models), "--models needs the name of a preset")
        unknown = [part for part in self.parts if part not in dataclasses.replace(self, parts=()).shares]
        require(not unknown, f"--parts {' '.join(unknown)}: there is no such part")
        require(self.out.suffix == ".md", f"--out {self.out}: name a file that ends with .md")

    def measure(self, display: Display) -> Mapping[str, object]:
        """Each part in a process of its own, which this one ends in time."""
        self.check()
        make_folder(self.out.parent, "--out in")
        started, shares = time.time(), self.shares
        gathered = Gathered([Part(name) for name in shares], {"settings": self._changed})
        with tempfile.TemporaryDirectory() as folder:
            until, whole = 0.0, sum(shares.values())
            for name, share in shares.items():
                until += share / whole
                display.note(f"{name}; until {until * self.minutes:.1f} minutes at most")
                # Some seconds are left for the process to end.
                deadline = started + 60 * self.minutes * until - GRACE - 2 * POLL
                self._part(gathered, name, Path(folder), deadline)
        gathered.notes.append(f"\nAll of it took {(time.time() - started) / 60:.1f} of {self.minutes:g} minutes.")
        self._write(gathered)
        display.note(f"{gathered.markdown()}\nwritten to {self.out} and {self.out.with_suffix('.json')}")
        return {"device": gathered.device, "parts": gathered.parts}

    @property
    def _changed(self) -> str:
        """The settings that are not the defaults, for the report."""
        values = ((one.name, getattr(self, one.name), one.default) for one in dataclasses.fields(self))
        return ", ".join(f"{name} {value}" for name, value, default in values if value != default) or "the defaults"

    def _part(self, gathered: Gathered, name: str, folder: Path, deadline: float) -> None:
        part = gathered.part(name)
        if time.time() >= deadline:
            part.ended = "Skipped: no time was left for it"
            self._write(gathered)
            return
        lines, request = folder / f"{name}.jsonl", folder / f"{name}.request"
        lines.touch()
        request.write_text(json_text(Request(name, self.asked, lines, deadline, GRACE)))
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(folder / "programs")}
        if name.startswith("PyTorch"):
            # The card's memory is PyTorch's alone.
            environment["JAX_PLATFORMS"] = "cpu"
        with (folder / f"{name}.log").open("w+") as log, lines.open() as stream:
            process = subprocess.Popen(command(request), env=environment, stdout=log, stderr=log)
            try:
                while process.poll() is None and time.time() < deadline + GRACE:
                    self._hear(gathered, name, stream)
                    time.sleep(POLL)
            finally:
                over = process.poll() is None
                process.kill()
                process.wait()
            self._hear(gathered, name, stream)
            log.seek(0)
            incomplete = bool(part.without) or not part.begun
            part.ended = _end(process.returncode, over or time.time() >= deadline, log.read(), incomplete)
        self._write(gathered)

    def _hear(self, gathered: Gathered, name: str, stream: TextIO) -> None:
        place, line = stream.tell(), stream.readline()
        if not line:
            return
        while line.endswith("\n"):
            gathered.hear(name, json.loads(line))
            place, line = stream.tell(), stream.readline()
        # A line that is still being written is read with the rest of it.
        stream.seek(place)
        self._write(gathered)

    def _write(self, gathered: Gathered) -> None:
        content = {"settings": dataclasses.asdict(self), "device": gathered.device, "parts": gathered.parts}
        write_atomically(
            self.out.with_suffix(".json"), json_text({**content, "against PyTorch": gathered.against_torch})
        )
        write_atomically(self.out, gathered.markdown())


def command(request: Path) -> Sequence[str]:
    """The command line of a part."""
    return [sys.executable, "-m", "experiments.benchmark.device.worker", str(request)]


def _end(code: int, over: bool, log: str, incomplete: bool) -> str | None:
    """How a part ended, where that has to be said."""
    if over:
        return "The time of this part was over" if incomplete else None
    if code == 0:
        return None
    last = next((line for line in reversed(log.strip().splitlines()) if line.strip()), "it said nothing")
    return f"This part broke off with exit code {code}: {last.strip()[:300]}"
