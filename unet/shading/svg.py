"""Shaded texts as one SVG: a picture that follows light and dark pages, with its text as text."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

from unet.shading.characters import Character, clusters, from_right, visible
from unet.shading.html import classes, shades, tooltip

COLUMNS = 80
"""Columns of a line; a Chinese character or an emoji takes two."""
MOST_SIGNS = 20_000
"""Of each text that are drawn."""

_WIDTH, _HEIGHT, _MARGIN = 9, 24, 12
"""Of a column, a line, and around everything, in pixels."""
_BARS = (0, 2, 4, 6)
"""Widths of the line that marks a boundary, by depth."""

Line = list[tuple[int, Character]]
"""The characters of a line, each with its column."""


def picture(texts: Sequence[Sequence[Character]], notes: Sequence[str], *, bits: bool = False) -> str:
    """An SVG of texts, each below its note, shaded by the probability of a boundary or by `bits`. Hovering over a character shows
    what is known of it. Signs are laid out on a grid, those of lines that begin from right to left in that direction; letters
    that join, as in Arabic, are drawn apart."""
    parts, y = [], _MARGIN
    for text, note in zip(texts, notes, strict=True):
        signs = list(clusters(text))
        left_out = len(signs) - MOST_SIGNS
        note = note if left_out <= 0 else f"{note} (the first {MOST_SIGNS:,} of {len(signs):,} characters)"
        parts.append(f'<text class="note" x="{_MARGIN}" y="{y + 16}">{html.escape(visible(note))}</text>')
        y += _HEIGHT
        for line in _lines(signs[:MOST_SIGNS]):
            parts += _drawn(line, y)
            y += _HEIGHT
        y += _HEIGHT // 2
    width, height = 2 * _MARGIN + COLUMNS * _WIDTH, y + _MARGIN
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">\n'
        f'<style>{_style(bits)}</style>\n<rect class="paper" width="{width}" height="{height}"/>\n{body}\n</svg>\n'
    )


def _style(bits: bool) -> str:
    def coloured(dark: bool) -> str:
        paper, ink, quiet = ("#16181c", "#e8e8e8", "#999") if dark else ("#fff", "#000", "#666")
        none = "#unused{step}{{fill"
        rules = [none, ".c{step}{{fill"] if bits else [".p{step}{{fill", none]
        shaded = "\n".join(one for one in shades(*rules, dark=dark).splitlines() if not one.startswith("#unused"))
        return f".paper{{fill:{paper}}} text,.bar{{fill:{ink}}} .note{{fill:{quiet}}}\n{shaded}"

    return (
        'text{font:14px ui-monospace,"Noto Sans Mono","Noto Sans Mono CJK SC",monospace;text-anchor:middle;'
        "white-space:pre;pointer-events:none} .note{font:13px system-ui,sans-serif;text-anchor:start}\n"
        f".sign{{fill:none}} .bar{{fill-opacity:.7}}\n{coloured(False)}\n"
        f"@media (prefers-color-scheme: dark){{{coloured(True)}}}"
    )


def _lines(signs: Sequence[Character]) -> Iterator[Line]:
    line: Line = []
    column = 0
    for one in signs:
        width = _columns(one.text)
        if column + width > COLUMNS:
            yield line
            line, column = [], 0
        line.append((column, one))
        column += width
        if one.text == "\n":
            yield line
            line, column = [], 0
    if line:
        yield line


def _drawn(line: Line, y: int) -> Iterator[str]:
    backwards = _from_right(one.text for _, one in line)
    for column, one in line:
        width = _columns(one.text)
        column = COLUMNS - column - width if backwards else column
        x, size = _MARGIN + column * _WIDTH, width * _WIDTH
        names = " ".join(["sign", *classes(one)])
        yield (
            f'<rect class="{names}" x="{x}" y="{y}" width="{size}" height="{_HEIGHT - 2}" pointer-events="all">'
            f"<title>{html.escape(tooltip(one))}</title></rect>"
        )
        if one.depth:
            bar = _BARS[min(one.depth, 3)] // 2 + 1
            edge = x if backwards else x + size - bar
            yield f'<rect class="bar" x="{edge}" y="{y}" width="{bar}" height="{_HEIGHT - 2}"/>'
        if not one.text.isspace() or one.text == "\n":
            shown = "⏎" if one.text == "\n" else visible(one.text)
            yield f'<text x="{x + size / 2:g}" y="{y + 16}">{html.escape(shown)}</text>'


def _columns(text: str) -> int:
    wide = unicodedata.east_asian_width(text[0]) in "WF" or text[0] >= "\N{REGIONAL INDICATOR SYMBOL LETTER A}"
    return 2 if wide else 1


def _from_right(texts: Iterable[str]) -> bool:
    """Whether the first letter of a line belongs to a script that is written from right to left."""
    return next((way for text in texts if (way := from_right(text)) is not None), False)
