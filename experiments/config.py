"""What a run is: frozen dataclasses, every field a command-line flag."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from estimators.equations import logit
from unet.model import UNetConfig

EstimatorName = Literal["sfe", "uniform", "stride", "whitespace", "spacelike", "isotropic"]
ModelName = Literal["tiny", "18M", "32M", "73M", "90M", "130M", "147M", "346M", "ratio2", "ratio4", "ratio6"]


class ConfigError(Exception):
    """A value, or a combination of values, that cannot be run, said in one sentence."""


@dataclass(frozen=True)
class ScoreFunctionConfig:
    """The score-function estimator (--estimator sfe)."""

    window: int = 7
    """Past boundaries that the policy sees; 0 for a policy without memory."""
    discount: float = 0.99
    """Discount of rewards per byte (eq. 13); 1 leaves discounting out."""
    early_exit: bool = True
    """Rewards relative to a prediction from the encoder alone (eq. 11-12)."""
    early_weight: float = 0.1
    """Weight of the early head's own loss (eq. 22)."""
    centring: Literal["batch", "leave-one-out", "none"] = "batch"
    """Returns relative to the batch's mean at the same position (eq. 14), with or without the sequence itself in it."""
    policy_weight: float = 1e-2
    """Weight of the policy loss (eq. 22)."""
    rate_weight: float = 1e-2
    """Weight of the rate loss (eq. 22)."""
    scale: float = 16.0
    """Divisor of the policy's raw logits (eq. 18); a smaller one makes the policy move faster."""
    cap: float = 6.0
    """Bound of the policy's logits in training (eq. 19)."""


@dataclass(frozen=True)
class StrideConfig:
    """Boundaries at every n-th byte (--estimator stride)."""

    stride: int | None = None
    """Bytes per token; by default the whole number nearest to 1 / rate."""


@dataclass(frozen=True)
class IsotropicConfig:
    """A byte-level baseline (--estimator isotropic)."""

    token_level: bool = True
    """Run the token level at every byte; without it only the windowed byte-level blocks remain."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW under a cosine schedule with linear warm-up."""

    learning_rate: float = 3e-3
    """Peak learning rate."""
    warmup_bytes: int | None = None
    """Training bytes over which the learning rate rises from 0; by default 5 % of all."""
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
    """Parts a batch is cut into, one after another, to save memory; batch centring and means over bytes work within a part."""


@dataclass(frozen=True)
class DataConfig:
    """How documents become training rows."""

    protocol: Literal["crop", "cut", "pack"] = "cut"
    """crop: random stretches of documents; cut: the start of documents that are long enough; pack: documents side by side,
    none seeing another."""
    text_field: str | None = None
    """Field of JSON lines and Parquet files that holds the text; by default what the named data set uses, else "text"."""
    held_out: float = 0.05
    """Share of documents held out for validation, chosen by their content."""
    workers: int = 0
    """Processes that prepare batches; their number never changes a batch."""
    cache: Path | None = None
    """Where shards of hub data sets are kept; by default ~/.cache/caesura."""
    cache_gib: float = 8.0
    """Size to which that cache is kept for each data set, in GiB; the oldest shards go first."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Validation on held-out text."""

    bytes: int = 262_144
    """Held-out bytes to evaluate on, at most."""
    times: int = 10
    """How often during training, evenly spread, the last at the end."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept to go on from."""

    times: int = 10
    """How often during training, evenly spread; there is always one at the end and when a run is stopped."""
    keep: int = 2
    """How many of the latest are kept."""


@dataclass(frozen=True)
class RunConfig:
    """Train a byte-level language model and its token boundaries."""

    unet: UNetConfig
    """Shape of the model; the preset's unless changed."""
    estimator: EstimatorName = "sfe"
    """How boundaries are drawn and learned."""
    dataset: str = "docs"
    """docs, stdlib, codeparrot, codeparrot-clean, fineweb, fineweb-edu, hub:owner/name, or a file, folder or glob."""
    model: ModelName = "tiny"
    """Preset that all other defaults come from."""
    length: int = 4096
    """Bytes per sequence."""
    batch: int = 32
    """Sequences per step."""
    bytes: int = 6_000_000
    """Training bytes; rounded down to whole steps."""
    steps: int | None = None
    """Training steps, instead of --bytes."""
    rate: float = 0.2
    """Target share of bytes with a boundary."""
    seed: int = 0
    """Seed of parameters, data order and boundaries."""
    out: Path | None = None
    """Folder for everything the run leaves; by default runs/ESTIMATOR-DATASET-MODEL-SEED."""
    resume: bool = False
    """Go on with the run in --out from its last checkpoint."""
    overwrite: bool = False
    """Delete what is in --out first."""
    chunker: Literal["distribute", "deviate"] = "distribute"
    """What the token level adds to the bytes: its output, or its change of its input."""
    capacity_slack: float = 1.35
    """Token rows per sequence in training, as a multiple of rate x length; boundaries beyond are dropped and counted."""
    devices: int | None = None
    """Devices that share a batch; by default all there are (a CPU counts as up to two)."""
    log_every: int = 1
    """Steps between lines of metrics.jsonl."""
    sfe: ScoreFunctionConfig = field(default_factory=ScoreFunctionConfig)
    stride: StrideConfig = field(default_factory=StrideConfig)
    isotropic: IsotropicConfig = field(default_factory=IsotropicConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    @property
    def bytes_per_step(self) -> int:
        return self.batch * self.length

    @property
    def total_steps(self) -> int:
        return self.bytes // self.bytes_per_step if self.steps is None else self.steps

    @property
    def warmup_steps(self) -> int:
        warmup = self.optimizer.warmup_bytes
        steps = self.total_steps / 20 if warmup is None else warmup / self.bytes_per_step
        return max(1, round(steps))

    @property
    def folder(self) -> Path:
        """Where the run's files go."""
        if self.out is not None:
            return self.out
        dataset = "".join(c if c.isalnum() or c in "-." else "-" for c in Path(self.dataset).name)
        return Path("runs") / f"{self.estimator}-{dataset}-{self.model}-{self.seed}"


def check(config: RunConfig) -> None:
    """Raise `ConfigError` for values that are impossible or do not go together."""
    for name in ("length", "batch", "bytes", "log_every"):
        _require(getattr(config, name) >= 1, f"--{name.replace('_', '-')} must be at least 1")
    _require(config.length >= 2, "--length must be at least 2: one byte to read and one to predict")
    _require(config.steps is None or config.steps >= 1, "--steps must be at least 1")
    _require(
        config.total_steps >= 1,
        f"--bytes {config.bytes} is less than one step of {config.batch} x {config.length} bytes",
    )
    _require(0 < config.rate < 1, f"--rate is a share of bytes strictly between 0 and 1; got {config.rate}")
    _require(config.capacity_slack >= 1, "--capacity-slack below 1 would drop boundaries at the target rate")
    optimizer = config.optimizer
    _require(optimizer.learning_rate > 0, "--optimizer.learning-rate must be positive")
    _require(optimizer.clip > 0, "--optimizer.clip must be positive")
    _require(0 <= optimizer.final_fraction <= 1, "--optimizer.final-fraction lies between 0 and 1")
    _require(0 <= optimizer.beta1 < 1 and 0 <= optimizer.beta2 < 1, "--optimizer.beta1 and beta2 lie in [0, 1)")
    _require(optimizer.weight_decay >= 0, "--optimizer.weight-decay cannot be negative")
    _require(
        optimizer.accumulate >= 1 and config.batch % optimizer.accumulate == 0,
        f"--optimizer.accumulate {optimizer.accumulate} does not divide --batch {config.batch}",
    )
    _require(
        config.warmup_steps <= config.total_steps,
        f"a warm-up of {optimizer.warmup_bytes} bytes is longer than the run: name a shorter --optimizer.warmup-bytes, or None "
        "for 5 % of the run",
    )
    _require(0 < config.data.held_out < 1, "--data.held-out is a share of documents strictly between 0 and 1")
    _require(config.data.workers >= 0, "--data.workers cannot be negative")
    _require(config.data.cache_gib > 0, "--data.cache-gib must be positive")
    _require(config.evaluation.bytes >= config.length, "--evaluation.bytes must hold at least one sequence")
    _require(config.evaluation.times >= 1, "--evaluation.times must be at least 1")
    _require(config.checkpoint.times >= 1 and config.checkpoint.keep >= 1, "--checkpoint.times and keep are at least 1")
    _require(config.devices is None or config.devices >= 1, "--devices must be at least 1")
    if config.estimator == "sfe":
        _check_score_function(config)
    if config.estimator == "stride" and config.stride.stride is not None:
        _require(config.stride.stride >= 1, f"--stride.stride must be at least 1; got {config.stride.stride}")
    _require(
        not (config.resume and config.overwrite), "--resume goes on with a run and --overwrite deletes it: use one"
    )


def _check_score_function(config: RunConfig) -> None:
    sfe = config.sfe
    part = config.batch // config.optimizer.accumulate
    _require(sfe.window >= 0, f"--sfe.window counts past boundaries and cannot be negative; got {sfe.window}")
    _require(0 <= sfe.discount <= 1, f"--sfe.discount lies between 0 and 1; got {sfe.discount}")
    _require(sfe.scale > 0 and sfe.cap > 0, "--sfe.scale and --sfe.cap must be positive")
    _require(
        abs(logit(config.rate)) < sfe.cap,
        f"--rate {config.rate} lies beyond policy logits capped at {sfe.cap}: raise --sfe.cap",
    )
    _require(
        sfe.centring == "none" or part > 1,
        f"centred returns of a batch of {part} are all zero: use a larger --batch or --sfe.centring none",
    )


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ConfigError(otherwise)


def to_json(config: RunConfig) -> str:
    """The configuration as JSON text, paths as strings."""
    return json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n"


_SECTIONS: dict[str, type] = {
    "unet": UNetConfig,
    "sfe": ScoreFunctionConfig,
    "stride": StrideConfig,
    "isotropic": IsotropicConfig,
    "optimizer": OptimizerConfig,
    "data": DataConfig,
    "evaluation": EvaluationConfig,
    "checkpoint": CheckpointConfig,
}


def from_json(text: str, where: str) -> RunConfig:
    """The configuration that `to_json` wrote. Raises `ConfigError`, naming `where`, if it is anything else."""
    try:
        values: dict[str, object] = json.loads(text)
        for name, section in _SECTIONS.items():
            values[name] = _build(section, values[name])
        return _build(RunConfig, values)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ConfigError(f"{where} is not the configuration of a run ({error})") from None


Built = TypeVar("Built")


def _build(kind: type[Built], values: object) -> Built:
    if not isinstance(values, dict):
        raise TypeError(f"{kind.__name__} is written as an object, not {values!r}")
    paths = {name: Path(values[name]) for name in ("out", "cache") if isinstance(values.get(name), str)}
    return kind(**values | paths)
