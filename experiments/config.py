"""What a run is: frozen dataclasses, every field a command-line flag."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar, get_origin, get_type_hints

import tyro

from estimators.equations import logit
from experiments.sections import (
    BPEConfig,
    CheckpointConfig,
    DataConfig,
    DynamicChunkingConfig,
    EntropyConfig,
    EvaluationConfig,
    IsotropicConfig,
    MLPConfig,
    OffPolicyConfig,
    OptimizerConfig,
    PoolConfig,
    ScoreFunctionConfig,
    SmoothConfig,
    StrideConfig,
    TargetConfig,
)
from unet.config import UNetConfig
from unet.hnet import HNetConfig

EstimatorName = Literal[
    "sfe",
    "sfe-cosine",
    "sfe-mlp",
    "sfe-smooth",
    "sfe-offpolicy",
    "gumbel",
    "hnet",
    "entropy",
    "bpe",
    "bpe-distilled",
    "uniform",
    "stride",
    "whitespace",
    "spacelike",
    "isotropic",
]
ModelName = Literal[
    "tiny",
    "18M",
    "32M",
    "73M",
    "90M",
    "130M",
    "147M",
    "346M",
    "ratio2",
    "ratio4",
    "ratio6",
    "hnet-tiny",
    "hnet-2stage-tiny",
    "hnet-1stage-L",
    "hnet-1stage-XL",
    "hnet-2stage-L",
    "hnet-2stage-XL",
    "hnet-2stage-XL-chinese",
    "hnet-2stage-XL-code",
    "hnet-space-L",
    "hnet-space-XL",
    "hnet-pool-L",
    "spacebyte++-L",
    "spacebyte++-XL",
    "llamabyte-L",
    "mambabyte-L",
    "dna-transformer",
    "dna-mamba",
    "dna-hnet",
    "dna-hnet-mamba",
]


class ConfigError(Exception):
    """A value, or a combination of values, that cannot be run, said in one sentence."""


@dataclass(frozen=True)
class LevelConfig:
    """What is asked of one level of tokens."""

    estimator: EstimatorName
    rate: float


@dataclass(frozen=True)
class RunConfig:
    """Train a byte-level language model and its token boundaries."""

    unet: tyro.conf.AvoidSubcommands[UNetConfig | HNetConfig]
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
    inner_estimators: tuple[EstimatorName, ...] = ()
    """Estimators of the levels of tokens inside the first, from the outside in; --estimator for those not named."""
    inner_rates: tuple[float, ...] = ()
    """Target shares of the tokens of the level around that close a token of these levels; --rate for those not named."""
    seed: int = 0
    """Seed of parameters, data order and boundaries."""
    init: str | None = None
    """Start from the weights of this model: a run's folder or an exported model, hub:owner/name, or a published H-Net by name
    (cartesia-ai/hnet_1stage_L) or file; by default new ones are drawn."""
    out: Path | None = None
    """Folder for everything the run leaves; by default runs/ESTIMATOR-DATASET-MODEL-SEED."""
    resume: bool = False
    """Go on with the run in --out from its last checkpoint."""
    overwrite: bool = False
    """Delete what is in --out first."""
    chunker: Literal["distribute", "deviate", "mean", "smooth", "attend"] | None = None
    """How bytes become tokens and come back: select and add the token level's output (distribute) or its change (deviate), the
    means of groups (mean), select and smooth (smooth), select and let bytes attend to their token (attend, as BLT); by default
    what the estimator was published with."""
    capacity_slack: float = 1.35
    """Most token rows per sequence in training, as a multiple of rate x length; boundaries beyond are dropped and counted."""
    buckets: int = 4
    """Sizes, up to that bound, of which each step runs the token level in the smallest with room; each takes time to
    compile."""
    fold: bool = True
    """Lay the token rows of all sequences of a device one after another in training: then the sum of their tokens decides which
    size has room, not the fullest of them; attention alone always works in the largest. Not where tokens are smoothed."""
    devices: int | None = None
    """Devices that share a batch; by default all there are (a CPU counts as up to two)."""
    log_every: int = 1
    """Steps between lines of metrics.jsonl."""
    sfe: ScoreFunctionConfig = field(default_factory=ScoreFunctionConfig)
    offpolicy: OffPolicyConfig = field(default_factory=OffPolicyConfig)
    mlp: MLPConfig = field(default_factory=MLPConfig)
    hnet: DynamicChunkingConfig = field(default_factory=DynamicChunkingConfig)
    smooth: SmoothConfig = field(default_factory=SmoothConfig)
    pool: PoolConfig = field(default_factory=PoolConfig)
    entropy: EntropyConfig = field(default_factory=EntropyConfig)
    bpe: BPEConfig = field(default_factory=BPEConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
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
    def samples(self) -> int:
        """Draws of boundaries for each sequence of a training batch."""
        return self.sfe.samples if self.estimator.startswith("sfe") else 1

    @property
    def total_steps(self) -> int:
        return self.bytes // self.bytes_per_step if self.steps is None else self.steps

    @property
    def warmup_steps(self) -> int:
        warmup = self.optimizer.warmup_bytes
        share = 0.1 if self.optimizer.schedule == "wsd" else 0.05
        steps = share * self.total_steps if warmup is None else warmup / self.bytes_per_step
        return max(1, round(steps))

    @property
    def levels(self) -> tuple[LevelConfig, ...]:
        """The estimator and the target rate of each level of tokens, the outermost first."""
        if self.unet.levels == 0 or (self.estimator == "isotropic" and not self.isotropic.token_level):
            return ()
        missing = self.unet.levels - 1
        names = [self.estimator, *self.inner_estimators, *[self.estimator] * missing]
        rates = [self.rate, *self.inner_rates, *[self.rate] * missing]
        return tuple(LevelConfig(name, rate) for name, rate in zip(names, rates, strict=False))[: self.unet.levels]

    @property
    def folder(self) -> Path:
        """Where the run's files go."""
        if self.out is not None:
            return self.out
        dataset = "".join(c if c.isalnum() or c in "-." else "-" for c in Path(self.dataset).name)
        return Path("runs") / f"{self.estimator}-{dataset}-{self.model}-{self.seed}"


def transformer_shape(config: RunConfig) -> UNetConfig:
    """The shape of a model of transformer blocks with one level of tokens. Raises `ConfigError` for one of another kind."""
    if not isinstance(config.unet, UNetConfig):
        raise ConfigError(
            f"--model {config.model} is no model of transformer blocks with one level of tokens: name one"
        )
    return config.unet


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
    _require(config.buckets >= 1, "--buckets must be at least 1")
    _require(config.capacity_slack >= 1, "--capacity-slack below 1 would drop boundaries at the target rate")
    optimizer = config.optimizer
    _require(optimizer.learning_rate > 0, "--optimizer.learning-rate must be positive")
    _require(optimizer.clip > 0, "--optimizer.clip must be positive")
    multipliers = optimizer.stage_multipliers
    _require(multipliers is None or multipliers > 0, "--optimizer.stage-multipliers is a number of bytes above 0")
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
    _check_levels(config)
    if any(level.estimator.startswith("sfe") for level in config.levels):
        _check_score_function(config)
    _check_estimators(config)
    if config.estimator == "stride" and config.stride.stride is not None:
        _require(config.stride.stride >= 1, f"--stride.stride must be at least 1; got {config.stride.stride}")
    _require(
        not (config.resume and config.overwrite), "--resume goes on with a run and --overwrite deletes it: use one"
    )


def _check_levels(config: RunConfig) -> None:
    inside = max(config.unet.levels - 1, 0)
    named = max(len(config.inner_estimators), len(config.inner_rates))
    _require(
        named <= inside, f"{named} inner levels are named, but --model {config.model} has {inside} inside its first"
    )
    for rate in config.inner_rates:
        _require(0 < rate < 1, f"--inner-rates are shares strictly between 0 and 1; got {rate}")
    _require(
        config.unet.levels > 0 or (config.estimator == "isotropic" and not config.isotropic.token_level),
        f"--model {config.model} has no level of tokens: use --estimator isotropic --isotropic.no-token-level",
    )
    _require(
        config.unet.levels < 2 or config.estimator != "isotropic" or config.isotropic.token_level,
        "--isotropic.no-token-level leaves out the only level of tokens; this shape has several",
    )
    for name in {level.estimator for level in config.levels[1:]} & {"entropy", "bpe", "bpe-distilled"}:
        raise ConfigError(f"{name} reads bytes, not tokens: use it for the first level, and name --inner-estimators")


def _check_pool(config: RunConfig) -> None:
    pool, levels = config.pool, config.levels
    attends = pool.kind == "attention" or config.chunker == "attend"
    _require(pool.heads >= 1 and pool.vectors >= 1, "--pool.heads and --pool.vectors must be at least 1")
    for width in config.unet.widths[: len(levels)]:
        _require(
            not attends or width % pool.heads == 0, f"--pool.heads {pool.heads} does not divide a width of {width}"
        )
    means = config.chunker == "mean" or any(level.estimator == "gumbel" for level in levels)
    _require(not means or pool.kind == "last", "--chunker mean makes its tokens itself: leave --pool.kind out")
    _require(
        not pool.boundary or pool.kind != "last", "--pool.boundary adds the last row to a pool: name a --pool.kind"
    )


def _check_estimators(config: RunConfig) -> None:
    _check_pool(config)
    mlp, target = config.mlp, config.target
    _require(mlp.inner is None or mlp.inner >= 1, "--mlp.inner must be at least 1")
    _require(mlp.temperature > 0, f"--mlp.temperature must be positive; got {mlp.temperature}")
    _require(
        config.estimator != "entropy" or config.entropy.model is not None,
        "--estimator entropy needs a byte model: train one with --estimator isotropic --isotropic.no-token-level and name "
        "its folder with --entropy.model",
    )
    _require(config.bpe.vocabulary >= 257, "--bpe.vocabulary has 256 bytes and at least one merge: 257 or more")
    _require(
        target.start is None or 0 < target.start < 1,
        f"--target.start is a share of bytes strictly between 0 and 1; got {target.start}",
    )
    _require(0 < target.until <= 1, f"--target.until is a share of training, above 0 and at most 1; got {target.until}")
    _require(target.control >= 0, f"--target.control cannot be negative; got {target.control}")
    _require(
        config.estimator != "gumbel" or config.chunker in (None, "mean"),
        f"--estimator gumbel learns through the means of groups: --chunker {config.chunker} would pass it no gradient",
    )
    _require(
        config.estimator != "hnet" or config.chunker in (None, "smooth"),
        f"--estimator hnet learns through smoothing: --chunker {config.chunker} would pass it no gradient",
    )
    _require(
        config.estimator != "hnet" or config.smooth.smoothing or config.smooth.weighting != "none",
        "--estimator hnet without smoothing and without weighting by confidence has no gradient to learn from",
    )
    _require(
        config.optimizer.accumulate == 1 or target.control == 0,
        "--target.control measures the rate of whole batches: use --optimizer.accumulate 1",
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
        sfe.advantage_decay is None or 0 <= sfe.advantage_decay <= 1,
        f"--sfe.advantage-decay lies between 0 and 1; got {sfe.advantage_decay}",
    )
    _require(
        sfe.advantage_decay is None or not sfe.critic,
        "--sfe.advantage-decay brings a critic of its own: leave --sfe.critic out",
    )
    _require(sfe.samples >= 1, f"--sfe.samples must be at least 1; got {sfe.samples}")
    _require(
        sfe.centring != "samples" or sfe.samples > 1,
        "--sfe.centring samples compares draws for one sequence: ask for --sfe.samples 2 or more",
    )
    clip = config.offpolicy.clip
    _require(clip is None or clip > 0, f"--offpolicy.clip must be positive; got {clip}")
    _require(
        sfe.centring in ("none", "samples") or part * sfe.samples > 1,
        f"centred returns of a batch of {part} are all zero: use a larger --batch or --sfe.centring none",
    )


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ConfigError(otherwise)


def to_json(config: RunConfig) -> str:
    """The configuration as JSON text, paths as strings."""
    return json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n"


def from_json(text: str, where: str) -> RunConfig:
    """The configuration that `to_json` wrote. Raises `ConfigError`, naming `where`, if it is anything else."""
    try:
        values: dict[str, object] = json.loads(text)
        shape = values["unet"]
        kinds = get_type_hints(RunConfig)
        kinds["unet"] = HNetConfig if isinstance(shape, dict) and "layout" in shape else UNetConfig
        for name, kind in kinds.items():
            # A setting that is newer than the file was what its default is.
            if dataclasses.is_dataclass(kind) and name in values:
                values[name] = _build(kind, values[name])
        return _build(RunConfig, values)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ConfigError(f"{where} is not the configuration of a run ({error})") from None


Built = TypeVar("Built")


def _build(kind: type[Built], values: object) -> Built:
    if not isinstance(values, dict):
        raise TypeError(f"{kind.__name__} is written as an object, not {values!r}")
    hints = get_type_hints(kind)
    paths = {name: Path(value) for name, value in values.items() if hints[name] == Path | None and value is not None}
    # JSON has lists only.
    tuples = {name: tuple(value) for name, value in values.items() if get_origin(hints[name]) is tuple}
    return kind(**values | paths | tuples)
