"""Train a model: `python -m experiments.run --estimator sfe --dataset codeparrot`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.command import exit_code
from experiments.config.arguments import expanded
from experiments.config.errors import ConfigError
from experiments.config.flags import parse_run
from experiments.config.plugins import import_plugins, named_modules, plugins_in
from experiments.config.presets import PRESETS
from experiments.config.settings import RunConfig
from experiments.devices import use_cpu_devices
from experiments.launch import program
from experiments.reporting.display import Display, bits_per_byte
from experiments.reporting.report import write_report
from experiments.reporting.shading import shade
from experiments.reporting.summary import summary_of
from experiments.training.prepared import write_prepared
from experiments.training.run_dir import CHECKPOINTS, SUMMARY, differing, held, prepare_new, read_config
from experiments.training.session import NonFiniteError
from experiments.training.setup import Setup, set_up
from experiments.training.train import Interrupted, train
from unet.files.saving import save, write_atomically

SAMPLE_ROWS = 6


def parse(arguments: Sequence[str]) -> RunConfig:
    """The configuration that a command line asks for; the preset named by --model gives its defaults.

    Prints help or a usage error and raises `SystemExit` (2 for an error), raises `ConfigError` for values that cannot be run.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--model", default="tiny")
    early.add_argument("--out", default=None)
    early.add_argument("--resume", action="store_true")
    known, _ = early.parse_known_args(arguments)
    modules = named_modules(arguments)
    import_plugins(plugins_in(arguments))
    if known.model not in PRESETS:
        raise ConfigError(f"--model {known.model!r} is none of {', '.join(PRESETS)}")
    default = PRESETS[known.model]
    if known.resume and known.out is not None:
        default = dataclasses.replace(read_config(Path(expanded(known.out)), modules), resume=False, overwrite=False)
    config = parse_run(arguments, default, program="python -m experiments.run")
    # Given several times, all of them count.
    config = dataclasses.replace(config, plugin=plugins_in(arguments))
    if config.resume:
        saved = read_config(config.run_dir, modules)
        if changed := differing(config, saved):
            raise ConfigError(
                f"the run in {config.run_dir} has other settings for {', '.join(changed)}: resume it without changing them, "
                "or start a new run in another --out"
            )
    return config


def run(config: RunConfig, display: Display) -> None:
    """Train, evaluate, and leave everything in the run's folder."""
    setup = set_up(config)
    with held(config.run_dir):
        if not config.resume:
            prepare_new(config)
        write_prepared(config.run_dir, setup.prepared)
        _run_in(config.run_dir, config, setup, display)


def _run_in(run_dir: Path, config: RunConfig, setup: Setup, display: Display) -> None:
    outcome = train(config, setup, run_dir, display)
    rows = outcome.split.held_out_rows(SAMPLE_ROWS * max(config.length, 1))[:SAMPLE_ROWS]
    shaded = shade(outcome.model, rows, seed=config.seed)
    summary = summary_of(config, outcome)
    write_report(run_dir, config, summary, shaded)
    save(outcome.model, run_dir)
    # Last, so that a folder with a summary is a finished run.
    write_atomically(run_dir / SUMMARY, json.dumps(summary, indent=2) + "\n")
    if outcome.validation.rate > 0:
        display.sample([character for row in shaded[:3] for character in row][:600])
    if outcome.dropped.warning:
        display.note(outcome.dropped.warning)
    display.note(
        f"held-out bpb {bits_per_byte(outcome.validation)} at rate {outcome.validation.rate:.3f} after "
        f"{config.total_steps * config.bytes_per_step / 1e6:.2f} MB and {outcome.seconds:.0f} s; see {run_dir / 'report.html'}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code, 128 + n after signal n."""
    display = Display()

    def command() -> None:
        config = parse(sys.argv[1:] if arguments is None else arguments)
        # Two halves of a batch side by side beat one product on two cores at these sizes.
        use_cpu_devices(2)
        try:
            run(config, display)
        except KeyboardInterrupt:
            if config.overwrite or not any((config.run_dir / CHECKPOINTS).glob("[0-9]*")):
                raise
            raise Interrupted(f"stopped; {config.run_dir} has its last checkpoint", signal.SIGINT) from None

    try:
        return exit_code(display, command)
    except NonFiniteError as error:
        display.note(f"error: {error}")
        return 1
    except Interrupted as error:
        display.note(f"{error}; go on with --resume")
        return 128 + error.signal_number


if __name__ == "__main__":
    program(main)
