"""Evaluate models on a text: `python -m experiments.evaluate RUN [MODEL …] --dataset my-texts/`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data.hub import default_cache
from experiments.command import command_line
from experiments.launch import program
from experiments.reporting.display import Display
from experiments.scoring.cache import ScoreCache
from experiments.scoring.compute import evaluation_of
from experiments.scoring.document import document
from experiments.scoring.inputs import read_inputs
from experiments.scoring.page import FILES, write_page
from experiments.scoring.per_byte import require_writable, write_per_byte
from experiments.scoring.settings import EvaluateConfig
from experiments.scoring.tables import markdown
from experiments.terminal import write_output
from experiments.training.run_dir import json_text, refuse_existing


def evaluate(config: EvaluateConfig, display: Display) -> None:
    """Evaluate the models and print tables or a JSON document. Everything is checked before anything is computed.

    Raises `ConfigError`, `DataError` and `LoadError`.
    """
    if config.per_byte is not None:
        require_writable(config.per_byte, overwrite=config.overwrite)
    if config.report is not None:
        refuse_existing(config.report, FILES, overwrite=config.overwrite)
    cache = ScoreCache(_folder(config) if config.keep else None)
    inputs = read_inputs(config)
    cache.check()
    try:
        evaluation, scores = evaluation_of(inputs, config, cache, display)
    finally:
        cache.evict()
    found = json_text(document(evaluation, config))
    write_output(found if config.json else markdown(evaluation))
    if config.per_byte is not None:
        write_per_byte(
            config.per_byte, inputs.text, [(one.name, of) for one, of in zip(inputs.models, scores, strict=True)]
        )
        display.note(f"see {config.per_byte}")
    if config.report is not None:
        write_page(config.report, evaluation, scores, found)
        display.note(f"see {config.report / FILES[0]}")


def _folder(config: EvaluateConfig) -> Path:
    return default_cache() / "evaluation" if config.cache is None else config.cache


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code."""
    stopped = "stopped; the same command goes on where this one was"
    return command_line(EvaluateConfig, evaluate, "experiments.evaluate", arguments, stopped)


if __name__ == "__main__":
    program(main)
