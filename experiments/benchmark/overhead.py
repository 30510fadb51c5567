"""FLOPs of learned boundaries: a training step with the score function compared with one with fixed boundaries."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from estimators import AbstractRouter, Boundaries, SamplingOptions
from estimators.base import has_gradient
from estimators.registry import DEFAULT, REGULAR
from estimators.sections import EARLY_EXIT, ScoreFunctionSettings
from experiments.benchmark.shapes import shapes_of
from experiments.config.settings import RunConfig
from unet import UNet
from unet.likelihood import plain_layout
from unet.ops import boundary_scan


@dataclass(frozen=True)
class OverheadReport:
    """FLOPs per byte of the loss and its gradient, by XLA's analysis of the unoptimised program.

    `prescribed`: with a boundary every 1/rate bytes, at no cost for drawing it. The score function adds: `policy`, the projection
    and sampling, forward and backward; `early_head`; `objective`, the returns and the losses. XLA counts a loop as one iteration,
    so that the sum over previous actions, about `window` operations per byte, is missing.
    """

    prescribed: float
    policy: float
    early_head: float
    objective: float

    @property
    def share(self) -> float:
        """Sum of the three additions as a fraction of `prescribed`."""
        return (self.policy + self.early_head + self.objective) / self.prescribed

    @property
    def share_without_early_head(self) -> float:
        """Policy and objective as a fraction of `prescribed`."""
        return (self.policy + self.objective) / self.prescribed


def overhead(config: RunConfig) -> OverheadReport:
    """The overhead of the score function in the model of `config`, with a batch size of 2."""
    config = dataclasses.replace(config, batch=2)

    def step(estimator: str, *, early_exit: bool = True) -> float:
        reductions = [name for name in ScoreFunctionSettings().reductions if early_exit or name != EARLY_EXIT]
        run = dataclasses.replace(config, estimator=estimator)
        return _loss_flops(run.with_settings(sfe={"reductions": reductions}))

    fixed = dataclasses.replace(config, estimator=REGULAR)
    prescribed, with_head, without_head = (
        step(REGULAR) - _sampling_flops(fixed),
        step(DEFAULT),
        step(DEFAULT, early_exit=False),
    )
    policy = _policy_flops(dataclasses.replace(config, estimator=DEFAULT))
    return OverheadReport(prescribed, policy, with_head - without_head, without_head - prescribed - policy)


def _loss_flops(config: RunConfig) -> float:
    """FLOPs per byte of the whole loss and its gradient."""
    params, static = eqx.partition(shapes_of(config), has_gradient)
    capacity = round(config.rate * config.length)

    def loss(params: UNet, bytes: jax.Array, key: jax.Array) -> jax.Array:
        model: UNet = eqx.combine(params, static)
        return model.loss(bytes, key=key, capacities=(capacity,)).loss

    return _flops(jax.value_and_grad(loss), params, _bytes(config), jax.random.key(0)) / (config.batch * config.length)


def _policy_flops(config: RunConfig) -> float:
    """FLOPs per byte of drawing the boundaries and of the gradient of their logits."""

    def sum_of_logits(
        inputs: tuple[AbstractRouter, jax.Array], draw: Callable[[AbstractRouter, jax.Array], Boundaries]
    ):
        return jnp.sum(draw(*inputs).logits)

    return _router_flops(config, lambda draw: jax.value_and_grad(lambda inputs: sum_of_logits(inputs, draw)))


def _sampling_flops(config: RunConfig) -> float:
    """FLOPs per byte of drawing the boundaries."""
    return _router_flops(config, lambda draw: lambda inputs: draw(*inputs).actions)


def _router_flops(config: RunConfig, wrap: Callable[..., Callable[..., PyTree]]) -> float:
    """FLOPs per byte of `wrap(draw)`, where `draw` draws boundaries from the router's parameters and hidden states."""
    params, static = eqx.partition(shapes_of(config).stage.estimators[0].router, has_gradient)
    hidden = jax.ShapeDtypeStruct((config.batch, config.length, config.unet.widths[0]), jnp.dtype(config.unet.compute))

    def run(inputs: tuple[AbstractRouter, jax.Array], bytes: jax.Array, key: jax.Array) -> PyTree:
        def draw(params: AbstractRouter, hidden: jax.Array) -> Boundaries:
            return eqx.combine(params, static)(hidden, plain_layout(bytes), SamplingOptions(boundary_scan, key))

        return wrap(draw)(inputs)

    return _flops(run, (params, hidden), _bytes(config), jax.random.key(0)) / (config.batch * config.length)


def _flops(function: Callable[..., PyTree], *arguments: PyTree) -> float:
    """FLOPs of the unoptimised program, by XLA's analysis."""
    analysis = jax.jit(function).lower(*arguments).cost_analysis()
    assert analysis is not None
    return analysis["flops"]


def _bytes(config: RunConfig) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((config.batch, config.length), jnp.int32)
