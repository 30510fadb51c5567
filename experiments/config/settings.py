"""What a run is: frozen dataclasses, every field a command-line flag."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from estimators.equations import logit
from experiments.config.errors import ConfigError, require
from experiments.config.sections import (
    BPEConfig,
    CharactersConfig,
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

LearnedName = Literal["sfe", "sfe-cosine", "sfe-mlp", "sfe-smooth", "sfe-offpolicy", "gumbel", "hnet"]
PreparedName = Literal["entropy", "bpe", "bpe-distilled"]
RuleName = Literal["uniform", "stride", "characters", "whitespace", "spacelike", "isotropic"]
EstimatorName = Literal[LearnedName, PreparedName, RuleName]

TransformerName = Literal["tiny", "18M", "32M", "73M", "90M", "130M", "147M", "346M", "ratio2", "ratio4", "ratio6"]
SmallHNetName = Literal["hnet-tiny", "hnet-2stage-tiny"]
PublishedName = Literal[
    "hnet-1stage-L",
    "hnet-1stage-XL",
    "hnet-2stage-L",
    "hnet-2stage-XL",
    "hnet-2stage-XL-chinese",
    "hnet-2stage-XL-code",
]
ChunkedName = Literal["hnet-space-L", "hnet-space-XL", "hnet-pool-L", "spacebyte++-L", "spacebyte++-XL"]
FlatName = Literal["llamabyte-L", "mambabyte-L"]
GenomeName = Literal["dna-transformer", "dna-mamba", "dna-hnet", "dna-hnet-mamba"]
ModelName = Literal[TransformerName, SmallHNetName, PublishedName, ChunkedName, FlatName, GenomeName]


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
    """docs, stdlib, codeparrot, codeparrot-clean, fineweb, fineweb-edu (samples of ten billion tokens), fineweb-100BT,
    fineweb-edu-100BT, hub:owner/name or hub:owner/name/folder, both with @revision behind or not, or a file, folder or glob."""
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
    """Target rates of these levels, as fractions of the tokens of the level around; --rate for those not named."""
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
    """How bytes become tokens and come back: select, and add the token level's output (distribute) or its change (deviate); mean
    pooling (mean); select, and smooth on the way back (smooth); select, and let the decoder attend to tokens (attend, as BLT:
    with --unet.attend every). By default what the estimator was published with."""
    capacity_slack: float = 1.35
    """Capacity in training (most tokens per sequence), as a multiple of the number expected at --rate, or at the rate of an
    untrained router where that is higher (about one half for hnet and sfe-cosine). Boundaries beyond it are dropped and
    counted."""
    buckets: int = 4
    """Capacities to choose from, up to --capacity-slack x --rate x --length: each step runs the token level at the smallest that
    fits its tokens. There is one more where an untrained router draws more. 1: the largest alone. Each takes time to compile."""
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
    characters: CharactersConfig = field(default_factory=CharactersConfig)
    isotropic: IsotropicConfig = field(default_factory=IsotropicConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self):
        _require_amounts(self)
        _require_levels(self)
        _require_chunker(self)
        if any(level.estimator.startswith("sfe") for level in self.levels):
            _require_score_function(self)

    @property
    def bytes_per_step(self) -> int:
        return self.batch * self.length

    @property
    def samples(self) -> int:
        """Samples of boundaries for each sequence of a training batch."""
        return self.sfe.samples if any(level.estimator.startswith("sfe") for level in self.levels) else 1

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
    def run_dir(self) -> Path:
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


def _require_amounts(config: RunConfig) -> None:
    for name in ("batch", "bytes", "log_every", "buckets"):
        require(
            getattr(config, name) >= 1, f"--{name.replace('_', '-')} must be at least 1; got {getattr(config, name)}"
        )
    require(config.length >= 2, "--length must be at least 2: one byte to read and one to predict")
    require(config.steps is None or config.steps >= 1, f"--steps must be at least 1; got {config.steps}")
    require(config.devices is None or config.devices >= 1, f"--devices must be at least 1; got {config.devices}")
    require(
        config.total_steps >= 1,
        f"--bytes {config.bytes} is less than one step of {config.batch} x {config.length} bytes",
    )
    require(0 < config.rate < 1, f"--rate is a share of bytes strictly between 0 and 1; got {config.rate}")
    require(config.capacity_slack >= 1, "--capacity-slack below 1 would drop boundaries at the target rate")
    optimizer = config.optimizer
    require(
        config.batch % optimizer.accumulate == 0,
        f"--optimizer.accumulate {optimizer.accumulate} does not divide --batch {config.batch}",
    )
    require(
        optimizer.accumulate == 1 or config.target.control == 0,
        "--target.control measures the rate of whole batches: use --optimizer.accumulate 1",
    )
    require(
        config.warmup_steps <= config.total_steps,
        f"a warm-up of {optimizer.warmup_bytes} bytes is longer than the run: name a shorter --optimizer.warmup-bytes, or None "
        "for 5 % of the run",
    )
    require(config.evaluation.bytes >= config.length, "--evaluation.bytes must hold at least one sequence")
    require(not (config.resume and config.overwrite), "--resume goes on with a run and --overwrite deletes it: use one")


def _require_levels(config: RunConfig) -> None:
    inside = max(config.unet.levels - 1, 0)
    given = max(len(config.inner_estimators), len(config.inner_rates))
    require(
        given <= inside, f"{given} inner levels are named, but --model {config.model} has {inside} inside its first"
    )
    for rate in config.inner_rates:
        require(0 < rate < 1, f"--inner-rates are shares strictly between 0 and 1; got {rate}")
    require(
        config.unet.levels > 0 or (config.estimator == "isotropic" and not config.isotropic.token_level),
        f"--model {config.model} has no level of tokens: use --estimator isotropic --isotropic.no-token-level",
    )
    named = {config.estimator, *config.inner_estimators}
    require(
        config.unet.levels == 0
        or not isinstance(config.unet, HNetConfig)
        or "isotropic" not in named
        or config.isotropic.token_level,
        f"--isotropic.no-token-level leaves out the only level of tokens, but the layout of --model {config.model} has "
        f"{config.unet.levels}: name a --unet.layout without any, such as '[\"m4\"]'",
    )
    for name in {level.estimator for level in config.levels[1:]} & {"entropy", "bpe", "bpe-distilled", "characters"}:
        raise ConfigError(f"{name} reads bytes, not tokens: use it for the first level, and name --inner-estimators")


def _require_chunker(config: RunConfig) -> None:
    """The chunker can be built, and passes a gradient to the router of each level that learns through it."""
    pool, chunker = config.pool, config.chunker
    names = {level.estimator for level in config.levels}
    require(
        chunker != "attend" or config.unet.attend != "none",
        "--chunker attend brings no token back itself: name the blocks that attend to them with --unet.attend first or every",
    )
    for width in config.unet.widths[: len(config.levels)]:
        require(
            pool.kind != "attention" or width % pool.heads == 0,
            f"--pool.heads {pool.heads} does not divide a width of {width}",
        )
    means = chunker == "mean" or "gumbel" in names
    require(not means or pool.kind == "last", "--chunker mean makes its tokens itself: leave --pool.kind out")
    require(
        "gumbel" not in names or chunker in (None, "mean"),
        f"--estimator gumbel learns through the means of groups: --chunker {chunker} would pass it no gradient",
    )
    require(
        "hnet" not in names or chunker in (None, "smooth"),
        f"--estimator hnet learns through smoothing: --chunker {chunker} would pass it no gradient",
    )
    require(
        "hnet" not in names or config.smooth.smoothing or config.smooth.weighting != "none",
        "--estimator hnet without smoothing and without weighting by confidence has no gradient to learn from",
    )


def _require_score_function(config: RunConfig) -> None:
    sfe = config.sfe
    for level in config.levels:
        require(
            not level.estimator.startswith("sfe") or abs(logit(level.rate)) < sfe.cap,
            f"a rate of {level.rate} lies beyond policy logits capped at {sfe.cap}: raise --sfe.cap",
        )
    part = config.batch // config.optimizer.accumulate
    require(
        sfe.centring in ("none", "samples") or part * sfe.samples > 1,
        f"centred returns of a batch of {part} are all zero: use a larger --batch or --sfe.centring none",
    )
