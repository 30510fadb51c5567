"""The model in a checkpoint of a run, read without changing anything in its folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from experiments.config.build import new_model
from experiments.config.errors import ConfigError, require
from experiments.config.sections import MeshConfig
from experiments.config.structure import structured
from experiments.training.checkpoint import DamagedError, Meta, as_written, require_undamaged, said
from experiments.training.placement import with_implementation
from experiments.training.prepared import read_prepared
from experiments.training.run_dir import CHECKPOINTS, PREPARED, read_config
from experiments.training.trainer import Trainer
from unet.language_model import AbstractLanguageModel


def stored_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints of a run, ascending."""
    root = folder / CHECKPOINTS
    names = [path.name for path in root.iterdir()] if root.is_dir() else []
    return sorted(int(name) for name in names if name.isascii() and name.isdecimal())


@dataclass(frozen=True)
class StoredRun:
    """A run in a `folder`, with what reads its checkpoints: built once for all of them."""

    folder: Path
    trainer: Trainer

    @classmethod
    def of(cls, folder: Path, plugins: Sequence[str] = ()) -> StoredRun:
        """`plugins` are modules that the run may name. Raises `ConfigError`."""
        if not stored_steps(folder):
            raise ConfigError(f"{folder} holds no checkpoint yet: train its run further, or name another model")
        config = dataclasses.replace(read_config(folder, plugins), out=folder, devices=1, mesh=MeshConfig())
        config = with_implementation(config)
        prepared = read_prepared(config)
        require(
            prepared is not None or not (config.reads_tokens or config.distill.teacher is not None),
            f"{folder} lacks {PREPARED}, which has the tokenizer of its checkpoints: copy it there too",
        )
        model = new_model(config, jax.random.key(config.seed), prepared)
        # The capacities of training do not matter here.
        return cls(folder, Trainer.of(config, model, (config.length,)))

    def model(self, step: int | None = None) -> tuple[AbstractLanguageModel, int]:
        """The model of a checkpoint and its step, the newest one unless `step` names another.

        Raises `ConfigError` if there is no such checkpoint, or if it is damaged or does not fit the run's settings.
        """
        steps = stored_steps(self.folder)
        step = steps[-1] if step is None and steps else step
        if step not in steps:
            raise ConfigError(
                f"{self.folder} holds no checkpoint of step {step}; it holds {', '.join(map(str, steps))}"
            )
        like = jax.eval_shape(self.trainer.first_state)
        return self.trainer.model(_restored(self.folder / CHECKPOINTS / str(step), like)), step


def stored_model(
    folder: Path, step: int | None = None, plugins: Sequence[str] = ()
) -> tuple[AbstractLanguageModel, int]:
    """`StoredRun.model` of the run in a folder."""
    return StoredRun.of(folder, plugins).model(step)


def _restored(folder: Path, like):
    """The parameters of a checkpoint of states like this one, checked against the hashes written with it."""
    try:
        require_undamaged(folder)
    except DamagedError as error:
        raise ConfigError(f"the checkpoint {folder} is damaged ({error})") from None
    handler = ocp.CompositeCheckpointHandler(state=ocp.StandardCheckpointHandler(), meta=ocp.JsonCheckpointHandler())
    with ocp.Checkpointer(handler) as reader:
        try:
            here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), like)
            arguments = ocp.args.Composite(state=ocp.args.StandardRestore(target), meta=ocp.args.JsonRestore())
            found = reader.restore(folder.absolute(), args=arguments)
            leaves = structured(found["meta"], Meta).leaves
        except Exception as error:  # orbax lets whatever its readers raise through, bare Exceptions among them
            raise ConfigError(f"the checkpoint {folder} is damaged, or does not fit its run ({said(error)})") from error
    if not as_written(found["state"], leaves):
        raise ConfigError(f"the checkpoint {folder} is damaged: its bits are not those written")
    return found["state"].params
