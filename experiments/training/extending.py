"""A run that goes on to another end than it was begun with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from experiments.config.errors import ConfigError
from experiments.config.files import to_json
from experiments.config.plugins import trusted
from experiments.config.sections import ScheduleConfig
from experiments.config.settings import RunConfig
from experiments.training.optimizer import learning_rate
from experiments.training.run_dir import CHECKPOINTS, CONFIG, SUMMARY, has_checkpoint, read_config
from experiments.training.target import TargetSchedule
from unet.files.saving import WEIGHTS, write_atomically

OF_THE_END = ("bytes", "steps", "schedule")
"""Settings that a run may have otherwise when it goes on."""


def latest_step(config: RunConfig) -> int:
    """The step of the newest checkpoint of a run, 0 without one."""
    folder = config.run_dir / CHECKPOINTS
    steps = [int(path.name) for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    return max(steps, default=0)


def resumed(config: RunConfig, saved: RunConfig) -> RunConfig:
    """A run that goes on, with --schedule.decay-now made into the place where it goes on, and with the alignment that it was
    begun with. Raises `ConfigError` for an end that lies behind it."""
    config, step = _aligned_as(config, saved), latest_step(config)
    if config.total_steps < step:
        raise ConfigError(
            f"the run in {config.run_dir} is at step {step} ({_megabytes(config, step)}) already, and is asked to end at step "
            f"{config.total_steps}: name at least as many --bytes or --steps"
        )
    if not config.schedule.decay_now:
        return config
    before = saved.schedule
    if before.decay_from is not None and config.total_steps != saved.total_steps:
        raise ConfigError(
            f"the learning rate of the run in {config.run_dir} decays from {before.decay_from / 1e6:.2f} MB on already, to step "
            f"{saved.total_steps}: leave out --schedule.decay-now to stretch that decay, or keep the end"
        )
    if before.decay_from is None:
        planned = saved.total_steps * saved.bytes_per_step
        before = ScheduleConfig(decay_from=step * config.bytes_per_step, planned_bytes=planned)
    if step >= config.total_steps:
        raise ConfigError(
            f"the run in {config.run_dir} has ended, so its learning rate cannot decay any more: name more --bytes, or --steps"
        )
    return dataclasses.replace(config, schedule=before)


def _aligned_as(config: RunConfig, saved: RunConfig) -> RunConfig:
    """`config` with an alignment that ends where that of `saved` does: by default it is half of a run, and another end would move
    it, even back to steps that have left it behind."""
    if config.align_steps == saved.align_steps or config.distill.align_bytes is not None:
        return config
    bytes = saved.align_steps * saved.bytes_per_step
    return dataclasses.replace(config, distill=dataclasses.replace(config.distill, align_bytes=bytes))


def extend(config: RunConfig, note: Callable[[str], None]) -> None:
    """Where a run that goes on has another end or schedule than before, say what becomes of its learning rate, and make it a run
    that has not ended."""
    saved = read_config(config.run_dir, trusted(config))
    if all(getattr(config, name) == getattr(saved, name) for name in OF_THE_END):
        return
    note(change(config, saved, latest_step(config) if has_checkpoint(config.run_dir) else 0))
    # In this order: in between it is a run of the old length whose report is missing.
    (config.run_dir / SUMMARY).unlink(missing_ok=True)
    if has_checkpoint(config.run_dir):
        # The model is that of the newest checkpoint from here on.
        (config.run_dir / WEIGHTS).unlink(missing_ok=True)
    write_atomically(config.run_dir / CONFIG, to_json(dataclasses.replace(config, resume=False, overwrite=False)))


def change(config: RunConfig, saved: RunConfig, step: int) -> str:
    """What another end does to the learning rate, and to the rate asked for, of a run that is at `step`, in a sentence."""
    total, final = config.total_steps, config.optimizer.learning_rate * config.optimizer.final_fraction
    rate, was = learning_rate(config, step), learning_rate(saved, step)
    shape = "along a cosine" if config.optimizer.schedule == "cosine" else "with an inverse square root"
    if config.schedule.decay_from is not None:
        way = f"decays {shape} from {config.schedule.decay_from / 1e6:.2f} MB on"
    elif config.optimizer.schedule == "cosine":
        way = f"falls {shape}"
    else:
        way = f"stays at its peak until the last fifth, then decays {shape}"
    same = abs(rate - was) <= 1e-6 * max(rate, was)
    here = f"goes on at {rate:.3g}" if same else f"is {rate:.3g} from here on, where it was {was:.3g}"
    asked, asked_before = (TargetSchedule.of(one).at(step) for one in (config, saved))
    target = ""
    if abs(asked - asked_before) > 1e-6:
        target = f"; the rate asked for is {asked:.3g} from here on, where it was {asked_before:.3g}"
    return (
        f"the run ends at step {total} ({_megabytes(config, total)}) instead of step {saved.total_steps} "
        f"({_megabytes(saved, saved.total_steps)}); it is at step {step}: its learning rate {here}, and {way} to "
        f"{final:.3g}{target}"
    )


def _megabytes(config: RunConfig, step: int) -> str:
    return f"{step * config.bytes_per_step / 1e6:.2f} MB"
