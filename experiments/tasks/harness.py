"""What is used of lm-evaluation-harness: its tasks, and its register of models. Importing this needs nothing of it."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jax.errors import JaxRuntimeError

from data import DataError
from experiments.config.errors import ConfigError, RunError, one_line, require
from experiments.terminal import OutputClosed
from unet.files.saving import LoadError

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

FILES = Path(__file__).parent / "files"
"""Task files of this library."""
NAME = "caesura"
"""What models of this library are called there."""
USUAL = ("piqa", "hellaswag", "arc", "lambada", "winogrande", "openbookqa", "xwinograd")
"""Folders of the harness with the tasks of the published tables. To look through all of them takes ten seconds."""


def require_harness() -> None:
    """Raise `ConfigError` where lm-evaluation-harness is not installed."""
    require(
        importlib.util.find_spec("lm_eval") is not None,
        "tasks need lm-evaluation-harness, which is not installed: pip install 'caesura-lm[eval]'",
    )


def register() -> None:
    """Make `CaesuraLM` a model that the harness knows by name. Its own way, since it looks for none in other packages."""
    import lm_eval.models  # or those of the harness would not be registered any more
    from lm_eval.api.registry import model_registry

    assert lm_eval.models.MODEL_MAPPING
    if NAME not in model_registry:
        model_registry.register(NAME, target="experiments.tasks.model:CaesuraLM")


@dataclass(frozen=True)
class OpenTasks:
    """Tasks with their data, and the groups that they were named by."""

    tasks: Mapping[str, Task]
    groups: Mapping[str, Group]


def open_tasks(names: Sequence[str], folders: Sequence[Path]) -> OpenTasks:
    """The tasks of these names, from `folders`, which count first, from `FILES` or from the harness.

    Raises `ConfigError` for one that is not there or cannot be used, and `DataError` where its data cannot be had.
    """
    import datasets

    for folder in folders:
        require(folder.is_dir(), f"--task-files {folder} is not a folder")
    for noisy in ("lm_eval", "datasets", "huggingface_hub"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    manager = _manager_with(names, folders)
    tasks: dict[str, Task] = {}
    groups: dict[str, Group] = {}
    for name in names:
        loaded = _loaded(manager, name)
        tasks |= loaded["tasks"]
        groups |= loaded.get("groups", {})
    for name, task in tasks.items():
        require(
            not getattr(task, "MULTIMODAL", False),
            f"the task {name} shows pictures or sounds, and this model reads text",
        )
        require(
            not getattr(task, "UNSAFE_CODE", False),
            f"the task {name} runs code that the model writes: see --confirm_run_unsafe_code of python -m experiments.harness",
        )
    return OpenTasks(tasks, groups)


def _manager_with(names: Iterable[str], folders: Sequence[Path]) -> TaskManager:
    """Raises `ConfigError` for a name that no file has."""
    import lm_eval.tasks

    own: list[str | Path] = [FILES, *folders]
    there = Path(lm_eval.tasks.__file__).parent
    usual = lm_eval.tasks.TaskManager(include_defaults=False, include_path=[*(there / one for one in USUAL), *own])
    if all(name in usual.all_tasks for name in names):
        return usual
    every = lm_eval.tasks.TaskManager(include_path=own)
    missing = next((name for name in names if name not in every.all_tasks), None)
    if missing is not None:
        places = "".join(f", nor in {folder}" for folder in folders)
        raise ConfigError(
            f"there is no task called {one_line(missing)} in lm-evaluation-harness{places}: lm_eval ls tasks lists them"
        )
    return every


def _loaded(manager: TaskManager, name: str) -> Mapping:
    import datasets

    try:
        with harness_errors(f"the task {name} cannot be used"):
            return manager.load([name])
    except OSError as error:  # those of the network among them
        raise DataError(
            f"the data of the task {name} cannot be had: {_reason(error)} (the hub is {datasets.config.HF_ENDPOINT}); what was "
            "loaded before needs no network (HF_HUB_OFFLINE=1), nor do files of your own (--task-files)"
        ) from error


@contextlib.contextmanager
def harness_errors(what: str) -> Iterator[None]:
    """Turns what the harness, its task files and their functions raise into a `ConfigError` that begins with `what`. Errors of
    this library, of the system and of the device pass."""
    try:
        yield
    except (ConfigError, DataError, LoadError, RunError, OSError, MemoryError, JaxRuntimeError, OutputClosed):
        raise
    except Exception as error:
        # Whatever else: they raise all kinds, for bad settings too.
        raise ConfigError(f"{what} ({type(error).__name__}): {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The first line of an error, without its full stop."""
    return one_line(next(iter(str(error).splitlines()), "")).rstrip(". ") or type(error).__name__
