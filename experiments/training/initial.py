"""Training that starts from the weights of another model."""

from __future__ import annotations

from collections.abc import Sequence
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


def initial_weights(where: str, fresh: Model, plugins: Sequence[ModuleType] = ()) -> Model:
    """`fresh` with the weights of another model of the same parts: a run's folder or an exported model, `hub:owner/name`, or a
    published model by its name on the hub or by its file. `plugins` are modules whose classes it may hold.

    Raises `LoadError` where there is no model, `ConfigError` where it is made of other parts.
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
    leaves = [theirs[name].astype(leaf.dtype) for name, leaf in ours.items()]
    params, rest = eqx.partition(fresh, eqx.is_array)
    return eqx.combine(jax.tree.unflatten(jax.tree.structure(params), leaves), rest)


def _fits(here: Array, there: Array) -> bool:
    """Whether an array has this shape, and its values fit this dtype."""
    return here.shape == there.shape and np.can_cast(there.dtype, here.dtype)
