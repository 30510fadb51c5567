"""Train a model: `python -m experiments.run --estimator sfe --dataset codeparrot`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from data import DataError, HeldOutRow
from experiments.command import exit_code
from experiments.config.arguments import expanded
from experiments.config.errors import ConfigError, RunError, failure, one_line
from experiments.config.flags import parse_run, with_flag_length
from experiments.config.layers import from_file
from experiments.config.plugins import import_plugins, named_modules, plugins_in
from experiments.config.presets import PRESETS
from experiments.config.settings import RunConfig
from experiments.devices import CPU_DEVICES, require_devices, settle_cpu_devices
from experiments.launch import program
from experiments.processes.agreement import require_shared
from experiments.processes.membership import Membership
from experiments.processes.processes import ALONE, AbstractProcesses
from experiments.reporting.display import Display, bits_per_byte
from experiments.reporting.report import write_report
from experiments.reporting.shading import Character, readable, shade
from experiments.reporting.summary import summary_of
from experiments.tracking.follow import Trackers
from experiments.tracking.tracker import require_trackers
from experiments.training.data import with_lanes
from experiments.training.extending import OF_THE_END, extend, latest_step, resumed
from experiments.training.prepared import write_prepared
from experiments.training.replacing import replacing
from experiments.training.rescue import save_elsewhere
from experiments.training.run_dir import (
    OF_DEVICES,
    SUMMARY,
    differing,
    has_checkpoint,
    held,
    moved,
    prepare_new,
    read_config,
    require_free,
)
from experiments.training.setup import Setup, require_equal, require_same_settings, set_up
from experiments.training.sharding import on_host
from experiments.training.train import Interrupted, Outcome, train
from unet.files.saving import WEIGHTS, save, write_atomically

SAMPLE_ROWS, MOST_ROWS, SAMPLE_BYTES = 6, 64, 2**15
"""Held-out text of the report: rows at least and at most, and bytes."""
SAMPLED_CHARACTERS = 200
"""Of each text on the terminal."""


def parse(arguments: Sequence[str]) -> RunConfig:
    """The configuration that a command line asks for; the preset named by --model gives its defaults.

    Prints help or a usage error and raises `SystemExit` (2 for an error), raises `ConfigError` for values that cannot be run.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--model", default=None)
    early.add_argument("--out", default=None)
    early.add_argument("--config", default=None)
    early.add_argument("--resume", action="store_true")
    known, _ = early.parse_known_args(arguments)
    modules = named_modules(arguments)
    import_plugins(plugins_in(arguments))
    if known.model not in (None, *PRESETS):
        raise ConfigError(f"--model {known.model!r} is none of {', '.join(PRESETS)}")
    default = PRESETS[known.model or "tiny"]
    if known.config is not None:
        if known.resume:
            raise ConfigError("--config is for new runs: one that goes on (--resume) has settings of its own")
        default = from_file(Path(expanded(known.config)), known.model, modules)
    if known.resume and known.out is not None:
        default = dataclasses.replace(read_config(Path(expanded(known.out)), modules), resume=False, overwrite=False)
    config = parse_run(arguments, with_flag_length(default, arguments), program="python -m experiments.run")
    require_trackers(config.tracker)
    # Given several times, all of them count.
    config = dataclasses.replace(config, plugin=plugins_in(arguments))
    if config.resume:
        saved = read_config(config.run_dir, modules)
        _require_same(config, saved)
        config = resumed(config, saved)
    return config


def _require_same(config: RunConfig, saved: RunConfig) -> None:
    """Raise `ConfigError` where a run that goes on would have other settings. Its data may have moved, since a checkpoint says
    what they were."""
    there = moved(config, saved) if has_checkpoint(config.run_dir) else saved
    if changed := differing(config, there, (*OF_THE_END, *OF_DEVICES)):
        raise ConfigError(
            f"the run in {config.run_dir} has other settings for {', '.join(changed)}: resume it without changing them, or start "
            "a new run in another --out"
        )


def run(config: RunConfig, display: Display, processes: AbstractProcesses = ALONE) -> None:
    """Train, evaluate, and leave everything in the run's folder. `processes`: those that do this together; the first of them
    writes.

    Raises `ConfigError`, `DataError` and `LoadError` for what cannot be run, before anything is touched, `RunError` for what
    fails later, and what `train` raises.
    """
    run_dir = config.run_dir
    with held(run_dir, display.note) if processes.leads else contextlib.nullcontext():
        if processes.leads and not config.resume:
            require_free(config)
        require_shared(run_dir, processes)
        require_same_settings(config, processes)
        setup = _set_up(config, processes)
        require_equal(setup, processes)
        config = with_lanes(config, setup.lanes)
        if processes.leads and config.resume:
            extend(config, display.note)
        replaces = processes.leads and not config.resume
        with replacing(run_dir, display.note) if replaces else contextlib.nullcontext():
            try:
                if replaces:
                    prepare_new(config)
                if processes.leads:
                    write_prepared(run_dir, setup.prepared)
                processes.wait()
                _run_in(run_dir, config, setup, display, processes)
            except OSError as error:
                if not has_checkpoint(run_dir):
                    raise
                raise RunError(f"{failure(error)}; go on with --resume once that is mended") from error


def _set_up(config: RunConfig, processes: AbstractProcesses) -> Setup:
    try:
        return set_up(config, processes)
    except DataError as error:
        if config.resume and not os.path.exists(config.dataset):
            raise DataError(f"{error}; where the data have moved to is said with --dataset") from None
        raise


def _run_in(run_dir: Path, config: RunConfig, setup: Setup, display: Display, processes: AbstractProcesses) -> None:
    followed = config if processes.leads else dataclasses.replace(config, tracker=())
    trackers = Trackers(followed, run_dir, setup.split, latest_step(config), display.note)
    # Without trackers no process has to have the whole model at a validation.
    on_validation = trackers.on_validation if config.tracker else None
    try:
        outcome = train(
            config,
            setup,
            run_dir,
            display,
            on_step=trackers.on_step,
            on_validation=on_validation,
            processes=processes,
        )
    finally:
        trackers.close()
    with processes.together():
        _report(run_dir, config, outcome, display, processes)


def _report(run_dir: Path, config: RunConfig, outcome: Outcome, display: Display, processes: AbstractProcesses) -> None:
    """Write the report and say where it is; of several processes the first one does, and all compute what it shows."""
    try:
        shaded = shade(outcome.passes, _shown_rows(config, outcome), seed=config.seed)
        if not processes.leads:
            return
        _write_results(run_dir, config, outcome, shaded)
    except Exception as error:  # whatever a report stumbles over, the training was not for nothing
        place = (
            run_dir
            if (run_dir / WEIGHTS).is_file()
            else save_elsewhere(run_dir, partial(save, outcome.model, read=on_host))
        )
        where = "its model is saved nowhere" if place is None else f"its model is saved in {place}"
        reason = one_line(f"{type(error).__name__}: {error}")
        raise RunError(
            f"the training has ended and {where}, but its report could not be written ({reason}); go on with --resume to write it"
        ) from error
    if outcome.validation.rate > 0:
        display.sample([readable(text, SAMPLED_CHARACTERS) for text in shaded[:3]])
    if outcome.dropped.warning:
        display.note(outcome.dropped.warning)
    display.note(
        f"held-out bpb {bits_per_byte(outcome.validation)} at rate {outcome.validation.rate:.3f} after "
        f"{config.total_steps * config.bytes_per_step / 1e6:.2f} MB and {outcome.seconds:.0f} s; see {run_dir / 'report.html'}"
    )


def _shown_rows(config: RunConfig, outcome: Outcome) -> Sequence[HeldOutRow]:
    """The held-out text that a report shows."""
    count = max(SAMPLE_ROWS, min(MOST_ROWS, SAMPLE_BYTES // config.length))
    return outcome.split.held_out_rows(count * config.length)[:count]


def _write_results(run_dir: Path, config: RunConfig, outcome: Outcome, shaded: Sequence[list[Character]]) -> None:
    """Write the report, with held-out text and its boundaries, and the summary."""
    summary = summary_of(config, outcome)
    write_report(run_dir, config, summary, shaded)
    # Last, so that a folder with a summary is a finished run.
    write_atomically(run_dir / SUMMARY, json.dumps(summary, indent=2) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code, 128 + n after signal n."""
    display = Display()
    membership = Membership(display)

    def command() -> None:
        config = parse(sys.argv[1:] if arguments is None else arguments)
        display.quiet = config.quiet

        def settle(processes: int) -> None:
            settle_cpu_devices(CPU_DEVICES if processes == 1 else 1, -(-config.mesh.named // processes))

        def resumable() -> bool:
            return not config.overwrite and has_checkpoint(config.run_dir)

        try:
            with membership.joined(config.distributed, before=settle, resumable=resumable) as processes:
                require_devices()
                run(config, display, processes)
        except KeyboardInterrupt:
            if not resumable():
                raise
            raise Interrupted(f"stopped; {config.run_dir} has its last checkpoint", signal.SIGINT) from None

    with membership.ending() as end:
        try:
            end.code = exit_code(display, command)
        except Interrupted as error:
            display.note(f"{error}; go on with --resume")
            end.code = 128 + error.signal_number
    return end.code


if __name__ == "__main__":
    program(main)
