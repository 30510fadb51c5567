"""Models of array shapes without values, to compile or to count FLOPs of models of any size."""

from __future__ import annotations

import equinox as eqx
import jax

from experiments.config.build import build_byte_model
from experiments.config.settings import RunConfig
from unet import UNet


def shapes_of(config: RunConfig) -> UNet:
    """The model of a run with a `jax.ShapeDtypeStruct` for every array. Raises `ValueError` for estimators that need data."""

    def build() -> UNet:
        return build_byte_model(config, jax.random.key(0))

    return eqx.filter_eval_shape(build)
