"""Do learned boundaries stand at the ends of words? `python -m experiments.words runs/a runs/b --segmenter jieba`."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import tyro

from data import Row
from experiments.comparison.comparison import Measured
from experiments.config.errors import ConfigError, require
from experiments.config.settings import RunConfig
from experiments.evaluation.boundaries import Drawn, Examined, Report, examine, placements, shares
from experiments.evaluation.evaluate import evaluate_rows
from experiments.evaluation.segmentation import PLACES, Marks, SegmenterName, mark, open_segmenter
from experiments.launch import with_large_pages
from experiments.reporting.display import Display, command_line
from experiments.reporting.markdown import table
from experiments.training.data import load_split
from experiments.training.run_dir import differing, json_text, read_config, refuse_existing, write_atomically
from unet.files.saving import load

FILES = ("words.md", "words.json")


@dataclass(frozen=True)
class WordsConfig:
    """Compare the boundaries of finished runs with the ends of words, on their held-out text.

    Runs that differ in nothing but their seeds are one line, with a mean and a standard error.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of finished runs on the same data."""
    segmenter: SegmenterName = "jieba"
    """Who says where words end: jieba for Chinese (pip install 'caesura-lm[words]'), or white space."""
    bytes: int | None = None
    """Held-out bytes to look at, at most; by default what the runs were validated on."""
    placements: bool = False
    """Also: the bits per byte of each model with as many boundaries in other places, at random ones, at first, middle or last
    bytes of characters, or at ends of words."""
    seed: int = 0
    """Seed of sampled boundaries and of other places."""
    out: Path | None = None
    """Folder for words.md and words.json; by default nothing is written."""
    overwrite: bool = False
    """Replace the files of an earlier call."""

    def __post_init__(self):
        require(bool(self.runs), "name at least one folder of a finished run")
        require(len({folder.resolve() for folder in self.runs}) == len(self.runs), "each run is named once")
        require(self.bytes is None or self.bytes >= 1, f"--bytes must be at least 1; got {self.bytes}")


def held_out_text(run: RunConfig) -> tuple[str | int | float | None, ...]:
    """The settings that say which held-out text a run has."""
    data = run.data
    return run.dataset, run.length, run.evaluation.bytes, data.protocol, data.text_field, data.held_out


def check_runs(runs: Mapping[Path, RunConfig]) -> None:
    """Raise `ConfigError` for runs that draw no boundaries, or that cannot be compared."""
    (first, of_first), *others = runs.items()
    for folder, run in others:
        if held_out_text(run) != held_out_text(of_first):
            raise ConfigError(
                f"{first} and {folder} have different held-out text (--dataset, --length, --evaluation.bytes or --data): look "
                "at them in separate calls"
            )
    for folder, run in runs.items():
        if not run.levels:
            raise ConfigError(f"{folder} has no level of tokens, and so no boundaries")


def groups(runs: Mapping[Path, RunConfig]) -> dict[str, list[Path]]:
    """Runs that differ in nothing but their seeds, by estimator; by estimator and first folder where that is not enough."""
    found: list[list[Path]] = []
    for folder, run in runs.items():
        same = [group for group in found if not differing(run, runs[group[0]], may_differ=("seed", "devices"))]
        same[0].append(folder) if same else found.append([folder])
    names = [runs[group[0]].estimator for group in found]
    # As much of each first folder's path as tells all of them apart.
    most = max(len(group[0].parts) for group in found)
    ends = ([Path(*group[0].parts[-parts:]) for group in found] for parts in range(1, most + 1))
    paths = next(some for some in ends if len(set(some)) == len(some))
    return {
        f"`{name}`" if names.count(name) == 1 else f"`{name}` ({path})": group
        for name, path, group in zip(names, paths, found, strict=True)
    }


def look(config: WordsConfig, display: Display) -> None:
    """Examine the runs one after another; tables on standard output. Raises `ConfigError`, `DataError` and `LoadError`."""
    if config.out is not None:
        refuse_existing(config.out, FILES, overwrite=config.overwrite)
    segment = open_segmenter(config.segmenter)
    models = {folder: load(str(folder)).model for folder in config.runs}
    runs = {folder: read_config(folder) for folder in config.runs}
    check_runs(runs)
    one = runs[config.runs[0]]
    rows: Sequence[Row] = load_split(one).held_out_rows(one.evaluation.bytes if config.bytes is None else config.bytes)
    display.note(f"segmenting {len(rows)} held-out rows of {one.dataset} with {config.segmenter}")
    marks = mark(rows, segment)
    if not marks.ends.any():
        raise ConfigError(f"{config.segmenter} sees no word end inside the held-out text of {one.dataset}")
    found: dict[Path, Examined] = {}
    for folder, model in models.items():
        display.note(f"evaluating {folder}")
        batch = runs[folder].batch // runs[folder].optimizer.accumulate
        kept = evaluate_rows(model, rows, batch=batch, capacity=one.length, key=jax.random.key(config.seed))
        found[folder] = examine(kept, marks)
        if config.placements:
            found[folder].placements.update(placements(model, rows, kept, marks, batch=batch, seed=config.seed))
    grouped = {name: [found[folder] for folder in group] for name, group in groups(runs).items()}
    text = markdown(grouped, marks, config.segmenter)
    sys.stdout.write(text)
    if config.out is not None:
        config.out.mkdir(parents=True, exist_ok=True)
        write_atomically(config.out / FILES[0], text)
        write_atomically(
            config.out / FILES[1],
            json_text(
                {
                    "settings": config,
                    "text": {"bytes": int(marks.counted.sum()), "places": shares(marks, marks.counted)},
                    "groups": {name: [str(folder) for folder in group] for name, group in groups(runs).items()},
                    "runs": {str(folder): one for folder, one in found.items()},
                }
            ),
        )
        display.note(f"see {config.out / FILES[0]}")


KINDS = {"own": "", "uniform": "uniform, all bytes", "uniform_characters": "uniform, ends of characters"}


def markdown(grouped: Mapping[str, Sequence[Examined]], marks: Marks, segmenter: SegmenterName) -> str:
    """All tables, means and standard errors over the runs of each group."""
    counted = int(marks.counted.sum())
    ends, words = int(marks.ends.sum()) / counted, int(marks.words.sum()) / counted
    last = int(marks.at("single", "last").sum()) / counted
    parts = [
        f"{counted:,} held-out bytes, of which {last:.3f} end a character, {ends:.3f} a token of {segmenter} and {words:.3f} a "
        "word (a token with a letter, digit or ideograph in it). A boundary agrees where it stands at the last byte of a token; "
        "forced boundaries, characters cut by a row's edge and the last character of each text do not count. Uniform "
        "boundaries are as many as the model's, their figures exact expectations. ± is the standard error over seeds.",
        table(["estimator", "bits per byte", "AUC of p, tokens", "AUC of p, words", "runs"], _summary_rows(grouped)),
        "Where boundaries stand in their characters (a character of one byte; the first, a middle, the last byte of several):",
        table(["boundaries", "rate", *PLACES], _place_rows(grouped, marks)),
        "Bits of a predicted byte by its place in its character; less than the early head's is what boundaries are rewarded for:",
        table(["estimator", *PLACES], _bit_rows(grouped)),
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
            "Bits per byte with as many boundaries elsewhere (the same number in each row), of models that were trained with "
            "their own; ends of words tell of bytes to come, so that those figures are no compression."
        )
        head = ["estimator", "boundaries", "rate", "of them there", "bits per byte", "above its own"]
        parts.append(table(head, _placement_rows(grouped)))
    return "\n".join(f"{part.rstrip()}\n" for part in parts)


def _summary_rows(grouped: Mapping[str, Sequence[Examined]]) -> list[list[str]]:
    return [
        [
            name,
            Measured.of([run.bpb for run in runs]).text(4),
            Measured.of([run.auc_ends for run in runs]).text(),
            Measured.of([run.auc_words for run in runs]).text(),
            str(len(runs)),
        ]
        for name, runs in grouped.items()
    ]


def _drawn(runs: Sequence[Examined], action: str) -> list[Drawn]:
    return [run.sampled if action == "sampled" else run.greedy for run in runs]


def _place_rows(grouped: Mapping[str, Sequence[Examined]], marks: Marks) -> list[list[str]]:
    rows = []
    for name, runs in grouped.items():
        for action in ("sampled", "greedy"):
            own = [drawn.own for drawn in _drawn(runs, action)]
            cells = [Measured.of([one.places[place] for one in own]).text() for place in PLACES]
            rows.append([f"{name}, {action}", Measured.of([one.rate for one in own]).text(), *cells])
    everywhere = shares(marks, marks.counted)
    return [*rows, ["all bytes", "1", *(f"{everywhere[place]:.3f}" for place in PLACES)]]


def _bit_rows(grouped: Mapping[str, Sequence[Examined]]) -> list[list[str]]:
    rows = []
    for name, runs in grouped.items():
        for label, bits in {
            name: [run.bits for run in runs],
            f"{name}, early head": [run.early_bits for run in runs],
        }.items():
            rows.append([label, *(Measured.of([one[place] for one in bits]).text() for place in PLACES)])
    return rows


def _score_rows(grouped: Mapping[str, Sequence[Examined]]) -> list[list[str]]:
    rows = []
    for name, runs in grouped.items():
        for action in ("sampled", "greedy"):
            for kind, label in KINDS.items():
                reports: list[Report] = [getattr(drawn, kind) for drawn in _drawn(runs, action)]
                cells = [
                    Measured.of([getattr(getattr(report, of), score) for report in reports]).text()
                    for of in ("ends", "words")
                    for score in ("precision", "recall", "f1")
                ]
                rows.append([f"{name}, {action}" if kind == "own" else f"as many {label}", *cells])
    return rows


def _placement_rows(grouped: Mapping[str, Sequence[Examined]]) -> list[list[str]]:
    rows = []
    for name, runs in grouped.items():
        for where in runs[0].placements:
            placed = [run.placements[where] for run in runs]
            worse = [one.bpb - next(iter(run.placements.values())).bpb for one, run in zip(placed, runs, strict=True)]
            there = Measured.of([one.there for one in placed])
            rows.append(
                [
                    name,
                    where,
                    Measured.of([one.rate for one in placed]).text(),
                    "" if math.isnan(there.mean) else there.text(2),
                    Measured.of([one.bpb for one in placed]).text(4),
                    Measured.of(worse).text(4),
                ]
            )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns 0, or 2 for a user's error."""
    return command_line(WordsConfig, look, "experiments.words", arguments)


if __name__ == "__main__":
    with_large_pages()
    sys.exit(main())
