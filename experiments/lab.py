"""How biased and how noisy every estimator is, exactly, and where each leads: `python -m experiments.lab --out DIR`."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import tyro
from matplotlib.figure import Figure

from data import load, open_source
from experiments.config import ConfigError
from experiments.display import Display, exit_code
from experiments.folder import json_text, write_atomically
from experiments.laboratory.gradients import Subjects, findings
from experiments.laboratory.results import Finding, Flow, Noise
from experiments.laboratory.scale import noise
from experiments.laboratory.subjects import RATE, SHAPE, train_subject
from experiments.launch import with_large_pages
from experiments.presets import PRESETS
from experiments.report import picture
from unet import MeanPool, SelectDistribute, SelectSmooth

FILES = ("lab.md", "lab.json", "lab.png")


@dataclass(frozen=True)
class LabConfig:
    """Examine gradient estimators on models small enough to try every boundary string."""

    out: Path
    """Folder for the table (lab.md, lab.json) and the figure (lab.png)."""
    dataset: str = "docs"
    """Text to train the small models on: anything that --dataset of experiments.run takes."""
    length: int = 10
    """Bytes of a text; 2 to the power of length - 1 strings are tried."""
    texts: int = 6
    """Texts that the models are examined on."""
    steps: int = 600
    """Training steps of the small models."""
    time: float = 3000.0
    """Time for which the gradient flows run."""
    learning_rates: tuple[float, ...] = (1.0, 8.0)
    """Learning rates of the flows with noise."""
    after: tuple[int, ...] = (0, 100)
    """Training steps after which the noise in the model of ordinary size is measured."""
    draws: int = 32
    """Draws of boundaries in the model of ordinary size; a multiple of 4."""
    seed: int = 0
    """Seed of the models and of all noise."""
    overwrite: bool = False
    """Replace the files of an earlier run."""


def check(config: LabConfig) -> None:
    """Raise `ConfigError` for values that cannot be worked with."""
    if not 3 <= config.length <= 12:
        raise ConfigError(f"--length lies between 3 and 12, since every boundary string is tried; got {config.length}")
    if config.texts < 2:
        raise ConfigError(f"--texts must be at least 2, since returns are centred over them; got {config.texts}")
    if config.steps < 1 or config.time <= 0:
        raise ConfigError("--steps must be at least 1 and --time positive")
    if config.draws < 8 or config.draws % 4:
        raise ConfigError(f"--draws is a multiple of 4 and at least 8; got {config.draws}")
    if any(rate <= 0 for rate in config.learning_rates) or any(steps < 0 for steps in config.after):
        raise ConfigError("--learning-rates must be positive and --after not negative")
    present = [name for name in FILES if (config.out / name).exists()]
    if present and not config.overwrite:
        raise ConfigError(
            f"{config.out} holds {', '.join(present)} already: replace it (--overwrite) or name another --out"
        )


def run(config: LabConfig, display: Display) -> None:
    """Do all experiments and write their results. Raises `ConfigError` and `DataError`."""
    check(config)
    try:
        from experiments.laboratory.flow import flows, noisy_flows
    except ImportError as error:
        raise ConfigError(f"the laboratory needs diffrax ({error}): pip install 'caesura-lm[lab]'") from error

    config.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()

    def note(text: str) -> None:
        display.note(f"{time.perf_counter() - started:4.0f} s  {text}")

    source = open_source(config.dataset, text_field=None, cache=None, cache_bytes=8 << 30)
    held_out = 16 * config.texts * config.length
    split = load(source, length=config.length, protocol="crop", held_out_share=0.05, held_out_bytes=held_out)
    key = jax.random.key(config.seed)
    chunkers = SelectDistribute(), MeanPool(SHAPE.dim, key=jax.random.fold_in(key, 9)), SelectSmooth()
    trained = []
    for number, chunker in enumerate(chunkers):
        note(f"training a small model with {type(chunker).__name__}")
        subject = train_subject(
            split,
            chunker,
            texts=config.texts,
            length=config.length,
            steps=config.steps,
            key=jax.random.fold_in(key, number),
        )
        trained.append(subject)
    subjects = Subjects(*trained)
    note("exact means and variances")
    shape = (config.texts, config.length - 1)
    # Near the start of training: the target rate, give or take what a few steps would change.
    logits = jax.scipy.special.logit(RATE) + 0.5 * jax.random.normal(jax.random.fold_in(key, 10), shape)
    table = findings(subjects, logits)
    note("gradient flows")
    ways = flows(subjects, time=config.time)
    note("gradient flows with noise")
    paths = noisy_flows(
        subjects.distribute, time=config.time, rates=config.learning_rates, key=jax.random.fold_in(key, 11)
    )
    noises: dict[str, list[Noise]] = {}
    tiny = dataclasses.replace(PRESETS["tiny"], dataset=config.dataset, seed=config.seed)
    for steps in config.after:
        note(f"noise in `tiny` after {steps} steps")
        noises[str(steps)] = noise(tiny, steps=steps, draws=config.draws, key=jax.random.fold_in(key, 12))

    everything = {
        "settings": dataclasses.asdict(config),
        "gradients": [dataclasses.asdict(finding) for finding in table],
        "flows": [dataclasses.asdict(flow) for flow in (*ways, *paths)],
        "noise": {steps: [dataclasses.asdict(one) for one in found] for steps, found in noises.items()},
    }
    write_atomically(config.out / "lab.json", json_text(everything))
    write_atomically(config.out / "lab.png", flow_picture(ways, paths))
    page = "\n".join(
        [
            "## Gradients\n",
            gradient_table(table),
            "## Flows\n",
            flow_table(ways),
            "## Flows with noise\n",
            flow_table(paths),
            *(f"## Noise in `tiny` after {steps} steps\n\n{noise_table(found)}" for steps, found in noises.items()),
        ]
    )
    write_atomically(config.out / "lab.md", page)
    display.note(page)
    note(f"see {config.out / 'lab.md'} and {config.out / 'lab.png'}")


def gradient_table(table: Sequence[Finding]) -> str:
    """Bias, variance and signal-to-noise of every estimator, in Markdown."""
    lines = [
        "| estimator | model | bias | scale | cosine | variance | SNR | cost | SNR / cost |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in table:
        numbers = (one.bias, one.scale, one.cosine, one.variance, one.snr, one.cost, one.snr_per_cost)
        lines.append(f"| {one.name} | {one.model} | " + " | ".join(_short(number) for number in numbers) + " |")
    return "\n".join(lines) + "\n"


def flow_table(found: Sequence[Flow]) -> str:
    """Where every flow ended, in Markdown; losses in nats per byte, price included."""
    lines = [
        "| flow | model | start | end | likelier string | best string | rate | way closed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in found:
        losses = " | ".join(f"{value:.4f}" for value in (one.start, one.end, one.likelier, one.best))
        lines.append(f"| {one.name} | {one.model} | {losses} | {one.rate:.3f} | {one.closed:.2f} |")
    return "\n".join(lines) + "\n"


def noise_table(found: Sequence[Noise]) -> str:
    """Variance ratios in a model of ordinary size, in Markdown."""
    lines = ["| reductions | variance | SNR of a step | SNR per FLOP |", "|---|---|---|---|"]
    lines += [
        f"| {one.name} | {_short(one.variance)} | {_short(one.snr)} | {_short(one.snr_per_flop)} |" for one in found
    ]
    return "\n".join(lines) + "\n"


def flow_picture(ways: Sequence[Flow], paths: Sequence[Flow]) -> bytes:
    """Expected loss above that of the best strings, over time: each chunker's flows, then the noisy ones."""
    figure = Figure(figsize=(13, 5.2), dpi=130, layout="constrained")
    axes = figure.subplots(1, 4)
    titles = {"distribute": "select, distribute", "mean": "means of groups", "smooth": "select, smooth"}
    for part, (model, title) in zip(axes[:3], titles.items(), strict=True):
        for one in ways:
            if one.model == model:
                style = {"color": "black", "linestyle": "--"} if one.name == "exact gradient" else {}
                part.plot(one.times[1:], [loss - one.best for loss in one.losses[1:]], label=one.name, **style)
        part.set_title(title)
        part.set_xscale("log")
    for one in paths:
        axes[3].plot(one.times, [loss - one.best for loss in one.losses], label=one.name, linewidth=0.9)
    axes[3].set_title("score function with noise")
    for part in axes:
        part.axhline(0.0, color="#888888", linewidth=0.8)
        part.set_xlabel("time")
        part.grid(alpha=0.25)
        if part.get_legend_handles_labels()[0]:
            part.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    axes[0].set_ylabel("loss above the best string's, nats per byte")
    return picture(figure)


def _short(value: float) -> str:
    return "∞" if math.isinf(value) else "–" if math.isnan(value) else f"{value:.3g}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns 0, or 2 for a user's error."""
    display = Display()
    given = sys.argv[1:] if arguments is None else list(arguments)
    return exit_code(display, lambda: run(tyro.cli(LabConfig, prog="python -m experiments.lab", args=given), display))


if __name__ == "__main__":
    with_large_pages("experiments.lab")
    sys.exit(main())
