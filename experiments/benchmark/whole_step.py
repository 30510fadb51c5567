"""Compiles a whole training step for a GPU that is not there and says what it needs: a program of its own, one target each.

`experiments.bench compile` starts it in the right environment: `python -m experiments.benchmark.whole_step REQUEST.json`.
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

from experiments.benchmark.deviceless import ENVIRONMENT, TARGETS, compile_for, machine_program, mesh_of, missing
from experiments.benchmark.roofline import Share, kernels_of, shares
from experiments.benchmark.shapes import shapes_of
from experiments.config.errors import ConfigError
from experiments.config.files import from_json, to_json
from experiments.config.settings import RunConfig
from experiments.training.capacity import rated_capacities
from experiments.training.step import fresh_state
from experiments.training.trainer import Trainer

FLAGS = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
"""Nothing can be timed on a GPU that is not there, so that products go to cuBLAS, whose kernels the roofline can read."""


@dataclass(frozen=True)
class StepReport:
    """A training step of `config` on one GPU: seconds to compile, bytes of memory (parameters and moments, and at the peak),
    its kernels part by part, how many of them are this library's own, and loops, which are counted as one pass each."""

    target: str
    compile_seconds: float
    state_bytes: int
    peak_bytes: int
    pallas: int
    loops: int
    parts: tuple[Share, ...]


def compile_step(config: RunConfig, target: str) -> StepReport:
    """Compile in this process, which must have been started for it. Raises `ConfigError` for estimators read off data."""

    if config.estimator in ("entropy", "bpe", "bpe-distilled"):
        raise ConfigError(f"--estimator {config.estimator} is built from data, of which a compiler sees none")
    model = shapes_of(config)
    routers = [estimator.router for estimator in model.stage.estimators]
    if routers and routers[0].rate is None:
        raise ConfigError(f"--estimator {config.estimator} has a rate of the data's own, of which a compiler sees none")
    # One capacity, the largest: kernels of branches that may not be taken would have to be weighed.
    trainer = Trainer.of(config, model, rated_capacities(config, routers[0])[-1:] if routers else (config.length,))
    step, state = trainer.step, eqx.filter_eval_shape(lambda: fresh_state(trainer.params, trainer.optimizer))
    shape = config.batch, config.length
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype)
        for name, dtype in {"bytes": jnp.uint8, "segments": jnp.int32, "mask": bool}.items()
    }
    gpu = TARGETS[target]
    started = time.perf_counter()
    compiled = compile_for(
        mesh_of(gpu),
        lambda state, batch, key: step(state, batch, jax.random.wrap_key_data(key)),
        state,
        batch,
        jax.ShapeDtypeStruct((2,), jnp.uint32),
        donate=0,
    )
    seconds = time.perf_counter() - started
    memory = compiled.memory_analysis()
    assert memory is not None
    kept = memory.output_size_in_bytes - memory.alias_size_in_bytes
    kernels = kernels_of(machine_program(compiled))
    return StepReport(
        target=gpu.name,
        compile_seconds=seconds,
        state_bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)),
        peak_bytes=memory.argument_size_in_bytes + memory.temp_size_in_bytes + kept,
        pallas=sum(kernel.kind.startswith("mosaic_gpu") for kernel in kernels),
        loops=sum(kernel.kind == "while" for kernel in kernels),
        parts=tuple(shares(kernels, gpu)),
    )


def compile_elsewhere(config: RunConfig, target: str) -> StepReport:
    """`compile_step` in a process of its own. Raises `ConfigError` where the compiler is missing or gives up."""
    if lack := missing():
        raise ConfigError(lack)
    with tempfile.TemporaryDirectory() as folder:
        request, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        request.write_text(json.dumps({"config": to_json(config), "target": target, "answer": str(answer)}))
        environment = {
            **os.environ,
            **ENVIRONMENT,
            "JAX_TRACEBACK_FILTERING": "off",
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}",
        }
        command = [sys.executable, "-m", "experiments.benchmark.whole_step", str(request)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if not answer.is_file():
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise ConfigError(f"compiling for {target} failed: {lines[-1]}")
        found = json.loads(answer.read_text())
    if "error" in found:
        raise ConfigError(found["error"])
    parts = tuple(Share(**part) for part in found.pop("parts"))
    return StepReport(**found, parts=parts)


def main(path: str) -> None:
    """Answer one request."""
    request = json.loads(Path(path).read_text())
    try:
        found = dataclasses.asdict(compile_step(from_json(request["config"], path), request["target"]))
    except ConfigError as error:
        found = {"error": str(error)}
    Path(request["answer"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
