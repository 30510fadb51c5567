"""What the page saves: the texts that it shows, as files that need nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from experiments.config.errors import ConfigError
from experiments.exploring.documents import Request
from unet import TextBoundaries
from unet.shading.html import fragment, page
from unet.shading.svg import picture

Shown = Sequence[tuple[str, TextBoundaries]]
"""The names of models, and what they make of a text."""


@dataclass(frozen=True)
class Export:
    """A kind of file: its media type, and what writes it."""

    media: str
    write: Callable[[Shown], str]


def export_of(request: Request) -> Export:
    """What a request asks for. Raises `ConfigError`."""
    match request.values.get("format"):
        case "html":
            return Export("text/html", _page)
        case "svg" if request.values.get("shading") == "bits":
            return Export("image/svg+xml", lambda shown: _picture(shown, bits=True))
        case "svg":
            return Export("image/svg+xml", lambda shown: _picture(shown, bits=False))
    raise ConfigError("format must be html or svg")


def _notes(shown: Shown) -> list[str]:
    return [f"{name}: {found.summary()}" for name, found in shown]


def _page(shown: Shown) -> str:
    return page("Boundaries", fragment([found.characters for _, found in shown], _notes(shown)))


def _picture(shown: Shown, *, bits: bool) -> str:
    return picture([found.characters for _, found in shown], _notes(shown), bits=bits)
