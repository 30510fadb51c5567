"""Evaluate models on a text: `python -m experiments.evaluate RUN [MODEL …] --dataset my-texts/`; on tasks: `--tasks piqa`."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.command import command_line
from experiments.devices import CPU_DEVICES, settle_cpu_devices
from experiments.launch import program
from experiments.reporting.display import Display
from experiments.scoring.cache import ScoreCache, default_folder
from experiments.scoring.compute import evaluation_of
from experiments.scoring.document import document
from experiments.scoring.inputs import read_inputs
from experiments.scoring.page import FILES, write_page
from experiments.scoring.per_byte import require_writable, write_per_byte
from experiments.scoring.settings import EvaluateConfig
from experiments.scoring.tables import markdown
from experiments.tasks.evaluation import document as task_document
from experiments.tasks.evaluation import task_evaluation
from experiments.tasks.tables import markdown as task_markdown
from experiments.terminal import write_output
from experiments.training.run_dir import json_text, refuse_existing


def evaluate(config: EvaluateConfig, display: Display) -> None:
    """Evaluate the models on a text or on tasks. Raises `ConfigError`, `DataError` and `LoadError`."""
    cache = ScoreCache((config.cache or default_folder()) if config.keep else None)
    if config.tasks:
        evaluate_tasks(config, cache, display)
    else:
        evaluate_text(config, cache, display)


def evaluate_text(config: EvaluateConfig, cache: ScoreCache, display: Display) -> None:
    """Evaluate the models on a text and print tables or a JSON document. Everything is checked before anything is computed.

    Raises `ConfigError`, `DataError` and `LoadError`.
    """
    if config.per_byte is not None:
        require_writable(config.per_byte, overwrite=config.overwrite)
    if config.report is not None:
        refuse_existing(config.report, FILES, overwrite=config.overwrite)
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


def evaluate_tasks(config: EvaluateConfig, cache: ScoreCache, display: Display) -> None:
    """Evaluate the models on tasks and print tables or a JSON document. Raises `ConfigError`, `DataError` and `LoadError`."""
    cache.check()
    try:
        evaluation = task_evaluation(config, cache, display)
    finally:
        cache.evict()
    found = json_text(task_document(evaluation, config)) if config.json else task_markdown(evaluation)
    write_output(found)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code."""
    settle_cpu_devices(CPU_DEVICES)
    stopped = "stopped; the same command goes on where this one was"
    return command_line(EvaluateConfig, evaluate, "experiments.evaluate", arguments, stopped)


if __name__ == "__main__":
    program(main)
