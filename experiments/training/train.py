"""The training loop."""

from __future__ import annotations

import dataclasses
import functools
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, PRNGKeyArray

from data import Batch, DataError, Split, check_workers, load, open_batches, open_source
from estimators.keys import named_key
from experiments.config.errors import ConfigError
from experiments.config.registry import Found, build_model
from experiments.config.settings import RunConfig
from experiments.evaluation.evaluate import Validation, evaluate
from experiments.reporting.display import Display
from experiments.training.capacity import inner_capacities, training_capacities
from experiments.training.checkpoint import Checkpoints, Progress
from experiments.training.data_notes import EPOCHS, SHOWN, DataNotes, data_record, latest
from experiments.training.dropped import DroppedBoundaries
from experiments.training.initial import initial_weights
from experiments.training.optimizer import frozen_or_not, make_optimizer, multipliers
from experiments.training.prepared import find, notes, read_found, require_byte_model
from experiments.training.run_dir import CHECKPOINTS, METRICS, MetricsLog, read_metrics
from experiments.training.step import StepMetrics, TrainState, compiled, fresh_state, make_step
from unet import UNet
from unet.ops.mosaic import refusal


class NonFiniteError(Exception):
    """A loss or a gradient was not a finite number; the last checkpoint from before it stands."""


class Interrupted(Exception):
    """The run was asked to stop and has saved a checkpoint; `signal` is what asked."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number


@dataclass(frozen=True)
class Outcome:
    """A finished run: its model, what was `found` for it in the data first, its last validation, the held-out rows, and what it
    cost. `seconds` is time spent in the training loop, over all sessions; `bytes_per_second` leaves compilation and
    validation out; `epochs`: how often the data was gone through; `shown`: the share of its bytes that the protocol can show,
    of a stream of those read."""

    model: UNet
    found: Found
    validation: Validation
    split: Split
    capacity: int
    steps: int
    seconds: float
    bytes_per_second: float
    dropped: DroppedBoundaries
    parameters: int
    epochs: float | None
    shown: float | None


@dataclass(frozen=True)
class Prepared:
    """Everything that can turn out to be impossible, done before a run touches its folder: the data, the fresh model, the
    keys that its training steps and its validations draw from, and how batches and parameters are laid out on the
    devices."""

    split: Split
    found: Found
    model: UNet
    key_steps: PRNGKeyArray
    key_evaluate: PRNGKeyArray
    place_batch: Callable[[Batch], dict[str, Array]]
    replicate: Callable[[TrainState], TrainState]


def prepare(config: RunConfig) -> Prepared:
    """Read the data and build the model. Raises `DataError`, `ConfigError` and, for weights to start from, `LoadError`."""
    require_byte_model(config)
    place_batch, replicate = placement(config)
    config = with_implementation(config)
    split = load_split(config)
    check_workers(split, config.data.workers)
    key = jax.random.key(config.seed)
    found = read_found(config.folder, config) if config.resume else None
    found = find(config, split) if found is None else found
    # Compiled whole: a fraction of the time that its operations take to be compiled one by one.
    model = eqx.filter_jit(lambda: build_model(config, key, found))()
    # A run that goes on has its weights in its checkpoint.
    if config.init is not None and not config.resume:
        model = initial_weights(config.init, model)
    key_steps, key_evaluate = named_key(key, "steps"), named_key(key, "evaluation")
    return Prepared(split, found, model, key_steps, key_evaluate, place_batch, replicate)


def with_implementation(config: RunConfig) -> RunConfig:
    """The run with ragged operations in XLA where its batch is spread over devices, which kernels cannot be.

    Raises `ConfigError` where kernels were asked for by name and cannot run.
    """
    way, spread = config.unet.implementation, _device_count(config) > 1
    if way == "pallas":
        refused = "there is no CUDA device" if jax.default_backend() != "gpu" else None
        refused = refused or refusal(config.unet.widths[0], jnp.dtype(config.unet.compute))
        refused = refused or ("they run on one device only: add --devices 1" if spread else None)
        if refused:
            raise ConfigError(f"--unet.implementation pallas: kernels cannot run here: {refused}")
    if way is None and spread:
        return dataclasses.replace(config, unet=dataclasses.replace(config.unet, implementation="xla"))
    return config


def train(config: RunConfig, prepared: Prepared, folder: Path, display: Display) -> Outcome:
    """Train to the end, from the last checkpoint in `folder` if there is one.

    Raises `Interrupted` after SIGINT or SIGTERM, `NonFiniteError`, `DataError`, and `ConfigError` for a checkpoint that
    does not fit or data that has changed.
    """
    split, model, place_batch, replicate = prepared.split, prepared.model, prepared.place_batch, prepared.replicate
    for note in (*split.notes, *notes(config, prepared.found)):
        display.note(note)
    routers = [estimator.router for estimator in model.stage.estimators]
    params, static = eqx.partition(model, eqx.is_inexact_array)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(params, frozen_or_not(params))))
    optimizer = make_optimizer(config, multipliers(config, params))
    capacities = training_capacities(config, routers[0] if routers else None, split)
    capacity = capacities[-1]
    inside = inner_capacities(config, routers, capacity)
    step_function = compiled(make_step(config, static, optimizer, capacities=(capacities, *inside)))
    # Fresh trees share equal buffers between leaves, which donation forbids.
    state = replicate(jax.tree.map(jnp.copy, fresh_state(params, optimizer)))
    rows = split.held_out_rows(config.evaluation.bytes)

    def validate(state: TrainState) -> Validation:
        model: UNet = eqx.combine(jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), state.params), static)
        return evaluate(
            model, rows, batch=config.batch // config.optimizer.accumulate, capacity=capacity, key=prepared.key_evaluate
        )

    checkpoints = Checkpoints(folder / CHECKPOINTS, config.checkpoint.keep)
    progress = Progress(0, 0.0, {"step": 0, "stream": None}, split.fingerprint)
    restored = checkpoints.restore(state)
    if restored is not None:
        if restored.progress.fingerprint != split.fingerprint:
            raise ConfigError(f"{config.dataset} is not the data that {folder} was trained on: it has changed since")
        state, progress = restored.arrays, restored.progress
        display.note(f"resumed at step {progress.step} of {config.total_steps}")
    resumed_data = None if restored is None else progress.data
    batches = open_batches(split, batch=config.batch, seed=config.seed, workers=config.data.workers, state=resumed_data)
    data_notes = DataNotes(split, batches)
    log = MetricsLog(folder, progress.step)
    total, done = config.total_steps, progress.step
    started, seconds_before = time.perf_counter(), progress.seconds
    speed = Speedometer(config.bytes_per_step)
    validation: Validation | None = None
    dropped, warned = DroppedBoundaries.so_far(read_metrics(folder), len(routers)), False

    def seconds() -> float:
        return seconds_before + time.perf_counter() - started

    def save() -> None:
        checkpoints.save(state, Progress(done, seconds(), batches.state(), split.fingerprint))

    display.start(config, parameters, capacity, done)
    try:
        with _stop_requests() as requested:
            while done < total:
                try:
                    batch = next(batches)
                except DataError:
                    save()
                    raise
                state, metrics = step_function(state, place_batch(batch), jax.random.fold_in(prepared.key_steps, done))
                done += 1
                record = {
                    **_record(done, done * config.bytes_per_step, jax.device_get(metrics)),
                    **data_record(batches),
                }
                speed.tick()
                dropped.add(record)
                if not warned and (warning := dropped.early_warning):
                    display.note(f"by step {done}, {warning}")
                    warned = True
                _refuse_non_finite(record, folder)
                if done % config.log_every == 0 or done == total:
                    log.write({**record, **dropped.record, "seconds": round(seconds(), 3)})
                display.progress(done, record, speed.bytes_per_second)
                for note in data_notes.after(done, total, batches):
                    display.note(note)
                if _is_due(done, total, config.evaluation.times):
                    validation = validate(state)
                    log.write(_validation_record(done, record["bytes"], validation))
                    display.validation(done, validation)
                    speed.pause()
                if _is_due(done, total, config.checkpoint.times):
                    save()
                    speed.pause()
                if requested:
                    save()
                    name = signal.Signals(requested[0]).name
                    raise Interrupted(f"{name}: stopped at step {done} of {total} and saved {folder}", requested[0])
    finally:
        display.stop()
        log.close()
        batches.close()
        checkpoints.close()
    if validation is None:
        validation = validate(state)
    trained: UNet = eqx.combine(jax.device_get(state.params), static)
    return Outcome(
        model=jax.tree.map(lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf, trained),
        found=prepared.found,
        validation=validation,
        split=split,
        capacity=capacity,
        steps=done,
        seconds=seconds(),
        bytes_per_second=speed.bytes_per_second,
        dropped=dropped,
        parameters=parameters,
        epochs=latest(folder, EPOCHS),
        shown=latest(folder, SHOWN),
    )


class Speedometer:
    """Bytes per second over the steps since the first, which compiles, leaving out what `pause` says was something else."""

    def __init__(self, bytes_per_step: int):
        self._bytes_per_step = bytes_per_step
        self._last: float | None = None
        self._seconds = 0.0
        self._steps = 0

    def tick(self) -> None:
        """A step has ended."""
        now = time.perf_counter()
        if self._last is not None:
            self._seconds += now - self._last
            self._steps += 1
        self._last = now

    def pause(self) -> None:
        """Time since the last tick was not training."""
        self._last = time.perf_counter()

    @property
    def bytes_per_second(self) -> float:
        """NaN before the second step."""
        return self._steps * self._bytes_per_step / self._seconds if self._steps else math.nan


def load_split(config: RunConfig) -> Split:
    """The data of a run. Raises `DataError`."""
    data = config.data
    source = open_source(
        config.dataset, text_field=data.text_field, cache=data.cache, cache_bytes=round(data.cache_gib * 2**30)
    )
    return load(
        source,
        length=config.length,
        protocol=data.protocol,
        held_out_share=data.held_out,
        held_out_bytes=config.evaluation.bytes,
    )


def _device_count(config: RunConfig) -> int:
    """The devices asked for, or else as many as can share a batch evenly."""
    if config.devices is not None:
        return config.devices
    part = config.batch // config.optimizer.accumulate
    return max(n for n in range(1, len(jax.devices()) + 1) if part % n == 0)


def placement(config: RunConfig):
    """Functions that put a batch on the devices, row by row, and a tree on each of them."""
    part = config.batch // config.optimizer.accumulate
    available = jax.devices()
    count = _device_count(config)
    if count > len(available) or part % count:
        raise ConfigError(
            f"--devices {count} cannot share a batch of {part}: it must divide it, and there are {len(available)} device(s)"
        )
    mesh = jax.make_mesh((count,), ("batch",), axis_types=(AxisType.Auto,), devices=available[:count])
    by_row, everywhere = NamedSharding(mesh, PartitionSpec("batch")), NamedSharding(mesh, PartitionSpec())

    def place_batch(batch: Batch) -> dict[str, Array]:
        return jax.device_put({"bytes": batch["bytes"], "segments": batch["segments"], "mask": batch["mask"]}, by_row)

    return place_batch, functools.partial(jax.device_put, device=everywhere)


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """A list that the number of a SIGINT or SIGTERM is put on, instead of ending the process at once.

    A second one ends it as usual.
    """
    requested: list[int] = []
    watched = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in watched}

    def remember(number: int, frame: object) -> None:
        requested.append(number)
        signal.signal(number, before[signal.Signals(number)])

    for number in watched:
        signal.signal(number, remember)
    try:
        yield requested
    finally:
        for number in watched:
            signal.signal(number, before[number])


def _record(step: int, num_bytes: int, metrics: StepMetrics) -> dict[str, float | int | None]:
    """One line of `metrics.jsonl` for a training step."""
    output = metrics.output
    record: dict[str, float | int | None] = {
        "step": step,
        "bytes": num_bytes,
        "loss": float(output.loss),
        "bpb": -float(output.log_lik) / math.log(2),
        "early_bpb": _number(-float(output.early_log_lik) / math.log(2)),
        "rate": float(output.rate),
        "target_rate": float(metrics.target_rate),
        "overflow": float(output.overflow),
        "padding": float(output.padding),
        "gradient_norm": float(metrics.gradient_norm),
    }
    for level, values in enumerate(output.metrics):
        prefix = "" if level == 0 else f"level{level}_"
        record.update({prefix + name: float(value) for name, value in values.items()})
    return record


def _validation_record(
    step: int, num_bytes: float | int | None, validation: Validation
) -> dict[str, float | int | None]:
    record: dict[str, float | int | None] = {"step": step, "bytes": num_bytes}
    for name, value in dataclasses.asdict(validation).items():
        if isinstance(value, dict):
            record.update({f"val_{name}_{key}": _number(inner) for key, inner in value.items()})
        elif isinstance(value, tuple):
            record.update({f"val_level{level}_rate": _number(rate) for level, rate in enumerate(value, start=1)})
        else:
            record[f"val_{name}"] = _number(value)
    return record


def _number(value: float | int) -> float | int | None:
    """JSON has no NaN: what is not there is null."""
    return None if math.isnan(value) else value


def _refuse_non_finite(record: dict[str, float | int | None], folder: Path) -> None:
    for name in ("loss", "gradient_norm"):
        value = record[name]
        if value is None or not math.isfinite(value):
            raise NonFiniteError(
                f"{name} became {value} at step {record['step']} ({record['bytes']} bytes); the last checkpoint in "
                f"{folder / CHECKPOINTS} and {folder / METRICS} are from before it: resume with a lower "
                "--optimizer.learning-rate in a new --out, or look there for what went wrong"
            )


def _is_due(step: int, total: int, times: int) -> bool:
    """Whether `step` of 1 to `total` is one of `times` evenly spread ones, the last of which is `total`."""
    return step * times // total > (step - 1) * times // total
