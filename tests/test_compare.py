"""Comparisons as a user starts them: what they leave, how they go on, what they refuse."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys

import pytest

from experiments import compare as compare_module
from experiments.comparison import markdown, remarks, table
from experiments.display import Display
from tests.test_run import SMALL
from tests.test_run import corpus as corpus
from tests.test_run import usual_promotion as usual_promotion

ARGUMENTS = ("--estimators", "uniform", "sfe", "--seeds", "0", "1")


def start(*arguments):
    return compare_module.main([str(argument) for argument in arguments])


def summary(estimator, seed, bpb, rate=0.2):
    return {
        "estimator": estimator,
        "seed": seed,
        "val_bpb": bpb,
        "rate": rate,
        "target_rate": 0.2,
        "parameters": 1000,
        "flops_per_byte": 1e6,
        "layer_flops_per_byte": 2e6,
        "seconds": 10.0,
        "bytes_per_second": 1000.0,
        "overflow_fraction": 0.0,
        "boundary_f1_whitespace": None,
        "sampled_f1_whitespace": 0.5,
        "boundary_auc_whitespace": 0.5,
    }


def test_means_errors_and_paired_gains():
    lines = table(
        {
            "uniform": [summary("uniform", 0, 2.0), summary("uniform", 1, 2.2)],
            "sfe": [summary("sfe", 0, 1.9), summary("sfe", 1, 2.0)],
        }
    )
    found = [(line.bpb.mean, line.bpb.error, line.gain.mean, line.gain.error) for line in lines]
    assert found[1] == pytest.approx((1.95, 0.05, 0.15, 0.05))
    assert math.isnan(lines[0].gain.mean)
    assert "| `sfe` | 1.9500 ± 0.0500 | 0.1500 ± 0.0500 |" in markdown(lines)


def test_a_missed_rate_is_flagged():
    lines = table({"hnet": [summary("hnet", 0, 2.0, 0.268)], "sfe": [summary("sfe", 0, 2.0, 0.205)]})
    assert [line.missed for line in lines] == [True, False]
    assert "0.268 †" in markdown(lines)
    inside = {**summary("sfe", 0, 2.0, 0.21), "rate_level1": 0.6, "target_rate_level1": 0.5}
    (line,) = table({"sfe": [inside]})
    assert line.missed
    assert "| 0.210 / 0.600 † |" in markdown([line])
    assert "sfe 0.210 / 0.600 for 0.2 / 0.5" in " ".join(remarks([line]))
    assert any("hnet 0.268 for 0.2" in note for note in remarks(lines))


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("compare") / "out"
    assert start(*ARGUMENTS, "--dataset", corpus, "--out", out, "--jobs", "2", *SMALL) == 0
    return out


def test_a_comparison_leaves_its_table_its_curves_and_its_page(finished):
    lines = json.loads((finished / "table.json").read_text())
    assert [line["estimator"] for line in lines] == ["uniform", "sfe"]
    assert all(line["seeds"] == [0, 1] for line in lines)
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
    page = (finished / "report.html").read_text()
    assert page.count('<pre class="text">') == 6
    assert "http://" not in page
    assert (finished / "table.md").read_text().startswith("| estimator |")


def test_every_run_sees_the_same_data(finished):
    configs = [json.loads((finished / f"{name}-1" / "config.json").read_text()) for name in ("uniform", "sfe")]
    for key in ("estimator", "out"):
        assert configs[0].pop(key) != configs[1].pop(key)
    assert configs[0] == configs[1]


def test_what_is_finished_is_not_done_again_and_what_is_missing_is(finished, corpus, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(finished, out)
    for folder in out.glob("*-?"):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "out": str(folder)}))
    shutil.rmtree(out / "sfe-1")
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/summary.json")}
    assert start(*ARGUMENTS, "--dataset", corpus, "--out", out, *SMALL) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    again, first = (json.loads((folder / "sfe-1" / "summary.json").read_text()) for folder in (out, finished))
    assert again["val_bpb"] == first["val_bpb"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_comparison_stops_its_runs(tmp_path, number, monkeypatch):
    job = compare_module.Job("run", tmp_path)
    started = []

    def launch(job, core, logs):
        started.append(job)
        job.process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        os.kill(os.getpid(), number)

    monkeypatch.setattr(compare_module, "_launch", launch)
    before = signal.getsignal(number)
    with compare_module._interruptible(), pytest.raises(KeyboardInterrupt):
        compare_module.work_off([job], 1, tmp_path, Display(quiet=True))
    assert started[0].process.poll() == -signal.SIGTERM
    assert signal.getsignal(number) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--estimators", "sfe", "sfe"), "each seed once"),
        (("--estimators", "sfe", "--seed", "3"), "--seed is for single runs"),
        (("--estimators", "sfe", "--rate", "1.5"), "--rate"),
        (("--jobs", "0"), "at least one"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, corpus, capsys, arguments, message):
    assert start(*arguments, "--dataset", corpus, "--out", tmp_path / "out") == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_other_settings_are_refused_where_runs_are(finished, corpus, capsys):
    assert start(*ARGUMENTS, "--dataset", corpus, "--out", finished, "--rate", "0.3", *SMALL) == 2
    assert "other settings for rate" in " ".join(capsys.readouterr().err.split())
