"""What every parameter of a fresh H-Net is drawn from, by its published name: as the released program draws it."""

import math
import re

import jax
import numpy as np
import pytest

from estimators import DynamicChunking
from experiments.config.build import build_estimators
from experiments.config.presets import PRESETS
from unet import Chunker, HNetConfig, Projection, Select, Smooth, UNet, to_reference

SHAPE = HNetConfig(
    layout='["m1", ["T1m1", ["M1"], "t1"], "m1"]',
    dims=(128, 128, 192),
    mlp_dims=(0, 128, 128),
    heads=(2, 2, 2),
    rotary_dims=(8, 8, 8),
    windows=(4, 5, 0),
)
STD, TAPS = 0.02, 4
RESIDUALS = {0: 2, 1: 2 + 4, 2: 2 + 4 + 2}
"""Additions to the stream of residuals up to each stage; one of two layers or more counts its MLPs as well."""


def normal(value, std):
    assert float(np.std(value)) == pytest.approx(std, rel=0.04)
    assert abs(float(np.mean(value))) < 0.04 * std
    # Not cut off, and not uniform.
    assert float(np.mean(np.abs(value) > 1.8 * std)) == pytest.approx(math.erfc(1.8 / math.sqrt(2)), rel=0.3)


def uniform(value, low, high, rel=0.1):
    assert low <= np.min(value)
    assert np.max(value) <= high
    if np.size(value) > 100:
        assert float(np.std(value)) == pytest.approx((high - low) / math.sqrt(12), rel=rel)


def check(name, value):
    # The innermost stage's own network is called as a stage inside would be.
    stage, bound = min(name.count("main_network."), 2), TAPS**-0.5
    end = name.removeprefix(re.sub(r"[^.]+(\.weight|\.bias)?$", "", name))
    if name == "embeddings.weight":
        normal(value, 1.0)
    elif end in ("lm_head.weight", "in_proj.weight", "Wqkv.weight", "fc1.weight"):
        normal(value, STD)
    elif end in ("out_proj.weight", "fc2.weight"):
        normal(value, STD / math.sqrt(RESIDUALS[stage]))
    elif end in ("conv1d.weight", "conv1d.bias"):
        uniform(value, -bound, bound)
    elif end == "residual_proj.bias":
        uniform(value, -(len(value) ** -0.5), len(value) ** -0.5, rel=0.15)
        assert np.all(value != 0)
    elif end == "dt_bias":
        uniform(np.log(np.log1p(np.exp(value))), math.log(1e-3) - 1e-3, math.log(1e-1) + 1e-3)
    elif end == "A_log":
        uniform(np.exp(value), 1 - 1e-5, 16 + 1e-4)
    elif end in ("q_proj_layer.weight", "k_proj_layer.weight"):
        np.testing.assert_array_equal(value, np.eye(len(value)))
    elif end in ("residual_proj.weight", "pad_dimension"):
        assert not np.any(value)
    else:
        assert end == "D" or re.search(r"norm\d?\.weight$", name), name
        assert np.all(value == 1)


def test_every_parameter_starts_as_in_the_released_program():
    keys = jax.random.split(jax.random.key(0), 3)
    estimators = [DynamicChunking(128, chunker=Chunker(Select(), Smooth(Projection(128, key=key)))) for key in keys[1:]]
    model = UNet(SHAPE, estimators, key=keys[0])
    params = to_reference(model)
    for name, value in params.items():
        check(name, value)
    first, second = (value for name, value in params.items() if name.endswith("residual_proj.bias"))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("name", ["hnet-tiny", "hnet-2stage-tiny"])
def test_runs_draw_the_bias_of_the_residual(name):
    for estimator in build_estimators(PRESETS[name], jax.random.key(1)):
        assert isinstance(estimator.chunker, Chunker)
        assert isinstance(estimator.chunker.upsampler, Smooth)
        projection = estimator.chunker.upsampler.projection
        assert projection is not None
        uniform(projection.bias, -0.125, 0.125)
        assert np.std(projection.bias) == pytest.approx(0.125 / math.sqrt(3), rel=0.2)
