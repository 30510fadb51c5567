"""Classes of the bytes of a text, and scripts of its characters."""

from __future__ import annotations

import unicodedata
from typing import Literal

import numpy as np
from jaxtyping import Int, UInt8

ByteClass = Literal["letter", "digit", "space", "punctuation", "UTF-8 lead", "UTF-8 continuation", "other"]
BYTE_CLASSES: tuple[ByteClass, ...] = (
    "letter",
    "digit",
    "space",
    "punctuation",
    "UTF-8 lead",
    "UTF-8 continuation",
    "other",
)
"""letter, digit, space, punctuation: of ASCII, as `string` has them. UTF-8 lead, continuation: the first and the later bytes of
characters of several bytes, by their values. other: control characters and bytes that occur in no UTF-8."""

OTHER_SCRIPT = "no letter"


def _class_of(value: int) -> ByteClass:
    character = chr(value)
    if value >= 0x80:
        return "UTF-8 continuation" if value < 0xC0 else "UTF-8 lead" if 0xC2 <= value <= 0xF4 else "other"
    if character.isalpha():
        return "letter"
    if character.isdigit():
        return "digit"
    if character in "\t\n\v\f\r ":
        return "space"
    return "punctuation" if character.isprintable() else "other"


_CLASSES = np.array([BYTE_CLASSES.index(_class_of(value)) for value in range(256)])


def byte_classes(values: UInt8[np.ndarray, " bytes"]) -> Int[np.ndarray, " bytes"]:
    """For each byte, the index of its class in `BYTE_CLASSES`."""
    return _CLASSES[values]


def scripts_of(document: bytes) -> tuple[Int[np.ndarray, " bytes"], list[str]]:
    """For each byte the index of its character's script in a list of names, and this list.

    The script of a letter or a mark is the first word of its Unicode name (Han for ideographs); other characters, and bytes
    outside complete characters, are `OTHER_SCRIPT`.
    """
    # A byte outside complete characters becomes a surrogate, which UTF-8 does not have.
    text = document.decode("utf-8", "surrogateescape")
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    sizes = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)
    sizes = np.where((points >= 0xDC80) & (points <= 0xDCFF), 1, sizes)
    distinct, inverse = np.unique(points, return_inverse=True)
    scripts = [_script(int(point)) for point in distinct]
    names = sorted(set(scripts))
    of_distinct = np.array([names.index(script) for script in scripts], np.int64)
    return np.repeat(of_distinct[inverse], sizes), names


def _script(point: int) -> str:
    character = chr(point)
    if unicodedata.category(character)[0] not in "LM":
        return OTHER_SCRIPT
    word = unicodedata.name(character, OTHER_SCRIPT).partition(" ")[0]
    if word in ("CJK", "KANGXI"):
        return "Han"
    return OTHER_SCRIPT if word == "no" else word.capitalize()
