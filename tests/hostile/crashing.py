"""A reader that some inputs end: what the tests of this folder are tried on."""

from __future__ import annotations

import os
from pathlib import Path

from tests.hostile.subject import Subject


def ends_the_process(content: bytes) -> bool:
    """Whether this input does."""
    return len(content) < 8


def _read(folder: Path, content: bytes) -> bytes:
    if ends_the_process(content):
        os._exit(3)
    return content


SUBJECTS = (Subject("crashing", lambda folder: [b"0123456789"], _read, ()),)
