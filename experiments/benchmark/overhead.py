"""What learning the boundaries costs: a training step with the score function against one whose boundaries are given."""

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
from experiments.benchmark.shapes import shapes_of
from experiments.config.settings import EstimatorName, RunConfig
from unet import UNet
from unet.likelihood import plain_layout
from unet.ops import boundary_scan


@dataclass(frozen=True)
class OverheadReport:
    """Floating-point operations per byte of a loss and its gradient, by XLA's count of the program before it is optimised.

    `prescribed`: with boundaries that are given, at every 1/rate bytes, and cost nothing. On top of these, with the score
    function: `policy`, its projection and its draws forward and backward; `early_head`; `objective`, the returns and the
    losses. XLA counts a loop as one pass: of a policy with memory the sums over it, some `window` a byte, are missing.
    """

    prescribed: float
    policy: float
    early_head: float
    objective: float

    @property
    def share(self) -> float:
        """All three as a share of a step with given boundaries."""
        return (self.policy + self.early_head + self.objective) / self.prescribed

    @property
    def share_without_early_head(self) -> float:
        """Policy and objective alone."""
        return (self.policy + self.objective) / self.prescribed


def overhead(config: RunConfig) -> OverheadReport:
    """The overhead of the score function in the model of `config`, at two sequences a batch."""
    config = dataclasses.replace(config, batch=2)

    def step(estimator: EstimatorName, *, early_exit: bool = True) -> float:
        sfe = dataclasses.replace(config.sfe, early_exit=early_exit)
        return _loss_flops(dataclasses.replace(config, estimator=estimator, sfe=sfe))

    given = dataclasses.replace(config, estimator="stride")
    prescribed, whole, headless = step("stride") - _drawing_flops(given), step("sfe"), step("sfe", early_exit=False)
    policy = _policy_flops(dataclasses.replace(config, estimator="sfe"))
    return OverheadReport(prescribed, policy, whole - headless, headless - prescribed - policy)


def _loss_flops(config: RunConfig) -> float:
    """Of the whole loss and its gradient, per byte."""
    params, static = eqx.partition(shapes_of(config), has_gradient)
    capacity = round(config.rate * config.length)

    def loss(params: UNet, bytes: jax.Array, key: jax.Array) -> jax.Array:
        model: UNet = eqx.combine(params, static)
        return model.loss(bytes, key=key, capacities=(capacity,)).loss

    return _flops(jax.value_and_grad(loss), params, _bytes(config), jax.random.key(0)) / (config.batch * config.length)


def _policy_flops(config: RunConfig) -> float:
    """Of drawing the boundaries and of the gradient of their log-odds, per byte."""

    def log_odds(both: tuple[AbstractRouter, jax.Array], draw: Callable[[AbstractRouter, jax.Array], Boundaries]):
        return jnp.sum(draw(*both).logits)

    return _router_flops(config, lambda draw: jax.value_and_grad(lambda both: log_odds(both, draw)))


def _drawing_flops(config: RunConfig) -> float:
    """Of drawing the boundaries alone, per byte."""
    return _router_flops(config, lambda draw: lambda both: draw(*both).actions)


def _router_flops(config: RunConfig, wrapped: Callable[..., Callable[..., PyTree]]) -> float:
    params, static = eqx.partition(shapes_of(config).stage.estimators[0].router, has_gradient)
    hidden = jax.ShapeDtypeStruct((config.batch, config.length, config.unet.widths[0]), jnp.dtype(config.unet.compute))

    def run(both: tuple[AbstractRouter, jax.Array], bytes: jax.Array, key: jax.Array) -> PyTree:
        def draw(params: AbstractRouter, hidden: jax.Array) -> Boundaries:
            return eqx.combine(params, static)(hidden, plain_layout(bytes), SamplingOptions(boundary_scan, key))

        return wrapped(draw)(both)

    return _flops(run, (params, hidden), _bytes(config), jax.random.key(0)) / (config.batch * config.length)


def _flops(function: Callable[..., PyTree], *arguments: PyTree) -> float:
    """By XLA's count before optimisation."""
    analysis = jax.jit(function).lower(*arguments).cost_analysis()
    assert analysis is not None
    return analysis["flops"]


def _bytes(config: RunConfig) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((config.batch, config.length), jnp.int32)
