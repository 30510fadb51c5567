"""What a run is: frozen dataclasses, every field a command-line flag."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar, get_origin, get_type_hints

import tyro

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
    "characters",
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
    means of groups (mean), select and smooth (smooth), select and leave it to the decoder to attend to tokens (attend, as BLT:
    with --unet.attend every); by default what the estimator was published with."""
    capacity_slack: float = 1.35
    """Most token rows per sequence in training, as a multiple of the boundaries expected: at --rate, or at the rate at which an
    untrained router draws where that is higher (about one half for hnet and sfe-cosine). Boundaries beyond are dropped and
    counted."""
    buckets: int = 4
    """Sizes, up to --capacity-slack x --rate x --length, of which each step runs the token level in the smallest with room, and
    one more where an untrained router draws more; 1 for the largest alone. Each takes time to compile."""
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
    characters: CharactersConfig = field(default_factory=CharactersConfig)
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
    if unknown := sorted(values.keys() - hints.keys()):
        raise TypeError(f"{kind.__name__} has no setting {', '.join(unknown)}: another version wrote it")
    paths = {name: Path(value) for name, value in values.items() if hints[name] == Path | None and value is not None}
    # JSON has lists only.
    tuples = {name: tuple(value) for name, value in values.items() if get_origin(hints[name]) is tuple}
    return kind(**values | paths | tuples)
