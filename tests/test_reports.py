"""Reports: where texts begin, what is marked, and pictures that follow light and dark pages."""

import re

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments.comparison.comparison import columns
from experiments.comparison.page import curves_figure, html_table, same_texts
from experiments.reporting.display import Display
from experiments.reporting.pictures import _printable, boundaries_picture, inline_svg
from experiments.reporting.plots import OfClass, by_class, token_lengths, tokens_figure
from experiments.reporting.report import html_page
from experiments.reporting.shading import readable
from tests.chromium import Chromium, find_chromium
from unet.shading.characters import Character, characters
from unet.shading.html import fragment


def text(content, ends=(), bits=2.0):
    """The characters of a text, with tokens that end after the bytes at these places."""
    values = np.frombuffer(content.encode() if isinstance(content, str) else content, np.uint8)
    depth = np.isin(np.arange(len(values)), ends).astype(np.int64)
    return characters(values, np.full(len(values), 0.25), depth, np.full(len(values), bits))


@pytest.mark.parametrize(
    ("content", "beginning"),
    [
        ("gument of a call", "of a call"),
        ("x\n\n  of a call", "of a call"),
        (b"\xfeA document", "▪A document"),
        (b"nt ends.\xfeA document", "▪A document"),
        ("漢字かな交じり文".encode()[1:], "字かな交じり文"),
        ("nospaces", "nospaces"),
        ("", ""),
    ],
)
def test_shown_texts_begin_with_a_document_a_word_or_a_character(content, beginning):
    assert "".join(one.text for one in readable(text(content))) == beginning


def test_shown_texts_end_with_a_word_where_they_are_cut():
    assert "".join(one.text for one in readable(text("gument of a call"), 8)) == "of a "
    assert "".join(one.text for one in readable(text("gument of a call"), 9)) == "of a call"


def test_texts_on_a_terminal_are_not_glued_together(capsys):
    Display().sample([text("the argument"), text("the end")])
    written = capsys.readouterr().err
    assert "the argument\n\nthe end\n" in written


def test_lengths_of_tokens_leave_out_those_that_may_be_cut():
    # Tokens of 2, 3, 1 and 4 bytes, the first and the last of which may be longer.
    assert token_lengths([text("abcdefghij", (1, 4, 5))]).tolist() == [3, 1]
    assert token_lengths([text("ab"), text("")]).tolist() == []


def test_classes_of_bytes_have_their_share_bits_and_ends():
    found = by_class([text("ab 1é\n", (1, 2, 5))])
    assert found == {
        "letter": OfClass(2 / 7, 2.0, 0.5),
        "digit": OfClass(1 / 7, 2.0, 0.0),
        "space": OfClass(2 / 7, 2.0, 0.5),
        "UTF-8": OfClass(2 / 7, 2.0, 0.5),
    }
    assert by_class([]) == {}
    assert tokens_figure([]).axes


def test_pictures_of_pages_have_the_pages_colours_and_no_names_twice():
    figures = [Figure(), Figure()]
    for figure in figures:
        axes = figure.subplots()
        axes.plot([1, 2], [1, 2], marker="o", color="#c0392b", label="漢 & $")
        axes.axhline(1, color="#333333")
        axes.legend(frameon=False)
    both = "".join(inline_svg(figure, f'picture {number} "<&') for number, figure in enumerate(figures))
    assert both.count("<svg") == 2
    assert both.count("currentColor") > 20
    for absent in ("http:", "https:", "#000000", "#333333", "#ffffff", "#010203", "xlink"):
        assert absent not in both
    assert "漢" in both
    names = re.findall(r'\bid="([^"]*)"', both)
    assert len(names) == len(set(names))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]*)', both)) <= set(names)


def test_signs_without_a_font_are_said_and_are_no_boxes():
    # A private character, which no font has; matplotlib would warn of it.
    assert _printable("\U0010fffd") == "·"
    assert (_printable("a"), _printable("é"), _printable("$")) == ("a", "é", "\\$")
    assert boundaries_picture([text("a漢\U0001f600\n")]).startswith(b"\x89PNG")


def test_differences_between_methods_are_marked():
    first, second = text("a bc", (1, 3)), text("a bc", (0, 3))
    marked = re.findall(r'class="([^"]*)" title="[^"]*">(.)<', fragment([second], ["note"], [first]))
    assert [sign for names, sign in marked if "d" in names.split()] == ["a", " "]
    assert ' d"' not in fragment([second], ["note"])
    page = same_texts({"one": [first], "reference": [second]}, "reference")
    assert page.index("Text 1, reference<") < page.index("Text 1, one: 2 boundaries other than in reference")
    assert "No run" in same_texts({}, "reference")
    # Signs are counted, not the characters that they are made of.
    accents = {"one": [text("ae\u0301", (1, 2))], "reference": [text("ae\u0301", (2,))]}
    assert "one: 0 boundaries other" in same_texts(accents, "reference")


def test_curves_are_compared_with_the_reference_seed_by_seed():
    def curve(*bpb):
        return [(1e9 * x, float(x), float(y)) for x, y in enumerate(bpb, start=1)]

    curves = {
        "reference": {0: curve(3, 2, 1), 1: curve(4, 3, 2), 2: curve(9, 9, 9)},
        "other": {1: curve(3.5, 2, 1.5), 0: curve(2.5, 1.5, 0.5)},
    }
    _, _, differences = curves_figure(curves, "reference").axes
    drawn, zero = differences.get_lines()
    assert np.asarray(drawn.get_ydata()).tolist() == [-0.5, -0.75, -0.5]
    assert np.all(np.asarray(zero.get_ydata()) == 0)
    (band,) = differences.collections
    extent = band.get_datalim(differences.transData)
    # The standard error of -0.5 and -1 is a quarter.
    assert (extent.y0, extent.y1) == pytest.approx((-1.0, -0.5))
    assert len(curves_figure({"only": curves["other"]}, None).axes) == 2
    assert len(curves_figure({"none": {}}, "none").axes) == 2


@pytest.mark.skipif(find_chromium() is None, reason="Chromium is not installed")
def test_the_table_of_a_comparison_fits_a_window_of_1200_pixels(tmp_path):
    row = dict.fromkeys(columns("uniform"), "0.000 ± 0.000")
    row |= {"name": "`sfe-offpolicy`", "gain": "+0.0331 [+0.0254, +0.0407] ≈", "parameters": "346,370,368"}
    (tmp_path / "page.html").write_text(html_page("A comparison", html_table(columns("uniform"), [row] * 3)))
    browser = Chromium(str(find_chromium()), tmp_path / "chromium")
    try:
        for width in (1200, 360):
            browser.show_as(width=width)
            browser.open((tmp_path / "page.html").as_uri())
            assert browser.run("document.documentElement.scrollWidth") <= width
        browser.show_as(width=1200)
        assert (
            browser.run(
                "(({ scrollWidth, clientWidth }) => scrollWidth - clientWidth)(document.querySelector('.wide'))"
            )
            == 0
        )
    finally:
        browser.close()


def test_a_character_alone_is_a_text():
    assert readable([Character("a", 0.5, 0)]) == [Character("a", 0.5, 0)]
