"""The models that are evaluated: any that this library can read."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import equinox as eqx
import jax
import numpy as np

from experiments.config.errors import ConfigError, require
from experiments.config.files import from_values
from experiments.config.models import load_any
from experiments.config.plugins import import_plugins
from experiments.config.settings import RunConfig
from experiments.training.run_dir import CHECKPOINTS, read_config
from experiments.training.stored import StoredRun, stored_steps
from unet.files.saving import CONFIG, WEIGHTS
from unet.language_model import AbstractLanguageModel


@dataclass(frozen=True)
class OpenModel:
    """A model with its `name` in tables, the settings of the run that trained it (None if they are unknown), and the step of
    its checkpoint (None for the model of a finished run or an export)."""

    name: str
    model: AbstractLanguageModel
    config: RunConfig | None
    step: int | None = None

    @property
    def levels(self) -> int:
        """The number of its token levels."""
        return self.model.levels

    @property
    def draws(self) -> bool:
        """Whether it draws boundaries: those of a tokenizer are given."""
        return bool(self.model.estimators)

    @property
    def parameters(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(self.model, eqx.is_inexact_array)))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of its arrays and of its structure."""
        digest = hashlib.sha256()
        _digest(self.model, digest.update)
        return digest.hexdigest()


def _digest(value: object, update: Callable[[bytes], None]) -> None:
    """Feed everything that a model consists of to a hash, with the fields of modules in their order."""
    if eqx.is_array(value) or isinstance(value, np.ndarray):
        array = np.asarray(value, order="C")
        update(f"{array.dtype} {array.shape}\n".encode())
        update(array.tobytes())
    elif isinstance(value, dict):
        _digest(list(value.items()), update)
    elif isinstance(value, functools.partial):
        _digest([value.func, value.args, value.keywords], update)
    elif isinstance(value, types.FunctionType):
        # Its code, so that a function that was edited is another one.
        update(f"{value.__module__}.{value.__qualname__} {value.__code__.co_consts!r}\n".encode())
        update(value.__code__.co_code)
    elif isinstance(value, tuple | list):
        update(f"{len(value)} parts\n".encode())
        for part in value:
            _digest(part, update)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        update(f"{type(value).__module__}.{type(value).__qualname__} {[field.name for field in fields]}\n".encode())
        for field in fields:
            _digest(getattr(value, field.name), update)
    else:
        # The address of a function is another one in every process.
        update(re.sub(r" at 0x[0-9a-f]+", "", f"{value!r}\n").encode())


def open_model(where: str, step: int | None = None, plugins: Sequence[str] = ()) -> OpenModel:
    """The model of a finished run or of an export, in a `.safetensors` or `.pt` file or on the hub; of a run that is not
    finished, or with a `step`, that of a checkpoint.

    Raises `ConfigError` and `LoadError`.
    """
    folder = Path(where)
    modules = import_plugins(plugins)
    finished = (folder / WEIGHTS).is_file()
    if folder.is_dir() and (folder / CONFIG).is_file() and (step is not None or not finished) and _is_run(folder):
        return Checkpoints(where, plugins).open(step)
    if folder.is_dir() and not any(folder.glob("*.safetensors")) and not any(folder.glob("*.pt")):
        raise ConfigError(f"{where} holds neither a run nor the weights of a model")
    require(step is None, f"--step {step} names a checkpoint of a run, but {where} has none")
    loaded = load_any(where, modules)
    return OpenModel(where, loaded.model, _settings(loaded.config, where, plugins))


def open_checkpoints(where: str, plugins: Sequence[str] = ()) -> list[OpenModel]:
    """The models of all checkpoints of a run, the oldest first. Raises `ConfigError` if there are fewer than two."""
    steps = stored_steps(Path(where))
    require(
        len(steps) > 1,
        f"--drift compares checkpoints of one run, and {where} holds {len(steps)}: keep more of them in training "
        "(--checkpoint.keep)",
    )
    run = Checkpoints(where, plugins)
    return [run.open(step) for step in steps]


class Checkpoints:
    """The checkpoints of a run, of which several are opened for the price of one: a model is built only once."""

    def __init__(self, where: str, plugins: Sequence[str] = ()):
        """Raises `ConfigError` where there are none."""
        self._where = where
        self._run = StoredRun.of(Path(where), plugins)
        self._config = read_config(Path(where), plugins)

    def open(self, step: int | None = None) -> OpenModel:
        """That of a `step`, or the newest one. Raises `ConfigError`."""
        model, step = self._run.model(step)
        return OpenModel(f"{self._where}@{step}", model, self._config, step)


def _is_run(folder: Path) -> bool:
    """Whether a folder with settings is that of a run, not of an export or a published model."""
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.pt")]
    return (folder / CHECKPOINTS).is_dir() or not weights


def _settings(values: object, where: str, plugins: Sequence[str]) -> RunConfig | None:
    """The settings of a run beside a model; None where there are none, or those of something else."""
    if not values:
        return None
    try:
        return from_values(values, where, plugins)
    except ConfigError:
        return None
