"""Formulas as MathML, which browsers show without a script or a font from elsewhere: an extension of Python-Markdown.

It comes after `pymdownx.arithmatex` with `generic`, which finds the formulas.
"""

from __future__ import annotations

import re
from xml.etree.ElementTree import Element

from latex2mathml.converter import convert
from markdown import Extension, Markdown
from markdown.treeprocessors import Treeprocessor

NAMES = re.compile(r"<mi>(log|exp|tanh|logit|min|max)</mi>(?=<mi>)")
INLINE, BLOCK = ("\\(", "\\)"), ("\\[", "\\]")


class _Formulas(Treeprocessor):
    def run(self, root: Element) -> None:
        for element in root.iter():
            if "arithmatex" in element.get("class", "").split():
                element.text = self.md.htmlStash.store(mathml(element.text or ""))


def mathml(text: str) -> str:
    r"""The formula in `text`, which stands in \( \) or \[ \]. Raises `ValueError` where a command of it is unknown."""
    text = text.strip()
    display = text.startswith(BLOCK[0])
    opening, closing = BLOCK if display else INLINE
    latex = text.removeprefix(opening).removesuffix(closing).strip()
    made = convert(latex, display="block" if display else "inline")
    if "\\" in made:
        raise ValueError(f"no MathML for {latex!r}: {made}")
    # A function and its argument stand apart.
    return NAMES.sub(r'\g<0><mspace width="0.17em"/>', made)


class MathML(Extension):
    """Registers the conversion after formulas were found."""

    def extendMarkdown(self, md: Markdown) -> None:
        md.treeprocessors.register(_Formulas(md), "mathml", 1)


def makeExtension(**options: object) -> MathML:
    """What Python-Markdown asks for."""
    return MathML(**options)
