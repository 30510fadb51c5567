"""The cells of a notebook."""

from __future__ import annotations

import json
from pathlib import Path


def cells(path: Path) -> list[tuple[str, str]]:
    """The kind (`markdown` or `code`) and the text of each cell."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
