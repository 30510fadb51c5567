"""Runs as a user starts them: what they leave, how they resume, how they fail."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import run as run_module
from experiments.reporting import report
from experiments.reporting.metrics import metric_of
from experiments.training.metrics_log import MetricsLog, read_metrics
from experiments.training.placement import Placement
from experiments.training.run_dir import held, prepare_new
from experiments.training.setup import set_up
from unet.files.saving import load, save

ROOT = Path(__file__).parent.parent
SMALL = (
    *("--unet.dim", "8", "--unet.heads", "2", "--unet.main-layers", "1", "--unet.window", "4"),
    *("--length", "16", "--batch", "4", "--steps", "8", "--devices", "1", "--buckets", "1"),
    *("--evaluation.bytes", "64", "--evaluation.times", "2", "--checkpoint.times", "4"),
)
TIMES = ("seconds", "bytes_per_second")


@pytest.fixture(scope="module", autouse=True)
def usual_promotion():
    """Optax relies on JAX's usual dtype promotion; the losses themselves are tested under the strict one."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    rng = np.random.default_rng(0)
    words = ["".join(chr(97 + c) for c in rng.integers(0, 26, rng.integers(2, 7))) for _ in range(50)]
    path = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    lines = [json.dumps({"text": " ".join(rng.choice(words, 40))}) for _ in range(40)]
    path.write_text("\n".join(lines))
    return path


def start(*arguments, pictures=False):
    """Run in this process; returns the exit code. Reports have their pictures where a test is to look at them: to draw them takes
    a quarter of the time of a small run."""
    with pytest.MonkeyPatch.context() as patch:
        if not pictures:
            patch.setattr(report, "boundaries_picture", lambda shown: b"")
            patch.setattr(report, "inline_svg", lambda figure, label: label)
            for name in ("curves_figure", "tokens_figure"):
                patch.setattr(report, name, lambda *arguments: None)
        return run_module.main([str(argument) for argument in arguments])


def curve(folder):
    """Everything in the log but the times."""
    return [{k: v for k, v in record.items() if k not in TIMES} for record in read_metrics(folder)]


def summary(folder):
    values = json.loads((folder / "summary.json").read_text())
    return {key: value for key, value in values.items() if key not in TIMES}


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory, request):
    """A whole run that nothing disturbed; only here does a test look at its pictures."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert start("--dataset", corpus, "--out", folder, *SMALL, pictures=request.module.__name__ == __name__) == 0
    return folder


def test_a_run_leaves_everything_it_should(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        *("config.json", "metrics.jsonl", "summary.json", "checkpoints", "report.html", "boundaries.png"),
        "model.safetensors",
    }
    values = json.loads((finished / "summary.json").read_text())
    for name in (
        *("val_bpb", "val_early_bpb", "val_rate", "val_whitespace_f1", "bytes", "seconds", "bytes_per_second"),
        *("parameters", "dropped_fraction", "val_bpb_error", "val_documents"),
    ):
        assert values[name] is not None, name
    last = list(read_metrics(finished))[-2:]
    assert values["epochs"] == last[0]["epochs"]
    assert 0 < values["epochs"] < 1
    assert values["shown_fraction"] == last[0]["shown_fraction"] == 1.0
    assert (values["val_bpb_error"], values["val_documents"]) == (last[1]["val_bpb_error"], last[1]["val_documents"])
    assert values["bytes"] == 8 * 4 * 16
    texts = {"estimator", "dataset", "model", "dropped_warning"}
    names = set(values).union(*read_metrics(finished)) - texts
    assert [name for name in sorted(names) if metric_of(name) is None] == []
    assert [record["step"] for record in read_metrics(finished) if "loss" in record] == list(range(1, 9))
    assert [record["step"] for record in read_metrics(finished) if "val_bpb" in record] == [4, 8]
    assert sorted(int(path.name) for path in (finished / "checkpoints").iterdir()) == [6, 8]


def test_returns_are_not_centred_over_the_one_sequence_of_a_device(corpus, tmp_path, capsys):
    given = ("--dataset", corpus, "--out", tmp_path / "run", *SMALL, "--batch", "2", "--batch-centre.over", "shard")
    assert start(*given, "--devices", "2") == 2
    assert "each device has 1 sequence at a time of a batch of 2" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_the_report_is_one_page_that_needs_nothing_else(finished):
    page = (finished / "report.html").read_text()
    assert page.count('<svg class="picture"') == 2
    assert "currentColor" in page
    assert "http://" not in page
    assert "https://" not in page
    assert page.count("<span") > 50
    bpb, error = (summary(finished)[name] for name in ("val_bpb", "val_bpb_error"))
    assert f"<td>{bpb:.4f} ± {error:.4f}</td>" in page
    assert (finished / "boundaries.png").read_bytes().startswith(b"\x89PNG")


def test_runs_share_a_compiled_step_where_it_is_the_same_program(corpus, tmp_path):
    def made(*arguments):
        return set_up(
            run_module.parse([str(one) for one in ("--dataset", corpus, "--out", tmp_path, *SMALL, *arguments)])
        )

    setup, other = made(), made("--seed", "1", "--evaluation.times", "1")
    trainer, placement = setup.trainer, setup.placement
    first = trainer.compiled_on(placement)
    assert other.trainer.compiled_on(other.placement) is first
    config = trainer.config
    for changed in (
        dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=0.5)),
        dataclasses.replace(config, steps=9),
        dataclasses.replace(config, rate=0.3),
        dataclasses.replace(config, batch=2),
    ):
        assert dataclasses.replace(trainer, config=changed).compiled_on(placement) is not first, changed
    assert dataclasses.replace(trainer, capacities=((9,),)).compiled_on(placement) is not first
    two = Placement.of(dataclasses.replace(config, devices=2))
    assert trainer.compiled_on(two) is not first
    narrower = dataclasses.replace(trainer, static=made("--unet.window", "2").trainer.static)
    assert narrower.compiled_on(placement) is not first
    holding = dataclasses.replace(trainer, static=setup.model)
    assert holding.compiled_on(placement) is not holding.compiled_on(placement), "arrays are not compared"


def test_the_same_command_gives_the_same_run(finished, corpus, tmp_path):
    assert start("--dataset", corpus, "--out", tmp_path / "again", *SMALL) == 0
    assert curve(tmp_path / "again") == curve(finished)
    assert summary(tmp_path / "again") == summary(finished)


def test_two_processes_never_share_a_folder(finished, corpus, capsys):
    before = curve(finished)
    with held(finished):
        assert start("--dataset", corpus, "--out", finished, "--overwrite", *SMALL) == 2
        assert start("--resume", "--out", finished) == 2
    assert capsys.readouterr().err.count("another process is at work in") == 2
    assert curve(finished) == before


def interrupt_at(monkeypatch, step):
    """Have the run receive a SIGTERM when it has logged `step`."""
    write = MetricsLog.write

    def write_and_interrupt(self, record):
        error = write(self, record)
        if record["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return error

    monkeypatch.setattr(MetricsLog, "write", write_and_interrupt)


@pytest.mark.parametrize("step", [1, 5])
def test_an_interrupted_run_saves_and_resumes_bit_for_bit(finished, corpus, tmp_path, monkeypatch, step):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_at(patch, step)
        assert start("--dataset", corpus, "--out", out, *SMALL) == 128 + signal.SIGTERM
    assert (out / "checkpoints" / str(step)).is_dir()
    assert start("--resume", "--out", out) == 0
    assert curve(out) == curve(finished)
    assert summary(out) == summary(finished)


@pytest.mark.parametrize("change", [4, 71])
def test_a_killed_run_resumes_bit_for_bit(finished, corpus, tmp_path, change):
    """SIGKILL at an early and at a late change of the run's files, of about 120; tests.hostile.kills has many more."""
    out = tmp_path / "run"
    arguments = ["--dataset", str(corpus), "--out", str(out), *SMALL]
    command = [sys.executable, "-m", "tests.killed_run", str(change), *arguments]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    if not (out / "config.json").exists():
        assert start("--resume", "--out", out) == 2
        return
    assert start("--resume", "--out", out) == 0
    assert curve(out) == curve(finished)
    assert summary(out) == summary(finished)


def test_an_interrupted_report_is_written_by_resuming(finished, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    for name in ("summary.json", "report.html"):
        (copy / name).unlink()

    def interrupt(*_):
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "write_report", interrupt)
        assert start("--resume", "--out", copy) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"stopped; {copy} has its last checkpoint; go on with --resume"
    assert not (copy / "summary.json").exists()
    assert start("--resume", "--out", copy) == 0
    assert summary(copy)["val_bpb"] == summary(finished)["val_bpb"]


def message(capsys):
    return " ".join(capsys.readouterr().err.split())


def test_what_is_there_is_not_overwritten_unless_told(finished, corpus, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    before = sorted((path.name, path.stat().st_mtime_ns) for path in copy.rglob("*"))
    assert start("--dataset", corpus, "--out", copy, *SMALL) == 2
    assert (
        "is not empty: go on with its run (--resume), delete it first (--overwrite), or name another --out"
        in message(capsys)
    )
    assert sorted((path.name, path.stat().st_mtime_ns) for path in copy.rglob("*")) == before
    (copy / "thesis.tex").write_text("mine")
    assert start("--dataset", corpus, "--out", copy, "--overwrite", *SMALL) == 2
    assert "holds files that no run wrote (thesis.tex)" in message(capsys)
    assert (copy / "thesis.tex").read_text() == "mine"
    assert (copy / "summary.json").exists()


@pytest.mark.parametrize(
    "invalid",
    [
        ("--dataset", "no/such/file"),
        ("--devices", "3"),
        ("--unet.implementation", "pallas"),
        ("--unet.attention", "tokamax"),
    ],
)
def test_invalid_input_costs_no_finished_run_and_leaves_no_folder(finished, corpus, tmp_path, invalid):
    copy, fresh = tmp_path / "copy", tmp_path / "fresh"
    shutil.copytree(finished, copy)
    assert start("--dataset", corpus, "--out", copy, *SMALL, "--overwrite", *invalid) == 2
    assert (copy / "summary.json").exists()
    assert start("--dataset", corpus, "--out", fresh, *SMALL, *invalid) == 2
    assert not fresh.exists()


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path, capsys):
    assert start("--resume", "--out", tmp_path) == 2
    assert f"{tmp_path} holds no run to resume" in message(capsys)


def test_a_run_is_resumed_with_its_own_settings(finished, capsys):
    assert start("--resume", "--out", finished, "--seed", "5") == 2
    assert "has other settings for seed" in message(capsys)


def test_data_are_known_by_their_content_wherever_they_are(finished, corpus, tmp_path, capsys, monkeypatch):
    """They have moved, or the run goes on from another folder: --dataset says where they are now."""
    text, moved, out = Path("text.jsonl"), tmp_path / "elsewhere" / "text.jsonl", tmp_path / "run"
    moved.parent.mkdir()
    monkeypatch.chdir(tmp_path)
    text.write_text(corpus.read_text())
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        assert start("--dataset", text, "--out", out, *SMALL) == 128 + signal.SIGTERM
    monkeypatch.chdir(moved.parent)
    assert start("--resume", "--out", out) == 2
    assert "where the data have moved to is said with --dataset" in message(capsys)
    moved.write_text(corpus.read_text().replace("a", "b"))
    assert start("--resume", "--out", out, "--dataset", moved) == 2
    assert "is not the data that" in message(capsys)
    assert json.loads((out / "config.json").read_text())["dataset"] == "text.jsonl"
    moved.write_text(corpus.read_text())
    assert start("--resume", "--out", out, "--dataset", moved, "--rate", "0.3") == 2
    assert f"the run in {out} has other settings for rate:" in message(capsys)
    assert start("--resume", "--out", out, "--dataset", moved) == 0
    assert curve(out) == curve(finished)
    assert json.loads((out / "config.json").read_text())["dataset"] == str(moved)


def test_without_a_checkpoint_nothing_says_what_the_data_were(corpus, tmp_path, capsys):
    config = run_module.parse(["--dataset", str(corpus), "--out", str(tmp_path / "run"), *SMALL])
    prepare_new(config)
    assert start("--resume", "--out", tmp_path / "run", "--dataset", "docs") == 2
    assert "has other settings for dataset" in message(capsys)


def test_a_run_that_diverges_at_once_promises_no_checkpoint_and_gives_back_the_old_run(
    finished, corpus, tmp_path, capsys
):
    """With weights that are not numbers, which are refused, and with ones that are too large to compute with."""
    copy, broken, model = tmp_path / "copy", tmp_path / "broken", load(finished).model.unet
    shutil.copytree(finished, copy)
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    for value, code in ((np.nan, 2), (3e38, 1)):
        save(eqx.tree_at(lambda model: model.embedding, model, jnp.full_like(model.embedding, value)), broken)
        assert start("--dataset", corpus, "--out", copy, *SMALL, "--overwrite", "--init", broken) == code
        assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before
    text = message(capsys)
    assert f"error: {broken} holds weights that are not numbers" in text
    assert "at step 1 (64 bytes); there is no checkpoint yet, and the weights of --init" in text
    assert text.count(f"the run that was in {copy} before is there again") == 1


def test_a_run_that_diverges_later_names_its_last_checkpoint(corpus, tmp_path, capsys):
    out = tmp_path / "run"
    assert start("--dataset", corpus, "--out", out, *SMALL, "--optimizer.learning-rate", "1e30") == 1
    text = message(capsys)
    assert "error: loss became nan at step" in text or "error: gradient_norm became" in text
    steps = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert (f", of step {steps[-1]}, is from before it" if steps else "there is no checkpoint yet:") in text
    assert not (out / "summary.json").exists()


def test_a_run_stopped_before_its_first_checkpoint_begins_with_its_weights_again(finished, corpus, tmp_path):
    """A comparison starts its runs so."""
    arguments = ["--dataset", str(corpus), "--out", str(tmp_path / "run"), "--init", str(finished), *SMALL]
    config = run_module.parse(arguments)
    prepare_new(config)
    begun = set_up(dataclasses.replace(config, resume=True)).model.unet
    np.testing.assert_array_equal(begun.embedding, load(finished).model.unet.embedding)


def test_a_run_whose_folder_vanishes_is_saved_beside_it_and_goes_on_from_there(
    finished, corpus, tmp_path, monkeypatch, capsys
):
    out, rescued, write = tmp_path / "run", tmp_path / "run-rescued", MetricsLog.write

    def write_and_delete(self, record):
        # Again where a checkpoint is being written just then.
        while record["step"] == 5 and out.exists():
            shutil.rmtree(out, ignore_errors=True)
        return write(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", write_and_delete)
        assert start("--dataset", corpus, "--out", out, *SMALL) == 1
    text = message(capsys)
    # One step earlier where a checkpoint was being written just then, and could not be.
    vanished = f"error: {re.escape(str(out))} has vanished while the run was at work there"
    assert re.search(f"{vanished}; step [56] of 8 and its model are saved in", text)
    assert f"go on with --resume --out {rescued}" in text
    assert load(rescued)
    assert start("--resume", "--out", rescued) == 0
    assert curve(rescued) == curve(finished)
    assert summary(rescued) == summary(finished)


def test_a_report_that_fails_costs_no_model_and_is_written_by_going_on(finished, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    for name in ("model.safetensors", "summary.json"):
        (copy / name).unlink()

    def fail(*arguments):
        raise ValueError("no glyph\nfor that")

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "write_report", fail)
        assert start("--resume", "--out", copy) == 1
    text = message(capsys)
    assert f"the training has ended and its model is saved in {copy}, but its report could not be written" in text
    assert "(ValueError: no glyph\\nfor that); go on with --resume to write it" in text
    assert load(copy)
    assert not (copy / "summary.json").exists()
    assert start("--resume", "--out", copy) == 0
    assert curve(copy) == curve(finished)
    assert summary(copy) == summary(finished)


def test_a_run_with_a_damaged_newest_checkpoint_goes_on_from_the_one_before(finished, tmp_path, capsys):
    """The checkpoints themselves are tested without a run."""
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    (copy / "checkpoints" / "8" / "files.json").write_bytes(b"\0" * 64)
    assert start("--resume", "--out", copy) == 0
    assert f"{copy / 'checkpoints' / '8'} is damaged" in message(capsys)
    assert curve(copy) == curve(finished)
    assert sorted(path.name for path in (copy / "checkpoints").iterdir()) == ["6", "8"]


WRONG = [
    (("--model", "huge"), "--model 'huge' is none of tiny, 18M"),
    (("--dataset", "no/such/file"), "there is no data set, file or folder called 'no/such/file'"),
    (("--rate", "1.5"), "--rate must be a number from 1e-06 to 0.999999; got 1.5"),
    (("--length", "1"), "--length must be a whole number from 2 to"),
    (("--bytes", "10"), "--bytes 10 is less than one step of 16 x 256 bytes"),
    (("--rate", "0.001"), "lies beyond policy logits capped at 6.0"),
    (("--model", "18M", "--steps", "10"), "name a shorter --optimizer.warmup-bytes, or None for 5 % of the run"),
    (("--policy.window", "-1"), "--policy: window must be a whole number from 0"),
    (("--discount.factor", "1.1"), "--discount: factor must be a number from 0 to 1"),
    (("--unet.heads", "5"), "--unet: heads must divide dim"),
    (("--hnet.ratio-weight", "1"), "--hnet.ratio-weight is a setting of --estimator hnet, which was not chosen"),
    (("--estimator", "hnte"), "--estimator hnte: did you mean hnet?"),
    (("--batch", "1"), "centred returns of a batch of one sequence are all zero"),
    (("--optimizer.accumulate", "3"), "--optimizer.accumulate 3 does not divide --batch 16"),
    (("--estimator", "stride", "--stride.stride", "0"), "--stride: stride must be a whole number from 1"),
    (
        ("--estimator", "characters", "--characters.every", "0"),
        "--characters: every must be a whole number from 1 to 2147483647; got 0",
    ),
    (("--resume", "--overwrite"), "holds no run to resume"),
    (("--devices", "99"), "--devices 99 cannot share a batch"),
]


@pytest.mark.parametrize(("arguments", "expected"), WRONG)
def test_invalid_input_gets_one_sentence_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments, expected):
    monkeypatch.chdir(tmp_path)
    assert start("--out", "run", *arguments) == 2
    text = message(capsys)
    assert expected in text
    assert "Traceback" not in text


@pytest.mark.parametrize("arguments", [("--estimatr", "sfe"), ("--batch", "many")])
def test_unknown_flags_and_values_are_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        start(*arguments)
    assert stopped.value.code == 2


def test_help_says_what_every_setting_does(capsys):
    with pytest.raises(SystemExit) as stopped:
        start("--help-all")
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for phrase in (
        "Discount of rewards per byte",
        "Peak learning rate",
        "Share of documents held out",
        "--policy.window",
    ):
        assert phrase in text


@pytest.mark.parametrize("estimator", ["whitespace", "isotropic"])
def test_a_rule_runs_to_the_end(corpus, tmp_path, estimator):
    assert (
        start(
            "--dataset", corpus, "--out", tmp_path / "run", "--estimator", estimator, *SMALL, "--data.protocol", "pack"
        )
        == 0
    )
    values = summary(tmp_path / "run")
    assert values["val_early_bpb"] is None
    assert values["val_rate"] > 0.1


def test_accumulation_two_devices_and_no_token_level_run_too(corpus, tmp_path):
    extra = ("--optimizer.accumulate", "2", "--devices", "2", "--buckets", "2", "--unet.compute", "bfloat16")
    extra = (*extra, "--chunker", "deviate", "--unet.early-exit-fraction", "0.5")
    assert start("--dataset", corpus, "--out", tmp_path / "a", *SMALL, *extra) == 0
    flat = ("--estimator", "isotropic", "--isotropic.no-token-level")
    assert start("--dataset", corpus, "--out", tmp_path / "b", *SMALL, *flat) == 0
    assert summary(tmp_path / "b")["val_rate"] == 0.0
