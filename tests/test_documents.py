"""That the Python of README, the documentation and the notebooks runs, and that every command there is one that its own parser
understands. Some are run too."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import tomllib
from importlib.util import find_spec
from pathlib import Path

import jax
import pytest
import yaml

from documentation.cells import cells
from experiments.config.errors import ConfigError
from experiments.run import parse
from experiments.training.run_dir import prepare_new
from tests.compositions import registered
from tests.conftest import needs
from tests.documents import ROOT, blocks, check_statement, inline_commands, inline_flags, known_flags, pages, statements
from unet import (
    LlamaConfig,
    TokenModel,
    UNet,
    from_reference,
    save,
    save_blt,
    save_hnet,
    save_tokens,
    train_tokenizer,
)

OUTSIDE = ROOT / "tests" / "outside"
SHELL = ("", "sh")
LANGUAGES = {*SHELL, "python", "toml", "yaml", "text"}

NOT_RUN = {
    "docs/extending.md": "tests/test_outside.py runs each of these checks",
}
"""Pages with a block of Python that isn't run, and the reason that the page gives for it."""

SMALLER = {
    "docs/following.md": (
        (
            '["--dataset", "docs", "--steps", "20", "--evaluation.bytes", "4096", "--out", "runs/mine"]',
            '["--dataset", "small.jsonl", "--steps", "2", "--evaluation.bytes", "64", "--out", "runs/followed", *SMALL]',
        ),
    ),
    "docs/library.md": (
        ("UNetConfig(64, 4, 1, 4, 1, window=16)", "UNetConfig(64, 4, 1, 1, 1, window=16)"),
        ('["m2", ["T1m1", ["T2"], "m1T1"], "m2"]', '["m1", ["T1", ["T1"], "t1"], "m1"]'),
    ),
    "README.md": (("UNetConfig(64, 4, 1, 4, 1, window=16)", "UNetConfig(64, 4, 1, 1, 1, window=16)"),),
    "docs/generation.md": (("max_bytes=200", "max_bytes=20"),),
    "docs/blt.md": (("max_bytes=200", "max_bytes=4"),),
}
"""What is replaced in blocks before they are run, so that they take seconds."""

UNDERSTOOD: set[tuple[str, ...]] = set()

SMALL = (
    *("--unet.dim", "8", "--unet.heads", "2", "--unet.main-layers", "1", "--unet.window", "4", "--length", "16"),
    *("--batch", "4", "--devices", "1", "--buckets", "1", "--checkpoint.times", "1", "--evaluation.times", "1"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, golden) -> Path:
    """A folder with the runs, models and files that the pages speak of; published models are small ones of their layouts."""
    folder = tmp_path_factory.mktemp("documents")
    model = registered("sfe")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        for name in ("first", "mine"):
            prepare_new(parse(["--dataset", "docs", "--out", f"runs/{name}"]))
        for name in ("my-model", "runs/a"):
            Path(name).mkdir()
            save(model, Path(name))
        save_hnet(published("hnet_1stage", golden), "cartesia-ai/hnet_1stage_L", name="hnet_1stage_L")
        save_blt(published("blt", golden), "facebook/blt-1b")
        if find_spec("tokenizers"):
            save_tokens(small_llama(), "meta-llama/Llama-3.2-1B")
        Path("my-texts").mkdir()
        Path("small.jsonl").write_text("".join(f'{{"text": "A small document, number {n}."}}\n' for n in range(40)))
        Path("mine.toml").write_text('model = "tiny"\ndataset = "docs"\n')
        [study] = [one for one in blocks("docs/studies.md") if one.language == "toml"]
        Path("study.toml").write_text(study.text)
    return folder


def published(name: str, golden) -> UNet:
    """The small model of a published layout that a golden file holds."""
    content = golden(name)
    params = {key.removeprefix("param."): content[key] for key in content.files if key.startswith("param.")}
    return from_reference(json.loads(str(content["config"])), params)


def small_llama() -> TokenModel:
    """An untrained model of tokens in the layout of a Llama."""
    tokenizer = train_tokenizer([b"the cat sat on the mat; " * 20], 260)
    shape = LlamaConfig(dim=8, layers=1, heads=2, kv_heads=1, mlp_dim=16)
    return TokenModel(tokenizer, UNet(shape, None, key=jax.random.key(0), vocab=tokenizer.size))


@pytest.fixture
def there(folder, monkeypatch) -> Path:
    """That folder as the current one, with the package of `docs/extending.md` at hand."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(OUTSIDE))
    monkeypatch.setenv("MPLBACKEND", "agg")
    return folder


@pytest.mark.parametrize("page", pages())
def test_every_command_is_understood(page, there, monkeypatch):
    commands = [
        (str(block), words)
        for block in blocks(page)
        if block.language in SHELL and block.not_run is None
        for words in statements(block.text)
    ]
    commands += [(page, tuple(shlex.split(text))) for text in inline_commands(page)]
    for where, words in commands:
        # Several pages have the same command, and parsers are slow.
        if words in UNDERSTOOD:
            continue
        try:
            check_statement(words, monkeypatch)
            UNDERSTOOD.add(words)
        except ConfigError as error:
            # What is not installed here was understood.
            if "is not installed: pip install 'caesura-lm[" not in str(error):
                raise AssertionError(f"{where}: {shlex.join(words)}: {error}") from error
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{where}: {shlex.join(words)}: {type(error).__name__}: {error}") from error


NOT_OURS = {
    *("gpu-bind", "gpus-per-task", "ntasks-per-node", "signal"),  # SLURM's
    *("include_path", "model_args"),  # those of lm-evaluation-harness
    "logdir",  # TensorBoard's
    *("norm-router.start", "section.argument"),  # of the example in docs/extending.md
}
"""Flags in sentences that no command of this library has."""


def test_every_flag_in_a_sentence_is_that_of_a_command(capsys):
    known = known_flags(capsys)
    sections = {flag.split(".")[0] for flag in known if "." in flag}
    unknown = set()
    for page in pages():
        for flag, begins in inline_flags(page) if page not in ("CHANGELOG.md", "docs/changelog.md") else ():
            plain = {flag, flag.removeprefix("no-"), flag.replace(".no-", ".")}
            if not (plain & (known | sections) or (begins and any(one.startswith(flag) for one in known))):
                unknown.add(flag)
    assert unknown == NOT_OURS


@pytest.mark.parametrize("page", [page for page in pages() if any(one.language == "python" for one in blocks(page))])
def test_every_block_of_python_runs(page, there, capsys):
    if page == "docs/distillation.md":
        needs("bpe", "tokenizers")
    namespace: dict[str, object] = {"SMALL": SMALL}
    with jax.numpy_dtype_promotion("standard"):
        for block in blocks(page):
            if block.language == "python" and block.not_run is None:
                exec(compile(smaller(page, block.text), f"{ROOT / page}:{block.line}", "exec"), namespace)


def smaller(page: str, text: str) -> str:
    """The block with smaller sizes."""
    for old, new in SMALLER.get(page, ()):
        text = text.replace(old, new)
    return text


def test_what_is_made_smaller_is_there():
    for page, changes in SMALLER.items():
        for old, _ in changes:
            assert old in (ROOT / page).read_text(), (page, old)


def test_every_other_block_is_read():
    for page in pages():
        for block in blocks(page):
            assert block.language in LANGUAGES, str(block)
            if block.language == "toml":
                tomllib.loads(block.text)
            if block.language == "yaml":
                yaml.safe_load(block.text)


def test_blocks_that_are_not_run_say_why():
    said = {page: block.not_run for page in pages() for block in blocks(page) if block.not_run is not None}
    assert said == NOT_RUN


def test_every_file_the_readme_names_is_there():
    names = re.findall(r"`((?:estimators|tests|docs)/[\w/.]+)`|\]\(([\w./-]+)\)", (ROOT / "README.md").read_text())
    assert len(names) > 20
    for name in {one or other for one, other in names}:
        assert (ROOT / name).exists(), name


NOTEBOOKS = {
    "train-and-look": {"DATASET": "small.jsonl", "BYTES": 128, "FLAGS": [*SMALL, "--evaluation.bytes", "64"]},
    "your-own-estimator": {"STEPS": 2, "DIM": 16, "LAYERS": 1, "LENGTH": 32, "BATCH": 4, "CLAUSES": 1},
    "read-an-h-net": {"MAX_BYTES": 4, "TEXTS": ["One text.", "Another."]},
}
"""The notebooks, and values for variables of their first cell of code with which they take seconds."""


@pytest.mark.parametrize("name", sorted(NOTEBOOKS))
def test_the_notebooks_run(name, there, capsys):
    assert sorted(path.stem for path in (ROOT / "examples").glob("*.ipynb")) == sorted(NOTEBOOKS)
    namespace: dict[str, object] = {"display": lambda shown: shown._repr_html_()}
    code = [text for kind, text in cells(ROOT / f"examples/{name}.ipynb") if kind == "code"]
    with jax.numpy_dtype_promotion("standard"):
        for number, text in enumerate(code):
            exec(compile(text, f"{name}, cell {number}", "exec"), namespace)
            if number == 0:
                assert NOTEBOOKS[name].keys() <= namespace.keys()
                namespace |= NOTEBOOKS[name]


def test_the_notebooks_are_kept_without_outputs():
    for path in (ROOT / "examples").glob("*.ipynb"):
        notebook = json.loads(path.read_text())
        assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in notebook["cells"])


def test_the_forms_for_issues_are_read():
    forms = [path for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config"]
    assert len(forms) == 3
    for path in forms:
        form = yaml.safe_load(path.read_text())
        assert {"name", "description", "body"} <= form.keys()
        names = [part["id"] for part in form["body"] if part["type"] != "markdown"]
        assert len(set(names)) == len(names)
        assert all(part["attributes"] for part in form["body"])


def test_what_to_cite_has_years_and_numbers():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for paper in cited["references"]:
        [number] = [one["value"] for one in paper["identifiers"]]
        assert re.fullmatch(r"arXiv:\d{4}\.\d{5}", number)
        assert paper["year"] - 2000 - int(number[6:8]) in (0, 1)
        assert paper["title"]
        assert len(paper["authors"]) == len({tuple(author.values()) for author in paper["authors"]}) > 0


RUN_TOO = (
    "python -m experiments.runs runs/ --html runs.html",
    "python -m experiments.shade runs/a --file chapter.txt --out chapter.html chapter.png chapter.parquet",
)
"""Commands of the pages that are run, not only understood."""


def test_some_commands_are_run(there, capsysbinary):
    needs("parquet", "pyarrow")
    there.joinpath("chapter.txt").write_text("A chapter.\n\nIts end.")
    said = "\n".join((ROOT / page).read_text() for page in pages())
    for command in RUN_TOO:
        assert command in said
        name, *arguments = shlex.split(command.removeprefix("python -m experiments."))
        assert importlib.import_module(f"experiments.{name}").main(arguments) == 0, command
    assert {"runs.html", "chapter.html", "chapter.png", "chapter.parquet"} <= {path.name for path in there.iterdir()}


@pytest.mark.parametrize(
    "line",
    [
        "python -m experiments.shade runs/a --text a --nosuchflag",
        "python -m experiments.nosuchcommand",
        "caesura-generate",
        "pip install 'caesura-lm[nosuchextra]'",
        "pip install somethingelse",
        "make nosuchtarget",
        "rm -r runs/",
        "python -c 'import unet; unet.no_such_name()'",
    ],
)
def test_a_command_that_does_not_exist_is_found(line, there, monkeypatch, capsys):
    [words] = statements(line)
    with pytest.raises((AssertionError, AttributeError, ConfigError, ImportError, SystemExit)):
        check_statement(words, monkeypatch)


def test_blocks_and_statements_are_found(tmp_path):
    assert statements("A=1 python -m a \\\n  --b 'c d'  # e\n\ncat f | python -m g") == [
        ("python", "-m", "a", "--b", "c d"),
        ("cat", "f"),
        ("python", "-m", "g"),
    ]
    page = tmp_path / "page.md"
    page.write_text("a\n```python\nb\n```\n<!-- not run: c -->\n```sh\nd\n```\n")
    assert [(one.line, one.language, one.text, one.not_run) for one in blocks(str(page))] == [
        (2, "python", "b\n", None),
        (6, "sh", "d\n", "c"),
    ]
