"""Everything of a run that can turn out to be impossible, done before it touches its folder."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from data import Split
from estimators.keys import named_key
from estimators.objectives.reductions import rows_for_each_device
from experiments.config.build import new_model
from experiments.config.errors import ConfigError, require
from experiments.config.files import to_json
from experiments.config.plugins import import_plugins, modules_of
from experiments.config.settings import RunConfig
from experiments.processes.processes import ALONE, AbstractProcesses
from experiments.training.data import lanes_of_run, load_split
from experiments.training.distil import AlignmentStage, require_one_process
from experiments.training.initial import initial_weights
from experiments.training.placement import Placement, with_implementation
from experiments.training.prepared import prepare, require_prerequisite
from experiments.training.run_dir import has_checkpoint
from experiments.training.trainer import Trainer
from unet.files.saving import require_saveable
from unet.language_model import AbstractLanguageModel
from unet.tensor import require_divisible


@dataclass(frozen=True)
class Setup:
    """The data of a run, what its estimator was prepared with, the fresh model and its trainer, the keys that its training steps
    and its validations draw from, and how all of it lies on the devices."""

    split: Split
    prepared: PyTree
    model: AbstractLanguageModel
    trainer: Trainer
    key_steps: PRNGKeyArray
    key_evaluate: PRNGKeyArray
    placement: Placement
    notes: tuple[str, ...] = ()
    """What a user should know of the weights that the model starts from, and of where they lie."""
    alignment: AlignmentStage | None = None
    """The steps in which it is aligned with a teacher, of a run that is distilled."""
    lanes: int = 1
    """Parts that its stream is divided into, for several processes to read."""


def require_same_settings(config: RunConfig, processes: AbstractProcesses) -> None:
    """Raise `ConfigError` where processes that are to train one model have other settings, before they do anything together that
    depends on them."""
    if processes.count == 1:
        return
    there = dataclasses.replace(config.data, cache=None)
    settings = to_json(dataclasses.replace(config, out=None, overwrite=False, data=there))
    processes.require_same("settings", settings.encode())


def require_equal(setup: Setup, processes: AbstractProcesses) -> None:
    """Raise `ConfigError` where processes that are to train one model have other data or first parameters."""
    if processes.count == 1:
        return
    processes.require_same("data", setup.split.fingerprint.encode())
    arrays = jax.tree.leaves((setup.trainer.params, eqx.filter(setup.prepared, eqx.is_array)))
    # Of what is divided over the processes each has another part.
    whole = [leaf for leaf in arrays if leaf.is_fully_addressable or leaf.is_fully_replicated]
    sums = [zlib.crc32(np.asarray(leaf).tobytes()) for leaf in whole]
    processes.require_same("first parameters", str(sums).encode())


def set_up(config: RunConfig, processes: AbstractProcesses = ALONE) -> Setup:
    """Read the data and build the model; several `processes` do so together.

    Raises `DataError`, `ConfigError` and, for weights to start from, `LoadError`.
    """
    require_prerequisite(config)
    placement = Placement.of(config)
    config = with_implementation(config)
    require_one_process(config, placement)
    split = load_split(config, processes)
    lanes = lanes_of_run(config, split, min(jax.process_count(), placement.batch_shards))
    key = jax.random.key(config.seed)
    prepared = prepare(config, split, processes)
    _require_shareable(config, lambda: new_model(config, key, prepared))
    model = placement.with_local_rest(new_model(config, key, prepared, placement.model_kept))
    aligned = config.distill.teacher is not None
    alignment = AlignmentStage.of(config, prepared, split, placement) if aligned else None
    try:
        require_saveable(model)
    except ValueError as error:
        raise ConfigError(f"{error}: the model could not be saved when it is trained") from None
    notes = [] if alignment is None else [alignment.note]
    # A run that goes on has its weights in its checkpoint; one that was stopped before the first has not.
    if config.init is not None and not (config.resume and has_checkpoint(config.run_dir)):
        model = initial_weights(config.init, model, (*modules_of(config), *import_plugins(config.plugin)), notes.append)
    _require_comparable(config, model, placement)
    trainer = Trainer.on(config, model, split, 0.0 if alignment is None else alignment.rate)
    if config.mesh.show:
        notes.append(placement.shown(trainer.params))
    return Setup(
        *(split, prepared, model, trainer, named_key(key, "steps"), named_key(key, "evaluation"), placement),
        tuple(notes),
        alignment,
        lanes,
    )


def _require_comparable(config: RunConfig, model: AbstractLanguageModel, placement: Placement) -> None:
    """Raise `ConfigError` where each device has too few sequences for a reduction that compares those of one device."""
    sequences = config.batch // config.optimizer.accumulate // placement.batch_shards
    require(
        sequences * config.samples >= rows_for_each_device(model),
        f"--batch-centre.over shard: each device has {sequences} sequence at a time of a batch of {config.batch}, whose centred "
        "return is zero: use a larger --batch, --batch-centre.over batch, or --batch-centre.leave-one-out",
    )


def _require_shareable(config: RunConfig, build: Callable[[], AbstractLanguageModel]) -> None:
    """Raise `ConfigError` where --mesh.tensor does not divide a layer of the model, of which nothing is computed."""
    if config.mesh.tensor == 1:
        return
    try:
        require_divisible(eqx.filter_eval_shape(build), config.mesh.tensor)
    except ValueError as error:
        raise ConfigError(f"--mesh.tensor {config.mesh.tensor}: {error}") from None
