"""JSON objects that lie beside models, and inside them."""

from __future__ import annotations

import json
from pathlib import Path

from unet.files.errors import LoadError, shown

MAX_BYTES = 1 << 24
"""Maximum size of a configuration or of an index of shards."""


def read_json(path: Path) -> dict[str, object]:
    """The JSON object in a file, in UTF-8 with or without a byte order mark. Raises `LoadError` for anything else."""
    with path.open("rb") as stream:
        content = stream.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise LoadError(f"{path} has over {MAX_BYTES} bytes, more than any configuration needs")
    try:
        return parse_json(content.decode("utf-8-sig"), path)
    except UnicodeDecodeError as error:
        raise LoadError(
            f"{path} is damaged: it is not UTF-8 text ({shown(error.reason)} at byte {error.start})"
        ) from None


def parse_json(text: str, path: Path) -> dict[str, object]:
    """The JSON object that `text`, found in `path`, is. Raises `LoadError` for anything else."""
    try:
        content = json.loads(text)
    except RecursionError:
        raise LoadError(f"{path} is damaged: its JSON is nested too deep") from None
    except ValueError as error:
        raise LoadError(f"{path} is damaged: {shown(error, 200)}") from None
    if not isinstance(content, dict):
        raise LoadError(f"{path} is damaged: it holds no JSON object")
    return content
