"""Weights & Biases; its environment variables (WANDB_MODE=offline, WANDB_PROJECT) say where to."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import wandb  # type: ignore[missing-import]  # an extra
from PIL import Image

from experiments.tracking.identity import run_id


class NamedTracker:
    """A run of its own for each run; one that goes on goes on there too."""

    def __init__(self, run_dir: Path, config: Mapping[str, object], step: int):
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "caesura"),
            name=run_dir.resolve().name,
            id=run_id(run_dir / "wandb"),
            resume="allow",
            dir=str(run_dir),
            config=dict(config),
            settings=wandb.Settings(console="off", silent=True, x_disable_stats=True),
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def histogram(self, step: int, name: str, edges: Sequence[float], shares: Sequence[float]) -> None:
        self._run.log({name: wandb.Histogram(np_histogram=(np.asarray(shares), np.asarray(edges)))}, step=step)

    def html(self, step: int, name: str, page: str) -> None:
        self._run.log({name: wandb.Html(page, inject=False)}, step=step)

    def picture(self, step: int, name: str, png: bytes) -> None:
        self._run.log({name: wandb.Image(Image.open(io.BytesIO(png)))}, step=step)

    def close(self) -> None:
        self._run.finish()
