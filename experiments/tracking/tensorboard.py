"""TensorBoard: event files in the run's folder, for `tensorboard --logdir runs/`."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tensorboardX import SummaryWriter


class NamedTracker:
    """Writes event files. What a run that goes on had written after its checkpoint is hidden by them."""

    def __init__(self, run_dir: Path, config: Mapping[str, object], step: int):
        folder = run_dir / "tensorboard"
        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)
        self._writer.add_text("config", f"```json\n{json.dumps(config, indent=2)}\n```", step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def histogram(self, step: int, name: str, edges: Sequence[float], shares: Sequence[float]) -> None:
        limits, counts = np.asarray(edges, np.float64), np.asarray(shares, np.float64)
        middles = (limits[1:] + limits[:-1]) / 2
        self._writer.add_histogram_raw(
            name,
            min=float(limits[0]),
            max=float(limits[-1]),
            num=float(counts.sum()),
            sum=float(counts @ middles),
            sum_squares=float(counts @ middles**2),
            bucket_limits=limits[1:].tolist(),
            bucket_counts=counts.tolist(),
            global_step=step,
        )

    def html(self, step: int, name: str, page: str) -> None:
        self._writer.add_text(name, page, step)

    def picture(self, step: int, name: str, png: bytes) -> None:
        self._writer.add_image(name, np.asarray(Image.open(io.BytesIO(png)).convert("RGB")), step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
