"""The settings of an evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from estimators.bounds import LARGEST_BYTES, Count, Length, Seed, Within
from experiments.config.errors import require, require_bounds
from experiments.scoring.score import BoundaryChoice
from experiments.scoring.texts import SplitName


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluate models on a text: bits per byte of every byte, and their boundaries. Or on tasks (--tasks)."""

    models: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Folders of runs, finished or not, or of exported models; .safetensors or .pt files; hub:owner/name; or published H-Nets
    (cartesia-ai/hnet_1stage_L)."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness instead of a text (pip install 'caesura-lm[eval]'): its names, such as piqa; cute;
    hellaswag_antspeak and the other noises; or the tasks of a published table: sfe-table-1, hnet-table-2, hnet-table-3,
    hnet-table-4."""
    task_files: tuple[Path, ...] = ()
    """Folders with task files of your own, for --tasks."""
    limit: Count | None = None
    """Examples of each task, from its start; by default all."""
    shots: Annotated[int, Within(0, 1024)] | None = None
    """Solved examples before each example of a task; by default what the task says, or none."""
    bytes_per_token: Annotated[int, Within(1, 1024)] = 4
    """Bytes that a token of a task's limit on generated text stands for."""
    step: Count | None = None
    """Use the checkpoint of this step of each run; by default the finished model or, before that, the newest checkpoint."""
    dataset: str | None = None
    """Text: whatever training takes; by default what the models were trained on."""
    split: SplitName = "held-out"
    """held-out: the documents that training holds out; training: the others; all: both; test: the test text of enwik8 and text8,
    or what --data.test of the run names."""
    text: Path | None = None
    """A file as one document, byte for byte, instead of a data set."""
    text_field: str | None = None
    """Field of JSON lines and Parquet files that holds the text; by default as in training."""
    bytes: Annotated[int, Within(1, LARGEST_BYTES)] | None = None
    """Maximum bytes of text, from its start; by default 1,000,000 of a data set and all of --text."""
    context: Length | None = None
    """Bytes that a window reads; by default the length of the runs' sequences, 4096 without one."""
    stride: Annotated[int, Within(1, 2**24)] | None = None
    """Bytes that windows move by; every byte is predicted from more than --context minus --stride bytes, but at the start of a
    document. By default half the context. The cost is --context divided by --stride."""
    boundaries: BoundaryChoice | None = None
    """drawn: as in generation, with --seed; greedy: where p > 0.5. By default drawn, for tasks greedy."""
    samples: Annotated[int, Within(1, 1024)] | None = None
    """Sets of boundaries that are drawn for each document, or each continuation of a task; by default 1."""
    seed: Seed = 0
    """Seed of drawn boundaries, of bootstrap intervals and of bytes that a task draws."""
    bpe: str | None = None
    """Compare boundaries with a byte-pair encoding: the number of tokens to learn from this text, or a tokenizer.json (pip
    install 'caesura-lm[bpe]')."""
    reference: Path | None = None
    """Compare boundaries with a segmentation: JSON lines, for each document a list of the byte offsets at which its segments
    begin."""
    repeat: tuple[str, ...] = ("a", " ", "0")
    """Also evaluate texts of one repeated string."""
    drift: bool = False
    """Also compare the boundaries of all checkpoints of each run."""
    perplexity: bool = False
    """Also give the perplexity, 2 to the bits per byte: for DNA that per base, as papers have it."""
    per_byte: Path | None = None
    """Write everything about every byte to this Parquet file (pip install 'caesura-lm[parquet]')."""
    report: Path | None = None
    """Folder for report.html, with plots, and evaluation.json."""
    overwrite: bool = False
    """Replace existing files."""
    json: bool = False
    """Print one JSON document instead of tables."""
    cache: Path | None = None
    """Folder where scores are kept, so that nothing is computed twice; by default ~/.cache/caesura/evaluation."""
    keep: bool = True
    """Use that folder."""
    plugin: tuple[str, ...] = ()
    """Modules with classes of your own that the models hold, as package.module."""

    def __post_init__(self):
        require(bool(self.models), "name at least one model")
        require(len(set(self.models)) == len(self.models), "each model is named once")
        require_bounds(self)
        if self.context is not None and self.stride is not None:
            require(
                self.stride <= self.context,
                f"--stride {self.stride} is more than --context {self.context}: windows would leave bytes out",
            )
        require(
            self.text is None or self.dataset is None, "--text is evaluated instead of a --dataset: name one of them"
        )
        require(self.text is None or self.split == "held-out", "--text has no splits: leave out --split")
        require(all(self.repeat), "--repeat needs strings that are not empty")
        require(self.step is None or not self.drift, "--drift takes all checkpoints: leave out --step")
        self._check_tasks()

    def _check_tasks(self) -> None:
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        of_texts = [name for name in OF_TEXTS if getattr(self, name) != defaults[name]]
        of_tasks = [name for name in OF_TASKS if getattr(self, name) != defaults[name]]
        require(
            not self.tasks or not of_texts, f"--tasks are evaluated instead of a text: leave out {_flags(of_texts)}"
        )
        require(bool(self.tasks) or not of_tasks, f"name the --tasks that {_flags(of_tasks)} is for")


OF_TEXTS = (
    "dataset",
    "split",
    "text",
    "text_field",
    "bytes",
    "bpe",
    "reference",
    "repeat",
    "drift",
    "per_byte",
    "report",
    "overwrite",
)
"""Settings of texts that tasks do not have."""
OF_TASKS = ("task_files", "limit", "shots", "bytes_per_token")


def _flags(names: Sequence[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)
