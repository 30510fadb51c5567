"""The parts of a run's configuration, every field a command-line flag; each refuses values that are impossible by themselves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from experiments.config.errors import require


@dataclass(frozen=True)
class TargetConfig:
    """How the target rate moves during training. Uniform boundaries follow it at once, learned ones through their losses."""

    start: float | None = None
    """Target at the first step, from which it goes to --rate in a straight line; by default --rate itself."""
    until: float = 0.5
    """Share of training after which --rate is reached."""
    control: float = 0.0
    """Gain of a slow controller that moves an estimator's own target, in log-odds per step and unit of relative error, until
    the measured rate is the one asked for; 0 leaves the target alone. Rules draw at their own rate all the same, and so does the
    policy of sfe-offpolicy: the rate measured there is that of the independent boundaries."""

    def __post_init__(self):
        require(
            self.start is None or 0 < self.start < 1,
            f"--target.start is a share of bytes strictly between 0 and 1; got {self.start}",
        )
        require(0 < self.until <= 1, f"--target.until is a share of training, above 0 and at most 1; got {self.until}")
        require(self.control >= 0, f"--target.control cannot be negative; got {self.control}")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW under a schedule with linear warm-up."""

    learning_rate: float = 3e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """After the warm-up a cosine to the end; or the peak until the last fifth, then an inverse square root (H-Net)."""
    warmup_bytes: int | None = None
    """Training bytes over which the learning rate rises from 0; by default 5 % of all, 10 % for wsd."""
    stage_multipliers: float | None = None
    """Multiply the learning rate of each stage by what H-Net's eq. 11 says for so many bytes per token of a usual tokenizer
    (4.6 for English); by default all stages learn alike."""
    decay: Literal["all", "matrices"] = "all"
    """What decays: all parameters, or matrices alone, and no bias, norm or other vector."""
    final_fraction: float = 0.0
    """Learning rate at the end, as a share of the peak."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    clip: float = 1.0
    """Global norm to which gradients are clipped."""
    accumulate: int = 1
    """Gradient accumulation: parts of a batch that are computed one after another; batch centring works within a part."""

    def __post_init__(self):
        require(self.learning_rate > 0, "--optimizer.learning-rate must be positive")
        require(self.clip > 0, "--optimizer.clip must be positive")
        multipliers = self.stage_multipliers
        require(multipliers is None or multipliers > 0, "--optimizer.stage-multipliers is a number of bytes above 0")
        require(0 <= self.final_fraction <= 1, "--optimizer.final-fraction lies between 0 and 1")
        require(0 <= self.beta1 < 1 and 0 <= self.beta2 < 1, "--optimizer.beta1 and beta2 lie in [0, 1)")
        require(self.weight_decay >= 0, "--optimizer.weight-decay cannot be negative")
        require(self.accumulate >= 1, f"--optimizer.accumulate must be at least 1; got {self.accumulate}")


@dataclass(frozen=True)
class DataConfig:
    """How documents become training sequences."""

    protocol: Literal["crop", "cut", "pack"] = "cut"
    """crop: random stretches of documents; cut: the start of documents that are long enough, and nothing of what follows it;
    pack: documents side by side, none seeing another."""
    train: str | None = None
    """Training text, where it is not --dataset: anything that --dataset takes."""
    valid: str | None = None
    """Held-out text: anything that --dataset takes. No document of the training text is held out then."""
    test: str | None = None
    """Test text: anything that --dataset takes. A run never reads it; experiments.evaluate does."""
    text_field: str | None = None
    """Field of JSON lines and Parquet files that holds the text; by default what the named data set uses, else "text"."""
    held_out: float = 0.05
    """Share of documents held out for validation, chosen by their content; none of a data set that has a validation or test
    split of its own, by the names of its files, which is used instead and never trains."""
    workers: int = 0
    """Processes that prepare batches; their number never changes a batch."""
    cache: Path | None = None
    """Where shards of hub data sets are kept; by default ~/.cache/caesura."""
    cache_gib: float = 8.0
    """Size to which that cache is kept for each data set, in GiB; the oldest shards go first."""

    def __post_init__(self):
        require(0 < self.held_out < 1, "--data.held-out is a share of documents strictly between 0 and 1")
        require(self.workers >= 0, "--data.workers cannot be negative")
        require(self.cache_gib > 0, "--data.cache-gib must be positive")


@dataclass(frozen=True)
class EvaluationConfig:
    """Validation on held-out text."""

    bytes: int = 262_144
    """Held-out bytes to evaluate on, at most."""
    times: int = 10
    """How often during training, evenly spread, the last at the end."""

    def __post_init__(self):
        require(self.times >= 1, "--evaluation.times must be at least 1")


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept to go on from."""

    times: int = 10
    """How often during training, evenly spread; there is always one at the end and when a run is stopped."""
    keep: int = 2
    """How many of the latest are kept."""

    def __post_init__(self):
        require(self.times >= 1 and self.keep >= 1, "--checkpoint.times and --checkpoint.keep must be at least 1")
