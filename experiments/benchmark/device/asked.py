"""What is measured on a device, and how its results are handed over."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from estimators.registry import DEFAULT
from experiments.config.presets import PRESETS
from experiments.config.settings import RunConfig, transformer_shape
from unet.fused_attention import AttentionForm
from unet.ops import Implementation

Result = Mapping[str, float | int | str | bool | None]
"""What was measured of one thing, by the heading of its column."""

Report = Callable[[Result], None]


@dataclass(frozen=True)
class Item:
    """One row of a part. `run` measures it; what it raises is reported, and the part goes on."""

    name: str
    run: Callable[[], Result]


Compute = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Asked:
    """What is to be measured: the models, at `batch` × `length` bytes (None: the preset's), and how often."""

    models: tuple[str, ...]
    dataset: str
    batch: int | None
    length: int | None
    compute: Compute
    rounds: int
    calls: int
    generated: int
    """Bytes of each text that is generated."""
    batches: tuple[int, ...]
    """Texts that are generated together."""
    dtypes: tuple[Compute, ...] = ("bfloat16", "float32")
    """Dtypes in which kernels are compared."""

    def config(
        self, model: str, implementation: Implementation | None = None, attention: AttentionForm = "auto"
    ) -> RunConfig:
        """The run of a model, with ragged operations and attention in these forms."""
        run = PRESETS[model]
        shape = dataclasses.replace(
            transformer_shape(run), compute=self.compute, implementation=implementation, attention=attention
        )
        return dataclasses.replace(
            run,
            unet=shape,
            estimator=DEFAULT,
            dataset=self.dataset,
            devices=1,
            batch=self.batch or run.batch,
            length=self.length or run.length,
        )
