"""The command line of lm-evaluation-harness with the models of this library: `python -m experiments.harness --model caesura
--model_args path=RUN --tasks piqa`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from experiments.command import exit_code
from experiments.config.errors import ConfigError, one_line
from experiments.launch import program
from experiments.reporting.display import Display
from experiments.tasks.harness import FILES, harness_errors, register, require_harness


def harness(arguments: Sequence[str]) -> None:
    """Run the harness's own command (`lm_eval`) with these arguments; the task files of this library are among its tasks.

    Raises `ConfigError` where it is not installed or refuses its arguments, and what its models raise.
    """
    require_harness()
    from lm_eval.__main__ import cli_evaluate

    register()
    given = list(arguments)
    commands = {"run", "ls", "validate"} & set(given[:1]) or {word for word in given if word.startswith("--")}
    if commands - {"--help"} and not any(word.partition("=")[0] == "--include_path" for word in given):
        given += ["--include_path", str(FILES)]
    # It reads no other arguments than those of the process.
    before, sys.argv = sys.argv, ["lm_eval", *given]
    try:
        with harness_errors("lm-evaluation-harness cannot do this"):
            _evaluated(cli_evaluate)
    finally:
        sys.argv = before


def _evaluated(command: Callable[[], None]) -> None:
    try:
        command()
    except ValueError as error:
        if not str(error).startswith("Tasks not found"):
            raise
        raise ConfigError(f"{one_line(str(error))}: python -m experiments.harness ls tasks lists them") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    return exit_code(Display(), lambda: harness(given))


if __name__ == "__main__":
    program(main)
