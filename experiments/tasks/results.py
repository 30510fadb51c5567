"""What the harness finds of a model on tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

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
    the bits per byte of the right continuation. `cut`: examples whose context did not fit and lost its beginning. `without_gold`:
    examples whose answer is none of their choices, which are in no `gold`."""

    examples: int
    cut: int
    without_gold: int
    shots: int
    source: str
    values: Mapping[str, Value]


@dataclass(frozen=True)
class ModelTasks:
    """The results of a model. `combination`: how several samples of its boundaries became one score; None without samples.
    `groups` have no standard errors."""

    name: str
    step: int | None
    digest: str
    parameters: int
    combination: str | None
    tasks: Mapping[str, TaskResult]
    groups: Mapping[str, Mapping[str, float]]


def model_tasks(
    opened: OpenModel, combination: str | None, context: int, tasks: Mapping[str, Task], found: Mapping[str, Mapping]
) -> ModelTasks:
    """From what `lm_eval.evaluator.evaluate` returns, with the samples. `context`: the bytes that the model reads."""
    results = {name: _task_result(task, found, name, context) for name, task in tasks.items()}
    groups = {
        name: {_label(*key): value for key, value in _metrics(values).items()}
        for name, values in found.get("groups", {}).items()
    }
    return ModelTasks(opened.name, opened.step, opened.digest, opened.parameters, combination, results, groups)


def _task_result(task: Task, found: Mapping[str, Mapping], name: str, context: int) -> TaskResult:
    # Every example comes once for each filter of its answers.
    by_filter: dict[str, list[Mapping]] = {}
    for sample in found["samples"][name]:
        by_filter.setdefault(sample.get("filter", NO_FILTER), []).append(sample)
    values = {
        _label(metric, chosen): Value(value, _error(value, [one.get(metric) for one in by_filter.get(chosen, [])]))
        for (metric, chosen), value in _metrics(found["results"][name]).items()
    }
    examples = next(iter(by_filter.values()), [])
    places = [gold_place(task, example) for example in examples]
    bits = [gold_bits(example, place) for example, place in zip(examples, places, strict=True) if place is not None]
    if known := [one for one in bits if one is not None]:
        values[GOLD] = mean_and_error(known)
    without = places.count(None) if has_gold(task) else 0
    cut = sum(is_cut(task, example, context) for example in examples)
    source = str(found["configs"][name].get("metadata", {}).get("config_source", ""))
    return TaskResult(len(examples), cut, without, int(found["n-shot"][name]), source, values)


NO_FILTER = "none"
"""The harness's name of a filter that does nothing."""


def _label(metric: str, chosen: str) -> str:
    """The name of a metric, with that of its filter if it is one that does something."""
    return metric if chosen == NO_FILTER else f"{metric} ({chosen})"


def _metrics(values: Mapping[str, object]) -> dict[tuple[str, str], float]:
    """Metrics by their names and those of their filters."""
    metrics = {}
    for key, value in values.items():
        metric, comma, chosen = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float | np.number):
            metrics[metric, chosen] = float(value)
    return metrics


def is_cut(task: Task, example: Mapping, context: int) -> bool:
    """Whether a context of an example loses its beginning where a model reads at most `context` bytes."""
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return False
    room = context
    for before, after in example["arguments"]:
        if task.OUTPUT_TYPE == "generate_until":
            # Settings stand in the place of a continuation, and a BOS is read too.
            after, room = "", context - 1
        if before and len(before.encode()) + len(after.encode()) > room:
            return True
    return False


def _error(value: float, of_examples: Sequence[object]) -> float:
    """The standard error if `value` is the mean over examples."""
    known = [float(one) for one in of_examples if isinstance(one, int | float | np.number)]
    if not known or len(known) != len(of_examples):
        return math.nan
    mean = mean_and_error(known)
    return mean.error if math.isclose(mean.value, value, rel_tol=1e-9, abs_tol=1e-12) else math.nan


def mean_and_error(values: Sequence[float]) -> Value:
    r"""The mean of n numbers and its standard error, $\sqrt{\frac{1}{n(n-1)}\sum_i (x_i - \bar x)^2}$."""
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Value(float(np.mean(values)), error)


def has_gold(task: Task) -> bool:
    """Whether continuations are scored, of which one is right."""
    return task.OUTPUT_TYPE in ("loglikelihood", "multiple_choice")


def gold_bits(example: Mapping, place: int) -> float | None:
    r"""$-\log_2 p(c \mid x) / |c|$ of the right continuation c of an example, that of the request `place`, with |c| its
    bytes, those of what joins it to the context included. None where it is empty."""
    (log_prob, _), continuation = example["filtered_resps"][place], example["arguments"][place][1]
    return -log_prob / math.log(2) / len(continuation.encode()) if continuation else None


def gold_place(task: Task, example: Mapping) -> int | None:
    """Which request of an example is the right one; None where none is scored, or where its answer is none of the choices."""
    from lm_eval.api.task import ConfigurableTask

    if task.OUTPUT_TYPE == "loglikelihood":
        return 0
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    assert isinstance(task, ConfigurableTask)
    # Winograd schemes have several contexts and one continuation.
    answer = task.doc_to_text(example["doc"]) if task.multiple_input else example["target"]
    answer = answer[0] if isinstance(answer, list) and answer else answer
    choices = task.doc_to_choice(example["doc"])
    if isinstance(answer, str):
        answer = choices.index(answer) if answer in choices else -1
    return int(answer) if isinstance(answer, int | np.integer) and 0 <= answer < len(choices) else None
