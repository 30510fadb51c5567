"""Time of the token level as a function of the boundary rate."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import equinox as eqx
import jax
from jaxtyping import Array, PyTree

from estimators.registry import EVERY_BYTE, REGULAR
from experiments.benchmark.timing import Work, time_interleaved
from experiments.config.build import build_byte_model
from experiments.config.settings import RunConfig, transformer_shape

RATES = (1.0, 1 / 2, 1 / 4, 1 / 8)
"""Fractions of positions with a boundary."""


@dataclass(frozen=True)
class RateReport:
    """`seconds`: time of the token level. `per_token`: time per token relative to that at a rate of one half."""

    seconds: float
    per_token: float


def token_level(config: RunConfig, *, rounds: int, calls: int) -> dict[str, RateReport]:
    """Time of the token level at each of `RATES`, forward and backward: the time of a gradient with token-level blocks minus that
    without. Boundaries are evenly spaced. All measurements are interleaved."""
    layers = transformer_shape(config).main_layers
    works = {f"{rate} {blocks}": _work(config, rate, blocks) for rate in RATES for blocks in (layers, 0)}
    timings = time_interleaved(works, baseline=next(iter(works)), rounds=rounds, calls=calls)
    seconds = {rate: timings[f"{rate} {layers}"].seconds - timings[f"{rate} 0"].seconds for rate in RATES}
    half = seconds[0.5] / 0.5
    return {f"{rate:g}": RateReport(time, time / rate / half) for rate, time in seconds.items()}


def _work(config: RunConfig, rate: float, blocks: int) -> Work:
    unet = dataclasses.replace(transformer_shape(config), main_layers=blocks)
    config = dataclasses.replace(config, unet=unet, estimator=REGULAR if rate < 1 else EVERY_BYTE, rate=min(rate, 0.5))
    key = jax.random.key(config.seed)
    model = build_byte_model(config, key)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    bytes = jax.random.randint(key, (config.batch, config.length), 32, 127)
    capacity = round(rate * config.length)

    @jax.jit
    def gradient(params: PyTree[Array]) -> PyTree[Array]:
        def loss(params: PyTree[Array]) -> Array:
            return eqx.combine(params, static).loss(bytes, key=key, capacities=(capacity,)).loss

        return jax.grad(loss)(params)

    return lambda: gradient(params)
