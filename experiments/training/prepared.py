"""What some estimators find out from text before training, such as a vocabulary, kept with the run."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import equinox as eqx
import jax
from jaxtyping import PyTree

from data import Batches, Split, open_batches
from estimators import Layout
from experiments.config.errors import ConfigError, outside_errors, require
from experiments.config.models import is_published, load_any
from experiments.config.plugins import import_plugins, load_model, modules_of
from experiments.config.settings import RunConfig
from experiments.training.run_dir import PREPARED
from unet import UNet
from unet.files.blt_layout import is_blt, patcher_of
from unet.files.saving import load_module, save_module
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


def prepare(config: RunConfig, split: Split) -> PyTree:
    """What the estimator of `config` takes from the training text; None for one that takes nothing. Raises `ConfigError` where
    that is impossible."""
    with outside_errors(config.parts[0].all[:1]):
        try:
            prepared = config.first.prepare(RunText(config, split))
        except (ImportError, ValueError) as error:
            raise ConfigError(f"--estimator {config.estimator}: {error}") from error
    what = f"--estimator {config.estimator}: prepare returned a {type(prepared).__name__}"
    require(prepared is None or isinstance(prepared, eqx.Module), f"{what}, not an equinox.Module")
    return prepared


def require_prerequisite(config: RunConfig) -> None:
    """Raise `ConfigError` where an estimator reads the model of another run and none is named."""
    needs = config.first.prerequisite
    if needs is not None and getattr(config.first, needs.setting) is None:
        section = config.parts[0].estimator.section
        flags = " ".join(
            f"--{name}.{'' if value else 'no-'}{key.replace('_', '-')}"
            if isinstance(value, bool)
            else f"--{name}.{key} {value}"
            for name, values in needs.settings.items()
            for key, value in values.items()
        )
        raise ConfigError(
            f"--estimator {config.estimator} needs the model of another run: train one with --estimator {needs.estimator} "
            f"{flags} and name its folder with --{section}.{needs.setting}"
        )


def write_prepared(folder: Path, prepared: PyTree) -> None:
    """Save it in a run's folder: checkpoints do not hold it."""
    if prepared is not None:
        save_module(prepared, folder / PREPARED)


def read_prepared(config: RunConfig) -> PyTree:
    """What `write_prepared` saved in the folder of a run; None where there is nothing. Raises `LoadError` for a damaged file."""
    path = config.run_dir / PREPARED
    return load_module(path, modules_of(config)) if path.is_file() else None


def read_byte_model(folder: Path, plugins: Sequence[ModuleType] = ()) -> UNet:
    """The model of a finished run, which must not learn its tokens, or that of the patches of a published Byte Latent
    Transformer, by its name on the hub or by its file or folder; `plugins` are modules whose classes it may hold.

    Raises `ConfigError` for a run whose boundaries are not at every byte, `LoadError` for one that is not finished.
    """
    published = is_published(str(folder))
    model = (load_any(str(folder), plugins) if published else load_model(folder, plugins)).model
    if published and is_blt(model):
        return patcher_of(model)
    if any(estimator.router.rate != 1.0 for estimator in model.stage.estimators):
        raise ConfigError(
            f"{folder} holds a model that draws boundaries between its tokens; the entropy of bytes needs one without, or with a "
            "token at every byte"
        )
    return model
