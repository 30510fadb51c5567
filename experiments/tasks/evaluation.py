"""An evaluation on tasks, from what a command says to its results."""

from __future__ import annotations

import contextlib
import dataclasses
import sys

from experiments.reporting.display import Display
from experiments.scoring.cache import ScoreCache
from experiments.scoring.models import OpenModel, open_model
from experiments.scoring.plans import plan_of
from experiments.scoring.settings import EvaluateConfig
from experiments.tasks.checks import FEWSHOT_SEED, check
from experiments.tasks.generations import Generations
from experiments.tasks.harness import OpenTasks, harness_errors, open_tasks, require_harness
from experiments.tasks.likelihoods import COMBINATIONS, Likelihoods
from experiments.tasks.published import with_tables
from experiments.tasks.results import ModelTasks, model_tasks
from experiments.tasks.tables import TaskEvaluation


def task_evaluation(config: EvaluateConfig, cache: ScoreCache, display: Display) -> TaskEvaluation:
    """The results of all models on all tasks. Everything is checked before anything is computed.

    Raises `ConfigError`, `DataError` and `LoadError`.
    """
    require_harness()
    models = [open_model(where, config.step, config.plugin) for where in config.models]
    plan = plan_of(config, models, "greedy")
    # The harness and its metrics print, and standard output is for results.
    with contextlib.redirect_stdout(sys.stderr or None):
        tasks = open_tasks(with_tables(config.tasks), config.task_files)
        _set_shots(tasks, config.shots)
        check(tasks, config.limit, config.bytes_per_token)
        results: list[ModelTasks] = []
        for opened in models:
            display.note(f"{opened.name} on {', '.join(tasks.tasks)}")
            likelihoods, generations = Likelihoods(opened, plan, cache), Generations(opened, plan, cache)
            results += _of_model(opened, likelihoods, generations, tasks, config)
    return TaskEvaluation(plan, config.limit, results)


def _of_model(
    opened: OpenModel, likelihoods: Likelihoods, generations: Generations, tasks: OpenTasks, config: EvaluateConfig
) -> list[ModelTasks]:
    """The results of a model, for each combination of several samples apart."""
    from lm_eval.evaluator import evaluate

    from experiments.tasks.model import CaesuraLM

    several = likelihoods.plan.passes_of(opened) > 1
    results = []
    for combination in COMBINATIONS if several else ("mean",):
        for task in tasks.tasks.values():
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        model = CaesuraLM(likelihoods, generations, combination, config.bytes_per_token)
        # Standard errors are not the harness's: it would fork this process to resample for some.
        with harness_errors(f"the tasks {', '.join(tasks.tasks)} cannot be evaluated"):
            found = evaluate(
                model, {"tasks": dict(tasks.tasks), "groups": dict(tasks.groups)}, limit=config.limit, bootstrap_iters=0
            )
        assert found is not None
        results.append(
            model_tasks(opened, combination if several else None, likelihoods.plan.context, tasks.tasks, found)
        )
    return results


def _set_shots(tasks: OpenTasks, shots: int | None) -> None:
    """What a task sets to 0 itself stays 0, as in the harness."""
    for task in tasks.tasks.values():
        own = task.get_config("num_fewshot")
        if own is None or (shots is not None and own != 0):
            task.set_config(key="num_fewshot", value=shots or 0)


def document(evaluation: TaskEvaluation, config: EvaluateConfig) -> dict[str, object]:
    """The content of `--json`: `docs/evaluation.md` says what the values mean."""
    return {
        "settings": {name: value for name, value in vars(config).items() if name not in ("json", "report", "per_byte")},
        "plan": dataclasses.asdict(evaluation.plan),
        "models": [dataclasses.asdict(one) for one in evaluation.models],
    }
