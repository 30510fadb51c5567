"""What the harness finds of a model on tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from experiments.config.errors import ConfigError
from experiments.scoring.models import OpenModel
from experiments.tasks.published import GOLD

if TYPE_CHECKING:
    from lm_eval.api.task import Task


@dataclass(frozen=True)
class Value:
    """A mean over examples and its standard error (NaN where it is undefined or the value is no mean)."""

    value: float
    error: float


@dataclass(frozen=True)
class TaskResult:
    """The values of a task by the names of its metrics, `gold` among them where an answer is scored: the mean over examples of
    the bits per byte of the right continuation. `groups` have no standard errors."""

    examples: int
    shots: int
    source: str
    values: Mapping[str, Value]


@dataclass(frozen=True)
class ModelTasks:
    """The results of a model. `combination`: how several samples of its boundaries became one score; None without samples."""

    name: str
    step: int | None
    digest: str
    parameters: int
    combination: str | None
    tasks: Mapping[str, TaskResult]
    groups: Mapping[str, Mapping[str, float]]


def model_tasks(
    opened: OpenModel, combination: str | None, tasks: Mapping[str, Task], found: Mapping[str, Mapping]
) -> ModelTasks:
    """From what `lm_eval.evaluator.evaluate` returns, with the samples."""
    results = {name: _task_result(task, found, name) for name, task in tasks.items()}
    groups = {name: _metrics(values) for name, values in found.get("groups", {}).items()}
    return ModelTasks(opened.name, opened.step, opened.digest, opened.parameters, combination, results, groups)


def _task_result(task: Task, found: Mapping[str, Mapping], name: str) -> TaskResult:
    samples = found["samples"][name]
    values = {
        metric: Value(value, _error(value, [sample.get(metric) for sample in samples]))
        for metric, value in _metrics(found["results"][name]).items()
    }
    bits = [one for one in (gold_bits(task, sample) for sample in samples) if one is not None]
    if bits:
        values[GOLD] = mean_and_error(bits)
    source = str(found["configs"][name].get("metadata", {}).get("config_source", ""))
    return TaskResult(len({sample["doc_id"] for sample in samples}), int(found["n-shot"][name]), source, values)


def _metrics(values: Mapping[str, object]) -> dict[str, float]:
    """Metrics by their names, with the name of a filter if it is one that does something."""
    metrics = {}
    for key, value in values.items():
        metric, comma, filter_name = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float | np.number):
            metrics[metric if filter_name == "none" else f"{metric} ({filter_name})"] = float(value)
    return metrics


def _error(value: float, of_examples: Sequence[object]) -> float:
    """The standard error if `value` is the mean over examples."""
    numbers = [float(one) for one in of_examples if isinstance(one, int | float | np.number)]
    if len(numbers) != len(of_examples):
        return math.nan
    mean = mean_and_error(numbers)
    return mean.error if math.isclose(mean.value, value, rel_tol=1e-9, abs_tol=1e-12) else math.nan


def mean_and_error(numbers: Sequence[float]) -> Value:
    r"""The mean of n numbers and its standard error, $\sqrt{\frac{1}{n(n-1)}\sum_i (x_i - \bar x)^2}$."""
    error = float(np.std(numbers, ddof=1)) / math.sqrt(len(numbers)) if len(numbers) > 1 else math.nan
    return Value(float(np.mean(numbers)), error)


def gold_bits(task: Task, sample: Mapping) -> float | None:
    r"""$-\log_2 p(c \mid x) / |c|$ of the right continuation c of an example, with |c| its bytes, those of what joins it to the
    context included. None where none is scored, or where it is empty."""
    place = _gold_place(task, sample)
    if place is None:
        return None
    (log_prob, _), continuation = sample["filtered_resps"][place], sample["arguments"][place][1]
    return -log_prob / math.log(2) / len(continuation.encode()) if continuation else None


def _gold_place(task: Task, sample: Mapping) -> int | None:
    """Which request of an example is the right one. Raises `ConfigError` where its answer is none of the choices."""
    from lm_eval.api.task import ConfigurableTask

    if task.OUTPUT_TYPE == "loglikelihood":
        return 0
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    assert isinstance(task, ConfigurableTask)
    # Winograd schemes have several contexts and one continuation.
    answer = task.doc_to_text(sample["doc"]) if task.multiple_input else sample["target"]
    answer = answer[0] if isinstance(answer, list) and answer else answer
    choices = task.doc_to_choice(sample["doc"])
    if isinstance(answer, str):
        answer = choices.index(answer) if answer in choices else -1
    if not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ConfigError(
            f"the answer of example {sample['doc_id']} of the task {task.config.task} is none of its {len(choices)} choices"
        )
    return answer
