"""Studies: files of named variants, as one command trains and compares them."""

import json
import shutil

import pytest

from experiments import compare as compare_module
from experiments.compare import parse_compare
from experiments.comparison.plan import runs_of
from experiments.comparison.study import shipped
from experiments.config.errors import ConfigError
from experiments.config.settings import transformer_shape
from experiments.training.run_dir import differing
from tests.test_compare import launched as launched
from tests.test_compare import start
from tests.test_run import SMALL
from tests.test_run import corpus as corpus
from tests.test_run import finished as finished
from tests.test_run import usual_promotion as usual_promotion
from unet.hnet import HNetConfig

STUDY = """
title = "Discounts & <windows>"
seeds = [3, 4]
jobs = 2
reference = "far"
[settings]
model = "tiny"
discount.factor = 0.5
steps = 9
[variants.far]
discount.factor = 1
published = { val_bpb = 1.5, val_rate = 0.25 }
[variants."no memory, $x"]
policy = { window = 3 }
optimizer.learning-rate = 1e-3
[variants.uniform]
estimator = "uniform"
"""


def written(tmp_path, text, name="study.toml"):
    path = tmp_path / name
    path.write_text(text)
    return path


def plan(path, *flags):
    return parse_compare([str(path), *map(str, flags)])


def test_variants_are_presets_settings_and_flags_in_that_order(tmp_path):
    found = plan(written(tmp_path, STUDY), "--rate", "0.3", "--early-exit.weight", "0.2", "--bytes", "12e6")
    far, memory, uniform = (found.requested[name] for name in found.study.names)
    assert [run.settings["discount"]["factor"] for run in (far, memory)] == [1.0, 0.5]
    assert (memory.settings["policy"]["window"], far.settings["policy"]["window"]) == (3, 0)
    assert memory.optimizer.learning_rate == 1e-3
    # Settings and flags of parts that uniform boundaries do not have are no concern of theirs.
    assert (uniform.estimator, uniform.settings) == ("uniform", {})
    assert {run.rate for run in (far, memory, uniform)} == {0.3}
    assert far.settings["early_exit"]["weight"] == 0.2
    assert (far.steps, far.bytes) == (None, 12_000_000)
    assert (found.seeds, found.jobs, found.reference) == ((3, 4), 2, "far")
    assert found.pairs == (("no memory, $x", "far"), ("uniform", "far"))
    assert [run.run_dir.name for run in runs_of(found)[1].values()][:3] == ["far-3", "no-memory---x-3", "uniform-3"]
    assert plan(tmp_path / "study.toml", "--variants", "uniform", "far", "--seeds", "1").seeds == (1,)


def test_yaml_and_json_say_the_same(tmp_path):
    text = 'variants:\n  a: {optimizer: {learning_rate: 1e-3}, bytes: 2e6}\n  b: {chunker: "None", rate: 0.25}\n'
    values = {"variants": {"a": {"optimizer": {"learning-rate": 1e-3}, "bytes": 2e6}, "b": {"rate": 0.25}}}
    one = plan(written(tmp_path, text, "one.yaml")).requested
    other = plan(written(tmp_path, json.dumps(values), "two.json")).requested
    assert one == other
    assert one["a"].bytes == 2_000_000


WRONG = [
    ("variants = 3", "variants is no table of variants"),
    ("sedes = [1]\n[variants.a]", "there is no setting sedes (did you mean seeds?)"),
    ("seeds = [-1]\n[variants.a]", "seeds must be a whole number"),
    ("seeds = [1, 1]\n[variants.a]", "seeds names each seed once"),
    ("jobs = 0\n[variants.a]", "jobs must be a whole number from 1"),
    ("reference = 'b'\n[variants.a]", "reference: 'b' is none of a"),
    ("pairs = ['a:b']\n[variants.a]", "'a:b' is not FIRST:SECOND"),
    ("[variants]\na = 3", "variant a: it is no table of settings"),
    ("[variants.a]\nlearning_rate = 3", "variant a: there is no setting learning_rate"),
    ("[variants.a]\nrat = 0.3", "variant a: there is no setting rat (did you mean rate?)"),
    ("[variants.a]\nrate = 'x'", "variant a: rate: 'x' is no number"),
    ("[variants.a]\nrate = 3", "variant a: --rate must be a number"),
    ("[variants.a]\noptimizer.learning-rat = 3", "variant a: optimizer: there is no setting learning_rat (did you"),
    ("[variants.a]\npolicy.windw = 3", "variant a: --policy: there is no setting windw (did you mean window?)"),
    ("[variants.a]\nsfe.reductions = ['discont']", "variant a: --sfe.reductions discont: did you mean discount?"),
    (
        "[variants.a]\nhnet.ratio-weight = 3",
        "variant a: hnet: these are settings of --estimator hnet, which was not chosen",
    ),
    (
        "settings.hnet.ratio-weight = 3\n[variants.a]",
        "hnet: these are settings of --estimator hnet, which was not chosen",
    ),
    ("[variants.a]\nhmet.ratio-weight = 3", "variant a: there is no setting hmet: nothing that is chosen has"),
    ("[variants.a]\nestimator = 'sef'", "variant a: --estimator sef: did you mean sfe?"),
    ("[variants.a]\nestimator = 'evil:Mine'", "variant a: it was made with evil:Mine"),
    ("[variants.a]\nmodel = '19M'", "variant a: model: '19M' is none of"),
    ("[variants.a]\nseed = 3", "variant a: seed: a study has seeds"),
    ("[variants.a]\nplugin = ['os']", "variant a: plugin: what may be imported is for the command line"),
    ("[variants.a]\nrate = 0.3\n[variants.b]\nrate = 0.3", "variant b: it is the same run as a"),
    ("[variants.'a b']\nrate = 0.3\n[variants.'a/b']", "variant a/b: its runs would have the folders of a b's"),
    ("[variants.byte-model]", "variant byte-model: this name is taken"),
    ("[variants.'a|b']", "a name has 1 to 80 characters"),
    ("[variants.a]\nruns = ['x']\nrate = 0.3", "variant a: rate: the runs are finished already"),
    ("[variants.a]\nruns = []", "variant a: runs is no list"),
    ("[variants.a]\npublished.bits = 1", "variant a: published.bits: there is no such metric"),
    ("[variants.a]\npublished.val_bpb = 'x'", "variant a: published.val_bpb: 'x' is no number"),
    ("[variants.a]\nrate-x = 1\nrate_x = 2", "variant a: rate_x is there twice"),
    ("[variants.a", "Expected"),
]


@pytest.fixture
def untrained(monkeypatch):
    """Fails where anything would be trained."""
    monkeypatch.setattr(compare_module, "run_jobs", None)


@pytest.mark.parametrize(("text", "sentence"), WRONG)
def test_what_is_wrong_with_a_study_is_one_sentence_and_nothing_is_touched(untrained, tmp_path, capsys, text, sentence):
    path = written(tmp_path, text)
    assert start(path, "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert str(path) in said
    assert sentence in said
    assert [one.name for one in tmp_path.iterdir()] == ["study.toml"]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--discount.factor", "0.9"], "--discount.factor is what makes the variant far of"),
        (["--estimator", "uniform"], "--estimator is for single runs"),
        (["--variants", "near"], "--variants 'near' is none of far, "),
        (["--reference", "near"], "--reference 'near' is none of far, "),
        (["--hnet.ratio-weight", "1"], "which was not chosen"),
        (["--estimators", "sfe"], "use one"),
        (["--runs", "far=x"], "there is a variant of that name"),
        (["--runs", "x"], "x holds no finished run"),
    ],
)
def test_flags_that_do_not_go_with_a_study_are_refused(untrained, tmp_path, capsys, flags, sentence):
    assert start(written(tmp_path, STUDY), "--out", tmp_path / "out", *flags) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_flag_that_is_another_word_for_what_makes_a_variant_is_refused(tmp_path):
    path = written(
        tmp_path, "[variants.a]\nsteps = 3\n[variants.b]\nestimator = 'isotropic'\nisotropic.token_level = true"
    )
    with pytest.raises(ConfigError, match="--bytes is what makes the variant a of"):
        plan(path, "--bytes", "1e6")
    with pytest.raises(ConfigError, match=r"--isotropic\.no-token-level is what makes the variant b of"):
        plan(path, "--isotropic.no-token-level")


def test_outside_classes_are_variants_where_the_command_line_names_their_module(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend("tests/outside")
    path = written(tmp_path, "[variants.a]\nestimator = 'my_tokens.router:NormRouter'\nnorm_router.start = 0.5")
    with pytest.raises(ConfigError, match=r"variant a: it was made with my_tokens\.router:NormRouter"):
        plan(path)
    run = plan(path, "--plugin", "my_tokens.router").requested["a"]
    assert run.settings["norm_router"]["start"] == 0.5


def test_every_study_that_comes_with_the_library_can_be_run():
    assert {"sfe-ablations", "aspect-ratio", "hnet-components", "hnet-encoders"} <= set(shipped())
    for name in shipped():
        found = plan(name)
        assert found.study.head.reference in found.requested
        assert found.out.name == name


def test_the_settings_of_the_papers_ablations():
    """A few of them as the papers have them, by what differs from the reference."""
    ablations = dict(plan("sfe-ablations").requested)
    whole = ablations.pop("all on")
    assert {name: differing(run, whole) for name, run in ablations.items()} == {
        "no discount": ["discount"],
        "no centring": ["batch_centre", "sfe"],
        "no early exit": ["early_exit", "sfe"],
        "no memory": ["policy"],
        "no rate target": ["capacity_slack", "sfe"],
    }
    shapes = [run.unet for run in plan("hnet-encoders").requested.values()]
    assert [one.layout for one in shapes if isinstance(one, HNetConfig)] == [
        *('["m4", ["T22"], "m4"]', '["m2T1", ["T22"], "T1m2"]', '["T1m2", ["T22"], "m2T1"]', '["T2", ["T22"], "T2"]')
    ]
    ratios = plan("aspect-ratio", "--model", "tiny").requested.values()
    assert [(run.model, transformer_shape(run).main_layers, 1 / run.rate) for run in ratios] == [
        ("tiny", layers, pytest.approx(layers)) for layers in (2, 4, 6)
    ]


def test_a_study_goes_on_where_it_was(launched, corpus, tmp_path):
    common = ("--dataset", corpus, "--out", tmp_path / "out", *SMALL)
    path = written(tmp_path, STUDY.replace("steps = 9", ""))
    assert start(path, "--variants", "far", "--seeds", "0", *common) == 0
    assert launched == ["far-0"]
    assert start(path, "--seeds", "0", *common) == 0
    assert launched == ["far-0", "no-memory---x-0", "uniform-0"]


def test_finished_runs_are_joined_by_their_paths(finished, tmp_path, capsys):
    """Alone, in a file and on the command line: one table, one page, nothing trained, nothing written in their folders."""
    before = sorted((path, path.stat().st_mtime_ns) for path in finished.rglob("*"))
    text = f"title = 'A & <b>'\n[variants.'$a']\nruns = ['{finished}']\npublished.val_bpb = 1.5\n"
    out = tmp_path / "out"
    assert start(written(tmp_path, text), "--runs", f"b={finished}", "--out", out) == 0
    table = json.loads((out / "table.json").read_text())
    summary = json.loads((finished / "summary.json").read_text())
    assert [(one["name"], one["val_bpb"]["mean"]) for one in table["methods"]] == [
        (name, summary["val_bpb"]) for name in ("$a", "b")
    ]
    assert table["methods"][0]["published"] == {"val_bpb": 1.5}
    assert [(pair["first"], pair["second"], pair["below"]["values"]) for pair in table["pairs"]] == [("b", "$a", [0.0])]
    page, said = (out / "report.html").read_text(), capsys.readouterr().err
    assert "A &amp; &lt;b&gt;" in page
    assert "Published numbers" in page
    assert f"| `$a` | {summary['val_bpb']:.3f} | 1.5 |" in said
    assert sorted((path, path.stat().st_mtime_ns) for path in finished.rglob("*")) == before
    assert sorted(path.name for path in out.iterdir()) == [
        "curves.png",
        "logs",
        "report.html",
        "table.json",
        "table.md",
    ]
    assert start("--runs", finished, finished, "--out", tmp_path / "other") == 2
    assert "are both of seed 0" in capsys.readouterr().err
    copy = tmp_path / "copy-1"
    shutil.copytree(finished, copy)
    settings = json.loads((copy / "config.json").read_text()) | {"seed": 1, "rate": 0.3}
    (copy / "config.json").write_text(json.dumps(settings))
    assert start("--runs", f"a={finished}", f"a={copy}", "--out", tmp_path / "other") == 2
    assert "would be seeds of one variant a, but have other settings for rate" in " ".join(
        capsys.readouterr().err.split()
    )
