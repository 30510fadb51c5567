"""Training that starts from the weights of another model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import TypeVar

import equinox as eqx
import jax
import numpy as np
from jax import Array

from experiments.config.errors import ConfigError
from experiments.config.models import load_any
from unet.language_model import AbstractLanguageModel

Model = TypeVar("Model", bound=AbstractLanguageModel)

IGNORED = frozenset(
    {
        "objective",
        "target_rate",
        "remat",
        "implementation",
        "attention",
        "form",
        "compute",
        "early_exit_fraction",
        "training",
    }
)
"""Settings that do not say what weights mean."""
CHANGEABLE = frozenset(
    {
        "window",
        "n",
        "every",
        "scale",
        "temperature",
        "smoothing",
        "weighting",
        "capacity_factor",
        "balance_weight",
        "threshold",
    }
)
"""Settings that may be others in further training, which is said."""


def initial_weights(
    where: str, fresh: Model, plugins: Sequence[ModuleType] = (), note: Callable[[str], None] = lambda text: None
) -> Model:
    """`fresh` with the weights of another model of the same parts: a run's folder or an exported model, `hub:owner/name`, or a
    published model by its name on the hub or by its file. `plugins` are modules whose classes it may hold. `note` is told of
    settings that the weights were not trained with, such as another attention window.

    Raises `LoadError` where there is no model, `ConfigError` where it is made of other parts, or of parts with other settings
    that the weights belong to, such as the number of heads.
    """
    found = load_any(where, plugins).model
    ours, theirs = (
        {
            jax.tree_util.keystr(path): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(eqx.filter(one, eqx.is_array))
        }
        for one in (fresh, found)
    )
    fitting = {name for name in ours.keys() & theirs.keys() if _fits(ours[name], theirs[name])}
    differing = sorted((ours.keys() | theirs.keys()) - fitting)
    if differing:
        raise ConfigError(
            f"--init {where} is a model of other parts than this run's: {len(differing)} of its arrays are missing, left over "
            f"or of another shape or kind, such as {differing[0]}; name the --model, --estimator and settings it was made with"
        )
    others = _other_settings(fresh, found)
    refused = {name: text for name, text in others.items() if name.rpartition(".")[2] not in CHANGEABLE}
    if refused:
        raise ConfigError(
            f"--init {where} has the arrays of this run's model, but other settings: {'; '.join(list(refused.values())[:3])}; "
            "name the --model, --estimator and settings it was made with"
        )
    if others:
        note(
            f"the weights of --init {where} were made with other settings, and are trained on with this run's: "
            f"{'; '.join(list(others.values())[:3])}{' …' if len(others) > 3 else ''}"
        )
    leaves = [theirs[name].astype(leaf.dtype) for name, leaf in ours.items()]
    params, rest = eqx.partition(fresh, eqx.is_array)
    return eqx.combine(jax.tree.unflatten(jax.tree.structure(params), leaves), rest)


def _other_settings(fresh: object, found: object) -> dict[str, str]:
    """What differs between two models with the same arrays, by the name of the setting."""
    ours, theirs = dict(_settings("", fresh)), dict(_settings("", found))
    names = [name for name in dict.fromkeys((*ours, *theirs)) if ours.get(name) != theirs.get(name)]
    return {name: f"{name.lstrip('.')} is {theirs.get(name)} there and {ours.get(name)} here" for name in names}


def _settings(name: str, part: object) -> Iterator[tuple[str, object]]:
    """The class of each module of a model, and its values that are no arrays."""
    if isinstance(part, eqx.Module):
        yield name, type(part).__name__
        for field in dataclasses.fields(part):
            if field.name not in IGNORED:
                yield from _settings(f"{name}.{field.name}", getattr(part, field.name))
    elif isinstance(part, tuple | list):
        for number, one in enumerate(part):
            yield from _settings(f"{name}[{number}]" if isinstance(one, eqx.Module) else name + f".{number}", one)
    elif not eqx.is_array(part) and part is not None:
        yield name, getattr(part, "__name__", part)


def _fits(here: Array, there: Array) -> bool:
    """Whether an array has this shape, and its values fit this dtype."""
    return here.shape == there.shape and np.can_cast(there.dtype, here.dtype)
