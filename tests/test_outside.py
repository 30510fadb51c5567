"""Somebody else's package: found by name, used in every command, and named in a sentence where something is wrong with it."""

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from estimators import Boundaries, Credit, ObjectiveInputs, WindowedPolicy
from estimators.lookup import settings_of
from estimators.registry import ESTIMATORS, configuration, sections_of
from estimators.settings import EstimatorConfig
from estimators.testing import Setup, check_chunker, check_constraints, check_estimator, check_reduction
from experiments.compare import parse_compare
from experiments.comparison.plan import run_folders, runs_of
from experiments.comparison.study import of_estimators
from experiments.config.errors import ConfigError, PluginError
from experiments.config.parts import KINDS, find
from experiments.config.plugins import trusted
from experiments.run import parse
from tests.test_run import SMALL
from tests.test_run import corpus as corpus
from tests.test_run import usual_promotion as usual_promotion
from tests.test_sharding import on_two_devices
from unet.files.saving import require_saveable

ROOT = Path(__file__).parent.parent
OUTSIDE = ROOT / "tests" / "outside"
FILES = sorted((OUTSIDE / "my_tokens").glob("*.py"))


@pytest.fixture
def outside(monkeypatch):
    """The package without its entry points: it can be imported, and nothing announces it."""
    monkeypatch.syspath_prepend(str(OUTSIDE))
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **chosen: [])


def commands(folder, path, *lines):
    """Commands of this library, one after another in a fresh process in another folder: their exit codes, and what they said."""
    script = """
import sys, importlib, json
for line in json.loads(sys.argv[1]):
    print("=", importlib.import_module("experiments." + line[0]).main(line[1:]), file=sys.stderr, flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps([list(map(str, line)) for line in lines])],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{path}", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        # What a model writes need not be UTF-8.
        errors="replace",
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [int(code) for code in re.findall(r"^= (\d)$", done.stderr, re.MULTILINE)], " ".join(done.stderr.split())


QUICK = (*SMALL, "--steps", "2", "--evaluation.times", "1", "--checkpoint.times", "1")


def test_each_example_is_short_and_shown_in_the_documentation():
    text = (ROOT / "docs" / "extending.md").read_text()
    for path in FILES:
        assert len(path.read_text().splitlines()) <= 60
        assert path.name == "__init__.py" or path.read_text() in text


def test_classes_named_by_module_work_in_one_command_after_another(corpus, tmp_path):
    package = tmp_path / "path"
    shutil.copytree(OUTSIDE / "my_tokens", package / "my_tokens")
    chosen = (
        *("--estimator", "my_tokens.router:NormRouter", "--norm-router.start", "0.5"),
        *("--sfe.reductions", "discount", "my_tokens.reduction:Standardise"),
        *("--constrain", "my_tokens.constraint:Numbers", "--numbers.longest", "4"),
        *("--chunker", "my_tokens.chunker:Gated", "--dataset", corpus, "--out", "run"),
    )
    assert commands(tmp_path, package, ("run", *chosen, *QUICK))[0] == [0]
    modules = ("--plugin", "my_tokens")
    codes, said = commands(
        tmp_path,
        package,
        ("generate", "run", "--max-bytes", "4"),
        ("run", "--resume", "--out", "run"),
        ("generate", "run", "--max-bytes", "4", *modules),
        ("run", "--resume", "--out", "run", *modules),
        ("export", "run", "--to", "mine", *modules),
    )
    assert codes == [2, 2, 0, 0, 0], said
    assert (
        "add --plugin my_tokens.chunker my_tokens.constraint my_tokens.reduction my_tokens.router if you trust them"
        in said
    )
    assert (
        'unet.load("mine", known=[my_tokens.router, my_tokens.chunker, my_tokens.constraint, my_tokens.reduction])'
        in said
    )
    assert "was made with my_tokens.router:NormRouter, which is not part of this library: add --plugin" in said
    assert "Traceback" not in said


def test_an_installed_package_is_a_full_citizen(corpus, tmp_path):
    given = ("--dataset", corpus, "--policy.window", "1", *QUICK)
    codes, said = commands(
        tmp_path,
        OUTSIDE,
        ("compare", "--estimators", "exploring", "norm", "--seeds", "0", "--out", "all", *given),
        ("export", "all/exploring-0", "--to", "mine"),
        ("run", "--estimator", "exploring", "--init", "mine", "--out", "more", *given),
        ("generate", "mine", "--max-bytes", "4"),
    )
    assert codes == [0, 0, 0, 0], said
    assert "`exploring` below `norm`" in said


def test_the_examples_keep_the_contract(outside):
    chunker, constraint, objective, reduction, router = (
        importlib.import_module(f"my_tokens.{name}")
        for name in ("chunker", "constraint", "objective", "reduction", "router")
    )
    check_estimator(router.NormRouter, dim=16)
    check_estimator(objective.ExploringConfig(), dim=16)
    check_chunker(chunker.Gated, dim=16)
    check_constraints(router.NormRouter, Setup(dim=16, constraints=(constraint.Numbers(4),)))
    check_reduction(reduction.Standardise, dim=16)


def test_the_example_reduction_is_of_the_batch_of_all_devices(outside):
    reduction = importlib.import_module("my_tokens.reduction").Standardise()
    keys = jax.random.split(jax.random.key(0))
    returns, mask = jax.random.normal(keys[0], (4, 5), jnp.float32), jax.random.uniform(keys[1], (4, 5)) < 0.8

    def advantages(returns, mask):
        boundaries = Boundaries(mask, returns, jax.nn.sigmoid(returns), mask, mask)
        inputs = ObjectiveInputs(boundaries, returns[..., None], returns, None, mask, mask)
        return reduction(Credit(returns, returns, jnp.zeros(()), None), inputs).returns

    here = advantages(returns, mask)
    np.testing.assert_allclose(on_two_devices(advantages, returns, mask), here, rtol=1e-5, atol=1e-6)


BROKEN = {
    "raises.py": "raise RuntimeError('broken on purpose')",
    "needs.py": "import a_package_that_nobody_has",
    "untyped.py": """
from estimators import UniformRouter
class Untyped(UniformRouter):
    def __init__(self, slope): super().__init__(0.2)
class Any(UniformRouter):
    def __init__(self, *slopes: float): super().__init__(0.2)
class Table(UniformRouter):
    def __init__(self, slopes: dict): super().__init__(0.2)
class Fails(UniformRouter):
    def __init__(self, target_rate: float): raise KeyError("fails on purpose")
class Data(UniformRouter):
    def __init__(self, target_rate: float, slope: float = 1.0): super().__init__(target_rate)
class Policy(Data): pass
class Lambda(Data): pass
class Either(UniformRouter):
    def __init__(self, slopes: int | str = 1): super().__init__(0.2)
class Late(UniformRouter):
    def __init__(self, slopes: "Never" = 1): super().__init__(0.2)
""",
    "configs.py": """
from dataclasses import dataclass
from estimators import EstimatorConfig, UniformRouter
class Plain(EstimatorConfig):
    width: float = 1.0
    def build(self, context): return None
@dataclass(frozen=True)
class Other(EstimatorConfig):
    def build(self, context): return UniformRouter(0.2)
@dataclass(frozen=True)
class Checks(EstimatorConfig):
    def check(self, rate, sequences): raise KeyError("checks on purpose")
    def build(self, context): return UniformRouter(0.2)
@dataclass(frozen=True)
class Half(EstimatorConfig):
    pass
""",
    "twins.py": """
from dataclasses import dataclass
from estimators.fixed import StrideConfig
@dataclass(frozen=True)
class OtherConfig(StrideConfig):
    section = "policy"
""",
}

WRONG = [
    (("--estimator", "sef"), "--estimator sef: did you mean sfe? There are", None),
    (("--estimator", "nowhere:Mine"), "there is no module nowhere", None),
    (("--estimator", "untyped:Mine"), "untyped has no Mine", None),
    (("--estimator", "estimators:Discount"), "the class Discount is no EstimatorConfig or", None),
    (("--estimator", "estimators:AbstractRouter"), "is abstract", None),
    (("--estimator", "os:getcwd"), "is no EstimatorConfig", None),
    (("--estimator", "needs:Mine"), "needs a_package_that_nobody_has, which is not installed", ModuleNotFoundError),
    (("--estimator", "raises:Mine"), "importing raises failed (RuntimeError: broken on purpose)", RuntimeError),
    (("--estimator", "untyped:Untyped"), "the argument slope of Untyped has no type", None),
    (("--estimator", "untyped:Any"), "takes any arguments", None),
    (("--estimator", "untyped:Table"), "slopes of Table can be no flag", None),
    (("--estimator", "untyped:Fails"), "--estimator untyped:Fails failed (KeyError", KeyError),
    (("--estimator", "untyped:Data"), "settings called data would hide --data of the run", None),
    (("--estimator", "untyped:Policy"), "the settings of --policy are called policy too", None),
    (("--estimator", "untyped:Lambda"), "lambda is a keyword of Python", None),
    (("--estimator", "untyped:Either"), "slopes of Either can be no flag", None),
    (("--estimator", "untyped:Late"), "the types of Late cannot be read (name 'Never' is not defined)", None),
    (("--estimator", "configs:Plain"), "width of the class Plain would be no setting: decorate the class", None),
    (
        ("--estimator", "configs:Other"),
        "--estimator configs:Other built a UniformRouter, not an AbstractEstimator",
        None,
    ),
    (("--estimator", "configs:Checks"), "--estimator configs:Checks failed (KeyError", KeyError),
    (("--estimator", "configs:Half"), "the class Half is abstract: it lacks build", None),
    (("--estimator", "configs:"), "--estimator configs:: there are bpe", None),
    (("--estimator", ":Mine"), "--estimator :Mine: there are bpe", None),
    (
        ("--model", "hnet-2stage-tiny", "--inner-estimators", "isotropic", "--isotropic.no-token-level"),
        "makes no tokens",
        None,
    ),
    (("--inner-estimators", "sef"), "--estimator sef: did you mean sfe?", None),
    (("--chunker", "estimators:UniformRouter"), "the class UniformRouter is no ChunkerConfig or", None),
    (("--pool", "larst"), "--pool larst: did you mean last?", None),
    (("--sfe.reductions", "discout"), "--sfe.reductions discout: did you mean discount?", None),
    (("--hnet.routing", "direct"), "--hnet.routing is a setting of --estimator hnet, which was not chosen", None),
    (("--critic.loss-weight", "1"), "is a setting of --sfe.reductions critic, which was not chosen", None),
    (("--plugin", "raises"), "importing raises failed", RuntimeError),
]


@pytest.mark.parametrize(("arguments", "sentence", "cause"), WRONG, ids=lambda value: str(value)[:40])
def test_what_is_wrong_with_a_plugin_is_said_in_one_sentence(
    tmp_path, outside, monkeypatch, arguments, sentence, cause
):
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, text in BROKEN.items():
        (tmp_path / name).write_text(text)
        monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
    with pytest.raises(ConfigError) as refused:
        parse(arguments)
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)
    assert isinstance(refused.value, PluginError) == (cause is not None)
    assert cause is None or isinstance(refused.value.__cause__, cause)


def test_two_sections_of_one_name_are_refused(tmp_path, outside, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "twins.py").write_text(BROKEN["twins.py"])
    with pytest.raises(ConfigError, match="are called policy too"):
        parse(["--model", "hnet-2stage-tiny", "--estimator", "sfe", "--inner-estimators", "twins:OtherConfig"])


def test_a_name_that_two_packages_announce_is_refused(tmp_path, monkeypatch):
    for number in (1, 2):
        folder = tmp_path / str(number) / f"one_{number}-1.0.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: one-{number}\nVersion: 1.0\n")
        (folder / "entry_points.txt").write_text(f"[caesura.estimators]\ntwice = package_{number}:Mine\n")
        monkeypatch.syspath_prepend(str(folder.parent))
    with pytest.raises(ConfigError, match=r"announce it \(package_1:Mine and package_2:Mine\)"):
        parse(["--estimator", "twice"])


def test_an_outside_configuration_counts_what_its_sections_ask_for(outside):
    chosen = ("--estimator", "my_tokens.objective:ExploringConfig")
    assert parse([*chosen, "--sfe.samples", "4"]).samples == 4
    with pytest.raises(ConfigError, match="use a larger --batch"):
        parse([*chosen, "--batch", "1"])
    with pytest.raises(ConfigError, match=r"raise --policy\.cap"):
        parse([*chosen, "--rate", "0.001"])


def test_what_cannot_be_saved_is_refused_before_training():
    router = eqx.tree_at(lambda r: r.weight, WindowedPolicy(4), {"a": 1}, is_leaf=lambda leaf: leaf is None)
    with pytest.raises(ValueError, match="is a dict, which cannot be saved"):
        require_saveable(router)


def test_a_comparison_names_classes_by_module(outside, tmp_path):
    names = ("my_tokens.router:NormRouter", "uniform")
    plan = parse_compare(["--estimators", *names, "--pairs", f"{names[0]}:uniform", "--out", str(tmp_path)])
    assert plan.pairs == (names,)
    assert [run.run_dir.name for run in runs_of(plan)[1].values()][:2] == ["NormRouter-0", "uniform-0"]
    twins = run_folders(of_estimators((names[0], "other:NormRouter")))
    assert twins[names[0]] == "my_tokens.router.NormRouter"
    assert trusted(plan.requested[names[0]]) == ("my_tokens.router",)


def test_nothing_is_imported_because_a_file_names_it(tmp_path, outside, monkeypatch):
    from experiments.config.files import from_values, to_json
    from experiments.config.presets import PRESETS

    (tmp_path / "evil.py").write_text("raise SystemError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    values = json.loads(to_json(PRESETS["tiny"]))
    for field in ("estimator", "chunker", "pool"):
        with pytest.raises(ConfigError, match="was made with evil:Mine"):
            from_values({**values, field: "evil:Mine"}, "config.json")
    with pytest.raises(ConfigError, match="was made with evil:Mine"):
        from_values({**values, "inner_estimators": ["evil:Mine"]}, "config.json")


def test_every_setting_has_a_help_text_and_the_house_is_short():
    for kind in KINDS:
        for name in kind.house:
            part = find(kind, name)
            assert all(setting.help for setting in settings_of(part)), name
    for name in ESTIMATORS.house:
        part = find(ESTIMATORS, name)
        defaults = {one.name: one.default for one in settings_of(part)}
        shared = {key: cls() for key, cls in sections_of(part).items()}
        assert isinstance(configuration(part, defaults, shared), EstimatorConfig)


def test_experiments_and_unet_name_no_estimator():
    """But for words that mean something else there: columns, metrics, kinds of entropy, sources of tokenizers."""
    other_meanings = {"entropy", "uniform", "characters", "whitespace", "spacelike", "stride", "bpe"}
    names = set(ESTIMATORS.house) - other_meanings
    found = [
        (path.relative_to(ROOT).as_posix(), node.value)
        for package in ("experiments", "unet")
        for path in sorted((ROOT / package).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in names
    ]
    assert found == []
    text = "".join(path.read_text() for path in (ROOT / "experiments").rglob("*.py"))
    assert not re.search(r"estimator (==|!=) \"|estimator (not )?in \(|estimator\.startswith", text)


def test_help_has_the_flags_of_what_is_chosen_and_no_others(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for arguments in ((), ("--estimator", "hnet"), ("--estimator", "bpe-distilled")):
        with pytest.raises(SystemExit):
            parse([*arguments, "--help"])
        text = capsys.readouterr().out
        assert len(text.splitlines()) < 165
        assert ("--hnet.routing" in text) == ("hnet" in arguments)
        assert ("--policy.window" in text) == ("hnet" not in arguments)
    with pytest.raises(SystemExit):
        parse(["--help-all"])
    assert "--hnet.routing" in capsys.readouterr().out
