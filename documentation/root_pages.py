"""Links of pages that lie beside README and are shown in the site too: an extension of Python-Markdown.

`docs/contributing.md` includes CONTRIBUTING.md, where a page of the site is `docs/page.md`, and security.md is SECURITY.md.
"""

from __future__ import annotations

import re
from xml.etree.ElementTree import Element

from markdown import Extension, Markdown
from markdown.treeprocessors import Treeprocessor

ROOT_PAGES = ("CHANGELOG", "CONTRIBUTING", "SECURITY")


class _Links(Treeprocessor):
    def run(self, root: Element) -> None:
        for element in root.iter("a"):
            if link := element.get("href"):
                element.set("href", in_site(link))


def in_site(link: str) -> str:
    """The same link as a page of the site has it."""
    name = re.match(rf"({'|'.join(ROOT_PAGES)})\.", link)
    return link.removeprefix("docs/") if name is None else name[0].lower() + link.removeprefix(name[0])


class RootPages(Extension):
    """Registers the change of links, before names of sources become names of pages."""

    def extendMarkdown(self, md: Markdown) -> None:
        md.treeprocessors.register(_Links(md), "root-pages", 19)


def makeExtension(**options: object) -> RootPages:
    """What Python-Markdown asks for."""
    return RootPages(**options)
