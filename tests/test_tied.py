"""Models whose head is their embedding: one array, the gradients of both its uses, and all that reads or writes a model."""

import dataclasses
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from estimators import EarlyExit
from experiments import export
from experiments.config.files import from_json, to_json
from experiments.config.presets import PRESETS
from experiments.training.optimizer import stages_of
from tests.conftest import predict, small_score_function, text_bytes
from tests.test_decoding import check_in_pieces
from unet import HNetConfig, LoadError, UNet, from_reference, load, load_hnet, save, save_hnet, to_reference
from unet.files.hnet_layout import LayoutError, new_hnet, reference_config
from unet.flops import layer_flops, matrix_flops
from unet.layers import Linear

TIED = HNetConfig(
    layout='["m1", ["T1"], "t1"]',
    dims=(32, 48),
    mlp_dims=(0, 128),
    heads=(2, 2),
    rotary_dims=(8, 8),
    windows=(4, 0),
    state=4,
    tie_embeddings=True,
)
UNTIED = dataclasses.replace(TIED, tie_embeddings=False)


@pytest.fixture(scope="module")
def published():
    return new_hnet(TIED)


def apart(model):
    """The same model with an embedding and a head of its own."""
    return eqx.tree_at(lambda m: m.head, model, Linear.of(model.embedding.T), is_leaf=lambda part: part is None)


def test_the_gradient_is_the_sum_of_those_of_both_uses():
    model = UNet(TIED, small_score_function((EarlyExit(),), dim=32), key=jax.random.key(0))
    bytes = text_bytes(2, 12)

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def trained(model):
        return model.loss(bytes, key=jax.random.key(1), capacities=((4, 12),)).loss

    # With several sizes to choose from, what comes after the choice is a program of its own.
    (loss, tied), (other, both) = trained(model), trained(apart(model))
    assert float(loss) == pytest.approx(float(other), rel=1e-6)
    assert jnp.any(both.head.weight != 0)
    wanted = both.embedding + both.head.weight.T
    np.testing.assert_allclose(tied.embedding, wanted, rtol=1e-5, atol=1e-6 * float(jnp.max(jnp.abs(wanted))))
    # The early head starts as a copy, and goes its own way.
    assert model.early_head is not None
    np.testing.assert_array_equal(model.early_head.weight, model.embedding.T)
    np.testing.assert_allclose(tied.early_head.weight, both.early_head.weight, rtol=1e-5, atol=1e-7)


def test_there_is_one_array(published):
    params = eqx.filter(published, eqx.is_inexact_array)
    sizes = [leaf.size for leaf in jax.tree.leaves(params)]
    others = [leaf.size for leaf in jax.tree.leaves(eqx.filter(new_hnet(UNTIED), eqx.is_inexact_array))]
    assert sum(others) - sum(sizes) == 256 * 32
    assert published.head is None
    assert stages_of(params).embedding == 0
    for count in (lambda m: matrix_flops(m, rate=0.2), lambda m: layer_flops(m, length=64, rate=0.2)):
        assert count(published) == count(apart(published))
        assert count(published).heads >= 6 * 256 * 32


def test_it_starts_as_the_embedding_does():
    model = UNet(TIED, small_score_function((), dim=32), key=jax.random.key(3))
    assert float(jnp.std(model.embedding)) == pytest.approx(1.0, rel=0.03)
    np.testing.assert_array_equal(model.output_head.weight, model.embedding.T)


def test_it_steps_as_it_reads(published):
    check_in_pieces(published, (1, 6, 11), keys=None)


def test_its_own_file_has_one_array(tmp_path, published):
    save(published, tmp_path)
    assert "model.head.weight" not in safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert eqx.tree_equal(load(tmp_path).model, published)


def test_the_released_layout_has_both_names_and_takes_either(tmp_path, published):
    params, config = dict(to_reference(published)), reference_config(published)
    assert config["tie_embeddings"] is True
    np.testing.assert_array_equal(params["embeddings.weight"], params["lm_head.weight"])
    for left_out in ("embeddings.weight", "lm_head.weight", "neither"):
        some = {name: value for name, value in params.items() if name != left_out}
        assert eqx.tree_equal(from_reference(config, some), published)
    for kind in ("pt", "safetensors"):
        assert eqx.tree_equal(load_hnet(save_hnet(published, tmp_path, name=kind, kind=kind)), published)
    neither = {name: value for name, value in params.items() if name not in ("embeddings.weight", "lm_head.weight")}
    with pytest.raises(LayoutError, match=r"1 missing \(such as embeddings.weight\)"):
        from_reference(config, neither)


def test_unequal_copies_are_refused(tmp_path, published):
    params, config = dict(to_reference(published)), reference_config(published)
    params["lm_head.weight"] = params["lm_head.weight"] + np.float32(1e-3)
    with pytest.raises(LayoutError, match=r"lm_head.weight is not equal to embeddings.weight"):
        from_reference(config, params)
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors.numpy.save(params))
    (tmp_path / "model.json").write_text(json.dumps(config))
    with pytest.raises(LoadError, match=r"model.safetensors: tie_embeddings is true, but"):
        load_hnet(path)


def test_runs_of_it_are_described_and_exported(tmp_path, published):
    config = dataclasses.replace(PRESETS["hnet-tiny"], unet=TIED)
    assert from_json(to_json(config), "here") == config.resolved
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(to_json(config))
    save(published, tmp_path / "run")
    assert export.main([str(tmp_path / "run"), "--to", str(tmp_path / "out"), "--layout", "hnet-pt"]) == 0
    bytes = text_bytes(1, 8)
    again = load_hnet(tmp_path / "out")
    np.testing.assert_array_equal(predict(again, bytes).logits, predict(published, bytes).logits)
