"""By what a service knows a run again that goes on."""

from __future__ import annotations

import uuid
from pathlib import Path

NAME = "caesura-run-id"


def run_id(folder: Path) -> str:
    """The identity of a run, which is kept in `folder` inside the run's own: a run that replaces another has a new one."""
    folder.mkdir(exist_ok=True)
    known = folder / NAME
    if not known.exists():
        known.write_text(uuid.uuid4().hex[:12])
    return known.read_text().strip()
