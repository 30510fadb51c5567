"""What is mutated and read: one kind of file, and how the library reads it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Structure = Literal["bytes", "json", "json lines"]


@dataclass(frozen=True)
class Subject:
    """A kind of file that the library reads."""

    name: str
    seeds: Callable[[Path], Sequence[bytes]]
    """The contents of valid files; made in an empty folder that is given."""
    read: Callable[[Path, bytes], object]
    """Puts the content where it belongs below an empty folder, and returns what the library reads there, comparable with ==."""
    refused: tuple[type[Exception], ...]
    """The only exceptions allowed."""
    structure: Structure = "bytes"
    """What is mutated: bytes alone, or the values and keys of JSON as well."""
    checked: bool = False
    """Whether the file has checksums: one that can be read in spite of a mutation must give what the seed gives."""
    seconds: float = 1.0
    """CPU time that one input may take."""
    memory: int = 64 * 2**20
    """Bytes by which resident memory may grow for one input."""
