"""Train variants of a model on the same data and compare them: `python -m experiments.compare --estimators sfe gumbel hnet`, or
`python -m experiments.compare study.toml`."""

from __future__ import annotations

import dataclasses
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from estimators.bounds import Seed, Within
from estimators.registry import COMPARED
from experiments.command import exit_code
from experiments.comparison.comparison import write_comparison
from experiments.comparison.finished import (
    FinishedRun,
    Key,
    by_variant,
    is_finished,
    read_finished,
    read_joined,
    read_tables,
)
from experiments.comparison.jobs import prepared, ready, run_jobs
from experiments.comparison.plan import BYTE_MODEL_RUN, Plan, pairs_of, requested_runs, run_folders, runs_of
from experiments.comparison.study import Study, Variant, found, of_estimators, read_study
from experiments.config.arguments import PATHS, usage
from experiments.config.errors import ConfigError, require, require_bounds
from experiments.config.plugins import named_modules, trusted
from experiments.config.settings import RunConfig
from experiments.launch import program
from experiments.reporting.display import Display
from experiments.training.data import open_data
from experiments.training.run_dir import SUMMARY, make_folder
from experiments.training.stopping import stop_signals

LOGS = "logs"
OF_SINGLE_RUNS = ("--estimator", "--seed", "--resume", "--overwrite", "--config")


@dataclass(frozen=True)
class CompareConfig:
    """Train variants of a model on the same data in the same order, seed by seed, and put them side by side.

    Variants are estimators, or those of a study: a TOML file of named settings. Every setting of `python -m experiments.run` may
    follow: it holds for all of the runs. Runs that are finished are not done again, runs that were stopped go on.
    """

    study: Path | None = None
    """File of named variants, or the name of one that comes with the library; also without --study, in the first place."""
    estimators: tuple[str, ...] = ()
    """What to compare instead, by name or as package.module:Class; by default those of the papers."""
    variants: tuple[str, ...] = ()
    """Those of the study to do; by default all."""
    runs: tuple[str, ...] = ()
    """Folders of finished runs to put beside them, made by any command, as PATH or NAME=PATH; those of one name are its seeds."""
    reference: str | None = None
    """What gains are relative to; by default what the study says, uniform boundaries, or the first."""
    pairs: tuple[str, ...] = ()
    """Which to compare with each other, as FIRST:SECOND, such as sfe:hnet sfe:uniform; by default every two estimators, and each
    variant of a study with its reference."""
    seeds: tuple[Seed, ...] | None = None
    """Seeds of parameters, data order and boundaries; by default those of the study, or 0 1 2."""
    tables: tuple[Path, ...] = ()
    """table.json of comparisons made elsewhere with the same settings: their runs count as if they had been done here."""
    out: Path | None = None
    """Folder for the runs, the table and the report; by default runs/compare, or runs/ and the name of the study."""
    jobs: Annotated[int, Within(1, 1024)] | None = None
    """Runs at a time; on a CPU each gets a core of its own, which for small models is faster than sharing two. By default what
    the study says, or 1."""

    def __post_init__(self):
        require_bounds(self)
        require(
            len(set(self.estimators)) == len(self.estimators) and len(set(self.seeds or ())) == len(self.seeds or ()),
            "--estimators and --seeds name each estimator and each seed once",
        )
        require(self.seeds is None or bool(self.seeds), "a comparison needs at least one seed")
        require(self.study is None or not self.estimators, "--study has variants and --estimators makes them: use one")


def parse_compare(arguments: Sequence[str]) -> Plan:
    """What to compare, and the run of each variant.

    Prints help or a usage error and raises `SystemExit` (2 for an error); raises `ConfigError` for inconsistent values.
    """
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--study", *arguments]
    with usage(arguments):
        config, rest = tyro.cli(
            CompareConfig,
            prog="python -m experiments.compare",
            args=list(arguments),
            return_unknown_args=True,
            registry=PATHS,
        )
    several = [given.partition("=")[0] for given in rest if given.startswith("--distributed.")]
    for flag in (*OF_SINGLE_RUNS, *several):
        if any(given == flag or given.startswith(flag + "=") for given in rest):
            raise ConfigError(
                f"{flag} is for single runs; a comparison has --study or --estimators, --seeds and goes on by itself"
            )
    return plan_of(config, rest, arguments)


def plan_of(config: CompareConfig, rest: Sequence[str], arguments: Sequence[str]) -> Plan:
    """The plan of a comparison with the flags `rest` for its runs; `arguments` are the whole command line.

    Raises `ConfigError` for what cannot be compared.
    """
    study = study_of(config)
    head = study.head
    run_folders(study)
    seeds = head.seeds if config.seeds is None else config.seeds
    require(
        bool(seeds) and len(set(seeds)) == len(seeds), f"{study.place()}seeds names each seed once, and at least one"
    )
    said = config.reference or head.reference
    reference = study.names[0] if said is None else said
    require(reference in study.names, f"{study.place()}--reference {reference!r} is none of {', '.join(study.names)}")
    out = Path("runs") / (study.file.stem if study.file else "compare") if config.out is None else config.out
    return Plan(
        study=study,
        requested=requested_runs(study, rest, named_modules(arguments)),
        seeds=seeds,
        reference=reference,
        # Of estimators without uniform boundaries none is the second of its pairs.
        pairs=pairs_of(study, config.pairs or head.pairs, reference if study.file else said),
        out=out,
        jobs=head.jobs if config.jobs is None else config.jobs,
        tables=config.tables,
        modules=named_modules(arguments),
    )


def study_of(config: CompareConfig) -> Study:
    """The study that the flags name or make, with the finished runs that they add. Raises `ConfigError`."""
    if config.study is not None:
        study = read_study(found(config.study))
    else:
        study = of_estimators(config.estimators or (() if config.runs else COMPARED))
    if config.variants:
        if unknown := [name for name in config.variants if name not in study.names]:
            raise ConfigError(f"{study.place()}--variants {unknown[0]!r} is none of {', '.join(study.names)}")
        head = (
            study.head if study.head.reference in config.variants else dataclasses.replace(study.head, reference=None)
        )
        kept = tuple(variant for variant in study.variants if variant.name in config.variants)
        study = dataclasses.replace(study, variants=kept, head=dataclasses.replace(head, pairs=()))
    joined = _joined(config.runs)
    for name in study.names:
        require(name not in joined, f"--runs {name}=…: there is a variant of that name; name the runs otherwise")
    return dataclasses.replace(
        study, variants=(*study.variants, *(Variant(name, runs=tuple(paths)) for name, paths in joined.items()))
    )


def _joined(given: Sequence[str]) -> dict[str, list[Path]]:
    """The folders of finished runs by the name that they have in the comparison: if none is given their own, without the seed."""
    joined: dict[str, list[Path]] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or Path(text).exists():
            own = Path(text).resolve().name
            name, path = (own.rpartition("-")[0] or own) if own.rpartition("-")[2].isdigit() else own, text
        joined.setdefault(name, []).append(Path(path))
    return joined


def compare(plan: Plan, display: Display) -> int:
    """Do the runs and write the comparison. Returns 0, or 1 where a run failed."""
    byte_models, requested = runs_of(plan)
    finished: dict[Key, FinishedRun] = {}
    for variant in plan.study.variants:
        finished |= read_joined(variant.name, variant.runs, plan.modules)
    finished |= read_tables(plan.tables, requested)
    here = {key: run for key, run in requested.items() if key not in finished}
    # All of them before the first is touched.
    for run in byte_models:
        prepared(run, may_differ=("seed",))
    for run in here.values():
        prepared(run)
    missing = [run for run in (*byte_models, *here.values()) if not is_finished(run.run_dir)]
    for dataset, data in {(run.dataset, run.data) for run in missing}:
        open_data(dataset, data)
    make_folder(plan.out)
    logs = plan.out / LOGS
    logs.mkdir(exist_ok=True)
    # A byte model serves for seeds named later, too.
    jobs = [*(ready(run, may_differ=("seed",)) for run in byte_models), *(ready(run) for run in here.values())]
    for job, run in zip(jobs, [*byte_models, *here.values()], strict=True):
        job.reads = next((other for other in jobs if other.folder == _read_by(run) and other is not job), None)
    failed = run_jobs(jobs, plan.jobs, logs, display)
    for key, run in here.items():
        if is_finished(run.run_dir):
            finished[key] = read_finished(run.run_dir, trusted(run))
    known = {job.name for job in jobs} | {run.run_dir.name for run in requested.values()}
    others = sorted(path.parent.name for path in plan.out.glob(f"*/{SUMMARY}") if path.parent.name not in known)
    if others := [name for name in others if not name.startswith(BYTE_MODEL_RUN)]:
        display.note(f"left out, since nothing here asks for them: {', '.join(others)}")
    if runs := by_variant(finished, plan.study.names):
        write_comparison(plan, runs, display)
    if failed:
        display.note(f"error: {len(failed)} of {len(jobs)} runs failed: {', '.join(failed)}")
    return 1 if failed else 0


def _read_by(run: RunConfig) -> object:
    """The folder of the run whose model this one reads, if any."""
    needs = run.first.prerequisite
    return None if needs is None else getattr(run.first, needs.setting)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code, 1 where a run failed, 130 after `kill` too."""
    display = Display()
    given = sys.argv[1:] if arguments is None else arguments

    def command() -> int:
        # `KeyboardInterrupt` on `kill` too, and on Ctrl-C where a shell that started this in the background ignores it: the runs
        # have sessions of their own and would stay behind.
        with stop_signals(signal.default_int_handler):
            return compare(parse_compare(given), display)

    return exit_code(display, command, stopped="stopped; the same command goes on from here")


if __name__ == "__main__":
    program(main)
