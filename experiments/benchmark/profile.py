"""The costliest kernels of a program, by name, from a profile of it."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.profiler import ProfileData

from experiments.benchmark.timing import Work


@dataclass(frozen=True)
class ProfiledKernel:
    """A kernel of a program: its launches and milliseconds in each call, and its share of the time of all kernels."""

    name: str
    launches: float
    ms: float
    share: float


def costliest(work: Work, calls: int, count: int = 10) -> list[ProfiledKernel]:
    """The `count` kernels of `work` that take most time, in a profile of some calls. It is called once before.

    Raises `ProfileError` where there is a GPU and the profile has nothing of it.
    """
    jax.block_until_ready(work())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                jax.block_until_ready(work())
        files = sorted(Path(folder).rglob("*.xplane.pb"))
        profiles = [ProfileData.from_file(str(file)) for file in files]
        on_gpu = jax.default_backend() == "gpu"
        durations = [one for profile in profiles for one in kernel_durations(profile, on_gpu=on_gpu)]
    return summed(durations, calls)[:count]


class ProfileError(Exception):
    """A profile lacks what was to be measured."""


def kernel_durations(profile: ProfileData, *, on_gpu: bool) -> Iterator[tuple[str, float]]:
    """The name and the nanoseconds of every kernel in a profile: of what runs in the streams of the GPUs; without a GPU, of the
    operations that XLA's threads run. Raises `ProfileError` for a profile of a GPU that has nothing of it."""
    planes = list(profile.planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    if on_gpu and not devices:
        raise ProfileError(
            "the profile has nothing of the GPU; NVIDIA's CUPTI, which comes with jax[cuda13], is missing, or only "
            "administrators may use it (NVreg_RestrictProfilingToAdminUsers)"
        )
    for line in (line for plane in (devices if on_gpu else planes) for line in plane.lines):
        on_stream = (line.name or "").startswith("Stream")
        for event in line.events:
            # On a CPU, events of XLA are between those of the host's functions.
            counts = on_stream if on_gpu else any(name == "hlo_op" for name, _ in event.stats)
            if counts:
                yield event.name, event.duration_ns


def summed(durations: list[tuple[str, float]], calls: int) -> list[ProfiledKernel]:
    """The kernels with these durations in nanoseconds over some calls, the costliest first."""
    launches: Counter[str] = Counter()
    time: dict[str, float] = {}
    for name, duration in durations:
        launches[name] += 1
        time[name] = time.get(name, 0.0) + duration
    whole = sum(time.values())
    return [
        ProfiledKernel(name, launches[name] / calls, spent / calls / 1e6, spent / whole)
        for name, spent in sorted(time.items(), key=lambda one: -one[1])
    ]
