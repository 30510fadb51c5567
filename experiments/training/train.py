"""The training loop."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import PyTree

from data import DataError, Split
from experiments.config.settings import RunConfig
from experiments.evaluation.byte_results import AbstractPass
from experiments.evaluation.evaluate import Validation
from experiments.processes.processes import ALONE, RUNNING, AbstractProcesses
from experiments.processes.stopping import AgreedStop, Stop, StoppedError
from experiments.reporting.display import Display
from experiments.training.checkpoint import SaveError
from experiments.training.data import EPOCHS, SHOWN, latest
from experiments.training.dropped import DroppedBoundaries
from experiments.training.placement import attention_notes
from experiments.training.prepared import notes_of
from experiments.training.session import OnStep, OnValidation, Session
from experiments.training.setup import Setup
from experiments.training.stopping import stop_requests
from unet.language_model import AbstractLanguageModel


class Interrupted(AgreedStop):
    """The run was asked to stop and has saved a checkpoint; `signal_number` is what asked."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number


@dataclass(frozen=True)
class Outcome:
    """A finished run: its model, with its parameters where they lie, and `passes` of it, which all processes have to compute
    together; what its estimator was `prepared` with, its last validation, the held-out text, and what it cost. `seconds` is time
    spent in the training loop, over all sessions; `bytes_per_second` leaves compilation and validation out; `epochs`: how often
    the data was gone through; `shown`: the share of its bytes that the protocol can show, of a stream of those read."""

    model: AbstractLanguageModel
    passes: AbstractPass
    prepared: PyTree
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


def _notes(config: RunConfig, setup: Setup) -> list[str]:
    """What a user should know of what was prepared, and of how the step was chosen to run."""
    memory = setup.trainer.memory
    return [
        *notes_of(config, setup.prepared),
        *setup.notes,
        *attention_notes(config),
        *([] if memory is None else [memory.note]),
    ]


def train(
    config: RunConfig,
    setup: Setup,
    run_dir: Path,
    display: Display,
    *,
    on_step: OnStep | None = None,
    on_validation: OnValidation | None = None,
    processes: AbstractProcesses = ALONE,
) -> Outcome:
    """Train to the end, from the last checkpoint in `run_dir` if there is one. The callbacks are called after every logged step
    and after every validation; what they raise ends the run. `processes`: those that train together.

    The model is in `run_dir` then. Raises `Interrupted` after SIGINT or SIGTERM, `NonFiniteError`, `DataError`, `ConfigError`
    for a checkpoint that does not fit or data that has changed, and `RunError` for files that cannot be written, with everything
    saved where that is possible.
    """
    for note in (*setup.split.notes, *_notes(config, setup)):
        display.note(note)
    session, total = Session(config, setup, run_dir, display, processes), config.total_steps
    session.on_step, session.on_validation = on_step, on_validation
    display.start(config, session.trainer.parameters, session.trainer.capacity, session.step)
    try:
        with stop_requests() as requested:
            while session.step < total:
                stop = _step(session, requested)
                session.settle_saving()
                if _is_due(session.step, total, config.evaluation.times):
                    session.log_validation()
                if _is_due(session.step, total, config.checkpoint.times):
                    session.begin_saving()
                if stop is not None:
                    session.save()
                    raise _stopped(session, stop)
            session.finish_saving()
            session.save_model()
    except (OSError, SaveError) as error:
        raise session.rescued(error) from error
    finally:
        display.stop()
        session.close()
    return Outcome(
        model=session.placed_model,
        passes=session.passes,
        prepared=setup.prepared,
        validation=session.validate() if session.validation is None else session.validation,
        split=setup.split,
        capacity=session.trainer.capacity,
        steps=session.step,
        seconds=session.seconds,
        bytes_per_second=session.speed.bytes_per_second,
        dropped=session.dropped,
        parameters=session.trainer.parameters,
        epochs=latest(run_dir, EPOCHS),
        shown=latest(run_dir, SHOWN),
    )


def _step(session: Session, requested: Sequence[int]) -> Stop | None:
    """One step; returns what asks the run to stop after it. `requested`: the signals that have come to this process so far."""
    alone = session.processes.count == 1
    try:
        stop = session.train_step(requested[0] if requested else RUNNING)
    except StoppedError as error:
        raise _stopped(session, error.stop) from None
    except DataError:
        # What ends a run, such as a scheduler's SIGTERM, may have ended its workers too.
        if alone and requested:
            raise _stopped(session, Stop(requested[0], 0)) from None
        raise
    # Where nobody has to be asked, a signal during the step counts as well.
    return Stop(requested[0], 0) if alone and requested else stop


def _stopped(session: Session, stop: Stop) -> Interrupted:
    number = stop.signal_number
    done = f"step {session.step} of {session.config.total_steps}"
    saved = f" and saved {session.run_dir}" if session.step else ""
    asked = f" (process {stop.index})" if session.processes.count > 1 else ""
    return Interrupted(f"{signal.Signals(number).name}{asked}: stopped at {done}{saved}", number)


def _is_due(step: int, total: int, times: int) -> bool:
    """Whether `step` of 1 to `total` is one of `times` evenly spread ones, the last of which is `total`."""
    return step * times // total > (step - 1) * times // total
