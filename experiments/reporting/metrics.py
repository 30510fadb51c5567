"""All metrics that runs and comparisons write. Each metric has the same name in all files."""

from __future__ import annotations

import re
from dataclasses import dataclass

from experiments.reporting.markdown import table


@dataclass(frozen=True)
class Metric:
    """A metric: name, unit and meaning. In a name, `{n}` stands for an inner token level (1, 2, …), `{class}` for a class of
    bytes (whitespace or spacelike), `{part}` for a part of the model and `{tenth}` for 0 to 9."""

    name: str
    unit: str
    meaning: str


TRAINING = (
    Metric("step", "steps", "training steps so far"),
    Metric("bytes", "bytes", "training text so far; in `summary.json`: of the whole run"),
    Metric("seconds", "s", "training time so far; in `summary.json`: of the whole run"),
    Metric("epochs", "1", "passes over the training text so far"),
    Metric("shown_fraction", "fraction", "of the training text that can occur in batches under `--data.protocol`"),
    Metric("loss", "nats per byte", "the minimised loss: the weighted sum of all losses"),
    Metric("bpb", "bits per byte", "of the batch"),
    Metric("early_bpb", "bits per byte", "of the batch, from the early head"),
    Metric("rate", "fraction", "of the batch's bytes with a boundary; 0 without a token level"),
    Metric(
        "level{n}_rate", "fraction", "of the tokens of the next outer level with a boundary of this level, in the batch"
    ),
    Metric(
        "free_rate",
        "fraction",
        "the same of the bytes where no constraint (`--constrain`) forces or forbids a boundary",
    ),
    Metric("level{n}_free_rate", "fraction", "the same for an inner level (`--inner-constrain`)"),
    Metric("aimed_rate", "fraction", "target rate of the estimator at this step, after adjustment by `--target`"),
    Metric(
        "overflow", "fraction", "of the batch's bytes with a boundary that was dropped, since it exceeded the capacity"
    ),
    Metric("level{n}_overflow", "fraction", "the same for tokens of the next outer level"),
    Metric("padding", "fraction", "of the token positions that are padding"),
    Metric("gradient_norm", "nats per byte", "global norm of the gradient before clipping"),
    Metric(
        "gradient_norm_{part}",
        "nats per byte",
        "the same of a part: `embedding`, `encoder`, `router`, `chunker`, `objective`, `main`, `decoder`, `head`, `early_head`",
    ),
    Metric("level{n}_gradient_norm_{part}", "nats per byte", "the same of a part of an inner level"),
    Metric("drawn_so_far", "steps", "drawn boundaries, summed over steps; those of a step as a fraction of its bytes"),
    Metric("dropped_so_far", "steps", "dropped boundaries, in the same unit"),
    Metric("level{n}_drawn_so_far", "steps", "the same for an inner level"),
    Metric("level{n}_dropped_so_far", "steps", "the same for an inner level"),
)
"""Metrics in `metrics.jsonl` for a training step."""

OBJECTIVES = (
    Metric("policy_loss", "nats²", "loss of the policy under the score function, unweighted"),
    Metric("rate_loss", "1", "loss that keeps the rate of the score function at its target, unweighted"),
    Metric("policy_entropy", "nats per decision", "of the policy, in the batch"),
    Metric("advantage_rms", "nats", "root mean square of the advantages"),
    Metric("ratio_loss", "1", "of dynamic chunking (H-Net eq. 10), unweighted"),
    Metric("prior_loss", "nats per byte", "of straight-through Gumbel, unweighted"),
    Metric(
        "balance_loss", "1", "of mixtures of experts, unweighted, mean over layers; 1 if all experts are chosen alike"
    ),
    Metric("dropped_choices", "fraction", "of the choices of experts that had no room, mean over layers"),
    Metric("imitation_loss", "nats per byte", "cross-entropy of a distilled policy, unweighted"),
    Metric("byte_loss", "nats per byte", "divergence of the next byte from what a teacher expects, unweighted"),
    Metric("embedding_loss", "1", "squared distance to a teacher's embeddings relative to their size, unweighted"),
)
"""Metrics in `metrics.jsonl` from the objective of the first level. Objectives of inner levels add the prefix `level{n}_`. Custom
estimators may add others."""

HELD_OUT = (
    Metric("val_bpb", "bits per byte", "with sampled boundaries"),
    Metric("val_bpb_error", "bits per byte", "standard error of `val_bpb` over documents"),
    Metric("val_early_bpb", "bits per byte", "from the early head"),
    Metric("val_bpb_greedy", "bits per byte", "with greedy boundaries; only for off-policy routers"),
    Metric("val_bpb_as_trained", "bits per byte", "with boundaries drawn as in training; only for off-policy routers"),
    Metric("val_rate", "fraction", "of bytes with a boundary; 0 without a token level"),
    Metric("val_level{n}_rate", "fraction", "of the tokens of the next outer level with a boundary of this level"),
    Metric(
        "val_free_rate",
        "fraction",
        "the same as `val_rate` of the bytes that constraints leave free; only with constraints",
    ),
    Metric("val_policy_entropy", "nats per decision", "of the policy"),
    Metric(
        "val_probability_{tenth}",
        "fraction",
        "of the bytes where no boundary is forced, with a boundary probability from tenth/10 to (tenth + 1)/10",
    ),
    Metric("val_overflow", "fraction", "of bytes with a boundary that was dropped; 0 by construction"),
    Metric("val_bytes", "bytes", "predicted held-out bytes"),
    Metric("val_documents", "documents", "distinct documents among them"),
    Metric(
        "val_{class}_auc",
        "probability",
        "area under the ROC curve: that p is higher at a byte of the class than at another byte",
    ),
    Metric("val_{class}_precision", "fraction", "of greedy boundaries (p > 0.5) that are at a byte of the class"),
    Metric("val_{class}_recall", "fraction", "of the bytes of the class that have a greedy boundary"),
    Metric("val_{class}_f1", "fraction", "harmonic mean of the two"),
    Metric("val_{class}_sampled_precision", "fraction", "the same for sampled boundaries"),
    Metric("val_{class}_sampled_recall", "fraction", "the same for sampled boundaries"),
    Metric("val_{class}_sampled_f1", "fraction", "the same for sampled boundaries"),
)
"""Metrics on held-out text: in `metrics.jsonl` for each validation, in `summary.json` for the last one."""

RUN = (
    Metric("seed", "1", "seed of parameters, data order and boundaries"),
    Metric("parameters", "1", "number of trained parameters"),
    Metric("steps", "steps", "training steps of the whole run"),
    Metric("bytes_per_second", "bytes/s", "of training text, without compilation and validation"),
    Metric("capacity", "tokens", "maximum tokens per sequence in training"),
    Metric("target_rate", "fraction", "target rate (`--rate`); under constraints, of the bytes that they leave free"),
    Metric("level{n}_target_rate", "fraction", "target rate of an inner level (`--inner-rates`)"),
    Metric(
        "dropped_fraction", "fraction", "of the boundaries in training that were dropped, at the level with the most"
    ),
    Metric("flops_per_byte", "FLOP/byte", "of training at `val_rate`: 6 per parameter and byte or token"),
    Metric("layer_flops_per_byte", "FLOP/byte", "the same, counted layer by layer and including attention"),
    Metric("vocabulary", "tokens", "size of the byte-pair encoding"),
    Metric("vocabulary_rate", "fraction", "of bytes of training text at which a token of the encoding begins"),
    Metric("vocabulary_bytes", "bytes", "training text that the encoding was learned from"),
)
"""Further metrics in `summary.json`."""

COMPARISON = (
    Metric("gain", "bits per byte", "`val_bpb` of `uniform` minus that of the method, paired by seed"),
    Metric("val_rates", "fraction", "`val_rate` and each `val_level{n}_rate`"),
    Metric("target_rates", "fraction", "`target_rate` and each `level{n}_target_rate`"),
    Metric("flops", "FLOP", "training FLOPs so far, at a point of a curve"),
)
"""Further metrics in `table.json` of a comparison, which has means over the seeds of a method."""

SECTIONS = {
    "Training: `metrics.jsonl`, one record for each logged step": TRAINING,
    "Training: metrics of objectives": OBJECTIVES,
    "Held-out text: `metrics.jsonl`, one record for each validation, and `summary.json`": HELD_OUT,
    "A finished run: `summary.json`": RUN,
    "A comparison: `table.json`": COMPARISON,
}


def metric_of(name: str) -> Metric | None:
    """The metric called `name`, which may have a level or a class in it; None for an unknown name."""
    general = re.sub(r"^(val_)?level\d+_", r"\1level{n}_", name)
    general = re.sub(r"gradient_norm_[a-z_]+$", "gradient_norm_{part}", general)
    general = re.sub(r"^val_probability_\d$", "val_probability_{tenth}", general)
    general = re.sub(r"^val_(whitespace|spacelike)_", "val_{class}_", general)
    known = {metric.name: metric for metrics in SECTIONS.values() for metric in metrics}
    of_objectives = {metric.name: metric for metric in OBJECTIVES}
    return known.get(general) or of_objectives.get(general.removeprefix("level{n}_"))


def documentation() -> str:
    """The content of `docs/metrics.md`."""
    parts = [
        "# Metrics\n",
        "A metric has the same name in `metrics.jsonl`, `summary.json` and `table.json`. `val_` marks held-out text, `level{n}_` "
        "an inner token level (n = 1, 2, …), `{class}` a class of bytes (`whitespace` or `spacelike`). Undefined values are "
        "null. `experiments/reporting/metrics.py` generates this page.\n",
    ]
    for title, metrics in SECTIONS.items():
        rows = [(f"`{metric.name}`", metric.unit, metric.meaning) for metric in metrics]
        parts.append(f"## {title}\n\n{table(['name', 'unit', 'meaning'], rows)}")
    return "\n".join(parts)
