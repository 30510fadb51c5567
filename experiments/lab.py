"""How biased and how noisy gradient estimators are, and where each leads.

`python -m experiments.lab --out DIR` does the experiments of docs/laboratory.md. `python -m experiments.lab --out DIR
--estimators sfe gumbel` trains a small model with each of these estimators and measures the gradient of its router.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
from jaxtyping import Array, Int, PRNGKeyArray

from data import Split, load, open_source
from estimators.bounds import LARGEST_INDEX, MARGIN, Count, Positive, Within
from experiments.command import command_line
from experiments.config.build import build_byte_model, require_fit
from experiments.config.errors import ConfigError, require, require_bounds
from experiments.config.presets import PRESETS
from experiments.laboratory.gradients import Subjects, findings
from experiments.laboratory.greedy import SPREAD, greedy_start
from experiments.laboratory.measure import OUTCOMES
from experiments.laboratory.named import Candidate, examine, measured_table, summarise
from experiments.laboratory.report import flow_picture, flow_table, gradient_table, noise_table
from experiments.laboratory.results import (
    Finding,
    Flow,
    Noise,
    over_sets,
    summarise_findings,
    summarise_flows,
    summarise_noise,
)
from experiments.laboratory.scale import noise
from experiments.laboratory.subjects import RATE, SHAPE, Subject, held_out_texts, make_optimizer, train_subject
from experiments.launch import program
from experiments.reporting.display import Display
from experiments.training.prepared import prepare, require_prerequisite
from experiments.training.run_dir import held, json_text, refuse_existing, write_atomically
from unet import Chunker, Distribute, MeanPool, Select, Smooth

FILES = ("lab.md", "lab.json", "lab.png")
ESTIMATOR_FILES = ("estimators.md", "estimators.json")


@dataclass(frozen=True)
class LabConfig:
    """Examine gradient estimators on models small enough to try every boundary string."""

    out: Path
    """Folder for the tables (lab.md, lab.json) and the figure (lab.png); with --estimators estimators.md and .json."""
    estimators: tuple[str, ...] = ()
    """Measure the router's gradient under these estimators (names, or package.module:Class), each on models trained with it, and
    do nothing else."""
    dataset: str = "docs"
    """Text to train the small models on: anything that --dataset of experiments.run takes."""
    length: Annotated[int, Within(3, 12)] | None = None
    """Bytes of a text, of which 2 to the power of length - 1 boundary strings are tried: by default 10, with --estimators 6."""
    models: Annotated[int, Within(2, 1000)] = 5
    """Small models of different seeds for each chunker, and runs of `tiny`: intervals are over these."""
    sets: Annotated[int, Within(1, 1000)] = 2
    """Sets of texts that the gradients of each model are averaged over; its flows use the first."""
    texts: Annotated[int, Within(2, 1000)] | None = None
    """Texts of a set: by default 6, with --estimators 2, which are the batch of a training step."""
    steps: Count = 400
    """Training steps of the small models, of 64 texts each."""
    time: Annotated[float, Within(MARGIN, 1e9)] = 3000.0
    """Time for which the gradient flows run."""
    learning_rates: tuple[Positive, ...] = (1.0, 8.0)
    """Learning rates of stochastic gradient descent."""
    paths: Annotated[int, Within(1, 1000)] = 8
    """Paths of stochastic gradient descent for each model."""
    after: tuple[Annotated[int, Within(0, LARGEST_INDEX)], ...] = (0, 100)
    """Training steps after which the noise in the model of ordinary size is measured."""
    draws: Annotated[int, Within(8, 2**16)] = 32
    """Draws of boundaries in the model of ordinary size; a multiple of 4."""
    seed: Annotated[int, Within(0, 2**32 - 2001)] = 0
    """Seed of the models and of all noise; models and batches take some of the numbers after it."""
    overwrite: bool = False
    """Replace the files of an earlier run."""

    def __post_init__(self):
        # Every boundary string is tried, intervals are over models, and returns are centred over texts.
        require_bounds(self)
        require(self.draws % 4 == 0, f"--draws must be a multiple of 4; got {self.draws}")

    @property
    def bytes(self) -> int:
        """The length of a text."""
        return (6 if self.estimators else 10) if self.length is None else self.length

    @property
    def batch(self) -> int:
        """The texts of a set."""
        return (2 if self.estimators else 6) if self.texts is None else self.texts


def run(config: LabConfig, display: Display) -> None:
    """Do what is asked for and write the results. Raises `ConfigError` and `DataError`."""
    with held(config.out, display.note):
        if config.estimators:
            _measure_named(config, display)
        else:
            _do_all(config, display)


def find(config: LabConfig, name: str, split: Split) -> Candidate:
    """The estimator of that name, with the settings of `tiny`, in the laboratory's small model. Raises `ConfigError` if there
    is none, or if it cannot be measured on these texts."""
    run = dataclasses.replace(PRESETS["tiny"], unet=SHAPE, estimator=name, dataset=config.dataset, rate=RATE)
    require_prerequisite(run)
    require_fit(run)
    require(len(run.levels) == 1, f"--estimators {name}: without a level of tokens there is no router to measure")
    outcomes = 2 ** (config.batch * run.samples * (config.bytes - 1))
    require(
        outcomes <= OUTCOMES,
        f"--estimators {name}: {config.batch * run.samples} boundary strings of {config.bytes} bytes have {outcomes} outcomes, "
        f"and at most {OUTCOMES} are tried: lower --length or --texts",
    )
    prepared = prepare(run, split)
    return Candidate(name, lambda key: build_byte_model(run, key, prepared), run.samples)


def _measure_named(config: LabConfig, display: Display) -> None:
    """Measure the estimators that are named, and write and show their table."""
    refuse_existing(config.out, ESTIMATOR_FILES, overwrite=config.overwrite)
    split = _split(config)
    texts = _texts(config, split)
    candidates = [find(config, name, split) for name in config.estimators]
    models = []
    for candidate in candidates:
        display.note(f"{candidate.name}: {config.models} models")
        models.append(examine(candidate, split, texts, steps=config.steps, seed=config.seed))
    found = [summarise(of) for of in models]
    page = f"Means over {config.models} models with 95 % intervals.\n\n{measured_table(found)}"
    write_atomically(
        config.out / "estimators.json", json_text({"settings": config, "estimators": found, "models": models})
    )
    write_atomically(config.out / "estimators.md", page)
    display.note(page)


def _do_all(config: LabConfig, display: Display) -> None:
    """All experiments of the laboratory's page."""
    refuse_existing(config.out, FILES, overwrite=config.overwrite)
    try:
        from experiments.laboratory.flow import flows, stochastic_flows
    except ImportError as error:
        raise ConfigError(f"the laboratory needs diffrax ({error}): pip install 'caesura-lm[lab]'") from error

    started = time.process_time()

    def note(text: str) -> None:
        display.note(f"{time.process_time() - started:4.0f} s of CPU time  {text}")

    key = jax.random.key(config.seed)
    tables, expected, paths = [], [], []
    against: tuple[list[int], list[int]] = [], []
    for number, sets in enumerate(_subjects(config, key)):
        own = jax.random.fold_in(key, number)
        note(f"model {number + 1} of {config.models}: means and variances")
        tables.append(_over_sets(sets, own))
        note(f"model {number + 1} of {config.models}: flows")
        found, with_flow = flows(sets[0], time=config.time, key=jax.random.fold_in(own, 11))
        expected.append(found)
        found, with_path = stochastic_flows(
            sets[0].distribute,
            time=config.time,
            rates=config.learning_rates,
            paths=config.paths,
            key=jax.random.fold_in(own, 12),
        )
        paths.append(found)
        against = with_flow, with_path
    note(f"noise in `tiny` after {' and '.join(str(steps) for steps in config.after) or 'no'} steps")
    tiny = dataclasses.replace(PRESETS["tiny"], dataset=config.dataset, seed=config.seed)
    noises = noise(tiny, after=config.after, draws=config.draws, models=config.models)

    page = _write(config, tables, expected, paths, against, noises)
    display.note(page)
    note(f"see {config.out / 'lab.md'} and {config.out / 'lab.png'}")


def _write(
    config: LabConfig,
    tables: Sequence[Sequence[Finding]],
    expected: Sequence[Sequence[Flow]],
    paths: Sequence[Sequence[Flow]],
    against: tuple[Sequence[int], Sequence[int]],
    noises: Mapping[int, Sequence[Sequence[Noise]]],
) -> str:
    """Write the numbers of every model, their means and intervals, and the figure; returns the tables."""
    read_tables = summarise_findings(tables)
    of_flows, of_paths = summarise_flows(expected, against[0]), summarise_flows(paths, against[1])
    of_noise = {steps: summarise_noise(models) for steps, models in noises.items()}
    everything = {
        "settings": config,
        "gradients": read_tables,
        "flows": (*of_flows, *of_paths),
        "noise": of_noise,
        "models": [
            {
                "gradients": tables[number],
                "flows": (*expected[number], *paths[number]),
                "noise": {steps: of[number] for steps, of in noises.items()},
            }
            for number in range(config.models)
        ],
    }
    write_atomically(config.out / "lab.json", json_text(everything))
    write_atomically(config.out / "lab.png", flow_picture(expected, [*of_flows, *of_paths], paths))
    page = "\n".join(
        [
            f"Means over {config.models} models with 95 % intervals.\n",
            "## Gradients\n",
            gradient_table(read_tables),
            "## Flows\n",
            flow_table(of_flows),
            "## Stochastic gradient descent\n",
            flow_table(of_paths),
            *(f"## Noise in `tiny` after {steps} steps\n\n{noise_table(found)}" for steps, found in of_noise.items()),
        ]
    )
    write_atomically(config.out / "lab.md", page)
    return page


def _split(config: LabConfig) -> Split:
    """Text to train the small models on, and enough to examine them on."""
    source = open_source(config.dataset, text_field=None, cache=None, cache_bytes=8 << 30)
    held_out = 16 * config.models * config.sets * config.batch * config.bytes
    return load(source, length=config.bytes, protocol="crop", held_out_share=0.05, held_out_bytes=held_out)


def _texts(config: LabConfig, split: Split) -> Int[Array, "models sets texts length"]:
    """Texts that no model is trained on; none comes twice."""
    shape = (config.models, config.sets, config.batch, config.bytes)
    return held_out_texts(split, count=math.prod(shape[:3]), length=config.bytes).reshape(shape)


def _subjects(config: LabConfig, key: PRNGKeyArray) -> Iterator[list[Subjects]]:
    """For each model seed its three models, with every set of texts; no text comes twice."""
    split = _split(config)
    texts = _texts(config, split)
    pool = MeanPool(SHAPE.dim, key=jax.random.fold_in(key, 9))
    chunkers = Chunker(Select(), Distribute()), Chunker(pool, Distribute()), Chunker(Select(), Smooth())
    optimizer = make_optimizer(config.steps)
    for number in range(config.models):
        own = jax.random.fold_in(jax.random.key(config.seed + 1), number)
        trained = [
            train_subject(
                split,
                chunker,
                length=config.bytes,
                optimizer=optimizer,
                seed=config.seed + number,
                key=jax.random.fold_in(own, place),
            )
            for place, chunker in enumerate(chunkers)
        ]
        yield [Subjects(*(Subject(model, rows) for model in trained)) for rows in texts[number]]


def _over_sets(sets: Sequence[Subjects], key: PRNGKeyArray) -> list[Finding]:
    """The findings of one model, means over its sets of texts, each at logits of its own."""
    found = []
    for number, subjects in enumerate(sets):
        texts, length = subjects.distribute.texts.shape
        keys = jax.random.split(jax.random.fold_in(key, number), 3)
        # Near the start of training: the target rate, give or take what a few steps would change.
        logits = jax.scipy.special.logit(RATE) + SPREAD * jax.random.normal(keys[0], (texts, length - 1))
        found.append(findings(subjects, logits, greedy_start(keys[1], logits.shape), keys[2]))
    return [over_sets(of) for of in zip(*found, strict=True)]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    return command_line(LabConfig, run, "experiments.lab", arguments)


if __name__ == "__main__":
    program(main)
