"""Ahead-of-time compilation of a whole training step for a GPU, with its memory and estimated time.

Each compilation is a process of its own, which `experiments.bench compile` starts in the right environment:
`python -m experiments.benchmark.whole_step REQUEST.json`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from experiments.benchmark.collectives import KINDS, Collective, CollectiveCost, collectives_of, costs_by_kind, on_paper
from experiments.benchmark.deviceless import ENVIRONMENT, TARGETS, compile_for, devices_of, missing, optimized_hlo
from experiments.benchmark.roofline import PartCost, costs_by_part, kernels_of
from experiments.benchmark.shapes import shapes_of
from experiments.config.errors import ConfigError
from experiments.config.files import from_json, to_json
from experiments.config.plugins import trusted
from experiments.config.settings import RunConfig
from experiments.training.capacity import rated_capacities
from experiments.training.placement import Placement
from experiments.training.remat import GIB
from experiments.training.step import Inputs, StepMetrics, TrainState, fresh_state
from experiments.training.trainer import Trainer

FLAGS = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
"""XLA flags without autotuning, which needs a GPU. Matrix products use cuBLAS, whose kernels `roofline` can parse."""

NOT_HERE = (*KINDS, "async-")
"""Kinds of instructions that are collectives, or wait for them."""

PREALLOCATED = 0.75
"""Share of the memory of a GPU that jax takes by default."""


@dataclass(frozen=True)
class StepReport:
    """A training step on one GPU, or on one of several.

    `state_bytes`: memory of parameters and moments. `peak_bytes`: peak memory. `pallas`: number of kernels of this library.
    `loops`: number of loops; each counts as one iteration. `parts`: costs by part of the step, without collectives. `mesh`: the
    sizes of its axes. `exchanged`: collectives by kind; `paper`: the same, of parameters and gradients, as counted without a
    compiler.
    """

    target: str
    compile_seconds: float
    state_bytes: int
    peak_bytes: int
    pallas: int
    loops: int
    parts: tuple[PartCost, ...]
    memory: str | None = None
    """What --unet.remat auto decided, and why."""
    mesh: tuple[int, int, int] = (1, 1, 1)
    exchanged: tuple[CollectiveCost, ...] = ()
    paper: tuple[CollectiveCost, ...] = ()

    @property
    def moved(self) -> float:
        """Bytes that the GPU sends."""
        return sum(one.moved for one in self.exchanged)


def compile_step(config: RunConfig, target: str) -> StepReport:
    """Compile in this process, which must have the right environment. Raises `ConfigError` for estimators that need data."""
    if config.first.needs_text:
        raise ConfigError(f"--estimator {config.estimator} is built from data, which compilation does not have")
    gpu = TARGETS[target]
    if config.unet.memory is None:
        config = dataclasses.replace(
            config, unet=dataclasses.replace(config.unet, memory=PREALLOCATED * gpu.memory / GIB)
        )
    model = shapes_of(config)
    routers = [estimator.router for estimator in model.stage.estimators]
    if routers and routers[0].rate is None:
        raise ConfigError(
            f"--estimator {config.estimator} has a rate of the data's own, which compilation does not have"
        )
    # Only the largest capacity: kernels in branches for other capacities would need weights.
    capacities = rated_capacities(config, routers[0])[-1:] if routers else (config.length,)
    count = config.devices or config.mesh.named
    placement = Placement.of(dataclasses.replace(config, devices=None), devices_of(gpu, count))
    shape = tuple(placement.mesh.shape.values())
    config = dataclasses.replace(config, devices=None, mesh=dataclasses.replace(config.mesh, data=shape[0]))
    # What runs in kernels, and so what has to be kept for the backward pass, follows from the default device.
    with jax.default_device(placement.mesh.devices.flat[0]):
        trainer = Trainer.of(config, model, capacities)
    started = time.perf_counter()
    compiled, state = _compiled(trainer, placement)
    seconds = time.perf_counter() - started
    memory = compiled.memory_analysis()
    assert memory is not None
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    program = optimized_hlo(compiled)
    kernels = [kernel for kernel in kernels_of(program) if not kernel.kind.startswith(NOT_HERE)]
    return StepReport(
        target=gpu.name,
        compile_seconds=seconds,
        state_bytes=sum(leaf.bytes_per_device for leaf in placement.leaves(state)),
        peak_bytes=memory.argument_size_in_bytes + memory.temp_size_in_bytes + outputs,
        pallas=sum(kernel.kind.startswith("mosaic_gpu") for kernel in kernels),
        loops=sum(kernel.kind == "while" for kernel in kernels),
        parts=tuple(costs_by_part(kernels, gpu)),
        memory=None if trainer.memory is None else trainer.memory.note,
        mesh=shape,
        exchanged=tuple(costs_by_kind(collectives_of(program))),
        paper=tuple(costs_by_kind(_on_paper(trainer, placement))),
    )


def _compiled(trainer: Trainer, placement: Placement) -> tuple[jax.stages.Compiled, PyTree[jax.ShapeDtypeStruct]]:
    """The step of a trainer, compiled for the devices of a placement, and the shapes of the state that it takes."""

    def placed(leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    state = eqx.filter_eval_shape(lambda: fresh_state(trainer.params, trainer.optimizer))
    state = jax.tree.map(placed, state, placement.shardings(state))
    step, rows = trainer.step_on(placement), (trainer.config.batch, trainer.config.length)
    batch = {
        name: jax.ShapeDtypeStruct(rows, dtype, sharding=placement.by_row)
        for name, dtype in {"bytes": jnp.uint8, "segments": jnp.int32, "mask": bool}.items()
    }

    def with_key(state: TrainState, batch: Inputs, key: Array) -> tuple[TrainState, StepMetrics]:
        return step(state, batch, jax.random.wrap_key_data(key))

    key = jax.ShapeDtypeStruct((2,), jnp.uint32)
    return compile_for(placement.mesh, with_key, state, batch, key, donate=0), state


def _on_paper(trainer: Trainer, placement: Placement) -> list[Collective]:
    config, width = trainer.config, jnp.dtype(trainer.config.unet.compute).itemsize
    again = config.unet.always_remat if trainer.memory is None else trainer.memory.remat
    widths = width, 4 if again else width
    return on_paper(placement.leaves(trainer.params), placement.mesh.shape, widths=widths)


def compile_in_subprocess(config: RunConfig, target: str) -> StepReport:
    """Run `compile_step` in a new process. Raises `ConfigError` if the compiler is missing or fails."""
    if problem := missing():
        raise ConfigError(problem)
    with tempfile.TemporaryDirectory() as folder:
        request, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        asked = {"config": to_json(config), "plugins": trusted(config), "target": target, "answer": str(answer)}
        request.write_text(json.dumps(asked))
        environment = {
            **os.environ,
            **ENVIRONMENT,
            "JAX_TRACEBACK_FILTERING": "off",
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}",
        }
        command = [sys.executable, "-m", "experiments.benchmark.whole_step", str(request)]
        process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if not answer.is_file():
            lines = process.stderr.strip().splitlines() or [f"exit code {process.returncode}"]
            raise ConfigError(f"compiling for {target} failed: {lines[-1]}")
        result = json.loads(answer.read_text())
    if "error" in result:
        raise ConfigError(result["error"])
    parts = tuple(PartCost(**part) for part in result.pop("parts"))
    exchanged, paper = (tuple(CollectiveCost(**one) for one in result.pop(name)) for name in ("exchanged", "paper"))
    mesh = tuple(result.pop("mesh"))
    return StepReport(**result, mesh=mesh, parts=parts, exchanged=exchanged, paper=paper)


def main(path: str) -> None:
    """Read a request from the file at `path`, compile, and write the result or the error to its answer file."""
    request = json.loads(Path(path).read_text())
    try:
        result = dataclasses.asdict(
            compile_step(from_json(request["config"], path, request["plugins"]), request["target"])
        )
    except ConfigError as error:
        result = {"error": str(error)}
    Path(request["answer"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])
