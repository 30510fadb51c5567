"""Released configurations of many shapes: logits, boundaries, losses and gradients against a plain program for the same."""

import json

import equinox as eqx
import numpy as np
import pytest

from tests import hnet_reference as plain
from tests.conftest import text_bytes
from unet import from_reference, to_reference
from unet.likelihood import plain_layout

CLOSE = {"rtol": 2e-4, "atol": 2e-5}


def described(layout, dims, mlp_dims, heads, rotary, windows, *, tied):
    return {
        "arch_layout": json.loads(layout),
        "d_model": dims,
        "d_intermediate": mlp_dims,
        "vocab_size": 256,
        "ssm_cfg": {"chunk_size": 256, "d_conv": 3, "d_state": 5, "expand": 2},
        "attn_cfg": {"num_heads": heads, "rotary_emb_dim": rotary, "window_size": windows},
        "tie_embeddings": tied,
    }


SHAPES = {
    "one network": described('["m1t1M1"]', [32], [100], [2], [6], [2], tied=True),
    "one stage": described('["m1t1", ["T1"], "t1"]', [32, 48], [0, 130], [4, 3], [4, 16], [0, 3], tied=True),
    "three stages": described(
        '["t1", ["m1", ["", ["T1m1"], "m0"], "m1"], "m1"]',
        [32, 32, 64, 64],
        [0, 0, 0, 96],
        [2, 0, 4, 8],
        [16, 7, 4, 0],
        [-1, 4, 1, 2],
        tied=False,
    ),
}


def parameters(config, seed=0):
    """Random ones, lively enough for boundaries of all stages to vary."""
    rng = np.random.default_rng(seed)

    def one(name, shape):
        if name.endswith(("norm1.weight", "norm2.weight", "norm.weight", ".D")):
            return 1 + 0.2 * rng.standard_normal(shape)
        if name.endswith(".A_log"):
            return rng.uniform(0, 1.5, shape)
        if name.endswith(("q_proj_layer.weight", "k_proj_layer.weight")):
            return np.eye(shape[0]) + 0.3 * rng.standard_normal(shape)
        return rng.standard_normal(shape) * (0.2 if len(shape) > 1 else 0.5)

    return {name: one(name, shape).astype(np.float32) for name, shape in plain.shapes(config).items()}


@pytest.fixture(scope="module", params=SHAPES)
def found(request):
    config = SHAPES[request.param]
    params = parameters(config)
    return config, params, from_reference(config, params, chunk_sizes=[3.0] * (len(config["d_model"]) - 1))


def test_logits_boundaries_losses_and_gradients_are_those_of_the_plain_program(found):
    config, params, model = found
    ids = text_bytes(3, 13, seed=1)
    exact = {name: value.astype(np.float64) for name, value in params.items()}

    @eqx.filter_jit
    @eqx.filter_value_and_grad(has_aux=True)
    def trained(model):
        prediction = model(ids)
        return model.losses(prediction, plain_layout(ids)).loss, prediction

    (loss, prediction), gradient = trained(model)
    batch = np.asarray(ids)
    wanted, known = plain.loss(exact, config, batch, 3.0)
    assert float(loss) == pytest.approx(wanted, rel=1e-5)
    for row, levels in enumerate(known):
        np.testing.assert_allclose(prediction.logits[row], plain.model(exact, config, batch[row])[0], **CLOSE)
        for level, (probs, closes) in zip(prediction.levels, levels, strict=True):
            np.testing.assert_array_equal(level.boundaries.actions[row, : len(closes)], closes)
            np.testing.assert_allclose(level.boundaries.probs[row, : len(closes)], probs, **CLOSE)
            assert level.layout.mask[row].sum() == len(closes)
    rng, ours = np.random.default_rng(2), to_reference(gradient)
    if config["tie_embeddings"]:
        # The one gradient goes by either name, as in PyTorch.
        np.testing.assert_array_equal(ours["lm_head.weight"], ours["embeddings.weight"])
    for name, value in exact.items():
        direction = rng.standard_normal(value.shape)
        slope = plain.slope(exact, config, batch, 3.0, known, name, direction)
        got, size = float(np.sum(direction * ours[name])), float(np.linalg.norm(ours[name]))
        assert got == pytest.approx(slope, rel=2e-4, abs=1e-4 * size + 1e-7), name
