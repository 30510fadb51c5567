"""That every command and every block of code in README and the documentation works."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from experiments.run import parse
from experiments.training.run_dir import prepare_new
from tests.documents import ROOT, blocks, check_statement, inline_commands, pages, statements

OUTSIDE = ROOT / "tests" / "outside"
LANGUAGES = {"", "sh", "python", "toml", "yaml", "text"}
SHELL = ("", "sh")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the runs and files that the pages speak of."""
    folder = tmp_path_factory.mktemp("documents")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        for name in ("first", "mine"):
            prepare_new(parse(["--dataset", "docs", "--out", f"runs/{name}"]))
        Path("my-texts").mkdir()
        Path("mine.toml").write_text('model = "tiny"\ndataset = "docs"\n')
        [study] = [one for one in blocks("docs/studies.md") if one.language == "toml"]
        Path("study.toml").write_text(study.text)
    return folder


@pytest.mark.parametrize("page", pages())
def test_every_command_is_understood(page, folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(OUTSIDE))
    lines = [
        (str(block), words) for block in blocks(page) if block.language in SHELL for words in statements(block.text)
    ]
    lines += [(page, shlex.split(text)) for text in inline_commands(page)]
    bad = []
    for where, words in lines:
        try:
            check_statement(words, monkeypatch)
        except (Exception, SystemExit) as error:
            bad.append(f"{where}: {shlex.join(words)}: {type(error).__name__} {error}")
    assert not bad, "\n".join(bad)
