"""Shaded texts as HTML that needs nothing but itself: no script, nothing from elsewhere, and text is never markup."""

from __future__ import annotations

import hashlib
import html
import math
from collections.abc import Callable, Iterable, Sequence

from unet.shading.characters import MOST_BITS, Character, clusters, colour_of, colour_of_bits, from_right, visible

STEPS = 20
"""Shades of a colour scale."""


def hexadecimal(colour: tuple[int, int, int]) -> str:
    """A colour as CSS has it."""
    return "#" + "".join(f"{channel:02x}" for channel in colour)


def shades(prob_rule: str, bits_rule: str, *, dark: bool) -> str:
    """The rules of all shades; both say where a shade (`{step}`) belongs and what is coloured, up to the colon."""
    # Bits of bytes: the last step is for all that is more.
    kinds = ((prob_rule, colour_of, 1.0), (bits_rule, colour_of_bits, MOST_BITS))
    return "\n".join(
        f"{rule.format(step=step)}:{hexadecimal(colour(most * step / STEPS, dark=dark))}}}"
        for rule, colour, most in kinds
        for step in range(STEPS + 1)
    )


def _coloured(*, dark: bool) -> str:
    """All rules that depend on whether the page is dark."""

    def gradient(colour: Callable[..., tuple[int, int, int]], most: float) -> str:
        stops = ", ".join(hexadecimal(colour(most * step / 10, dark=dark)) for step in range(11))
        return f"{{ background: linear-gradient(90deg, {stops}) }}"

    paper, ink, bar = ("#16181c", "#e8e8e8", "#fffb") if dark else ("#fff", "#000", "#0009")
    return f"""
.caesura {{ --paper: {paper}; --ink: {ink}; --bar: {bar};
  --differs: {"#ff9f43" if dark else "#b3006b"}; }}
.caesura .of-p {gradient(colour_of, 1.0)} .caesura .of-bits {gradient(colour_of_bits, MOST_BITS)}
{shades(".caesura .p{step}{{background", ".caesura:has(.bits:checked) .c{step}{{background", dark=dark)}
"""


STYLE = f"""
.caesura pre {{ background: var(--paper); color: var(--ink); padding: .8rem; border: 1px solid #8884; border-radius: 4px;
  margin: .3rem 0; white-space: break-spaces; overflow-wrap: anywhere; font: 14px/1.7 ui-monospace, "Noto Sans Mono",
  "Noto Sans Mono CJK SC", monospace; }}
.caesura pre span {{ padding: .15em 0; }}
.caesura .b1 {{ box-shadow: inset -2px 0 var(--bar); }} .caesura .b2 {{ box-shadow: inset -4px 0 var(--bar); }}
.caesura .b3 {{ box-shadow: inset -6px 0 var(--bar); }}
.caesura .r.b1 {{ box-shadow: inset 2px 0 var(--bar); }} .caesura .r.b2 {{ box-shadow: inset 4px 0 var(--bar); }}
.caesura .r.b3 {{ box-shadow: inset 6px 0 var(--bar); }}
.caesura .d {{ text-decoration: underline wavy var(--differs) 1.5px; text-underline-offset: .25em; }}
.caesura pre span:hover {{ outline: 1px solid var(--ink); }}
.caesura label {{ margin-right: 1rem; }} .caesura .note {{ color: #777; }}
.caesura .scale {{ display: inline-block; width: 8rem; height: .8rem; vertical-align: middle; border-radius: 2px; }}
{_coloured(dark=False)}
@media (prefers-color-scheme: dark) {{{_coloured(dark=True)}}}
"""
"""What a page needs to show shaded text, in its own light or dark colours."""


def spans(shown: Iterable[Character], reference: Iterable[Character] | None = None) -> str:
    """Characters as HTML. The tooltip of each shows its probability and, where they are known, its bits and its token.
    `reference`: the same characters with other boundaries; where one of both has a boundary it is marked."""
    signs = list(clusters(shown))
    others = signs if reference is None else list(clusters(reference))
    return "".join(_span(one, (one.depth > 0) != (other.depth > 0)) for one, other in zip(signs, others, strict=True))


def _span(one: Character, differs: bool) -> str:
    text = "⏎\n" if one.text == "\n" else _text(one.text)
    names = [*classes(one), *(["d"] if differs else [])]
    return f'<span class="{" ".join(names)}" title="{tooltip(one)}">{text}</span>'


def classes(one: Character) -> list[str]:
    """The shades of a character, and its boundary."""
    names = [] if math.isnan(one.prob) else [f"p{round(STEPS * one.prob)}"]
    if not math.isnan(one.bits):
        names.append(f"c{min(round(STEPS * one.bits / MOST_BITS), STEPS)}")
    if one.depth:
        # The end of what is written from the right is at its left.
        names += [f"b{min(one.depth, 3)}", *(["r"] if from_right(one.text) else [])]
    return names


def _text(text: str) -> str:
    return html.escape(visible(text))


def tooltip(one: Character) -> str:
    """What is known of a character, in one line."""
    parts = [] if math.isnan(one.prob) else [f"p {one.prob:.3f}"]
    if not math.isnan(one.bits):
        parts.append(f"{one.bits:.2f} bits")
    if one.token is not None:
        parts.append(f"token {one.token} of {one.token_bytes} bytes")
    if one.depth > 1:
        parts.append(f"ends tokens of {one.depth} levels")
    return ", ".join(parts)


def scale(kind: str, low: str, high: str) -> str:
    """A colour scale: `of-p` or `of-bits`."""
    return f'{low} <span class="scale {kind}"></span> {high}'


def block(shown: Sequence[Character], reference: Sequence[Character] | None = None) -> str:
    """A text as a block, its direction that of its first letter."""
    return f'<pre class="text" dir="auto">{spans(shown, reference)}</pre>'


LEGEND = (
    '<p class="note">Shaded: the probability of a boundary after each character (at its last byte), or what the character costs. '
    "Hover for the figures and the token. A line at the right of a character marks a boundary, a thicker one boundaries of "
    "several levels.</p>"
)


def fragment(
    texts: Sequence[Sequence[Character]],
    notes: Sequence[str],
    references: Sequence[Sequence[Character] | None] | None = None,
) -> str:
    """Several texts, each with a note, and a switch between probabilities and bits; for a page or a notebook. `references`: for
    each text, or for some, the same one with boundaries that it is compared with."""
    known = [one for text in texts for one in text]
    switches = ""
    if any(not math.isnan(one.bits) for one in known):
        # Buttons of one name belong together: texts that stand elsewhere on a page have another one.
        name = "c" + hashlib.sha256(repr(known).encode(errors="replace")).hexdigest()[:12]
        switches = (
            f'<p><label><input type="radio" name="{name}" checked> probability of a boundary, '
            f"{scale('of-p', '0', '1')}</label>"
            f'<label><input type="radio" class="bits" name="{name}"> bits of a character, '
            f"{scale('of-bits', '0', '8 or more')}</label></p>"
        )
    others = [None] * len(texts) if references is None else references
    blocks = "".join(
        f'<p class="note">{_text(note)}</p>{block(text, other)}'
        for text, note, other in zip(texts, notes, others, strict=True)
    )
    return f'<div class="caesura"><style>{STYLE}</style>{switches}{LEGEND}{blocks}</div>'


def page(title: str, body: str) -> str:
    """A page with `fragment`s."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(title)}</title>
<style>:root {{ color-scheme: light dark; }} body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto;
padding: 0 1rem; }} h1 {{ font-size: 1.4rem; }}</style></head><body>
<h1>{_text(title)}</h1>
{body}
</body></html>
"""
