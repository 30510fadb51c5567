"""Runs whose estimators take something from the data first, and the weights that runs leave."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from experiments.config import ConfigError
from experiments.folder import read_config
from experiments.found import read_byte_model, read_found
from experiments.registry import build_estimator
from tests.test_run import SMALL, curve, interrupt_at, start, summary
from tests.test_run import corpus as corpus
from tests.test_run import usual_promotion as usual_promotion
from unet import UNet


@pytest.fixture(scope="module")
def byte_run(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "bytes"
    assert (
        start(*("--estimator", "isotropic", "--isotropic.no-token-level", "--dataset", corpus, "--out", folder), *SMALL)
        == 0
    )
    return folder


def test_a_finished_run_leaves_the_weights_it_was_evaluated_with(byte_run):
    found = read_byte_model(byte_run)
    assert found.config == read_config(byte_run)
    fresh = UNet(found.config.unet, build_estimator(found.config, jax.random.key(0)), key=jax.random.key(0))
    assert not np.array_equal(found.model.embedding, fresh.embedding)


def test_an_entropy_run_resumes_without_the_run_its_model_came_from(byte_run, corpus, tmp_path, monkeypatch):
    import shutil

    source = tmp_path / "bytes"
    shutil.copytree(byte_run, source)
    arguments = ("--estimator", "entropy", "--entropy.model", source, "--rate", "0.3", "--dataset", corpus)
    assert start(*arguments, "--out", tmp_path / "whole", *SMALL) == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        assert start(*arguments, "--out", tmp_path / "cut", *SMALL) == 128 + 15
    shutil.rmtree(source)
    assert start("--resume", "--out", tmp_path / "cut") == 0
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert abs(summary(tmp_path / "whole")["rate"] - 0.3) < 0.12
    before = read_byte_model(byte_run).model
    after = read_byte_model(tmp_path / "whole" / "byte_model").model
    for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(one, other)
    kept = safetensors.numpy.load((tmp_path / "whole" / "model.safetensors").read_bytes())
    name = "model.stage.estimator.router.model.value.embedding"
    np.testing.assert_array_equal(kept[name], before.embedding)


def test_a_run_keeps_its_vocabulary_and_resumes(corpus, tmp_path, monkeypatch):
    pytest.importorskip("tokenizers")
    arguments = ("--estimator", "bpe-distilled", "--rate", "0.4", "--bpe.vocabulary", "400", "--dataset", corpus)
    assert start(*arguments, "--out", tmp_path / "whole", *SMALL) == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        assert start(*arguments, "--out", tmp_path / "cut", *SMALL) == 128 + 15
    assert start("--resume", "--out", tmp_path / "cut") == 0
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    found = read_found(tmp_path / "whole", read_config(tmp_path / "whole"))
    assert found is not None
    assert found.vocabulary is not None
    assert 257 <= len(found.vocabulary) <= 400


def test_what_cannot_be_found_is_said_in_a_sentence(byte_run, corpus, tmp_path, capsys):
    pytest.importorskip("tokenizers")
    cases = {
        "train a larger one": ("--estimator", "bpe", "--rate", "0.01", "--bpe.vocabulary", "300"),
        "--entropy.model": ("--estimator", "entropy"),
        "no config.json": ("--estimator", "entropy", "--entropy.model", tmp_path),
    }
    for message, arguments in cases.items():
        assert start(*arguments, "--dataset", corpus, "--out", tmp_path / "out", *SMALL) == 2
        assert message in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "out").exists()


def test_a_run_of_another_estimator_is_no_byte_model(byte_run, tmp_path):
    config = json.loads((byte_run / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "estimator": "sfe"}))
    with pytest.raises(ConfigError, match="needs one of isotropic"):
        read_byte_model(tmp_path)


def test_a_configuration_goes_out_and_comes_back(byte_run):
    config = read_config(byte_run)
    assert dataclasses.replace(config) == config
    assert config.out == byte_run
    assert config.model == "tiny"
