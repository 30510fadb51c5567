"""Every number that a run or a comparison writes, under the one name that it has everywhere."""

from __future__ import annotations

import re
from dataclasses import dataclass

from experiments.reporting.markdown import table


@dataclass(frozen=True)
class Metric:
    """A number: its name, its unit, and what it says. `{n}` in a name stands for a level of tokens inside the first, from 1
    on, `{class}` for a class of bytes: whitespace or spacelike."""

    name: str
    unit: str
    meaning: str


TRAINING = (
    Metric("step", "steps", "training steps so far"),
    Metric("bytes", "bytes", "training text so far; in `summary.json` of the whole run"),
    Metric("seconds", "s", "time spent in training so far; in `summary.json` of the whole run"),
    Metric("epochs", "1", "how often the data was gone through so far"),
    Metric("shown_fraction", "fraction", "of the training text that `--data.protocol` can show"),
    Metric("loss", "nats per byte", "what the step minimises: all losses with their weights"),
    Metric("bpb", "bits per byte", "of the batch"),
    Metric("early_bpb", "bits per byte", "of the batch, predicted by the early head"),
    Metric("rate", "fraction", "of the batch's bytes that close a token; 0 without a token level"),
    Metric(
        "level{n}_rate", "fraction", "of the tokens of the level around that close a token of this level, in the batch"
    ),
    Metric("aimed_rate", "fraction", "the target rate of the estimator at this step, as `--target` moves it"),
    Metric("overflow", "fraction", "of the batch's bytes whose boundary was dropped, beyond the capacity"),
    Metric("level{n}_overflow", "fraction", "the same of the tokens of the level around"),
    Metric("padding", "fraction", "of the token positions that held no token"),
    Metric("gradient_norm", "nats per byte", "global norm of the gradient before it is clipped"),
    Metric("drawn_so_far", "steps", "boundaries drawn, summed over steps, each step's as a fraction of its bytes"),
    Metric("dropped_so_far", "steps", "boundaries dropped, in the same unit"),
    Metric("level{n}_drawn_so_far", "steps", "the same of a level inside"),
    Metric("level{n}_dropped_so_far", "steps", "the same of a level inside"),
)
"""Lines of `metrics.jsonl` for a training step."""

OBJECTIVES = (
    Metric("policy_loss", "nats²", "of the score function, without its weight"),
    Metric("rate_loss", "1", "what holds the rate of the score function, without its weight"),
    Metric("policy_entropy", "nats per decision", "of the policy, in the batch"),
    Metric("advantage_rms", "nats", "root mean square of what decisions are credited with"),
    Metric("ratio_loss", "1", "of dynamic chunking (H-Net eq. 10), without its weight"),
    Metric("prior_loss", "nats per byte", "of straight-through Gumbel, without its weight"),
    Metric("imitation_loss", "nats per byte", "cross-entropy of a distilled policy, without its weight"),
)
"""What the objective of the first level adds to these lines; one inside writes `level{n}_` before the name. Estimators of your
own may add others."""

HELD_OUT = (
    Metric("val_bpb", "bits per byte", "with sampled boundaries"),
    Metric("val_bpb_error", "bits per byte", "standard error of `val_bpb` over documents"),
    Metric("val_early_bpb", "bits per byte", "predicted by the early head"),
    Metric("val_bpb_greedy", "bits per byte", "with greedy boundaries, where another router draws those of training"),
    Metric("val_bpb_as_trained", "bits per byte", "with the boundaries of that other router"),
    Metric("val_rate", "fraction", "of bytes that close a token; 0 without a token level"),
    Metric("val_level{n}_rate", "fraction", "of the tokens of the level around that close a token of this level"),
    Metric("val_policy_entropy", "nats per decision", "of the policy"),
    Metric("val_overflow", "fraction", "of bytes whose boundary was dropped: 0 by construction"),
    Metric("val_bytes", "bytes", "held-out bytes that were predicted"),
    Metric("val_documents", "documents", "different ones among them"),
    Metric("val_{class}_auc", "probability", "that p is higher at a byte of the class than at another one"),
    Metric("val_{class}_precision", "fraction", "of greedy boundaries (p > 0.5) that stand at a byte of the class"),
    Metric("val_{class}_recall", "fraction", "of the bytes of the class that have a greedy boundary"),
    Metric("val_{class}_f1", "fraction", "harmonic mean of the two"),
    Metric("val_{class}_sampled_precision", "fraction", "the same for sampled boundaries"),
    Metric("val_{class}_sampled_recall", "fraction", "the same for sampled boundaries"),
    Metric("val_{class}_sampled_f1", "fraction", "the same for sampled boundaries"),
)
"""Lines of `metrics.jsonl` for a validation, the last of which `summary.json` repeats; all on held-out text."""

RUN = (
    Metric("seed", "1", "of parameters, data order and boundaries"),
    Metric("parameters", "1", "that train"),
    Metric("steps", "steps", "of the whole run"),
    Metric("bytes_per_second", "bytes/s", "of training text, without compilation and validation"),
    Metric("capacity", "tokens", "most tokens that a sequence can have in training"),
    Metric("target_rate", "fraction", "the rate asked for (`--rate`)"),
    Metric("level{n}_target_rate", "fraction", "the same of a level inside (`--inner-rates`)"),
    Metric(
        "dropped_fraction", "fraction", "of the boundaries of training that were dropped, at the level that lost most"
    ),
    Metric("flops_per_byte", "FLOP/byte", "of training at `val_rate`: 6 per parameter and byte or token"),
    Metric("layer_flops_per_byte", "FLOP/byte", "the same counted layer by layer, attention included"),
    Metric("vocabulary", "tokens", "of the byte-pair encoding"),
    Metric("vocabulary_rate", "fraction", "of bytes of training text at which one of them begins"),
    Metric("vocabulary_bytes", "bytes", "of training text that they were learned from"),
)
"""What `summary.json` has besides."""

COMPARISON = (
    Metric("gain", "bits per byte", "how far `val_bpb` lies below that of `uniform`, seed by seed"),
    Metric("val_rates", "fraction", "`val_rate` and each `val_level{n}_rate`"),
    Metric("target_rates", "fraction", "`target_rate` and each `level{n}_target_rate`"),
    Metric("flops", "FLOP", "of training so far, a point of a curve"),
)
"""What `table.json` of a comparison has besides; a method's numbers are means over its seeds."""

SECTIONS = {
    "Training: a line of `metrics.jsonl` for each step": TRAINING,
    "Training: what an objective adds to it": OBJECTIVES,
    "Held-out text: a line of `metrics.jsonl` for each validation, and `summary.json`": HELD_OUT,
    "A finished run: `summary.json`": RUN,
    "A comparison: `table.json`": COMPARISON,
}


def metric_of(name: str) -> Metric | None:
    """What a number called `name` is; None where there is none of that name."""
    general = re.sub(r"^(val_)?level\d+_", r"\1level{n}_", name)
    general = re.sub(r"^val_(whitespace|spacelike)_", "val_{class}_", general)
    known = {metric.name: metric for metrics in SECTIONS.values() for metric in metrics}
    inside = {metric.name: metric for metric in OBJECTIVES}
    return known.get(general) or inside.get(general.removeprefix("level{n}_"))


def documentation() -> str:
    """`docs/metrics.md`."""
    parts = [
        "# Numbers\n",
        "A number has one name in `metrics.jsonl`, `summary.json`, `table.json` and the tables made of them. `val_` marks "
        "held-out text, `level{n}_` a level of tokens inside the first (n = 1, 2, …), `{class}` a class of bytes (`whitespace` "
        "or `spacelike`). What is not defined is null. Written by `experiments/reporting/metrics.py`.\n",
    ]
    for title, metrics in SECTIONS.items():
        rows = [(f"`{metric.name}`", metric.unit, metric.meaning) for metric in metrics]
        parts.append(f"## {title}\n\n{table(['name', 'unit', 'meaning'], rows)}")
    return "\n".join(parts)
