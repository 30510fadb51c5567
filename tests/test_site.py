"""The site of the documentation: what it holds, that it builds without a warning, and that it needs nothing from elsewhere."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from documentation import picture
from documentation.check_site import main, problems
from tests.conftest import needs
from tests.documents import ROOT, pages
from unet.shading.characters import characters

PUBLIC = ("estimators", "estimators.testing", "unet", "unet.ops", "data")
"""Packages whose `__all__` is public."""
MODULES = {"estimators.equations", "unet.decoding.utf8"}
"""Public modules, shown whole."""


def shown() -> list[str]:
    """What the pages of the reference show, by its full name."""
    text = "\n".join(path.read_text() for path in sorted((ROOT / "docs/reference").glob("*.md")))
    return re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)


def test_every_public_name_is_in_the_reference_once():
    names = {
        f"{package}.{name}"
        for package in PUBLIC
        for name in importlib.import_module(package).__all__
        if not isinstance(getattr(importlib.import_module(package), name), type(sys))
    }
    assert sorted(shown()) == sorted(names | MODULES)


def test_every_public_name_says_what_it_is():
    griffe = needs("docs", "griffe")
    packages = {name: griffe.load(name, search_paths=[str(ROOT)]) for name in ("estimators", "unet", "data")}
    for name in shown():
        package, _, rest = name.partition(".")
        assert packages[package][rest].docstring, name


def in_navigation(entry: object) -> list[str]:
    """The pages of an entry of the navigation: a page, a list of entries, or a title with one of both."""
    if isinstance(entry, str):
        return [entry]
    inside = entry.values() if isinstance(entry, dict) else entry
    assert isinstance(inside, Iterable)
    return [page for one in inside for page in in_navigation(one)]


def test_every_page_is_in_the_navigation_once():
    config = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]
    there = [name.removeprefix("docs/") for name in pages() if name.startswith("docs/")]
    assert sorted(in_navigation(config["nav"])) == there


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    needs("docs", "zensical")
    folder = tmp_path_factory.mktemp("site")
    for name in ("docs", "documentation", "estimators", "unet", "data", "examples"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (*ROOT.glob("*.md"), ROOT / "zensical.toml"):
        shutil.copy(path, folder)
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


def test_the_site_holds_together_and_fetches_nothing(site):
    assert problems(site) == []
    assert len(list(site.rglob("*.html"))) > len(pages()) - 3


def test_every_public_name_has_an_anchor(site):
    text = "".join(path.read_text() for path in (site / "reference").glob("*.html"))
    for name in shown():
        assert f'id="{name}"' in text or name == "estimators.equations", name
    assert 'id="estimators.equations.policy_loss"' in text


def test_formulas_are_mathml(site):
    text = (site / "reference/equations.html").read_text()
    assert text.count("<math") > 60
    assert "\\frac" not in text
    assert "<math" in (site / "evaluation.html").read_text()


def test_a_formula_that_is_not_understood_is_refused():
    needs("docs", "latex2mathml")
    from documentation.mathml import mathml

    assert mathml(r"\(\log p\)").count("<mi>") == 2
    assert 'display="block"' in mathml(r"\[x\]")
    with pytest.raises(ValueError, match="no MathML for"):
        mathml(r"\(\nosuchcommand x\)")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('<img src="https://example.org/a.png">', ["index.html fetches https://example.org/a.png"]),
        ('<script src="//example.org/a.js"></script>', ["index.html fetches //example.org/a.js"]),
        ("<style>@import 'https://example.org/a.css';</style>", ["index.html fetches https://example.org/a.css"]),
        ('<p style="background: url(https://example.org/)">', ["index.html fetches https://example.org/"]),
        ('<a href="other.html">', ["index.html: other.html is not there"]),
        ('<a href="#b">', ["index.html: #b has no such anchor"]),
        ("with $q = $ <code>$x</code>", ["index.html shows a formula as it is written: with $q = $"]),
        ('<img src="a.png">', ["index.html: a.png is not there"]),
        ('<a href="#a">, <a href="https://example.org">, <a href="index.html#a">, <img src="data:,">', []),
    ],
)
def test_what_is_wrong_with_a_site_is_found(tmp_path, body, said, capsys):
    (tmp_path / "index.html").write_text(f'<p id="a">{body}')
    assert problems(tmp_path.resolve()) == said
    assert main([str(tmp_path)]) == bool(said)
    assert all(sentence in capsys.readouterr().err for sentence in said[:1])


def test_a_folder_without_a_site_is_refused(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "holds no site" in capsys.readouterr().err


def test_links_between_pages_beside_the_readme_lead_somewhere_in_the_site():
    needs("docs", "markdown")
    from documentation.root_pages import in_site

    assert in_site("docs/extending.md#check-it") == "extending.md#check-it"
    assert in_site("SECURITY.md") == "security.md"
    assert in_site("https://example.org/SECURITY.md") == "https://example.org/SECURITY.md"


def test_the_picture_shows_every_character_on_its_colour():
    text = "An <end> of a line & more, " * 4
    depth = np.array([character == " " for character in text], int)
    drawn = picture.svg(characters(np.frombuffer(text.encode(), np.uint8), depth * 0.9, depth), "a > b")
    root = ElementTree.fromstring(drawn)
    letters = [one.text or "" for one in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "".join(letters) == text.replace(" ", "")
    assert len(list(root.iter("{http://www.w3.org/2000/svg}rect"))) == 1 + len(text) + depth.sum()
    assert "script" not in drawn
    shown = ElementTree.parse(ROOT / "docs/boundaries.svg").getroot()
    assert "".join(one.text or "" for one in shown.iter("{http://www.w3.org/2000/svg}text")) == picture.TEXT.replace(
        " ", ""
    )
