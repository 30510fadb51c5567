"""The content of `summary.json`: the results of a run in one flat object."""

from __future__ import annotations

import math

from experiments.config.settings import RunConfig
from experiments.training.prepared import figures_of
from experiments.training.records import held_out
from experiments.training.train import Outcome
from unet.flops import layer_flops, matrix_flops
from unet.losses import level_prefix

Summary = dict[str, float | int | str | None]


def target_rates(config: RunConfig) -> list[float | None]:
    """The target rate of each level, the outermost first; None of the tokens of a tokenizer, which come as they come, and of a
    model without tokens."""
    inside = [level.rate for level in config.levels]
    return [None, *inside] if config.reads_tokens or not inside else [config.rate, *inside[1:]]


def summary_of(config: RunConfig, outcome: Outcome) -> Summary:
    """The results of a finished run, described in `metrics.py`. Undefined values are None."""
    validation = outcome.validation
    summary: Summary = {
        "estimator": config.estimator,
        "dataset": config.dataset,
        "model": config.model,
        "seed": config.seed,
        "parameters": outcome.parameters,
        "steps": outcome.steps,
        "bytes": outcome.steps * config.bytes_per_step,
        "epochs": outcome.epochs,
        "shown_fraction": outcome.shown,
        "seconds": outcome.seconds,
        "bytes_per_second": outcome.bytes_per_second,
        "capacity": outcome.capacity,
        "dropped_fraction": max(outcome.dropped.shares, default=0.0),
        "dropped_warning": outcome.dropped.warning,
        "flops_per_byte": matrix_flops(
            outcome.model, rate=validation.rate, inner_rates=validation.inner_rates, samples=config.samples
        ).total,
        "layer_flops_per_byte": layer_flops(
            outcome.model,
            length=config.length,
            rate=validation.rate,
            inner_rates=validation.inner_rates,
            samples=config.samples,
        ).total,
        **held_out(validation),
    }
    summary |= figures_of(config, outcome.prepared)
    for level, rate in enumerate(target_rates(config)):
        summary[f"{level_prefix(level)}target_rate"] = rate
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in summary.items()}
