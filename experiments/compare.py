"""Train several estimators on the same data and compare them: `python -m experiments.compare --estimators sfe gumbel hnet`."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from estimators.bounds import Seed, Within
from estimators.registry import COMPARED
from experiments.command import exit_code
from experiments.comparison.comparison import REFERENCE, write_comparison
from experiments.comparison.finished import by_estimator, is_finished, read_finished, read_tables, without
from experiments.comparison.pairs import Names, every_pair
from experiments.config.arguments import PATHS, usage
from experiments.config.errors import ConfigError, require, require_bounds
from experiments.config.files import to_json
from experiments.config.flags import shared_out
from experiments.config.plugins import trusted
from experiments.config.settings import RunConfig
from experiments.launch import program
from experiments.reporting.display import Display
from experiments.run import parse
from experiments.training.run_dir import CONFIG, SUMMARY, differing, held, make_folder, prepare_new, read_config
from experiments.training.stopping import stop_requests, stop_signals
from unet.files.saving import write_atomically

LOGS = "logs"
BYTE_MODEL_RUN = "byte-model"


@dataclass(frozen=True)
class CompareConfig:
    """Train estimators on the same data in the same order, seed by seed, and put them side by side.

    Every setting of `python -m experiments.run` may follow: it holds for all of the runs. Runs that are finished are not
    done again, runs that were stopped go on.
    """

    estimators: tuple[str, ...] = COMPARED
    """What to compare, by name or as package.module:Class; the others are measured against uniform boundaries where those are
    among them."""
    pairs: tuple[str, ...] = ()
    """Which of them to compare with each other, as FIRST:SECOND, such as sfe:hnet sfe:uniform; by default every two."""
    seeds: tuple[Seed, ...] = (0, 1, 2)
    """Seeds of parameters, data order and boundaries."""
    tables: tuple[Path, ...] = ()
    """table.json of comparisons made elsewhere with the same settings: their runs count as if they had been done here."""
    out: Path = field(default=Path("runs/compare"))
    """Folder for the runs, the table and the report."""
    jobs: Annotated[int, Within(1, 1024)] = 1
    """Runs at a time; on a CPU each gets a core of its own, which for small models is faster than sharing two."""

    def __post_init__(self):
        require_bounds(self)
        require(
            len(set(self.estimators)) == len(self.estimators) and len(set(self.seeds)) == len(self.seeds),
            "--estimators and --seeds name each estimator and each seed once",
        )
        require(
            bool(self.estimators and self.seeds),
            "a comparison needs at least one estimator and one seed",
        )
        pairs_of(self)


@dataclass
class Job:
    """One run of the comparison, the modules of others that it needs, the run whose model it reads, and its process."""

    name: str
    folder: Path
    plugins: tuple[str, ...] = ()
    reads: Job | None = None
    process: subprocess.Popen[bytes] | None = None
    core: int | None = None

    @property
    def may_start(self) -> bool:
        """Whether the model it reads, if any, is there, or will never be."""
        if self.reads is None or (self.reads.folder / SUMMARY).is_file():
            return True
        return self.reads.process is not None and self.reads.process.poll() is not None


Requested = Mapping[str, RunConfig]
"""By estimator, the run that the command line asks for."""


def parse_compare(arguments: Sequence[str]) -> tuple[CompareConfig, Requested]:
    """What to compare, and the run of each estimator. Each takes the flags that it has, and every flag must be one of some run.

    Prints help or a usage error and raises `SystemExit` (2 for an error); raises `ConfigError` for inconsistent values.
    """
    with usage(arguments):
        config, rest = tyro.cli(
            CompareConfig,
            prog="python -m experiments.compare",
            args=list(arguments),
            return_unknown_args=True,
            registry=PATHS,
        )
    for flag in ("--estimator", "--seed", "--resume", "--overwrite"):
        if any(given == flag or given.startswith(flag + "=") for given in rest):
            raise ConfigError(
                f"{flag} is for single runs; a comparison has --estimators, --seeds and goes on by itself"
            )
    given = shared_out(rest, config.estimators)
    return config, {name: parse([*given[name], "--estimator", name]) for name in config.estimators}


def pairs_of(config: CompareConfig) -> list[Names]:
    """The pairs asked for. Raises `ConfigError` for one that is not of two estimators compared, or is there twice."""
    if not config.pairs:
        return every_pair(config.estimators, last=REFERENCE)
    by_name = {name: name for name in config.estimators}
    pairs = []
    for text in config.pairs:
        splits = [(text[:place], text[place + 1 :]) for place, letter in enumerate(text) if letter == ":"]
        first, second = next((both for both in splits if by_name.keys() >= set(both)), ("", ""))
        if first == second:
            raise ConfigError(
                f"--pairs {text!r} is not FIRST:SECOND of two different ones of --estimators ({', '.join(by_name)})"
            )
        pairs.append((by_name[first], by_name[second]))
    if len({frozenset(pair) for pair in pairs}) < len(pairs):
        raise ConfigError("--pairs names each pair once, in one order")
    return pairs


def runs_of(config: CompareConfig, requested: Requested) -> list[RunConfig]:
    """The configuration of every run, seed by seed; first, where an estimator reads the model of another run and none is named,
    that run."""
    chosen = {name: dataclasses.replace(run, devices=1) if config.jobs > 1 else run for name, run in requested.items()}
    first, runs = {}, []
    for name, run in chosen.items():
        needs = run.first.prerequisite
        if needs is not None and getattr(run.first, needs.setting) is None:
            before = dataclasses.replace(run, estimator=needs.estimator).with_settings(**needs.settings)
            folder = next((path for path, other in first.items() if not differing(other, before, ("seed",))), None)
            folder = folder or config.out / (BYTE_MODEL_RUN if not first else f"{BYTE_MODEL_RUN}-{len(first) + 1}")
            first[folder] = dataclasses.replace(before, seed=config.seeds[0], out=folder)
            chosen[name] = run.with_settings(**{run.parts[0].estimator.section: {needs.setting: folder}})
    for seed in config.seeds:
        runs += [
            dataclasses.replace(run, seed=seed, out=run_folder(config, name, seed)) for name, run in chosen.items()
        ]
    return [*first.values(), *runs]


def run_folder(config: CompareConfig, estimator: str, seed: int) -> Path:
    """The folder of a run; a class is named without its module where that tells it from the others."""
    short = [name.rpartition(":")[2] for name in config.estimators]
    own = estimator.rpartition(":")[2]
    return config.out / f"{own if short.count(own) == 1 else estimator.replace(':', '.')}-{seed}"


def ready(run: RunConfig) -> Job:
    """A run's folder with its configuration in it. Raises `ConfigError` where it holds a run of other settings, or one that
    another process is at work on while its number of devices has to change."""
    folder, plugins = run.run_dir, trusted(run)
    path = folder / CONFIG
    if not path.is_file():
        prepare_new(run)
        return Job(folder.name, folder, plugins)
    there = read_config(folder, plugins)
    # How many cores a run had moves its curve by no more than rounding. A byte model serves for seeds named later, too.
    may_differ = ("devices", "seed") if folder.name.startswith(BYTE_MODEL_RUN) else ("devices",)
    if changed := differing(run, there, may_differ):
        raise ConfigError(f"{folder} holds a run with other settings for {', '.join(changed)}; name another --out")
    if run.devices != there.devices and not (folder / SUMMARY).is_file():
        # It goes on with the cores that it gets now, or two devices would share one.
        with held(folder):
            write_atomically(path, to_json(dataclasses.replace(there, devices=run.devices)))
    return Job(folder.name, folder, plugins)


def run_jobs(jobs: list[Job], at_once: int, logs: Path, display: Display) -> list[str]:
    """Run the jobs, `at_once` at a time; returns the names of those that failed.

    A job waits for the one whose model it reads; where that one fails it says so itself. An interrupt or an error stops all of
    them, each with a checkpoint, and is raised again.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    waiting = [job for job in jobs if not (job.folder / SUMMARY).is_file()]
    if len(waiting) < len(jobs):
        display.note(f"{len(jobs) - len(waiting)} of {len(jobs)} runs are finished already")
    running: list[Job] = []
    failed: list[str] = []
    done = len(jobs) - len(waiting)
    try:
        while waiting or running:
            while len(running) < at_once and (job := next((job for job in waiting if job.may_start), None)):
                waiting.remove(job)
                free = [core for core in cores if core not in {other.core for other in running}]
                # Before it has a process, or an interrupt between the two would leave that behind.
                running.append(job)
                _launch(job, free[0] if at_once > 1 and free else None, logs)
            time.sleep(0.2)
            for job in [job for job in running if job.process is not None and job.process.poll() is not None]:
                running.remove(job)
                done += 1
                if job.process is not None and job.process.returncode:
                    failed.append(job.name)
                    display.note(f"{job.name} failed; the end of {logs / job.name}.log: {_last_line(job, logs)}")
                else:
                    display.note(f"{job.name} finished, {done} of {len(jobs)}: {_last_line(job, logs)}")
    except BaseException:
        _stop([job.process for job in running if job.process is not None])
        raise
    return failed


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Have runs save a checkpoint and end. On another interrupt they end at once, with the last one that they have saved."""
    try:
        with stop_signals(signal.SIG_IGN):
            for process in processes:
                process.send_signal(signal.SIGTERM)
        for process in processes:
            process.wait()
    except KeyboardInterrupt:
        with stop_signals(signal.SIG_IGN):
            for process in processes:
                process.kill()
                process.wait()


def _launch(job: Job, core: int | None, logs: Path) -> None:
    """Start a run in a process of its own; `--resume` of a run without a checkpoint starts it."""
    command = [sys.executable, "-m", "experiments.run", "--resume", "--out", str(job.folder)]
    command += ["--plugin", *job.plugins] if job.plugins else []
    # An interrupt before the process is known would leave it behind.
    with (logs / f"{job.name}.log").open("ab") as log, stop_requests() as requested:
        # In a session of its own, or Ctrl-C would reach it before it is told to stop.
        job.process = subprocess.Popen(
            command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )
    if requested:
        raise KeyboardInterrupt
    job.core = core
    if core is not None:
        os.sched_setaffinity(job.process.pid, {core})


def _last_line(job: Job, logs: Path) -> str:
    lines = (logs / f"{job.name}.log").read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "(empty)"


def compare(config: CompareConfig, requested: Requested, display: Display) -> int:
    """Do the runs and write the comparison. Returns 0, or 1 where a run failed."""
    runs = runs_of(config, requested)
    byte_models = [run for run in runs if run.run_dir.name.startswith(BYTE_MODEL_RUN)]
    compared = runs[len(byte_models) :]
    elsewhere = read_tables(config.tables, compared)
    runs = [*byte_models, *without(compared, elsewhere)]
    make_folder(config.out)
    logs = config.out / LOGS
    logs.mkdir(exist_ok=True)
    jobs = [ready(run) for run in runs]
    for job, run in zip(jobs, runs, strict=True):
        needs = run.first.prerequisite
        model = None if needs is None else getattr(run.first, needs.setting)
        job.reads = next((other for other in jobs if other.folder == model and other is not job), None)
    failed = run_jobs(jobs, config.jobs, logs, display)
    done = [job for job in jobs if not job.name.startswith(BYTE_MODEL_RUN) and is_finished(job.folder)]
    here = [read_finished(job.folder, job.plugins) for job in done]
    known = {BYTE_MODEL_RUN, *(job.name for job in jobs)}
    others = sorted(path.parent.name for path in config.out.glob(f"*/{SUMMARY}") if path.parent.name not in known)
    if others:
        display.note(f"left out, since --estimators, --seeds and --tables do not ask for them: {', '.join(others)}")
    if finished := by_estimator([*here, *elsewhere], config.estimators):
        write_comparison(config.out, finished, pairs_of(config), next(iter(requested.values())), display)
    if failed:
        display.note(f"error: {len(failed)} of {len(jobs)} runs failed: {', '.join(failed)}")
    return 1 if failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code, 1 where a run failed, 130 after `kill` too."""
    display = Display()
    given = sys.argv[1:] if arguments is None else arguments

    def command() -> int:
        # `KeyboardInterrupt` on `kill` too, and on Ctrl-C where a shell that started this in the background ignores it: the runs
        # have sessions of their own and would stay behind.
        with stop_signals(signal.default_int_handler):
            return compare(*parse_compare(given), display)

    return exit_code(display, command, stopped="stopped; the same command goes on from here")


if __name__ == "__main__":
    program(main)
