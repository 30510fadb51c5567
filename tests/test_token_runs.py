"""Runs whose model reads tokens: from training to files and evaluation, and what is refused."""

import json
import shutil

import jax
import numpy as np
import pytest

from experiments import evaluate as evaluate_module
from experiments import export as export_module
from experiments.comparison.finished import read_finished
from experiments.config.build import build_byte_model
from experiments.config.errors import ConfigError
from experiments.run import parse
from experiments.training.stored import stored_model
from experiments.training.text import read_byte_model
from tests.conftest import needs
from tests.test_run import corpus as corpus
from tests.test_run import curve, message, start
from tests.test_run import usual_promotion as usual_promotion
from unet import TokenModel, load

needs("bpe", "tokenizers")

SMALL = (
    *("--model", "hnet-bpe-tiny", "--unet.layout", '["T1", ["T1"], "T1"]', "--unet.dims", "8", "8"),
    *("--unet.mlp-dims", "8", "8", "--unet.heads", "2", "2", "--unet.rotary-dims", "2", "2"),
    *("--tokenizer.vocabulary", "270", "--estimator", "hnet", "--buckets", "1"),
    *("--length", "32", "--batch", "4", "--steps", "4", "--devices", "1"),
    *("--evaluation.bytes", "128", "--evaluation.times", "1", "--checkpoint.times", "2"),
)


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert start("--dataset", corpus, "--out", folder, *SMALL) == 0
    return folder


def tokenizer_of(folder):
    model = load(folder).model
    assert isinstance(model, TokenModel)
    return model.tokenizer


def test_a_run_of_tokens_leaves_a_model_with_its_tokenizer(finished):
    summary = json.loads((finished / "summary.json").read_text())
    model = load(finished).model
    assert isinstance(model, TokenModel)
    assert summary["vocabulary"] == model.tokenizer.size == 270
    assert 0.3 < summary["val_rate"] < 1.0
    assert summary["target_rate"] is None
    assert summary["level1_target_rate"] == 0.5
    assert summary["val_level1_rate"] > 0
    assert summary["dropped_fraction"] == 0
    assert 0 < summary["capacity"] <= 32
    finished_run = read_finished(finished)
    flops, _, bpb = finished_run.curve[-1]
    assert bpb == summary["val_bpb"]
    assert flops == pytest.approx(summary["flops_per_byte"] * 4 * 128, rel=0.5)


def test_it_resumes_bit_for_bit(finished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    (copy / "summary.json").unlink()
    shutil.rmtree(copy / "checkpoints" / "4")
    model, step = stored_model(copy)
    assert step == 2
    assert isinstance(model, TokenModel)
    assert start("--resume", "--out", copy) == 0
    assert curve(copy) == curve(finished)
    assert (copy / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()


def test_it_is_exported_and_evaluated_on_every_byte(finished, tmp_path, capsys):
    assert export_module.main([str(finished), "--to", str(tmp_path / "model")]) == 0
    (tmp_path / "text").write_bytes("Words, caf\u00e9 and half a character \xe4".encode("latin-1"))
    arguments = ["--text", str(tmp_path / "text"), "--cache", str(tmp_path / "cache"), "--json", "--context", "16"]
    capsys.readouterr()
    assert evaluate_module.main([str(tmp_path / "model"), *arguments]) == 0
    (found,) = json.loads(capsys.readouterr().out)["models"]
    assert np.isfinite(found["bpb"])


def test_a_tokenizer_of_a_file_or_of_another_model_is_used(finished, corpus, tmp_path):
    tokenizer = tokenizer_of(finished)
    path = tmp_path / "tokenizer.json"
    path.write_bytes(np.asarray(tokenizer.json).tobytes())
    for number, source in enumerate((path, finished)):
        out = tmp_path / str(number)
        assert start("--dataset", corpus, "--out", out, *SMALL, "--steps", "1", "--tokenizer.source", source) == 0
        assert tokenizer_of(out).tokens == tokenizer.tokens


def test_bad_input_is_one_sentence(finished, corpus, tmp_path, capsys):
    out = ("--dataset", corpus, "--out", tmp_path / "run", *SMALL)
    (tmp_path / "words.json").write_text(
        json.dumps({"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}}})
    )
    for arguments, sentence in (
        (("--tokenizer.source", tmp_path / "missing.json"), "missing.json cannot be read: No such file"),
        (("--tokenizer.source", tmp_path), "is neither bpe, nor a tokenizer.json, nor a model of tokens"),
        (("--tokenizer.source", tmp_path / "words.json"), "words.json: "),
        (("--tokenizer.vocabulary", "256"), "--tokenizer.vocabulary must be a whole number from 257 to 1048576"),
        (("--tokenizer.vocabulary", "2000000"), "--tokenizer.vocabulary must be a whole number from 257 to 1048576"),
        (("--estimator", "spacelike"), "spacelike reads bytes, not tokens"),
        (("--estimator", "entropy"), "entropy reads bytes, not tokens"),
        (("--constrain", "characters"), "reads bytes"),
        (("--unet.ngrams", "3"), "--unet.ngrams are embeddings of bytes"),
    ):
        assert start(*out, *arguments) == 2, arguments
        assert sentence in message(capsys)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="holds a model of tokens"):
        read_byte_model(finished)
    with pytest.raises(ConfigError, match="this is for models of bytes"):
        build_byte_model(parse([str(one) for one in out]), jax.random.key(0))
