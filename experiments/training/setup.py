"""Everything of a run that can turn out to be impossible, done before it touches its folder."""

from __future__ import annotations

from dataclasses import dataclass

import jax
from jaxtyping import PRNGKeyArray, PyTree

from data import Split, check_workers
from estimators.keys import named_key
from experiments.config.build import new_model
from experiments.config.errors import ConfigError
from experiments.config.plugins import import_plugins, modules_of
from experiments.config.settings import RunConfig
from experiments.training.data import load_split
from experiments.training.distil import AlignmentStage
from experiments.training.initial import initial_weights
from experiments.training.placement import Placement, with_implementation
from experiments.training.prepared import prepare, read_prepared, require_prerequisite
from experiments.training.run_dir import has_checkpoint
from experiments.training.trainer import Trainer
from unet.files.saving import require_saveable
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
    model, aligned = new_model(config, key, prepared), config.distill.teacher is not None
    alignment = AlignmentStage.of(config, prepared, split, placement) if aligned else None
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
