"""Trackio; its environment variables (TRACKIO_DIR, TRACKIO_SPACE_ID) say where to, and TRACKIO_PROJECT under which project."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import trackio  # type: ignore[missing-import]  # an extra
from PIL import Image

from experiments.tracking.identity import run_id


class NamedTracker:
    """A run of its own for each run; one that goes on goes on there too."""

    def __init__(self, run_dir: Path, config: Mapping[str, object], step: int):
        # Standard output is for results.
        with contextlib.redirect_stdout(io.StringIO()):
            self._run = trackio.init(
                project=os.environ.get("TRACKIO_PROJECT", "caesura"),
                name=f"{run_dir.resolve().name}-{run_id(run_dir / 'trackio')[:6]}",
                resume="allow",
                config=dict(config),
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def histogram(self, step: int, name: str, edges: Sequence[float], shares: Sequence[float]) -> None:
        self._run.log({name: trackio.Histogram(np_histogram=(np.asarray(shares), np.asarray(edges)))}, step=step)

    def html(self, step: int, name: str, page: str) -> None:
        self._run.log({name: trackio.Html(page)}, step=step)

    def picture(self, step: int, name: str, png: bytes) -> None:
        self._run.log({name: trackio.Image(Image.open(io.BytesIO(png)))}, step=step)

    def close(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            trackio.finish()
