"""A model's weights in one safetensors file."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jaxtyping import PyTree
from safetensors import SafetensorError

from experiments.config import ConfigError, RunConfig
from experiments.folder import write_atomically
from experiments.registry import Found, build_estimator
from unet import UNet

WEIGHTS = "model.safetensors"

Model = TypeVar("Model", bound=PyTree)


def write_weights(folder: Path, model: Model) -> None:
    """Write every floating-point array of `model` to `folder`, each by its path in the tree."""
    # Not np.ascontiguousarray, which makes vectors of numbers.
    arrays = {name: np.asarray(leaf, order="C") for name, leaf in _named(model).items()}
    write_atomically(folder / WEIGHTS, safetensors.numpy.save(arrays, {"format": "caesura"}))


def read_weights(folder: Path, like: Model) -> Model:
    """The model `like` with the weights that `folder` holds.

    Raises `ConfigError` where there are none, where they cannot be read, or where names, shapes or dtypes differ.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise ConfigError(f"{folder} holds no {WEIGHTS}: its run is not finished")
    try:
        saved = safetensors.numpy.load(path.read_bytes())
    except SafetensorError as error:
        raise ConfigError(f"{path} is damaged ({error})") from None
    expected = _named(like)
    for name in sorted(saved.keys() | expected.keys()):
        if name not in saved or name not in expected:
            raise ConfigError(f"{path} does not fit its configuration: {name} is {_where(name in saved)}")
        found, wanted = saved[name], expected[name]
        if found.shape != wanted.shape or found.dtype != wanted.dtype:
            raise ConfigError(
                f"{path} does not fit its configuration: {name} is {found.dtype}{list(found.shape)} in the file and "
                f"{wanted.dtype}{list(wanted.shape)} in the model"
            )

    def replaced(keys: tuple[object, ...], leaf: object) -> object:
        return jnp.asarray(saved[jax.tree_util.keystr(keys)]) if eqx.is_inexact_array(leaf) else leaf

    return jax.tree_util.tree_map_with_path(replaced, like)


def read_model(folder: Path, config: RunConfig, found: Found | None = None) -> UNet:
    """The model of `config` with the weights that `folder` holds; `found` is what its estimator took from data.

    Raises `ConfigError` as `read_weights` does.
    """
    key = jax.random.key(0)
    return read_weights(folder, UNet(config.unet, build_estimator(config, key, found), key=key))


def _named(model: PyTree) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(eqx.filter(model, eqx.is_inexact_array))
    return {jax.tree_util.keystr(keys): np.asarray(leaf) for keys, leaf in leaves}


def _where(in_file: bool) -> str:
    return "in the file and not in the model" if in_file else "in the model and not in the file"
