"""Pictures: as files, and as parts of pages that follow light and dark."""

from __future__ import annotations

import functools
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import matplotlib
from matplotlib import font_manager
from matplotlib.artist import Artist
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.spines import Spine
from matplotlib.text import Text

from unet.shading.characters import Character, colour_of

COLUMNS, LINES = 96, 26
"""Size of a picture of shaded text, in characters."""

WIDE_FONTS = (
    *("Noto Sans Mono CJK SC", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC"),
    *("WenQuanYi Zen Hei Mono", "WenQuanYi Zen Hei", "PingFang SC", "Hiragino Sans", "Microsoft YaHei", "SimHei"),
    *("Arial Unicode MS", "Droid Sans Fallback", "Unifont", "DejaVu Sans", "Noto Sans Arabic", "Noto Sans Devanagari"),
)
"""Fonts, of which those that are installed draw what the usual one does not have."""

_INK = {"#000000", "#333333"}
_SENTINEL = "#010203"
_LACKING = "·"


def picture(figure: Figure) -> bytes:
    """A figure as a PNG."""
    buffer = io.BytesIO()
    with _any_sign(figure):
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


@contextmanager
def _any_sign(figure: Figure) -> Iterator[None]:
    """Draws with every font that is installed; what none of them has is a box, without a warning for each."""
    for text in figure.findobj(Text):
        if isinstance(text, Text) and text.get_fontfamily() == matplotlib.rcParams["font.family"]:
            text.set_fontfamily(["sans-serif", *_installed()])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        yield


def inline_svg(figure: Figure, label: str) -> str:
    """A figure as SVG for a page: what is black in it has the colour of the page's text, and there is nothing behind it. `label`
    says what is to be seen. The figure is not to be drawn again."""
    for artist in figure.findobj():
        _recolour(artist)
    buffer = io.StringIO()
    with _any_sign(figure), matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(buffer, format="svg", transparent=True)
    content = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    head, _, body = content[content.index("<svg") :].partition(">")
    size = re.search(r'viewBox="[^"]*"', head)
    # Names of elements that nothing refers to would be there twice on a page with two pictures.
    body = re.sub(r' id="[A-Za-z0-9.]+_[0-9]+"', "", body).replace("xlink:href", "href")
    body = body.replace(_SENTINEL, "currentColor")
    quoted = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return f'<svg class="picture" role="img" aria-label="{quoted}" {size[0] if size else ""}>{body}'


def _recolour(artist: Artist) -> None:
    """Mark what is drawn in ink."""
    if isinstance(artist, Text | Line2D) and to_hex(artist.get_color()) in _INK:
        artist.set_color(_SENTINEL)
    if isinstance(artist, Line2D):
        for get, put in (
            (artist.get_markeredgecolor, artist.set_markeredgecolor),
            (artist.get_markerfacecolor, artist.set_markerfacecolor),
        ):
            if to_hex(get()) in _INK:
                put(_SENTINEL)
    if isinstance(artist, Spine) and to_hex(artist.get_edgecolor()) in _INK:
        artist.set_edgecolor(_SENTINEL)


def boundaries_picture(shaded: Sequence[Sequence[Character]], title: str = "Held-out text") -> bytes:
    """A PNG of texts with the boundary probability of each character as its background colour."""
    lines = _wrapped(shaded)[:LINES]
    shown = [[(_printable(one.text), one) for one in line] for line in lines]
    lacking = any(sign == _LACKING != one.text and one.text.isprintable() for line in shown for sign, one in line)
    height = 0.24 * len(lines) + 0.45
    figure = Figure(figsize=(0.105 * COLUMNS + 0.3, height), dpi=140)
    axes = figure.add_axes((0.01, 0.08 / height, 0.98, 1 - 0.45 / height))
    axes.set_xlim(0, COLUMNS)
    axes.set_ylim(len(lines), 0)
    axes.axis("off")
    figure.suptitle(
        f"{title}: boundary probability at each character, blue 0, red 1; bars are boundaries"
        + (f"; {_LACKING} is what no font here can draw" if lacking else ""),
        fontsize=9,
        y=1 - 0.1 / height,
    )
    families = ["monospace", *_installed()]
    for y, line in enumerate(shown):
        for x, (sign, character) in enumerate(line):
            colour = tuple(channel / 255 for channel in colour_of(character.prob))
            axes.add_patch(Rectangle((x, y + 0.06), 1, 0.88, facecolor=colour, linewidth=0))
            if character.depth:
                axes.add_patch(Rectangle((x + 0.86, y + 0.06), 0.14, 0.88, facecolor="#333333", linewidth=0))
            axes.text(x + 0.45, y + 0.53, sign, ha="center", va="center", fontsize=8, family=families)
    return picture(figure)


def _wrapped(shaded: Sequence[Sequence[Character]]) -> list[list[Character]]:
    lines: list[list[Character]] = []
    for characters in shaded:
        line: list[Character] = []
        for character in characters:
            line.append(character)
            if character.text == "\n" or len(line) == COLUMNS:
                lines.append(line)
                line = []
        lines.append(line)
    return [line for line in lines if line]


def _printable(text: str) -> str:
    if text == "\n":
        return "↵"
    # Matplotlib interprets a dollar sign as the start of a formula.
    if text == "$":
        return "\\$"
    return text if text.isprintable() and _can_draw(text) else _LACKING


@functools.cache
def _can_draw(text: str) -> bool:
    """Whether a font that is used has each of the characters. Those that lack a glyph would be boxes."""
    return all(any(font.get_char_index(ord(one)) for font in _fonts()) for one in text)


@functools.cache
def _fonts() -> list[FT2Font]:
    return [font_manager.get_font(font_manager.findfont(name)) for name in ("monospace", *_installed())]


@functools.cache
def _installed() -> list[str]:
    known = set(font_manager.get_font_names())
    return [name for name in WIDE_FONTS if name in known]
