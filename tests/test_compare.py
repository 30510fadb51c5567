"""Comparisons started by a user: their output, how they resume, and invalid input."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence

import pytest

from experiments import compare as compare_module
from experiments.comparison import jobs as jobs_module
from experiments.comparison.comparison import MethodResult, cells, columns, markdown, method_results, remarks
from experiments.comparison.finished import FinishedRun, curve, read_tables
from experiments.comparison.page import html_table
from experiments.comparison.pairs import (
    PAIR_COLUMNS,
    Curve,
    compare_pairs,
    difference_json,
    every_pair,
    pair_cells,
    pair_remarks,
)
from experiments.comparison.plan import pairs_of, runs_of
from experiments.comparison.study import of_estimators
from experiments.config.errors import ConfigError
from experiments.config.presets import PRESETS
from experiments.reporting.display import Display
from experiments.reporting.summary import target_rates
from experiments.training.run_dir import read_config
from experiments.training.stopping import stop_signals
from tests.test_run import SMALL
from tests.test_run import corpus as corpus
from tests.test_run import usual_promotion as usual_promotion
from unet.files.saving import load
from unet.flops import matrix_flops

ARGUMENTS = ("--estimators", "uniform", "sfe", "--seeds", "0", "1")


def start(*arguments):
    return compare_module.main([str(argument) for argument in arguments])


def finished_run(estimator: str, seed: int, bpb: float, rate: float = 0.2, **more: float) -> FinishedRun:
    summary: dict[str, float | int | str | None] = {
        "estimator": estimator,
        "seed": seed,
        "val_bpb": bpb,
        "val_rate": rate,
        "target_rate": 0.2,
        "parameters": 1000,
        "flops_per_byte": 1e6,
        "layer_flops_per_byte": 2e6,
        "seconds": 10.0,
        "bytes_per_second": 1000.0,
        "dropped_fraction": 0.0,
        "val_whitespace_f1": None,
        "val_whitespace_sampled_f1": 0.5,
        "val_whitespace_auc": 0.5,
        **more,
    }
    config = dataclasses.replace(PRESETS["tiny"], estimator=estimator, seed=seed)
    return FinishedRun(config, summary, straight(3.0, 1e-3, 1000.0))


def shown(lines: Sequence[MethodResult]) -> str:
    return markdown(columns("uniform"), [cells(line) for line in lines])


def test_means_errors_and_paired_gains():
    lines = method_results(
        {
            "uniform": [finished_run("uniform", 0, 2.0), finished_run("uniform", 1, 2.2)],
            "sfe": [finished_run("sfe", 0, 1.9), finished_run("sfe", 1, 2.0)],
        },
        "uniform",
    )
    bpb = lines[1].numbers["val_bpb"]
    found = bpb.mean, bpb.error, bpb.n, lines[1].gain.mean, lines[1].gain.half_width
    # The t quantile for one degree of freedom is tan(0.475 π) = 12.706.
    assert found == pytest.approx((1.95, 0.05, 2, 0.15, 0.05 * math.tan(0.475 * math.pi)))
    assert lines[0].gain.values == ()
    assert "| `uniform` | 2.1000 ± 0.1000 | – |" in shown(lines)
    assert "| `sfe` | 1.9500 ± 0.0500 | +0.1500 [-0.4853, +0.7853] ≈ |" in shown(lines)


def straight(start, slope, end):
    """A curve that falls by `slope` for each FLOP, validated three times."""
    return [(flops, flops / 1e6, start - slope * flops) for flops in (0.25 * end, 0.5 * end, end)]


BPB: dict[str, dict[int, float]] = {
    "uniform": {0: 2.0, 1: 2.2, 2: 2.1},
    "sfe": {0: 1.9, 1: 2.1, 2: 2.0},
    "hnet": {0: 1.9, 1: 2.3, 2: 2.1},
}
CURVES: dict[str, dict[int, Curve]] = {
    "uniform": {seed: straight(3.0, 0.01, 100.0) for seed in range(3)},
    "sfe": {seed: straight(3.0 + 0.1 * seed, 0.02, 120.0) for seed in range(3)},
    "hnet": {seed: straight(3.0, 0.01, 500.0) for seed in range(3)},
}


def test_every_pair_once_with_the_reference_second():
    assert every_pair(("uniform", "sfe", "hnet"), last="uniform") == [
        ("sfe", "uniform"),
        ("hnet", "uniform"),
        ("sfe", "hnet"),
    ]


def test_pairs_after_the_same_bytes_and_the_same_flops():
    pairs = compare_pairs([("sfe", "uniform"), ("hnet", "uniform"), ("sfe", "hnet")], BPB, CURVES)
    sure, unsure, third = pairs
    assert sure.below.values == pytest.approx((0.1, 0.1, 0.1))
    assert sure.below.distinguishable
    # The other p values are from scipy.stats.ttest_rel. Holm multiplies by three, two and one.
    assert (unsure.below.p, third.below.p) == pytest.approx((1.0, 0.225403), abs=1e-6)
    assert [pair.below_holm for pair in pairs] == pytest.approx([0.0, 1.0, 0.450807], abs=1e-6)
    assert not unsure.below.distinguishable
    # After 100 FLOPs uniform has 2 bits per byte, sfe has 1, 1.1 and 1.2.
    assert sure.flops == (100.0, 100.0, 100.0)
    assert sure.equal_flops.values == pytest.approx((1.0, 0.9, 0.8))
    assert sure.equal_flops.half_width == pytest.approx(4.302653 * 0.1 / math.sqrt(3))
    # hnet was first validated after 125 FLOPs, after the end of uniform (100) and of sfe (120).
    assert unsure.equal_flops.values == third.equal_flops.values == ()
    assert pair_cells(sure)["equal_flops"] == "+0.9000 [+0.6516, +1.1484]"
    assert pair_cells(unsure) == {
        "pair": "`hnet` below `uniform`",
        "below": "+0.0000 [-0.2484, +0.2484] ≈",
        "p": "1.000",
        "holm": "1.000",
        "equal_flops": "–",
        "equal_holm": "–",
        "seeds": "0, 1, 2",
    }
    rows = html_table(PAIR_COLUMNS, [pair_cells(pair) for pair in pairs]).split("<tr>")
    assert ['class="quiet"' in row for row in rows[2:]] == [False, True, True]
    notes = " ".join(pair_remarks(pairs, []))
    assert "of 3 pairs without any difference, 0.15 would be expected" in notes
    assert "Not for every seed at equal FLOPs (hnet:uniform, sfe:hnet)" in notes
    assert "One seed" not in notes


def test_one_seed_tells_nothing_apart():
    (pair,) = compare_pairs([("sfe", "uniform")], {name: {0: runs[0]} for name, runs in BPB.items()}, CURVES)
    assert pair_cells(pair)["below"] == "+0.1000 (one seed) ≈"
    assert difference_json(pair.below)["distinguishable"] is False
    assert "One seed gives no interval" in " ".join(pair_remarks([pair], []))


def test_a_method_without_runs_has_dashes():
    (pair,) = compare_pairs([("sfe", "uniform")], {"sfe": BPB["sfe"]}, {"sfe": CURVES["sfe"]})
    assert pair_cells(pair) == dict.fromkeys(PAIR_COLUMNS, "–") | {"pair": "`sfe` below `uniform`"}
    assert pair_remarks([pair], []) == []


def test_pairs_asked_for():
    study, asked = of_estimators(("sfe", "gumbel", "hnet", "uniform")), ("sfe:hnet", "uniform:sfe")
    assert pairs_of(study, asked, "uniform") == (("sfe", "hnet"), ("uniform", "sfe"))
    assert len(pairs_of(study, (), "uniform")) == 6
    with pytest.raises(ConfigError, match="sfe, gumbel"):
        pairs_of(of_estimators(("sfe", "gumbel")), asked, "sfe")


def test_a_missed_rate_is_flagged():
    lines = method_results(
        {"hnet": [finished_run("hnet", 0, 2.0, 0.268)], "sfe": [finished_run("sfe", 0, 2.0, 0.205)]}, ""
    )
    assert [line.missed for line in lines] == [True, False]
    assert "0.268 †" in shown(lines)
    inside = finished_run("sfe", 0, 2.0, 0.21, val_level1_rate=0.6, level1_target_rate=0.5)
    (line,) = method_results({"sfe": [inside]}, "")
    assert line.missed
    assert "| 0.210 / 0.600 † |" in shown([line])
    assert "sfe 0.210 / 0.600 for 0.2 / 0.5" in " ".join(remarks([line]))
    assert any("hnet 0.268 for 0.2" in note for note in remarks(lines))


def test_a_model_without_tokens_has_no_rate_to_miss():
    config = dataclasses.replace(PRESETS["tiny"], estimator="isotropic").with_settings(isotropic={"token_level": False})
    assert target_rates(config) == [None]
    run = finished_run("isotropic", 0, 2.0, 0.0)
    run = dataclasses.replace(run, config=config, summary={**run.summary, "target_rate": None})
    (line,) = method_results({"no tokens": [run]}, "")
    assert not line.missed
    assert "Missed" not in " ".join(remarks([line]))


def test_what_a_reader_of_the_table_has_to_know():
    taught = finished_run("bpe-distilled", 0, 2.8, val_bpb_greedy=2.7, val_bpb_as_trained=2.6, dropped_fraction=0.02)
    said = " ".join(remarks(method_results({"bpe-distilled": [taught], "sfe": [finished_run("sfe", 0, 2.0)]}, "")))
    assert "2.6000 bits per byte with those, 2.8000 with its own, sampled, and 2.7000 with its own, greedy" in said
    assert "(bpe-distilled 2.0%)" in said


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("compare") / "out"
    assert start(*ARGUMENTS, "--dataset", corpus, "--out", out, "--jobs", "2", *SMALL) == 0
    return out


def test_a_comparison_leaves_its_table_its_curves_and_its_page(finished):
    found = json.loads((finished / "table.json").read_text())
    assert set(found) == {"reference", "confidence", "methods", "pairs", "notes"}
    assert [line["name"] for line in found["methods"]] == ["uniform", "sfe"]
    assert all(line["seeds"] == [0, 1] for line in found["methods"])
    runs = {line["name"]: line["runs"] for line in found["methods"]}
    for name, of_method in runs.items():
        for run in of_method:
            assert run["summary"] == json.loads((finished / f"{name}-{run['seed']}" / "summary.json").read_text())
            assert run["curve"][-1]["val_bpb"] == run["summary"]["val_bpb"]
    (pair,) = found["pairs"]
    assert (pair["first"], pair["second"]) == ("sfe", "uniform")
    ends = [[run["summary"]["val_bpb"] for run in runs[name]] for name in ("uniform", "sfe")]
    assert pair["below"]["values"] == [uniform - sfe for uniform, sfe in zip(*ends, strict=True)]
    assert pair["below"]["seeds"] == found["methods"][1]["gain"]["seeds"] == [0, 1]
    assert pair["equal_flops"]["flops"] == [run["curve"][-1]["flops"] for run in runs["uniform"]]
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
    page = (finished / "report.html").read_text()
    assert page.count('<pre class="text"') == 6
    assert "http://" not in page
    tables = (finished / "table.md").read_text()
    assert tables.startswith("| variant |")
    assert "| `sfe` below `uniform` | " in tables
    assert "<td>sfe below uniform</td>" in page


def test_runs_made_elsewhere_count_as_if_made_here(finished, launched, corpus, tmp_path):
    common = ("--dataset", corpus, "--out", tmp_path / "out", "--jobs", "2", *SMALL)
    table_json = finished / "table.json"
    assert start("--estimators", "uniform", "sfe", "--seeds", "0", "1", "2", "--tables", table_json, *common) == 0
    assert launched == ["uniform-2", "sfe-2"]
    asked = compare_module.parse_compare([*ARGUMENTS, "--dataset", str(corpus), *map(str, SMALL)]).requested
    runs = {(name, 0): dataclasses.replace(asked[name], seed=0) for name in ("uniform", "sfe")}
    found = read_tables([table_json, table_json], runs)
    assert list(found) == [("uniform", 0), ("sfe", 0)]
    assert found["sfe", 0].summary == json.loads((finished / "sfe-0" / "summary.json").read_text())
    assert found["sfe", 0].curve == curve(finished / "sfe-0")
    with pytest.raises(ConfigError, match="other settings for rate"):
        read_tables([table_json], {("sfe", 0): dataclasses.replace(runs["sfe", 0], rate=0.3)})
    # A published text is the same wherever its file lies; another file may hold anything.
    elsewhere = tmp_path / "table.json"
    for theirs, ours in (("enwik8:old/enwik8.zip", "enwik8"), ("old/text.jsonl", "text.jsonl")):
        elsewhere.write_text(table_json.read_text().replace(json.dumps(str(corpus)), json.dumps(theirs)))
        asked = {("sfe", 0): dataclasses.replace(runs["sfe", 0], dataset=ours)}
        if ours == "enwik8":
            assert list(read_tables([elsewhere], asked)) == [("sfe", 0)]
        else:
            with pytest.raises(ConfigError, match="other settings for dataset"):
                read_tables([elsewhere], asked)
    with pytest.raises(ConfigError, match="is not the table"):
        read_tables([finished / "sfe-0" / "summary.json"], runs)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_tables([finished / "nothing.json"], runs)


def test_runs_made_elsewhere_are_told_from_those_of_a_byte_model(finished, launched, corpus, tmp_path):
    """A comparison with `entropy` trains an isotropic byte model, which must not be taken from the table."""
    values = json.loads((finished / "table.json").read_text())
    uniform, sfe = (method["runs"][0] for method in values["methods"])
    uniform["config"]["estimator"] = "isotropic"
    uniform["config"]["settings"] = {}
    sfe["config"]["estimator"] = "entropy"
    sfe["config"]["settings"] = {"entropy": {"model": "elsewhere/byte-model", "rule": "rise"}}
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"methods": [{"runs": [uniform]}]}))
    common = ("--seeds", "0", "--tables", path, "--dataset", corpus, "--jobs", "2", *SMALL)
    assert start("--estimators", "entropy", "isotropic", *common, "--out", tmp_path / "out") == 0
    assert launched == ["byte-model", "entropy-0"]
    path.write_text(json.dumps({"methods": [{"runs": [sfe]}]}))
    assert start("--estimators", "entropy", *common, "--out", tmp_path / "out") == 2
    launched.clear()
    assert start("--estimators", "entropy", *common, "--out", tmp_path / "new", "--entropy.rule", "rise") == 0
    assert launched == ["byte-model"]


def test_flops_count_up_to_a_validation_between_records(finished, tmp_path):
    """The training record covers 300 bytes, at a rate of 1 / 2. Only a validation covers the last 100 bytes, at 1 / 4."""
    folder = tmp_path / "run"
    shutil.copytree(finished / "sfe-0", folder)
    records = [
        {"step": 3, "bytes": 300, "rate": 0.5},
        {"step": 3, "bytes": 300, "val_bpb": 2.0, "val_rate": 0.75},
        {"step": 4, "bytes": 400, "val_bpb": 1.5, "val_rate": 0.25},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    half, quarter = (matrix_flops(load(folder).model, rate=rate).total for rate in (0.5, 0.25))
    assert curve(folder) == [(300 * half, 0.0003, 2.0), (300 * half + 100 * quarter, 0.0004, 1.5)]


def test_every_run_sees_the_same_data(finished):
    configs = [json.loads((finished / f"{name}-1" / "config.json").read_text()) for name in ("uniform", "sfe")]
    for key in ("estimator", "out", "settings"):
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


@pytest.fixture
def launched(monkeypatch):
    """Replaces runs with ones that finish at once. The list has the names of the started runs."""
    names = []

    def launch(job, core, logs):
        names.append(job.name)
        (job.folder / "summary.json").write_text("{}")
        (logs / f"{job.name}.log").write_text("done")
        job.process = subprocess.Popen(["true"])

    monkeypatch.setattr(jobs_module, "_launch", launch)
    monkeypatch.setattr(compare_module, "write_comparison", lambda *arguments: None)
    monkeypatch.setattr(
        compare_module, "read_finished", lambda folder, plugins: FinishedRun(read_config(folder), {}, [])
    )
    return names


def test_methods_and_seeds_added_later_are_all_that_is_done(launched, corpus, tmp_path, capsys):
    common = ("--dataset", corpus, "--out", tmp_path / "out", *SMALL)
    assert start("--estimators", "uniform", "sfe", "--seeds", "1", *common) == 0
    assert launched == ["uniform-1", "sfe-1"]
    launched.clear()
    assert start("--estimators", "gumbel", "uniform", "entropy", "sfe", "--seeds", "1", *common) == 0
    assert launched == ["byte-model", "gumbel-1", "entropy-1"]
    launched.clear()
    assert start("--estimators", "gumbel", "entropy", "--seeds", "0", "1", *common) == 0
    assert launched == ["gumbel-0", "entropy-0"]
    assert start("--estimators", "gumbel", "--seeds", "0", "1", *common) == 0
    assert launched == ["gumbel-0", "entropy-0"]
    said = " ".join(capsys.readouterr().err.split())
    assert "left out, since nothing here asks for them: sfe-1, uniform-1" in said
    assert said.endswith("nothing here asks for them: entropy-0, entropy-1, sfe-1, uniform-1")


def test_an_unfinished_run_goes_on_with_the_cores_it_gets(launched, corpus, tmp_path):
    """Two jobs get a core each; one job leaves the number of devices unset. Resume from one to two jobs, and back."""
    common = SMALL[: SMALL.index("--devices")] + SMALL[SMALL.index("--devices") + 2 :]
    given = ("--estimators", "uniform", "--seeds", "0", "1", "--dataset", corpus, "--out", tmp_path, *common)
    for jobs, devices in (("1", None), ("2", 1), ("1", None)):
        assert start(*given, "--jobs", jobs) == 0
        assert read_config(tmp_path / "uniform-1").devices == devices
        (tmp_path / "uniform-1" / "summary.json").unlink()


def test_runs_side_by_side_share_no_mesh(tmp_path):
    common = ("--estimators", "uniform", "--seeds", "0", "--out", str(tmp_path))
    for mesh in (("--mesh.fsdp", "2"), ("--mesh.data", "2"), ("--mesh.tensor", "2")):
        assert runs_of(compare_module.parse_compare([*common, *mesh, "--jobs", "1"]))
        with pytest.raises(ConfigError, match="its mesh needs 2 devices, and each of --jobs 2 has one"):
            runs_of(compare_module.parse_compare([*common, *mesh, "--jobs", "2"]))


def test_settings_are_checked_for_what_is_compared(launched, corpus, tmp_path, capsys):
    """Returns cannot be centred in a batch of one, which does not concern uniform boundaries; a policy that starts at .2 cannot
    have a cap of 1, and uniform boundaries have no policy."""
    common = ("--dataset", corpus, "--out", tmp_path / "out", *SMALL)
    assert start("--estimators", "uniform", "--seeds", "0", *common, "--batch", "1") == 0
    assert start("--estimators", "uniform", "sfe", "--seeds", "0", *common, "--batch", "1") == 2
    assert "use a larger --batch" in " ".join(capsys.readouterr().err.split())
    assert start("--estimators", "uniform", "sfe", "--seeds", "0", *common, "--policy.cap", "1") == 2
    assert "raise --policy.cap" in " ".join(capsys.readouterr().err.split())
    assert start("--estimators", "uniform", "--seeds", "0", *common, "--policy.cap", "1") == 2
    assert "which was not chosen" in " ".join(capsys.readouterr().err.split())


def test_a_second_interrupt_waits_for_no_checkpoint(tmp_path, monkeypatch):
    """Of a run that takes its time over one, as of one that has just been started."""

    class Slow(subprocess.Popen):
        told = ()
        _child_created = False

        def __init__(self):
            """Without a process."""

        def send_signal(self, sig):
            # Ignored until all have been told.
            os.kill(os.getpid(), signal.SIGINT)
            self.told += (sig,)

        def wait(self, timeout: float | None = None) -> int:
            if self.told[-1] == signal.SIGTERM:
                os.kill(os.getpid(), signal.SIGINT)
            return 0

        def kill(self):
            self.told += (signal.SIGKILL,)

    slow = [Slow(), Slow()]
    jobs_module._stop(slow)
    assert [one.told for one in slow] == [(signal.SIGTERM, signal.SIGKILL)] * 2

    def popen(*_, **__):
        os.kill(os.getpid(), signal.SIGINT)
        return slow[0]

    monkeypatch.setattr(subprocess, "Popen", popen)
    job = jobs_module.Job("run", tmp_path)
    with pytest.raises(KeyboardInterrupt):
        jobs_module._launch(job, None, tmp_path)
    assert job.process is slow[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_comparison_stops_its_runs(tmp_path, number, monkeypatch):
    job = jobs_module.Job("run", tmp_path)
    started = []

    def launch(job, core, logs):
        started.append(job)
        job.process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        os.kill(os.getpid(), number)

    monkeypatch.setattr(jobs_module, "_launch", launch)
    before = signal.getsignal(number)
    with stop_signals(signal.default_int_handler), pytest.raises(KeyboardInterrupt):
        jobs_module.run_jobs([job], 1, tmp_path, Display(quiet=True))
    assert started[0].process.poll() == -signal.SIGTERM
    assert signal.getsignal(number) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--estimators", "sfe", "sfe"), "each seed once"),
        (("--estimators", "sfe", "--seed", "3"), "--seed is for single runs"),
        (("--estimators", "sfe", "--distributed.index", "0"), "--distributed.index is for single runs"),
        (("--estimators", "sfe", "--rate", "1.5"), "--rate"),
        (("--jobs", "0"), "--jobs must be a whole number from 1"),
        (("--pairs", "sfe:bpe"), "--pairs 'sfe:bpe' is not FIRST:SECOND"),
        (("--pairs", "sfe"), "--pairs 'sfe' is not FIRST:SECOND"),
        (("--pairs", "sfe:sfe"), "--pairs 'sfe:sfe' is not FIRST:SECOND"),
        (("--pairs", "sfe:hnet", "hnet:sfe"), "each pair once"),
    ],
)
def test_invalid_input_is_one_sentence(tmp_path, corpus, capsys, arguments, message):
    assert start(*arguments, "--dataset", corpus, "--out", tmp_path / "out") == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_other_settings_are_refused_where_runs_are(finished, corpus, capsys):
    assert start(*ARGUMENTS, "--dataset", corpus, "--out", finished, "--rate", "0.3", *SMALL) == 2
    assert "other settings for rate" in " ".join(capsys.readouterr().err.split())


def test_data_that_are_not_there_are_refused_before_anything_is_touched(tmp_path, capsys):
    missing = tmp_path / "none.jsonl"
    given = ("--seeds", "0", "1", "--dataset", str(missing), "--out", str(tmp_path / "out"))
    assert compare_module.main(["--estimators", "sfe", "uniform", *given]) == 2
    assert capsys.readouterr().err.count("none.jsonl") == 1
    assert not (tmp_path / "out").exists()
