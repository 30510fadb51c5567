"""Runs whose estimators take something from the data first, and the weights that runs leave."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from estimators.entropy import Measured
from estimators.vocabulary import Vocabulary
from experiments.config.build import build_estimator
from experiments.config.errors import ConfigError
from experiments.run import parse
from experiments.training.data import load_split
from experiments.training.prepared import prepare, read_prepared
from experiments.training.run_dir import PREPARED, read_config
from experiments.training.text import read_byte_model
from tests.compositions import registered
from tests.conftest import needs
from tests.test_run import SMALL, curve, interrupt_at, start, summary
from tests.test_run import corpus as corpus
from tests.test_run import usual_promotion as usual_promotion
from unet import UNet
from unet.files.saving import LoadError, load, save


@pytest.fixture(scope="module")
def byte_run(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "bytes"
    assert (
        start(*("--estimator", "isotropic", "--isotropic.no-token-level", "--dataset", corpus, "--out", folder), *SMALL)
        == 0
    )
    return folder


def test_a_finished_run_leaves_the_weights_it_was_evaluated_with(byte_run):
    found, config = read_byte_model(byte_run), read_config(byte_run)
    fresh = UNet(config.unet, build_estimator(config, jax.random.key(0)), key=jax.random.key(0))
    assert not np.array_equal(found.embedding, fresh.embedding)


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
    assert abs(summary(tmp_path / "whole")["val_rate"] - 0.3) < 0.12
    before, kept = read_byte_model(byte_run), read_prepared(read_config(tmp_path / "whole"))
    assert isinstance(kept, Measured)
    for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(kept.model), strict=True):
        np.testing.assert_array_equal(one, other)
    kept = safetensors.numpy.load((tmp_path / "whole" / "model.safetensors").read_bytes())
    name = "model.stage.estimator.router.model.value.embedding"
    np.testing.assert_array_equal(kept[name], before.embedding)


def test_a_run_keeps_its_vocabulary_and_resumes(corpus, tmp_path, monkeypatch, capsys):
    needs("bpe", "tokenizers")
    arguments = ("--estimator", "bpe-distilled", "--rate", "0.4", "--bpe.vocabulary", "400", "--dataset", corpus)
    assert start(*arguments, "--out", tmp_path / "whole", *SMALL) == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        assert start(*arguments, "--out", tmp_path / "cut", *SMALL) == 128 + 15
    assert start("--resume", "--out", tmp_path / "cut") == 0
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    values = summary(tmp_path / "whole")
    # Of its own boundaries, sampled and greedy, and of the guide's, which it was trained on.
    assert len({values[name] for name in ("val_bpb", "val_bpb_greedy", "val_bpb_as_trained")} - {None}) == 3
    assert "greedy; {:.4f} with those it is trained on".format(values["val_bpb_as_trained"]) in capsys.readouterr().err
    assert "… with the boundaries it is trained on" in (tmp_path / "whole" / "report.html").read_text()
    found, again = (read_prepared(read_config(tmp_path / name)) for name in ("whole", "cut"))
    assert isinstance(found, Vocabulary)
    assert 257 <= found.size <= 400
    assert found.tokens == again.tokens
    assert found.rate == again.rate
    (tmp_path / "cut" / PREPARED).write_text('["a"]')
    with pytest.raises(LoadError, match="is damaged"):
        read_prepared(read_config(tmp_path / "cut"))


def test_a_vocabulary_that_misses_the_rate_is_used_and_its_rate_told(corpus, tmp_path, capsys):
    """Its router says what it draws, not what was asked for: in the run, in its summary and in the model that is loaded."""
    needs("bpe", "tokenizers")
    out = tmp_path / "run"
    arguments = ("--estimator", "bpe", "--rate", "0.05", "--bpe.vocabulary", "300", "--bpe.text-bytes", "256")
    assert start(*arguments, "--dataset", corpus, "--out", out, *SMALL) == 0
    config = read_config(out)
    found = read_prepared(config)
    assert isinstance(found, Vocabulary)
    rate = found.rate
    assert rate > 0.2
    text = " ".join(capsys.readouterr().err.split())
    assert f"begin at {rate:.4f} of the bytes" in text
    assert "comes nearer to --rate 0.05" in text
    values = summary(out)
    assert (values["target_rate"], values["vocabulary_rate"]) == (0.05, rate)
    assert values["vocabulary"] == found.size
    assert values["val_bpb_as_trained"] is None
    # One batch of the four that may be read is kept to measure the rate on; a BOS is no text.
    assert 3 * 64 - 12 <= values["vocabulary_bytes"] <= 3 * 64
    assert values["capacity"] >= min(rate * config.length, config.length)
    assert load(out).model.unet.stage.estimators[0].router.rate == rate
    assert values["val_rate"] == pytest.approx(rate, abs=0.2)


def test_what_cannot_be_found_is_said_in_a_sentence(byte_run, corpus, tmp_path, capsys):
    needs("bpe", "tokenizers")
    cases = {
        "--bpe: text_bytes must be a whole number from 1": ("--estimator", "bpe", "--bpe.text-bytes", "0"),
        "--entropy.model": ("--estimator", "entropy"),
        "holds no model.safetensors": ("--estimator", "entropy", "--entropy.model", tmp_path),
    }
    for message, arguments in cases.items():
        assert start(*arguments, "--dataset", corpus, "--out", tmp_path / "out", *SMALL) == 2
        assert message in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "out").exists()


def test_a_model_with_tokens_of_its_own_is_no_byte_model(tmp_path):
    save(registered("sfe"), tmp_path)
    with pytest.raises(ConfigError, match="draws boundaries between its tokens"):
        read_byte_model(tmp_path)


def test_a_configuration_goes_out_and_comes_back(byte_run):
    config = read_config(byte_run)
    assert dataclasses.replace(config) == config
    assert config.out == byte_run
    assert config.model == "tiny"


def test_a_vocabulary_learns_from_one_epoch_and_not_from_what_its_rate_is_measured_on(corpus):
    """A long run goes through few texts again and again."""
    given = ("--estimator", "bpe", "--rate", "0.4", "--bpe.vocabulary", "300", "--dataset", str(corpus), "--batch", "8")
    config = parse(
        [*given, *("--length", "64", "--steps", "400", "--data.protocol", "pack", "--evaluation.bytes", "64")]
    )
    text = sum(len(json.loads(line)["text"]) for line in corpus.read_text().splitlines())
    vocabulary = prepare(config, load_split(config))
    assert vocabulary.apart
    assert 0.5 * text < vocabulary.learned_from < text
    short = prepare(dataclasses.replace(config, steps=1), load_split(config))
    assert not short.apart
