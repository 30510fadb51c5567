"""What can be wrong with tasks, found before a model scores anything."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from experiments.config.errors import ConfigError
from experiments.tasks.generations import style_of
from experiments.tasks.harness import OpenTasks, harness_errors

if TYPE_CHECKING:
    from lm_eval.api.task import Task

FEWSHOT_SEED = 1234
"""Which solved examples stand before an example: the harness's own default."""

Given = ParamSpec("Given")
Result = TypeVar("Result")


def check(tasks: OpenTasks, limit: int | None, bytes_per_token: int) -> None:
    """Write the prompts of all examples once, and read how texts are to be generated. From here on, an error in a task's own
    judgement of answers names the task.

    Raises `ConfigError`.
    """
    from lm_eval.evaluator_utils import get_sample_size

    for name, task in tasks.tasks.items():
        if task.OUTPUT_TYPE == "generate_until":
            _check_style(name, task, bytes_per_token)
        with harness_errors(f"the prompts of the task {name} cannot be written"):
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
            task.build_all_requests(limit=get_sample_size(task, limit))
        task.process_results = _named(f"the answers of the task {name} cannot be judged", task.process_results)


def _check_style(name: str, task: Task, bytes_per_token: int) -> None:
    try:
        style_of(task.get_config("generation_kwargs") or {}, bytes_per_token)
    except ConfigError as error:
        raise ConfigError(f"the task {name} cannot be used: {error}") from None


def _named(what: str, function: Callable[Given, Result]) -> Callable[Given, Result]:
    """The function with its errors as `ConfigError`s that begin with `what`."""

    @functools.wraps(function)
    def guarded(*given: Given.args, **named: Given.kwargs) -> Result:
        with harness_errors(what):
            return function(*given, **named)

    return guarded
