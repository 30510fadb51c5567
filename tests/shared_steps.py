"""Training steps that runs in one process share, so that tests which start many small runs trace and compile few programs."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field

import jax
import numpy as np

from experiments.config.files import to_json
from experiments.config.sections import CheckpointConfig, DataConfig, EvaluationConfig
from experiments.training.placement import Placement
from experiments.training.step import compiled
from experiments.training.trainer import Trainer


@dataclass(frozen=True)
class Program:
    """All that a compiled step depends on beside its arguments, to be compared: the settings of the run but those that say where
    text comes from and what is left behind, the model without its parameters, and what was made of text and devices. The
    optimizer follows from the settings and from the names of the parameters, which are part of the model's structure.

    A step is made of `trainer`, which is not compared and has no parameters, so that no finished run is kept in memory.
    """

    settings: str
    structure: jax.tree_util.PyTreeDef
    leaves: tuple[tuple[type, object], ...]
    capacities: tuple[int | tuple[int, ...], ...]
    remat: bool | None
    placement: Placement
    trainer: Trainer = field(compare=False)

    @classmethod
    def of(cls, trainer: Trainer, placement: Placement) -> Program | None:
        """None where the model holds arrays that do not train, which are constants of the program and are not compared."""
        leaves, structure = jax.tree.flatten(trainer.static)
        if any(isinstance(leaf, jax.Array | np.ndarray | np.generic) for leaf in leaves):
            return None
        elsewhere = {"data": DataConfig(), "evaluation": EvaluationConfig(), "checkpoint": CheckpointConfig()}
        behind = {"seed": 0, "init": None, "out": None, "resume": False, "overwrite": False}
        settings = dataclasses.replace(trainer.config, **elsewhere, **behind, dataset="", log_every=1, log_seconds=0.0)
        remat = None if trainer.memory is None else trainer.memory.remat
        typed = tuple((type(leaf), leaf) for leaf in leaves)
        made_of = dataclasses.replace(trainer, params=None)
        return cls(to_json(settings), structure, typed, trainer.capacities, remat, placement, made_of)


@functools.lru_cache(maxsize=8)
def shared(program: Program) -> jax.stages.Wrapped:
    return compiled(program.trainer.step_on(program.placement))


def compiled_on(trainer: Trainer, placement: Placement) -> jax.stages.Wrapped:
    """In place of `Trainer.compiled_on`: steps that are the same program are one."""
    program = Program.of(trainer, placement)
    return compiled(trainer.step_on(placement)) if program is None else shared(program)
