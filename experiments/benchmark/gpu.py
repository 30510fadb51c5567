"""All that is worth measuring on a GPU, in one command and within so many minutes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
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
from experiments.config.settings import RunConfig, transformer_shape
from experiments.reporting.display import Display
from experiments.training.run_dir import json_text, make_folder, write_atomically
from unet.config import UNetConfig
from unet.decoding.generate import CHUNK

GRACE = 2.0
"""Seconds that a part has to end by itself when its time is over."""
STEPS = 0.34
"""Share of the time for the training steps of all models."""
POLL = 0.25
"""Seconds between looks at what a part has written."""


@dataclass(frozen=True, kw_only=True)
class Gpu(AbstractMeasurement):
    """All of it on one GPU: kernels against XLA, training steps with and without them, PyTorch, generation, a profile. The report
    is written after every result, so that one that is stopped has what was done."""

    cpu_devices: ClassVar[int] = 1
    minutes: Annotated[float, Within(0.01, 10_000.0)] = 8.0
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
    rounds: Annotated[int, Within(1, 10_000)] = 7
    """Times that every alternative is measured, in turns; medians are reported, from 6 on with their intervals."""
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
        """The parts in their order, with their shares of the time; what one leaves is for those after it. Of the time for steps
        of models each model has a half evenly, since all are compiled, and the other by its size."""
        sizes = {name: _work(self.asked.config(name)) for name in reversed(self.models)}
        steps = {
            f"step of {name}": STEPS * (0.5 / len(sizes) + 0.5 * size / sum(sizes.values()))
            for name, size in sizes.items()
        }
        shares = {**steps, "kernels": 0.2, "PyTorch": 0.16, "generation": 0.12, "profile": 0.06, "capacities": 0.08}
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
        # A process that was killed may leave others that still write.
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
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
        environment = {**os.environ, **_folders(folder)}
        if name.startswith("PyTorch"):
            # The card's memory is PyTorch's alone.
            environment["JAX_PLATFORMS"] = "cpu"
        with (folder / f"{name}.log").open("w+") as log, lines.open() as stream:
            # A group of its own, so that the compilers that PyTorch starts end with it.
            process = subprocess.Popen(
                command(request), env=environment, stdout=log, stderr=log, start_new_session=True
            )
            try:
                while process.poll() is None and time.time() < deadline + GRACE:
                    self._hear(gathered, name, stream)
                    time.sleep(POLL)
            finally:
                killed = process.poll() is None
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                self._hear(gathered, name, stream)
                log.seek(0)
                # One that sees itself that its time is over ends with 0.
                over = killed or (process.returncode == 0 and time.time() >= deadline)
                part.ended = _end(process.returncode, over, log.read(), part)
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


def _folders(folder: Path) -> dict[str, str]:
    """Where a part and what it uses put their files: below `folder`, which is removed."""
    places = {
        "JAX_COMPILATION_CACHE_DIR": folder / "programs",
        "TMPDIR": folder / "temporary",
        "TORCHINDUCTOR_CACHE_DIR": folder / "inductor",
        "TRITON_CACHE_DIR": folder / "triton",
    }
    for place in places.values():
        place.mkdir(exist_ok=True)
    return {name: str(place) for name, place in places.items()}


def _work(config: RunConfig) -> float:
    """About how much a step multiplies: bytes times weights, tokens times weights. (Not `unet.flops`, which needs JAX, and JAX
    would take the memory of the GPU in this process.)"""
    shape = transformer_shape(config)
    weights = 7 * (shape.encoder_layers + shape.decoder_layers) + 16 * config.rate * shape.main_layers
    return config.bytes_per_step * shape.dim**2 * weights


def _end(code: int, over: bool, log: str, part: Part) -> str | None:
    """How a part ended, where that has to be said."""
    rows = f"after {len(part.done)} of {len(part.done) + len(part.without)} rows" if part.begun else "before it began"
    if over:
        return None if part.complete else f"The time of this part was over {rows}"
    if code == 0:
        return None
    last = next((line for line in reversed(log.strip().splitlines()) if line.strip()), "it said nothing")
    ended = f"was ended by signal {-code}" if code < 0 else f"broke off with exit code {code}"
    return f"This part {ended} {rows}: {last.strip()[:300]}"
