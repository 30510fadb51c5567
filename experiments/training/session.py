"""A run while it trains: what a step, a validation and a checkpoint do, and what each leaves in the run's folder."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from data import Batch, DataError, open_batches
from experiments.config.errors import ConfigError, RunError, failure
from experiments.config.files import to_json
from experiments.config.settings import RunConfig
from experiments.evaluation.evaluate import Validation, evaluate
from experiments.processes.processes import ALONE, RUNNING, AbstractProcesses
from experiments.processes.stopping import Stop, StoppedError, meet
from experiments.reporting.display import Display
from experiments.training.checkpoint import Checkpoints, Progress, SaveError
from experiments.training.data import DataNotes, data_record, reading_of_all, state_of_all, text_of
from experiments.training.distil import AlignmentStep
from experiments.training.dropped import DroppedBoundaries
from experiments.training.metrics_log import ForeignMetricsLog, MetricsLog
from experiments.training.prepared import write_prepared
from experiments.training.records import Record, step_record, validation_record
from experiments.training.replacing import discard_replaced
from experiments.training.rescue import RunFolder, save_elsewhere
from experiments.training.run_dir import CHECKPOINTS, CONFIG, METRICS
from experiments.training.setup import Setup
from experiments.training.sharding import on_host
from experiments.training.validation import PlacedPass
from unet.files.saving import module_content, save, write_atomically
from unet.language_model import AbstractLanguageModel

OnStep = Callable[[int, Record], None]
"""Is told of a training step: its number and its line of `metrics.jsonl`."""
OnValidation = Callable[[int, Record, Callable[[], AbstractLanguageModel]], None]
"""Is told of a validation: its step, its line of `metrics.jsonl`, and how to get the model as it is then."""


class NonFiniteError(RunError):
    """A loss or a gradient was not a finite number; the last checkpoint from before it, if there is one, stands."""


class Session:
    """The state of a run: `step` steps are done, and `validation` is the latest one.

    Begins at the last checkpoint in `run_dir` that is whole, if there is one. Raises `ConfigError` where that does not fit, where
    all are damaged, or where the data have changed.
    """

    def __init__(
        self,
        config: RunConfig,
        setup: Setup,
        run_dir: Path,
        display: Display,
        processes: AbstractProcesses = ALONE,
    ):
        """`processes`: those that train together. All of them hold the same state, and the first of them writes."""
        self.config, self.setup, self.run_dir, self.display = config, setup, run_dir, display
        self.processes = processes
        self.trainer, self._folder = setup.trainer, RunFolder(run_dir)
        self._step_function = self.trainer.compiled_on(setup.placement)
        self._alignment_step: AlignmentStep | None = None
        self._state = self.trainer.first_state_on(setup.placement)
        self._held_out = setup.split.held_out_rows(config.evaluation.bytes)
        self._checkpoints = Checkpoints(run_dir / CHECKPOINTS, config.checkpoint.keep, processes)
        progress = self._restore()
        self.step, self._seconds_before = (0, 0.0) if progress is None else (progress.step, progress.seconds)
        self._batches = open_batches(
            setup.split,
            batch=config.batch,
            seed=config.seed,
            workers=config.data.workers,
            state=None if progress is None else progress.data,
            rows=self._own_rows,
            lanes=setup.lanes,
        )
        self._reading = self._batches.reading
        self._data_notes = DataNotes(setup.split, self._batches)
        self._log = (MetricsLog if processes.leads else ForeignMetricsLog)(run_dir, self.step)
        if self._log.damaged:
            display.note(f"{self._log.damaged} damaged line(s) of {run_dir / METRICS} are left out")
        self.dropped = DroppedBoundaries.so_far(self._log.kept, setup.model.levels)
        self._warned = self._cannot_log = False
        self._data_before: dict[str, object] | None = None
        self.speed = Speedometer(config.bytes_per_step)
        self._started = time.perf_counter()
        self.validation: Validation | None = None
        self.on_step: OnStep | None = None
        self.on_validation: OnValidation | None = None

    def _restore(self) -> Progress | None:
        """Take over the last checkpoint, if there is one; returns how far it is."""
        with self.processes.together(files=True):
            restored = self._checkpoints.restore(self._state, self.display.note)
        if restored is None:
            return None
        if restored.progress.fingerprint != self.setup.split.fingerprint:
            raise ConfigError(
                f"{self.config.dataset} is not the data that {self.run_dir} was trained on: it has changed since"
            )
        # Where the data, or the run itself, have moved.
        config = to_json(dataclasses.replace(self.config, resume=False))
        if self.processes.leads and config != (self.run_dir / CONFIG).read_text():
            write_atomically(self.run_dir / CONFIG, config)
        self._state = restored.arrays
        self.display.note(f"resumed at step {restored.progress.step} of {self.config.total_steps}")
        return restored.progress

    @property
    def seconds(self) -> float:
        """Time spent in training, over all sessions of the run."""
        return self._seconds_before + time.perf_counter() - self._started

    @property
    def placed_model(self) -> AbstractLanguageModel:
        """The model as it is now, its parameters where they lie."""
        return self.trainer.model(self._state.params)

    @property
    def model(self) -> AbstractLanguageModel:
        """The model as it is now, whole on the default device."""
        with self.processes.together():
            whole = self.setup.placement.whole(self._state.params)
        return self.trainer.model(jax.tree.map(jnp.asarray, whole))

    @property
    def _own_rows(self) -> slice | None:
        """The rows of a batch that this process reads: its own, or all where a row is as long as the longest of them."""
        alone = self.processes.count == 1 or self.config.reads_tokens
        return None if alone else self.setup.placement.own_rows

    def train_step(self, asked: int = RUNNING) -> Stop | None:
        """One step, logged and shown. `asked`: the signal that asked this process to stop. Returns what asked any process
        to, when this step began.

        Raises `DataError`, after a checkpoint of what was trained, and `NonFiniteError`.
        """
        batch, stop = self._next_batch(asked)
        key = jax.random.fold_in(self.setup.key_steps, self.step)
        alignment = self.setup.alignment
        if alignment is not None and self.step < alignment.steps:
            self._alignment_step = self._alignment_step or alignment.compiled(self.trainer)
            inputs, step_function = alignment.inputs(text_of(batch)), self._alignment_step
        else:
            # With it the teacher leaves the devices.
            self._alignment_step = None
            inputs = self.setup.model.inputs(text_of(batch), shortest=self.trainer.positions)
            step_function = self._step_function
        if self._own_rows is None and self.processes.count > 1:
            inputs = jax.tree.map(self.setup.placement.own_part, inputs)
        with self.processes.together():
            self._state, metrics = step_function(self._state, self.setup.placement.inputs(inputs), key)
            metrics = jax.device_get(metrics)
        self.step += 1
        record = step_record(self.step, self.step * self.config.bytes_per_step, metrics)
        # In between, of a stream in lanes, what the first process reads is taken for what all do.
        last = self.step == self.config.total_steps
        self._reading = reading_of_all(self._batches, self.processes) if last else self._batches.reading
        record |= data_record(self._reading)
        self.speed.tick()
        self.dropped.add(record)
        self._refuse_non_finite(record)
        total = self.config.total_steps
        if self.step % self.config.log_every == 0 or self.step == total:
            whole = {**record, **self.dropped.record, "seconds": round(self.seconds, 3)}
            self._write(whole)
            if self.on_step is not None:
                self.on_step(self.step, whole)
        self.display.progress(self.step, record, self.speed.bytes_per_second)
        self._note()
        return stop

    def _next_batch(self, asked: int) -> tuple[Batch, Stop | None]:
        """The rows of this process, and what asked any of the processes to stop."""
        # Where another process gets no batch, none of them is trained on, and the data go on from here.
        self._data_before = self._batches.state() if self.processes.count > 1 else None
        batch, failed = None, None
        try:
            batch = next(self._batches)
        except DataError as error:
            failed = error
        stop, lacking = meet(self.processes, asked, lacks_batch=failed is not None)
        if batch is not None and not lacking:
            self._data_before = None
            return batch, stop
        reasons = self.processes.said("" if failed is None else str(failed))
        # Of no step there is nothing to keep, and a checkpoint would be the end of a run that is being replaced.
        if self.step:
            self.save()
        if stop is not None and self.processes.count > 1:
            raise StoppedError(stop)
        raise failed or DataError(f"process {lacking[0]}: {reasons[lacking[0]]}")

    def _note(self) -> None:
        if not self._warned and (warning := self.dropped.early_warning):
            self.display.note(f"by step {self.step}, {warning}")
            self._warned = True
        for note in self._data_notes.after(self.step, self.config.total_steps, self._reading):
            self.display.note(note)

    def validate(self) -> Validation:
        """Evaluate the model on all held-out text, where its parameters lie."""
        config = self.config
        with self.processes.together():
            return evaluate(
                self.passes,
                self._held_out,
                batch=config.batch // config.optimizer.accumulate,
                capacity=self.trainer.capacity,
                key=self.setup.key_evaluate,
            )

    @property
    def passes(self) -> PlacedPass:
        """Passes of the model as it is now, where its parameters lie."""
        return PlacedPass(self.setup.placement, self._state.params, self.trainer.static, self.processes.together)

    def log_validation(self) -> None:
        """Evaluate, log and show it."""
        self.validation = self.validate()
        record = validation_record(self.step, self.step * self.config.bytes_per_step, self.validation)
        self._write(record)
        self.display.validation(self.step, self.validation)
        if self.on_validation is not None:
            # Gathered here, where all processes are: only one of them may ask for it.
            model = self.model
            self.on_validation(self.step, record, lambda: model)
        self.speed.pause()

    def begin_saving(self) -> None:
        """Begin to write a checkpoint, while training goes on. Raises `OSError` or `SaveError` where that fails, or has failed
        for the one before it."""
        self._folder.require_there()
        self.finish_saving()
        # First, so that no checkpoint is ahead of the log, not even after a power loss.
        self._log.sync()
        with self.processes.together(files=True):
            self._checkpoints.begin(self._state, self._progress())
        self.speed.pause()

    def finish_saving(self) -> None:
        """Return once the checkpoint that was begun is complete; the run that this one replaces is deleted then. Raises
        `SaveError`, and `OSError` where the folder has gone meanwhile."""
        try:
            with self.processes.together(files=True):
                complete = self._checkpoints.finish()
        except SaveError:
            self._folder.require_there()
            raise
        if complete and self.processes.leads:
            discard_replaced(self.run_dir)

    def settle_saving(self) -> None:
        """The same where nothing has to be waited for; several processes settle when all of them come to it."""
        if self.processes.count == 1 and self._checkpoints.written:
            self.finish_saving()

    def save(self) -> None:
        """Write a checkpoint, and return once it is complete. Raises as `begin_saving` does."""
        self.begin_saving()
        self.finish_saving()
        self.speed.pause()

    def save_model(self) -> None:
        """Write the model to the run's folder, one array after another. Raises `OSError`."""
        self._folder.require_there()
        model = self.placed_model
        with self.processes.together(files=True):
            if self.processes.leads:
                save(model, self.run_dir, read=on_host)
            else:
                # Of every array, this process has parts that the first one needs.
                for _ in module_content(model, on_host):
                    pass

    def rescued(self, error: Exception) -> RunError:
        """Save everything to where that is still possible. Returns what to say of it and of the `error`."""
        failed, step = failure(error), f"step {self.step} of {self.config.total_steps}"
        if self.processes.count > 1:
            # No process has all of the state, and the others may be anywhere.
            last = self._checkpoints.latest
            again = "start again" if last is None else f"go on with --resume from step {last}"
            return RunError(f"{failed}; {again} once that is mended")
        try:
            self.save()
            return RunError(f"{failed}; {step} is saved in {self.run_dir}: go on with --resume once that is mended")
        except (OSError, SaveError):
            place = save_elsewhere(self.run_dir, self._write_whole)
        last = self._checkpoints.latest
        here = "" if last is None else f"with --resume from step {last} once that is mended"
        if place is not None:
            again = f", or {here}" if here else ""
            return RunError(
                f"{failed}; {step} and its model are saved in {place}: go on with --resume --out {place}{again}"
            )
        return RunError(f"{failed}; {step} could be saved nowhere" + (f": go on {here}" if here else ""))

    def _write_whole(self, folder: Path) -> None:
        """Write a run to `folder` that can go on from there."""
        save(self.placed_model, folder, read=on_host)
        write_atomically(
            folder / CONFIG, to_json(dataclasses.replace(self.config, out=folder, resume=False, overwrite=False))
        )
        write_prepared(folder, self.setup.prepared)
        write_atomically(folder / METRICS, self._log.content())
        checkpoints = Checkpoints(folder / CHECKPOINTS, self.config.checkpoint.keep)
        checkpoints.save(self._state, self._progress())
        checkpoints.close()

    def _progress(self) -> Progress:
        """How far the run is. Every process has to call this: each knows the lanes that it reads."""
        own = self._batches.state() if self._data_before is None else self._data_before
        data = state_of_all(own, self.processes)
        return Progress(self.step, self.seconds, data, self.setup.split.fingerprint)

    def _write(self, record: Record) -> None:
        """Log a record, or say that it has to wait for the next checkpoint, which needs the log."""
        error = self._log.write(record)
        if error is not None and not self._cannot_log:
            self.display.note(
                f"{self.run_dir / METRICS} cannot be written now ({failure(error)}); what belongs there is kept"
            )
        self._cannot_log = error is not None

    def close(self) -> None:
        """Let go of the files and of the processes that prepare batches."""
        # What could not be written has been said before, with where it was saved instead.
        with contextlib.suppress(OSError):
            self._log.close()
        self._batches.close()
        # The last checkpoint may have been being written when the run ended for another reason.
        try:
            self.finish_saving()
        except (OSError, SaveError) as error:
            self.display.note(failure(error))
        self._checkpoints.close()

    def _refuse_non_finite(self, record: Record) -> None:
        for name in ("loss", "gradient_norm"):
            value = record[name]
            if value is None or not math.isfinite(value):
                # What is said of the last checkpoint is then true.
                with contextlib.suppress(OSError, SaveError):
                    self.finish_saving()
                raise NonFiniteError(
                    f"{name} became {value} at step {record['step']} ({record['bytes']} bytes); {self._before()}: start again "
                    "in a new --out with a lower --optimizer.learning-rate"
                )

    def _before(self) -> str:
        """What there is from before a loss that was not finite."""
        last = self._checkpoints.latest
        if last is not None:
            return f"the last checkpoint in {self.run_dir / CHECKPOINTS}, of step {last}, is from before it"
        if self.config.init is not None and self.step == 1:
            return f"there is no checkpoint yet, and the weights of --init {self.config.init} gave it at once"
        return "there is no checkpoint yet"


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
