"""The lines of `metrics.jsonl`: one for a training step, one for a validation."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

from experiments.evaluation.evaluate import Validation
from experiments.training.step import StepMetrics
from unet.losses import level_prefix

Record = dict[str, float | int | None]


def step_record(step: int, num_bytes: int, metrics: StepMetrics) -> Record:
    """The line of a training step."""
    output = metrics.output
    record: Record = {
        "step": step,
        "bytes": num_bytes,
        "loss": float(output.loss),
        "bpb": -float(output.log_prob) / math.log(2),
        "early_bpb": None if output.early_log_prob is None else -float(output.early_log_prob) / math.log(2),
        "rate": float(output.rate),
        "aimed_rate": float(metrics.aimed_rate),
        "overflow": float(output.overflow),
        "padding": float(output.padding),
        "gradient_norm": float(metrics.gradient_norm),
    }
    for part, value in metrics.gradient_norms.items():
        level, name = re.fullmatch(r"(level\d+_)?(.*)", part).groups(default="")  # type: ignore[missing-attribute]  # matches all
        record[f"{level}gradient_norm_{name}"] = float(value)
    return record | {name: float(value) for name, value in output.metrics.items()}


def validation_record(step: int, num_bytes: int, validation: Validation) -> Record:
    """The line of a validation."""
    return {"step": step, "bytes": num_bytes, **held_out(validation)}


def held_out(validation: Validation) -> Record:
    """The numbers of a validation by name."""
    record: Record = {}
    for name, value in dataclasses.asdict(validation).items():
        if isinstance(value, Mapping):
            record.update({f"val_{name}_{key}": number(inner) for key, inner in value.items()})
        elif isinstance(value, tuple):
            record.update({f"val_{level_prefix(level)}rate": number(rate) for level, rate in enumerate(value, start=1)})
        else:
            record[f"val_{name}"] = number(value)
    return record


def number(value: float | int) -> float | int | None:
    """JSON has no NaN: what is not there is null."""
    return None if math.isnan(value) else value
