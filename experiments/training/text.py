"""The training text of a run, and other models, for what must be found out before training."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import jax

from data import Batches, Split, open_batches
from estimators import Layout
from experiments.config.errors import ConfigError
from experiments.config.models import is_published, load_any
from experiments.config.plugins import import_plugins, load_model, modules_of, require_bytes
from experiments.config.settings import RunConfig
from unet import UNet
from unet.files.blt_layout import is_blt, patcher_of
from unet.likelihood import plain_layout


@dataclass
class LayoutBatches(Iterator[Layout]):
    """The batches of a run as layouts."""

    batches: Batches

    @property
    def epochs(self) -> float:
        """How often the text has been read so far."""
        return self.batches.epochs

    def __next__(self) -> Layout:
        batch = next(self.batches)
        return plain_layout(*(jax.numpy.asarray(batch[name]) for name in ("bytes", "segments", "mask")))


@dataclass(frozen=True)
class RunText:
    """The training text of a run (`estimators.settings.TrainingText`)."""

    config: RunConfig
    split: Split

    @property
    def rate(self) -> float:
        return self.config.rate

    def count(self, max_bytes: int) -> int:
        return max(1, min(max_bytes // self.config.bytes_per_step, self.config.total_steps))

    @contextmanager
    def batches(self) -> Generator[LayoutBatches, None, None]:
        batches = open_batches(self.split, batch=self.config.batch, seed=self.config.seed)
        try:
            yield LayoutBatches(batches)
        finally:
            batches.close()

    def byte_model(self, where: str) -> UNet:
        return read_byte_model(Path(where), (*modules_of(self.config), *import_plugins(self.config.plugin)))


def read_byte_model(folder: Path, plugins: Sequence[ModuleType] = ()) -> UNet:
    """The model of a finished run, which must not learn its tokens, or that of the patches of a published Byte Latent
    Transformer, by its name on the hub or by its file or folder; `plugins` are modules whose classes it may hold.

    Raises `ConfigError` for a run whose boundaries are not at every byte, `LoadError` for one that is not finished.
    """
    published = is_published(str(folder))
    loaded = load_any(str(folder), plugins) if published else load_model(folder, plugins)
    model = require_bytes(loaded.model, folder)
    if published and is_blt(model):
        return patcher_of(model)
    if any(estimator.router.rate != 1.0 for estimator in model.stage.estimators):
        raise ConfigError(
            f"{folder} holds a model that draws boundaries between its tokens; the entropy of bytes needs one without, or with a "
            "token at every byte"
        )
    return model
