"""Checks the built site: `python -m documentation.check_site site`.

Every link and picture must be there, anchors included, every formula must be one, and no page may fetch anything from elsewhere.
(What people may follow to elsewhere, a link in a sentence, is not followed here.)
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

FETCHED = {
    "link": "href",
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "object": "data",
}
"""What a browser fetches by itself, and the attribute that says from where."""
NOT_FETCHED = {"canonical", "prev", "next", "alternate"}
"""Kinds of `<link>` that only name something."""
VERBATIM = ("code", "pre", "script", "style", "math")
"""Where a dollar sign is one; elsewhere it is left over from a formula that was not found."""
IN_STYLES = re.compile(r"url\(\s*['\"]?(?P<url>[^'\")]+)|@import\s+['\"](?P<imported>[^'\"]+)")


class _Page(HTMLParser):
    """What a page links to, what it fetches, the anchors in it, and text with dollar signs."""

    def __init__(self, content: str):
        super().__init__()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.anchors: set[str] = set()
        self.dollars: list[str] = []
        self._inside: list[str] = []
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        said = {name: value or "" for name, value in attrs}
        self.anchors |= {said[name] for name in ("id", "name") if name in said}
        if tag in VERBATIM:
            self._inside.append(tag)
        if tag == "a" and "href" in said:
            self.links.append(said["href"])
        if tag in FETCHED and said.get("rel") not in NOT_FETCHED and FETCHED[tag] in said:
            self.fetched.append(said[FETCHED[tag]])
        self.fetched += in_styles(said.get("style", ""))

    def handle_endtag(self, tag: str) -> None:
        if self._inside and self._inside[-1] == tag:
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        if self._inside[-1:] == ["style"]:
            self.fetched += in_styles(data)
        elif not self._inside and "$" in data:
            self.dollars.append(" ".join(data.split()))


def in_styles(content: str) -> list[str]:
    """What a style sheet fetches."""
    return [match["url"] or match["imported"] for match in IN_STYLES.finditer(content)]


def problems(site: Path) -> list[str]:
    """A sentence for each link that leads nowhere, each formula that was not found, and all that is fetched from elsewhere."""
    pages = {path: _Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        name = path.relative_to(site)
        found += [f"{name} fetches {url}" for url in page.fetched if _elsewhere(url)]
        found += [f"{name} shows a formula as it is written: {text}" for text in page.dollars]
        for link in (*page.links, *page.fetched):
            if not _elsewhere(link) and (reason := _broken(path, link, site, pages)):
                found.append(f"{name}: {link} {reason}")
    for path in site.rglob("*.css"):
        styles = path.read_text(encoding="utf-8")
        found += [f"{path.relative_to(site)} fetches {url}" for url in in_styles(styles) if _elsewhere(url)]
    return found


def _elsewhere(url: str) -> bool:
    parts = urlsplit(url)
    return bool(parts.netloc) or parts.scheme not in ("", "data")


def _broken(path: Path, link: str, site: Path, pages: dict[Path, _Page]) -> str | None:
    parts = urlsplit(link)
    if parts.scheme == "data":
        return None
    # The page for addresses that are not there has links from the root, for it is shown at any address.
    base = site if parts.path.startswith("/") else path.parent
    target = (base / unquote(parts.path).lstrip("/")).resolve() if parts.path else path.resolve()
    if target.is_dir():
        target = target / "index.html"
    if not target.is_file():
        return "is not there"
    page = pages.get(target)
    if page is not None and parts.fragment and unquote(parts.fragment) not in page.anchors:
        return "has no such anchor"
    return None


def main(arguments: Sequence[str]) -> int:
    """Print what is wrong with a site. Returns 1 if there is something."""
    site = Path(arguments[0]).resolve()
    if not (site / "index.html").is_file():
        print(f"{site} holds no site: build it with `make docs`", file=sys.stderr)
        return 2
    found = problems(site)
    for sentence in found:
        print(sentence, file=sys.stderr)
    print(f"{len(list(site.rglob('*.html')))} pages, {len(found)} problems")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
