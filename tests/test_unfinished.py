"""Runs that are used before they end: their newest checkpoint, or the one of a step."""

import json

import equinox as eqx
import jax
import numpy as np
import pytest

import unet
from experiments.config import models
from experiments.exploring.held import HeldModel
from experiments.export import main as export
from experiments.generate import main as generate
from experiments.scoring.models import open_model
from tests.test_evaluate_command import unfinished as unfinished
from tests.test_run import usual_promotion as usual_promotion


def same(one, other):
    leaves = [jax.tree.leaves(eqx.filter(model, eqx.is_array)) for model in (one, other)]
    return all(np.array_equal(a, b) for a, b in zip(*leaves, strict=True))


def test_an_unfinished_run_is_exported_as_its_newest_checkpoint_or_that_of_a_step(unfinished, tmp_path, capsys):
    for name, flags, step in (("newest", (), 5), ("older", ("--step", "3"), 3)):
        assert export([str(unfinished), "--to", str(tmp_path / name), *flags]) == 0, capsys.readouterr().err
        expected = open_model(str(unfinished), step).model
        assert same(unet.load(tmp_path / name).model, expected)
        assert f"| training steps, of a checkpoint | {step} |" in (tmp_path / name / "README.md").read_text()
    assert not same(unet.load(tmp_path / "newest").model, unet.load(tmp_path / "older").model)
    assert export([str(unfinished), "--to", str(tmp_path / "none"), "--step", "4"]) == 2
    assert "holds no checkpoint of step 4; it holds 3, 5" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "none").exists()


def test_an_unfinished_run_generates(unfinished, capsys):
    code = generate([str(unfinished), "--prompt", "a", "--max-bytes", "6", "--json", "--step", "3"])
    out = capsys.readouterr()
    assert code == 0, out.err
    (text,) = json.loads(out.out)["texts"]
    model = open_model(str(unfinished), 3).model
    (expected,) = unet.generate(model, "a", max_bytes=6, key=jax.random.key(0)).texts
    assert text["text"] == expected.text
    assert json.loads(out.out)["settings"]["step"] == 3


def test_the_page_follows_a_run_that_trains(unfinished):
    held = HeldModel(str(unfinished))
    assert (held.first.step, held.steps, held.finished) == (5, [3, 5], False)
    assert held.at(None).step == 5
    assert held.at(None) is held.at(5)
    older = held.at(3)
    assert older.name.endswith("@3")
    assert same(older.model, open_model(str(unfinished), 3).model)
    assert held.at(3) is older
    assert held.is_open(3)
    with pytest.raises(Exception, match="holds no checkpoint of step 4 any more"):
        held.at(4)
    # A later checkpoint is the newest one from then on.
    checkpoints = unfinished / "checkpoints"
    (checkpoints / "5").rename(checkpoints / "7")
    try:
        assert not held.is_open(None)
        assert (held.at(None).step, held.steps) == (7, [3, 7])
    finally:
        (checkpoints / "7").rename(checkpoints / "5")


@pytest.mark.parametrize("command", [lambda where: generate([where]), lambda where: export([where, "--to", "x"])])
def test_a_mistyped_folder_is_named_and_asked_of_nobody(command, tmp_path, monkeypatch, capsys):
    def no_hub(*given, **named):
        raise AssertionError(given)

    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "load_pretrained", no_hub)
    assert command("runs/typo") == 2
    assert "runs/typo" in capsys.readouterr().err
