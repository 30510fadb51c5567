"""A run while it trains: what a step, a validation and a checkpoint do, and what each leaves in the run's folder."""

from __future__ import annotations

import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from data import DataError, open_batches
from experiments.config.errors import ConfigError
from experiments.config.settings import RunConfig
from experiments.evaluation.evaluate import Validation, evaluate
from experiments.reporting.display import Display
from experiments.training.checkpoint import Checkpoints, Progress
from experiments.training.data import DataNotes, data_record
from experiments.training.dropped import DroppedBoundaries
from experiments.training.records import Record, step_record, validation_record
from experiments.training.run_dir import CHECKPOINTS, METRICS, MetricsLog, read_metrics
from experiments.training.setup import Setup
from experiments.training.step import compiled
from experiments.training.trainer import Trainer
from unet import UNet


class NonFiniteError(Exception):
    """A loss or a gradient was not a finite number; the last checkpoint from before it stands."""


class Session:
    """The state of a run: `step` steps are done, and `validation` is the latest one.

    Begins at the last checkpoint in `run_dir`, if there is one. Raises `ConfigError` where that does not fit, or where the data
    have changed.
    """

    def __init__(self, config: RunConfig, setup: Setup, run_dir: Path, display: Display):
        self.config, self.setup, self.run_dir, self.display = config, setup, run_dir, display
        self.trainer = Trainer.on(config, setup.model, setup.split)
        self._step_function = compiled(self.trainer.step)
        self._state = setup.placement.replicated(self.trainer.first_state())
        self._held_out = setup.split.held_out_rows(config.evaluation.bytes)
        self._checkpoints = Checkpoints(run_dir / CHECKPOINTS, config.checkpoint.keep)
        progress = self._restore()
        self.step, self._seconds_before = (0, 0.0) if progress is None else (progress.step, progress.seconds)
        self._batches = open_batches(
            setup.split,
            batch=config.batch,
            seed=config.seed,
            workers=config.data.workers,
            state=None if progress is None else progress.data,
        )
        self._data_notes = DataNotes(setup.split, self._batches)
        self._log = MetricsLog(run_dir, self.step)
        self.dropped = DroppedBoundaries.so_far(read_metrics(run_dir), len(setup.model.stage.estimators))
        self._warned = False
        self.speed = Speedometer(config.bytes_per_step)
        self._started = time.perf_counter()
        self.validation: Validation | None = None

    def _restore(self) -> Progress | None:
        """Take over the last checkpoint, if there is one; returns how far it is."""
        restored = self._checkpoints.restore(self._state)
        if restored is None:
            return None
        if restored.progress.fingerprint != self.setup.split.fingerprint:
            raise ConfigError(
                f"{self.config.dataset} is not the data that {self.run_dir} was trained on: it has changed since"
            )
        self._state = restored.arrays
        self.display.note(f"resumed at step {restored.progress.step} of {self.config.total_steps}")
        return restored.progress

    @property
    def seconds(self) -> float:
        """Time spent in training, over all sessions of the run."""
        return self._seconds_before + time.perf_counter() - self._started

    @property
    def model(self) -> UNet:
        """The model as it is now, on the default device."""
        here = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), self._state.params)
        return self.trainer.model(here)

    def train_step(self) -> None:
        """One step, logged and shown. Raises `DataError`, after a checkpoint, and `NonFiniteError`."""
        try:
            batch = next(self._batches)
        except DataError:
            self.save()
            raise
        key = jax.random.fold_in(self.setup.key_steps, self.step)
        self._state, metrics = self._step_function(self._state, self.setup.placement.batch(batch), key)
        self.step += 1
        record = step_record(self.step, self.step * self.config.bytes_per_step, jax.device_get(metrics))
        record |= data_record(self._batches)
        self.speed.tick()
        self.dropped.add(record)
        self._refuse_non_finite(record)
        total = self.config.total_steps
        if self.step % self.config.log_every == 0 or self.step == total:
            self._log.write({**record, **self.dropped.record, "seconds": round(self.seconds, 3)})
        self.display.progress(self.step, record, self.speed.bytes_per_second)
        self._note()

    def _note(self) -> None:
        if not self._warned and (warning := self.dropped.early_warning):
            self.display.note(f"by step {self.step}, {warning}")
            self._warned = True
        for note in self._data_notes.after(self.step, self.config.total_steps, self._batches):
            self.display.note(note)

    def validate(self) -> Validation:
        """Evaluate the model on all held-out text."""
        config = self.config
        return evaluate(
            self.model,
            self._held_out,
            batch=config.batch // config.optimizer.accumulate,
            capacity=self.trainer.capacity,
            key=self.setup.key_evaluate,
        )

    def log_validation(self) -> None:
        """Evaluate, log and show it."""
        self.validation = self.validate()
        self._log.write(validation_record(self.step, self.step * self.config.bytes_per_step, self.validation))
        self.display.validation(self.step, self.validation)
        self.speed.pause()

    def save(self) -> None:
        """Write a checkpoint."""
        fingerprint = self.setup.split.fingerprint
        self._checkpoints.save(self._state, Progress(self.step, self.seconds, self._batches.state(), fingerprint))
        self.speed.pause()

    def close(self) -> None:
        """Let go of the files and of the processes that prepare batches."""
        self._log.close()
        self._batches.close()
        self._checkpoints.close()

    def _refuse_non_finite(self, record: Record) -> None:
        for name in ("loss", "gradient_norm"):
            value = record[name]
            if value is None or not math.isfinite(value):
                raise NonFiniteError(
                    f"{name} became {value} at step {record['step']} ({record['bytes']} bytes); the last checkpoint in "
                    f"{self.run_dir / CHECKPOINTS} and {self.run_dir / METRICS} are from before it: resume with a lower "
                    "--optimizer.learning-rate in a new --out, or look there for what went wrong"
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
