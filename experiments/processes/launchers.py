"""Where a process finds the others: what its flags say, or the launcher that started it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from experiments.config.errors import ConfigError, one_line
from experiments.config.sections import DistributedConfig


@dataclass(frozen=True)
class Place:
    """A process among `processes`, which meet at `coordinator` (HOST:PORT, of process 0). `local_devices`: the devices of its
    machine that are its own; None for all."""

    coordinator: str
    processes: int
    index: int
    local_devices: tuple[int, ...] | None = None


def place_of(config: DistributedConfig, environment: Mapping[str, str]) -> Place | None:
    """The place of this process; None where it is the only one, and nothing is asked of a cluster then.

    `environment`: its variables, which tell whether a launcher started several. What that one says is read by JAX. Raises
    `ConfigError` where a launcher was named, or has started several processes, and does not say where they meet.
    """
    if config.coordinator is not None and config.processes is not None and config.index is not None:
        place = Place(config.coordinator, config.processes, config.index)
        return place if place.processes > 1 else None
    launcher = started_by(environment) if config.launcher == "auto" else config.launcher
    if launcher in (None, "none"):
        return None
    return _detected(launcher, config, environment)


def started_by(environment: Mapping[str, str]) -> str | None:
    """The launcher that has started several processes, of those that say so."""
    if _number(environment, "SLURM_STEP_NUM_TASKS") > 1 and "SLURM_PROCID" in environment:
        return "slurm"
    return "ompi" if _number(environment, "OMPI_COMM_WORLD_SIZE") > 1 else None


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    return int(value) if value.isascii() and value.isdigit() else 0


BY_FLAGS = {
    "slurm": "--distributed.processes $SLURM_NTASKS --distributed.index $SLURM_PROCID",
    "ompi": "--distributed.processes $OMPI_COMM_WORLD_SIZE --distributed.index $OMPI_COMM_WORLD_RANK",
    "k8s": "--distributed.processes N --distributed.index $JOB_COMPLETION_INDEX",
}
"""How the variables of a launcher are given as flags."""


def _alone_on_its_machine(environment: Mapping[str, str]) -> bool:
    """Whether a launcher started one process on each machine."""
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    return re.fullmatch(r"1(\(x\d+\))?", tasks) is not None or environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"


def _detected(launcher: str, config: DistributedConfig, environment: Mapping[str, str]) -> Place | None:
    # Here, since a version of JAX may move it, which is no concern of a process that is alone.
    from jax._src.clusters import ClusterEnv

    # JAX has no name for Kubernetes, which it tries after those that have one.
    method = None if launcher == "k8s" else launcher
    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, method, round(config.wait))
        coordinator, processes, index, local = _complete(found)
    except Exception as error:  # clients of clusters raise what they like
        reason = one_line(str(error) or type(error).__name__, 200)
        raise ConfigError(
            f"--distributed.launcher {launcher}: JAX does not learn from it where the processes meet ({reason}); name "
            f"--distributed.coordinator HOST:PORT {BY_FLAGS[launcher]}"
        ) from None
    # JAX gives each process one device, whose number is that of the process on its machine.
    local = None if _alone_on_its_machine(environment) else local
    return Place(coordinator, processes, index, local) if processes > 1 else None


def _complete(
    found: tuple[str | None, int | None, int | None, Sequence[int] | None],
) -> tuple[str, int, int, tuple[int, ...] | None]:
    """What JAX found. Raises `ValueError` where something is missing."""
    coordinator, processes, index, local = found
    if coordinator is None or processes is None or index is None:
        raise ValueError("its variables are not there")
    return coordinator, processes, index, None if local is None else tuple(local)
