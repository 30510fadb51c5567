"""The runs of a comparison in processes of their own, some at a time."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.config.errors import ConfigError
from experiments.config.files import to_json
from experiments.config.plugins import trusted
from experiments.config.settings import RunConfig
from experiments.reporting.display import Display
from experiments.training.run_dir import CONFIG, OF_DEVICES, SUMMARY, differing, held, prepare_new, read_config
from experiments.training.stopping import stop_requests, stop_signals
from unet.files.saving import write_atomically


@dataclass
class Job:
    """One run of the comparison, the modules of others that it needs, the run whose model it reads, and its process."""

    name: str
    folder: Path
    plugins: tuple[str, ...] = ()
    trackers: tuple[str, ...] = ()
    reads: Job | None = None
    process: subprocess.Popen[bytes] | None = None
    core: int | None = None

    @property
    def may_start(self) -> bool:
        """Whether the model it reads, if any, is there, or will never be."""
        if self.reads is None or (self.reads.folder / SUMMARY).is_file():
            return True
        return self.reads.process is not None and self.reads.process.poll() is not None


def prepared(run: RunConfig, may_differ: Collection[str] = ()) -> RunConfig | None:
    """The configuration in a run's folder, whose settings `may_differ`; None where there is none yet. Raises `ConfigError` where
    it holds a run of other settings."""
    folder = run.run_dir
    if not (folder / CONFIG).is_file():
        return None
    there = read_config(folder, trusted(run))
    # How many cores a run had moves its curve by no more than rounding.
    if changed := differing(run, there, (*may_differ, *OF_DEVICES)):
        raise ConfigError(f"{folder} holds a run with other settings for {', '.join(changed)}; name another --out")
    return there


def ready(run: RunConfig, may_differ: Collection[str] = ()) -> Job:
    """A run's folder with its configuration in it. Raises what `prepared` raises, and `ConfigError` where another process is at
    work on the run while its number of devices has to change."""
    there, folder = prepared(run, may_differ), run.run_dir
    if there is None:
        prepare_new(run)
    elif run.devices != there.devices and not (folder / SUMMARY).is_file():
        # It goes on with the cores that it gets now, or two devices would share one.
        with held(folder):
            write_atomically(folder / CONFIG, to_json(dataclasses.replace(there, devices=run.devices)))
    return Job(folder.name, folder, trusted(run), run.tracker)


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
    # Of a launcher that has started the comparison, too.
    command += ["--distributed.launcher", "none"]
    command += ["--plugin", *job.plugins] if job.plugins else []
    command += ["--tracker", *job.trackers] if job.trackers else []
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
