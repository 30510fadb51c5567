"""A trainer: what moves the parameters of a model, shared by training, the benchmark and the laboratory."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from data import Split
from estimators import trainable
from estimators.base import has_gradient
from experiments.config.settings import RunConfig
from experiments.training.capacity import in_positions, inner_capacities, training_capacities
from experiments.training.optimizer import make_optimizer, multipliers
from experiments.training.placement import Placement
from experiments.training.remat import MemoryPlan, memory_plan
from experiments.training.sharding import local
from experiments.training.step import Step, TrainState, compiled, fresh_state, make_step, own_loss
from unet.language_model import AbstractLanguageModel


@dataclass(frozen=True)
class Trainer:
    """The model of a run, split into its first `params` and everything that stays the same (`static`), its optimizer, and the
    `capacities` of its levels: those that a step chooses from at the first level, and one for each level inside. `positions`:
    those of a sequence that the model reads, bytes or tokens; longer rows of tokens compile a program of their own. `memory`:
    what --unet.remat auto was decided by, None without it."""

    config: RunConfig
    params: PyTree[Float[Array, ...]]
    static: AbstractLanguageModel
    optimizer: optax.GradientTransformation
    capacities: tuple[int | tuple[int, ...], ...]
    positions: int
    memory: MemoryPlan | None = None

    @classmethod
    def of(
        cls,
        config: RunConfig,
        model: AbstractLanguageModel,
        capacities: Sequence[int],
        in_positions: RunConfig | None = None,
    ) -> Trainer:
        """The trainer of a fresh `model`, with these capacities to choose from at the first level. `in_positions`: the run with
        the length in positions that the model reads, if they are not bytes."""
        params, static = eqx.partition(model, has_gradient)
        routers = [estimator.router for estimator in model.estimators]
        read = in_positions or config
        inside = inner_capacities(read, routers, capacities[-1])
        auto = config.unet.remat == "auto"
        return cls(
            config,
            params,
            static,
            make_optimizer(config, multipliers(config, params)),
            (tuple(capacities), *inside),
            read.length,
            memory_plan(read, model.unet, (capacities[-1], *inside)) if auto else None,
        )

    @classmethod
    def on(cls, config: RunConfig, model: AbstractLanguageModel, split: Split, begun: float = 0.0) -> Trainer:
        """The same with the capacities that a run on this text has; `begun` as in `training_capacities`."""
        read = in_positions(config, model, split)
        # Its parameters may lie in parts on many devices.
        router = jax.tree.map(local, model.estimators[0].router) if model.estimators else None
        return cls.of(config, model, training_capacities(read, router, split, begun), read)

    @property
    def step(self) -> Step:
        """The training step on one device, not compiled."""
        return self.step_on(None)

    def step_on(self, placement: Placement | None) -> Step:
        """The training step on the devices of a placement, not compiled."""
        remat = None if self.memory is None else self.memory.remat
        loss = own_loss(self.config, self.capacities)
        return make_step(self.config, self.static, self.optimizer, loss=loss, remat=remat, placement=placement)

    def compiled_on(self, placement: Placement) -> jax.stages.Wrapped:
        """`step_on` jitted."""
        return compiled(self.step_on(placement))

    @property
    def capacity(self) -> int:
        """The most tokens that a sequence can have."""
        first = self.capacities[0]
        return first if isinstance(first, int) else first[-1]

    @property
    def parameters(self) -> int:
        """How many parameters train."""
        return sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(self.params, trainable(self.params))))

    def first_state(self, model: AbstractLanguageModel | None = None) -> TrainState:
        """The state before the first step, of another model of the same shape where one is given."""
        params = self.params if model is None else eqx.filter(model, has_gradient)
        # Fresh trees share equal buffers between leaves, which donation forbids.
        return jax.tree.map(jnp.copy, fresh_state(params, self.optimizer))

    def first_state_on(self, placement: Placement) -> TrainState:
        """The state before the first step, on the devices of a placement: of what is divided over them none has all."""
        if placement.alone:
            return placement.divided(self.first_state())

        @jax.jit
        def state(params: PyTree[Float[Array, ...]]) -> TrainState:
            return placement.kept(dataclasses.replace(self, params=params).first_state())

        return state(placement.divided(self.params))

    def model(self, params: PyTree[Float[Array, ...]]) -> AbstractLanguageModel:
        """The model with these parameters."""
        return eqx.combine(params, self.static)
