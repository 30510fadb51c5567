"""How the time of the token level follows the rate of boundaries."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import equinox as eqx
import jax
from jaxtyping import Array, PyTree

from experiments.benchmark.timing import Work, in_turns
from experiments.config.registry import build_model
from experiments.config.settings import RunConfig, transformer_shape

RATES = (1.0, 1 / 2, 1 / 4, 1 / 8)
"""Fractions of positions with a boundary."""


@dataclass(frozen=True)
class RateReport:
    """`seconds` of the token level at a rate, and what each token takes relative to a rate of one half."""

    seconds: float
    per_token: float


def token_level(config: RunConfig, *, rounds: int, calls: int) -> dict[str, RateReport]:
    """What the token level of a model takes at each of `RATES`, forward and backward: a loss and its gradient less the same
    without token-level blocks. Boundaries are evenly spaced; all rates and both models take turns."""
    layers = transformer_shape(config).main_layers
    works = {f"{rate} {blocks}": _work(config, rate, blocks) for rate in RATES for blocks in (layers, 0)}
    timings = in_turns(works, baseline=next(iter(works)), rounds=rounds, calls=calls)
    seconds = {rate: timings[f"{rate} {layers}"].seconds - timings[f"{rate} 0"].seconds for rate in RATES}
    half = seconds[0.5] / 0.5
    return {f"{rate:g}": RateReport(taken, taken / rate / half) for rate, taken in seconds.items()}


def _work(config: RunConfig, rate: float, blocks: int) -> Work:
    unet = dataclasses.replace(transformer_shape(config), main_layers=blocks)
    config = dataclasses.replace(
        config, unet=unet, estimator="stride" if rate < 1 else "isotropic", rate=min(rate, 0.5)
    )
    key = jax.random.key(config.seed)
    model = build_model(config, key)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    bytes = jax.random.randint(key, (config.batch, config.length), 32, 127)
    capacity = round(rate * config.length)

    @jax.jit
    def gradient(params: PyTree[Array]) -> PyTree[Array]:
        def loss(params: PyTree[Array]) -> Array:
            return eqx.combine(params, static).loss(bytes, key=key, capacities=(capacity,)).loss

        return jax.grad(loss)(params)

    return lambda: gradient(params)
