"""Results on tasks as Markdown, published ones beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from experiments.reporting.markdown import table
from experiments.scoring.score import Plan
from experiments.scoring.tables import number, shown
from experiments.tasks.noise import robustness
from experiments.tasks.published import GOLD, TABLES, Column, PublishedTable
from experiments.tasks.results import ModelTasks, Value


@dataclass(frozen=True)
class TaskEvaluation:
    """All results on tasks, and how models were scored. `limit`: of the examples of each task."""

    plan: Plan
    limit: int | None
    models: Sequence[ModelTasks]


def markdown(evaluation: TaskEvaluation) -> str:
    """All tables."""
    parts = [summary(evaluation), table(*value_table(evaluation.models)), *remarks(evaluation)]
    if any(one.groups for one in evaluation.models):
        parts.append(table(*group_table(evaluation.models)))
    for published in TABLES:
        if any(set(published.tasks) & set(one.tasks) for one in evaluation.models):
            parts += [f"{published.title}", table(*published_table(published, evaluation.models))]
    return "\n".join(f"{part.rstrip()}\n" for part in parts)


def summary(evaluation: TaskEvaluation) -> str:
    """The settings in a sentence or two."""
    plan = evaluation.plan
    boundaries = "greedy boundaries"
    if plan.boundaries == "drawn":
        boundaries = f"boundaries drawn with seed {plan.seed}"
        boundaries += f", {plan.samples} samples" if plan.samples > 1 else ""
    limit = "" if evaluation.limit is None else f"; the first {evaluation.limit:,} examples of each task"
    return (
        f"Continuations are predicted from at most {plan.context:,} bytes, longer ones in windows that move by {plan.stride:,}; "
        f"{boundaries}{limit}. gold: mean over examples of the bits per byte of the right continuation. ± is the standard error "
        "over examples."
    )


def remarks(evaluation: TaskEvaluation) -> list[str]:
    """What was left out, a sentence for each task."""
    notes = []
    for one in evaluation.models:
        for task, result in one.tasks.items():
            if result.cut:
                notes.append(
                    f"{named(one)}: the context of {result.cut:,} of {result.examples:,} examples of {task} does not fit into "
                    f"{evaluation.plan.context:,} bytes and was cut at its beginning (--context)"
                )
            if result.without_gold:
                notes.append(
                    f"{named(one)}: the answer of {result.without_gold:,} of {result.examples:,} examples of {task} is none "
                    "of its choices; these are not in gold"
                )
    return notes


Table = tuple[list[str], list[list[str]]]


def named(one: ModelTasks) -> str:
    """A model in a table."""
    return shown(one.name) if one.combination is None else f"{shown(one.name)}, {one.combination}"


def value_table(models: Sequence[ModelTasks]) -> Table:
    rows = [
        [named(one), task, str(result.examples), str(result.shots), measure, _with_error(value)]
        for one in models
        for task, result in one.tasks.items()
        for measure, value in result.values.items()
    ]
    return ["model", "task", "examples", "shots", "measure", "value"], rows


def group_table(models: Sequence[ModelTasks]) -> Table:
    rows = [
        [named(one), group, measure, number(value, 4)]
        for one in models
        for group, values in one.groups.items()
        for measure, value in values.items()
    ]
    return ["model", "group", "measure", "value"], rows


def published_table(published: PublishedTable, models: Sequence[ModelTasks]) -> Table:
    """The rows of the models that have one of its tasks, then the published ones."""
    head = ["model", *(column.title for column in published.columns), *published.more]
    ours = [[named(one), *_row(published, one)] for one in models if set(published.tasks) & set(one.tasks)]
    digits = _digits(published)
    theirs = [
        [f"published: {name}", *(number(value, digits) for value in values)] for name, values in published.rows.items()
    ]
    return head, ours + theirs


def _row(published: PublishedTable, one: ModelTasks) -> list[str]:
    values = [_value(column, one) for column in published.columns]
    mean = sum(values) / len(values)  # NaN unless all are there
    further = {"mean": mean, "robustness": robustness(mean / 100, _value(CLEAN, one) / 100)}
    return [number(value, _digits(published)) for value in (*values, *(further[name] for name in published.more))]


CLEAN = Column("HellaSwag", "hellaswag", "acc_norm")


def _value(column: Column, one: ModelTasks) -> float:
    """The value of a column: bits, or a percentage; NaN if the model was not evaluated on its task."""
    result = one.tasks.get(column.task)
    value = None if result is None else result.values.get(column.measure)
    if value is None:
        return math.nan
    return value.value if column.measure == GOLD else 100 * value.value


def _digits(published: PublishedTable) -> int:
    return 3 if published.columns[0].measure == GOLD else 1


def _with_error(value: Value) -> str:
    error = f" ± {number(value.error, 4)}" if math.isfinite(value.error) else ""
    return f"{number(value.value, 4)}{error}"
