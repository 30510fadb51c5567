"""That training finds words: a real run, seconds long."""

import dataclasses

import jax
import pytest

from experiments.config import RunConfig
from experiments.display import Display
from experiments.folder import prepare_new
from experiments.presets import PRESETS
from experiments.train import prepare, train


@pytest.fixture(autouse=True)
def usual_promotion_at_full_speed():
    # Hundreds of steps of a real model: here running fast beats compiling fast.
    jax.config.update("jax_disable_most_optimizations", False)
    with jax.numpy_dtype_promotion("standard"):
        yield
    jax.config.update("jax_disable_most_optimizations", True)


def trained(tmp_path, policy_weight: float = 1e-2) -> tuple[float, float]:
    """AUC of the boundary probability against white space, and the rate, after 0.6 MB of English."""
    preset: RunConfig = PRESETS["tiny"]
    config = dataclasses.replace(
        preset,
        length=128,
        steps=300,
        out=tmp_path / "run",
        devices=1,
        sfe=dataclasses.replace(preset.sfe, policy_weight=policy_weight),
        evaluation=dataclasses.replace(preset.evaluation, bytes=32_768, times=1),
    )
    validation = train(config, prepare(config), prepare_new(config), Display(quiet=True)).validation
    return validation.whitespace.auc, validation.rate


def test_boundaries_move_to_the_spaces_between_words(tmp_path):
    """With the sign of the policy loss reversed this ends below one half."""
    auc, rate = trained(tmp_path)
    assert auc > 0.9
    assert 0.1 < rate < 0.3
