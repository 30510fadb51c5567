"""Compare learned boundaries with the ends of words: `python -m experiments.words runs/a runs/b --segmenter jieba`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import tyro

from data import Row
from estimators.bounds import LARGEST_BYTES, Seed, Within
from experiments.command import command_line
from experiments.comparison.comparison import MeanAndError
from experiments.config.errors import NOT_NUMBERS, ConfigError, require, require_bounds
from experiments.config.plugins import import_plugins, load_model, require_bytes
from experiments.config.settings import RunConfig
from experiments.evaluation.boundaries import (
    BoundaryStatistics,
    RunAnalysis,
    WithBaselines,
    analyse,
    evaluate_placements,
    position_fractions,
)
from experiments.evaluation.evaluate import evaluate_rows
from experiments.evaluation.segmentation import (
    BYTE_POSITIONS,
    ByteLabels,
    SegmenterName,
    label_bytes,
    open_segmenter,
)
from experiments.launch import program
from experiments.reporting.display import Display
from experiments.reporting.markdown import table
from experiments.terminal import escaped, write_output
from experiments.training.data import load_split
from experiments.training.run_dir import (
    OF_DEVICES,
    differing,
    held,
    json_text,
    read_config,
    refuse_existing,
    with_any_lanes,
    write_atomically,
)

FILES = ("words.md", "words.json")


@dataclass(frozen=True)
class WordsConfig:
    """Compare the boundaries of finished runs with the ends of words, on their held-out text.

    Runs that differ only in their seeds share one row of a table, with mean and standard error.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of finished runs on the same data."""
    segmenter: SegmenterName = "jieba"
    """Definition of word ends: jieba for Chinese (pip install 'caesura-lm[words]'), or white space."""
    bytes: Annotated[int, Within(1, LARGEST_BYTES)] | None = None
    """Maximum number of held-out bytes; by default that of the runs' validation."""
    placements: bool = False
    """Also evaluate each model with the same number of boundaries at other positions: random ones, first, middle or last bytes of
    characters, ends of tokens or of words."""
    seed: Seed = 0
    """Seed of sampled boundaries and of random positions."""
    plugin: tuple[str, ...] = ()
    """Modules with classes of your own that the runs hold, as package.module."""
    out: Path | None = None
    """Folder for words.md and words.json; by default no files are written."""
    overwrite: bool = False
    """Replace existing files."""

    def __post_init__(self):
        require(bool(self.runs), "name at least one folder of a finished run")
        require(len({folder.resolve() for folder in self.runs}) == len(self.runs), "each run is named once")
        require_bounds(self)


def held_out_settings(run: RunConfig) -> tuple[str | int | float | None, ...]:
    """The settings that determine the held-out text of a run."""
    data = run.data
    texts = data.train or run.dataset, data.valid, data.text_field
    return *texts, run.length, run.evaluation.bytes, data.protocol, data.held_out


def check_runs(runs: Mapping[Path, RunConfig]) -> None:
    """Raise `ConfigError` if a run has no token level, or if the runs have different held-out text."""
    (first, of_first), *others = runs.items()
    for folder, run in others:
        if held_out_settings(run) != held_out_settings(of_first):
            raise ConfigError(
                f"{first} and {folder} have different held-out text (--dataset, --length, --evaluation.bytes or --data): "
                "analyse them in separate calls"
            )
    for folder, run in runs.items():
        if not run.levels:
            raise ConfigError(f"{folder} has no level of tokens and thus no boundaries")


def groups(runs: Mapping[Path, RunConfig]) -> dict[str, list[Path]]:
    """Groups of runs that differ only in seed and number of devices and processes. Its estimator names a group; if
    several groups have the same estimator, its first folder is added."""
    grouped: list[list[Path]] = []
    runs = {folder: with_any_lanes(run) for folder, run in runs.items()}
    for folder, run in runs.items():
        same = [group for group in grouped if not differing(run, runs[group[0]], may_differ=("seed", *OF_DEVICES))]
        same[0].append(folder) if same else grouped.append([folder])
    names = [runs[group[0]].estimator for group in grouped]
    # The shortest suffixes of the first folders' paths that are all different.
    longest = max(len(group[0].parts) for group in grouped)
    suffixes = ([Path(*group[0].parts[-parts:]) for group in grouped] for parts in range(1, longest + 1))
    paths = next(some for some in suffixes if len(set(some)) == len(some))
    return {
        f"`{name}`" if names.count(name) == 1 else f"`{name}` ({path})": group
        for name, path, group in zip(names, paths, grouped, strict=True)
    }


def analyse_runs(config: WordsConfig, display: Display) -> None:
    """Analyse the runs one after another and print the tables. Raises `ConfigError`, `DataError` and `LoadError`."""
    if config.out is not None:
        refuse_existing(config.out, FILES, overwrite=config.overwrite)
    with contextlib.nullcontext() if config.out is None else held(config.out, display.note):
        _analyse_runs(config, display)


def _analyse_runs(config: WordsConfig, display: Display) -> None:
    segment = open_segmenter(config.segmenter)
    models = {folder: load_model(folder, import_plugins(config.plugin)).model for folder in config.runs}
    runs = {folder: read_config(folder, config.plugin) for folder in config.runs}
    check_runs(runs)
    first = runs[config.runs[0]]
    rows: Sequence[Row] = load_split(first).held_out_rows(
        first.evaluation.bytes if config.bytes is None else config.bytes
    )
    display.note(f"segmenting {len(rows)} held-out rows of {first.dataset} with {config.segmenter}")
    labels = label_bytes(rows, segment)
    if not labels.token_ends.any():
        raise ConfigError(f"{config.segmenter} finds no token end inside the held-out text of {first.dataset}")
    analyses: dict[Path, RunAnalysis] = {}
    for folder, model in models.items():
        display.note(f"evaluating {folder}")
        batch = runs[folder].batch // runs[folder].optimizer.accumulate
        results = evaluate_rows(model, rows, batch=batch, capacity=first.length, key=jax.random.key(config.seed))
        analyses[folder] = analyse(results, labels)
        require(
            math.isfinite(analyses[folder].bpb),
            f"{folder}: {NOT_NUMBERS}",
        )
        if config.placements:
            moved = evaluate_placements(
                require_bytes(model, folder), rows, results, labels, batch=batch, seed=config.seed
            )
            analyses[folder].placements.update(moved)
    grouped = {name: [analyses[folder] for folder in group] for name, group in groups(runs).items()}
    text = escaped(markdown(grouped, labels, config.segmenter), keep="\n")
    if config.out is not None:
        write_atomically(config.out / FILES[0], text)
        write_atomically(
            config.out / FILES[1],
            json_text(
                {
                    "settings": config,
                    "text": {"bytes": int(labels.counted.sum()), "places": position_fractions(labels, labels.counted)},
                    "groups": {name: [str(folder) for folder in group] for name, group in groups(runs).items()},
                    "runs": {str(folder): one for folder, one in analyses.items()},
                }
            ),
        )
        display.note(f"see {config.out / FILES[0]}")
    # Last, since it may be that nobody reads it.
    write_output(text)


BASELINES = {"own": "", "uniform": "uniform, all bytes", "uniform_characters": "uniform, ends of characters"}


def markdown(grouped: Mapping[str, Sequence[RunAnalysis]], labels: ByteLabels, segmenter: SegmenterName) -> str:
    """All tables, with means and standard errors over the runs of each group."""
    counted = int(labels.counted.sum())
    ends, words = int(labels.token_ends.sum()) / counted, int(labels.word_ends.sum()) / counted
    last = int(labels.at("single", "last").sum()) / counted
    parts = [
        f"{counted:,} held-out bytes. Fractions of them: {last:.3f} end a character, {ends:.3f} end a token of {segmenter}, "
        f"{words:.3f} end a word (a token with a letter, digit or ideograph). A boundary is correct at the last byte of a token. "
        "Forced boundaries, characters cut off at the end of a row and the last character of each text do not count. Uniform "
        "boundaries are as many as the model's; their scores are exact expectations. ± is the standard error over seeds.",
        table(["estimator", "bits per byte", "AUC of p, tokens", "AUC of p, words", "runs"], _summary_rows(grouped)),
        "Distribution of boundaries over positions in characters (single byte; first, middle or last byte of several):",
        table(["boundaries", "rate", *BYTE_POSITIONS], _position_rows(grouped, labels)),
        "Bits of a predicted byte by position in its character. The reward for boundaries is the difference to the early head:",
        table(["estimator", *BYTE_POSITIONS], _bits_rows(grouped)),
        table(
            [
                "boundaries",
                *(f"{score}, {of}" for of in ("tokens", "words") for score in ("precision", "recall", "F1")),
            ],
            _score_rows(grouped),
        ),
    ]
    if any(one.placements for runs in grouped.values() for one in runs):
        parts.append(
            "Bits per byte with the same number of boundaries in each row at other positions. The models were trained with their "
            "own boundaries. Ends of words reveal following bytes, so those values are not a compression rate."
        )
        head = [
            "estimator",
            "boundaries",
            "rate",
            "fraction at these positions",
            "bits per byte",
            "above the model's own",
        ]
        parts.append(table(head, _placement_rows(grouped)))
    return "\n".join(f"{part.rstrip()}\n" for part in parts)


def _summary_rows(grouped: Mapping[str, Sequence[RunAnalysis]]) -> list[list[str]]:
    return [
        [
            name,
            MeanAndError.of([run.bpb for run in runs]).text(4),
            MeanAndError.of([run.auc_ends for run in runs]).text(),
            MeanAndError.of([run.auc_words for run in runs]).text(),
            str(len(runs)),
        ]
        for name, runs in grouped.items()
    ]


def _boundaries_of(runs: Sequence[RunAnalysis], action: str) -> list[WithBaselines]:
    return [run.sampled if action == "sampled" else run.greedy for run in runs]


def _position_rows(grouped: Mapping[str, Sequence[RunAnalysis]], labels: ByteLabels) -> list[list[str]]:
    rows = []
    for name, runs in grouped.items():
        for action in ("sampled", "greedy"):
            own = [boundaries.own for boundaries in _boundaries_of(runs, action)]
            cells = [MeanAndError.of([one.places[position] for one in own]).text() for position in BYTE_POSITIONS]
            rows.append([f"{name}, {action}", MeanAndError.of([one.rate for one in own]).text(), *cells])
    all_bytes = position_fractions(labels, labels.counted)
    return [*rows, ["all bytes", "1", *(f"{all_bytes[position]:.3f}" for position in BYTE_POSITIONS)]]


def _bits_rows(grouped: Mapping[str, Sequence[RunAnalysis]]) -> list[list[str]]:
    rows = []
    for name, runs in grouped.items():
        for label, bits in {
            name: [run.bits for run in runs],
            f"{name}, early head": [run.early_bits for run in runs],
        }.items():
            rows.append(
                [label, *(MeanAndError.of([one[position] for one in bits]).text() for position in BYTE_POSITIONS)]
            )
    return rows


def _score_rows(grouped: Mapping[str, Sequence[RunAnalysis]]) -> list[list[str]]:
    rows = []
    for name, runs in grouped.items():
        for action in ("sampled", "greedy"):
            for kind, label in BASELINES.items():
                statistics: list[BoundaryStatistics] = [
                    getattr(boundaries, kind) for boundaries in _boundaries_of(runs, action)
                ]
                cells = [
                    MeanAndError.of([getattr(getattr(one, of), score) for one in statistics]).text()
                    for of in ("ends", "words")
                    for score in ("precision", "recall", "f1")
                ]
                rows.append([f"{name}, {action}" if kind == "own" else f"as many {label}", *cells])
    return rows


def _placement_rows(grouped: Mapping[str, Sequence[RunAnalysis]]) -> list[list[str]]:
    rows = []
    for name, runs in grouped.items():
        for placement in runs[0].placements:
            placed = [run.placements[placement] for run in runs]
            worse = [one.bpb - next(iter(run.placements.values())).bpb for one, run in zip(placed, runs, strict=True)]
            at_requested = MeanAndError.of([one.there for one in placed])
            rows.append(
                [
                    name,
                    placement,
                    MeanAndError.of([one.rate for one in placed]).text(),
                    "" if math.isnan(at_requested.mean) else at_requested.text(2),
                    MeanAndError.of([one.bpb for one in placed]).text(4),
                    MeanAndError.of(worse).text(4),
                ]
            )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code."""
    return command_line(WordsConfig, analyse_runs, "experiments.words", arguments)


if __name__ == "__main__":
    program(main)
