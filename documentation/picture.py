"""The picture in README, drawn from what a model says: `make run`, then `python -m documentation.picture runs/first`."""

from __future__ import annotations

import html
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

import unet
from unet.files.saving import write_atomically
from unet.shading.characters import Character, colour_of, visible

TEXT = (
    "A caesura is a pause in a line of verse, where one phrase ends and another begins. "
    "Nobody told this model what a word is: it reads bytes, and is paid only for predicting the next one. "
    "Each line at the right of a character is the end of a token that it chose."
)
"""English that no model was trained on."""

COLUMNS = 68
WIDTH, HEIGHT, SIZE, MARGIN = 11.0, 27.0, 18, 14.0
"""Of a character, of a line, of the letters, and around all, in units of the picture."""


def lines_of(shown: Sequence[Character], columns: int) -> list[list[Character]]:
    """The characters in lines of at most so many, broken after spaces where there are any."""
    lines: list[list[Character]] = [[]]
    for one in shown:
        if len(lines[-1]) == columns:
            last = max((place for place, other in enumerate(lines[-1], 1) if other.text == " "), default=columns)
            lines[-1:] = [lines[-1][:last], lines[-1][last:]]
        lines[-1].append(one)
    return lines


def svg(shown: Sequence[Character], title: str) -> str:
    """The characters on their colours. Without a style sheet or a script, so that every page may show it."""
    lines = lines_of(shown, COLUMNS)
    width, height = COLUMNS * WIDTH + 2 * MARGIN, len(lines) * HEIGHT + 2 * MARGIN
    drawn = [
        part
        for row, line in enumerate(lines)
        for column, one in enumerate(line)
        for part in _character(one, MARGIN + column * WIDTH, MARGIN + row * HEIGHT)
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" '
        f'role="img" font-family="ui-monospace, monospace" font-size="{SIZE}" text-anchor="middle">\n'
        f"<title>{html.escape(title)}</title>\n"
        f'<rect width="100%" height="100%" rx="6" fill="#ffffff"/>\n' + "\n".join(drawn) + "\n</svg>\n"
    )


def _character(one: Character, x: float, y: float) -> list[str]:
    red, green, blue = colour_of(one.prob)
    parts = [
        f'<rect x="{x:g}" y="{y:g}" width="{WIDTH:g}" height="{HEIGHT - 3:g}" fill="#{red:02x}{green:02x}{blue:02x}"/>'
    ]
    if one.text.strip():
        text = html.escape(visible(one.text))
        parts.append(f'<text x="{x + WIDTH / 2:g}" y="{y + 17:g}" fill="#000000">{text}</text>')
    if one.depth:
        parts.append(f'<rect x="{x + WIDTH - 2:g}" y="{y:g}" width="2" height="{HEIGHT - 3:g}" fill="#404040"/>')
    return parts


def main(arguments: Sequence[str]) -> int:
    """Draw the picture from the model in a folder."""
    [folder] = arguments
    [found] = unet.boundaries(unet.load(folder).model, [TEXT], key=jax.random.key(0))
    title = "A text shaded by the probability of a boundary after each character: red at spaces, blue within words"
    write_atomically(Path("docs/boundaries.svg"), svg(found.characters, title))
    print(found.summary())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
