"""Everything of a run that can turn out to be impossible, done before it touches its folder."""

from __future__ import annotations

from dataclasses import dataclass

import equinox as eqx
import jax
from jaxtyping import PRNGKeyArray, PyTree

from data import Split, check_workers
from estimators.keys import named_key
from experiments.config.build import build_model
from experiments.config.errors import ConfigError
from experiments.config.plugins import import_plugins, modules_of
from experiments.config.settings import RunConfig
from experiments.training.data import load_split
from experiments.training.distil import AlignmentStage, with_teacher
from experiments.training.initial import initial_weights
from experiments.training.placement import Placement, with_implementation
from experiments.training.prepared import prepare, read_prepared, require_prerequisite
from experiments.training.run_dir import has_checkpoint
from experiments.training.trainer import Trainer
from unet.blocks import Stack
from unet.files.saving import require_saveable
from unet.hierarchy import Flat
from unet.language_model import AbstractLanguageModel


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
    """What a user should know of the weights that the model starts from."""
    alignment: AlignmentStage | None = None
    """The steps in which it is aligned with a teacher, of a run that is distilled."""


def set_up(config: RunConfig) -> Setup:
    """Read the data and build the model. Raises `DataError`, `ConfigError` and, for weights to start from, `LoadError`."""
    require_prerequisite(config)
    placement = Placement.of(config)
    config = with_implementation(config)
    split = load_split(config)
    check_workers(split, config.data.workers)
    key = jax.random.key(config.seed)
    prepared = read_prepared(config) if config.resume else None
    prepared = prepare(config, split) if prepared is None else prepared
    model, alignment = _built(config, key, prepared), None
    if config.distill.teacher is not None:
        model = with_teacher(config, model, prepared, key)
        alignment = AlignmentStage.of(config, prepared, split, placement)
    try:
        require_saveable(model)
    except ValueError as error:
        raise ConfigError(f"{error}: the model could not be saved when it is trained") from None
    notes = [] if alignment is None else [alignment.note]
    # A run that goes on has its weights in its checkpoint; one that was stopped before the first has not.
    if config.init is not None and not (config.resume and has_checkpoint(config.run_dir)):
        model = initial_weights(config.init, model, (*modules_of(config), *import_plugins(config.plugin)), notes.append)
    trainer = Trainer.on(config, model, split)
    return Setup(
        *(split, prepared, model, trainer, named_key(key, "steps"), named_key(key, "evaluation"), placement),
        tuple(notes),
        alignment,
    )


def _built(config: RunConfig, key: PRNGKeyArray, prepared: PyTree) -> AbstractLanguageModel:
    """A fresh model, of a distilled run without a main network."""
    # Compiled whole: a fraction of the time that its operations take to be compiled one by one.
    if config.distill.teacher is None:
        return eqx.filter_jit(lambda: build_model(config, key, prepared))()
    # What is not returned is not computed either.
    empty = Flat(Stack(()))
    return eqx.filter_jit(lambda: eqx.tree_at(lambda one: one.stage.inner, build_model(config, key), empty))()
