"""What a run is: frozen dataclasses, every field a command-line flag."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from estimators.bounds import LARGEST_BYTES, LARGEST_INDEX, Count, Length, Rate, Seed, Sequences, Within
from estimators.lookup import Part, PartError
from estimators.registry import DEFAULT, WITHOUT_TOKENS
from estimators.settings import EstimatorConfig
from experiments.config.errors import ConfigError, outside_errors, refused, require, require_bounds
from experiments.config.parts import Level, Names, chosen, estimator_config, levels_of, plain_values, sections_in
from experiments.config.sections import (
    CheckpointConfig,
    DataConfig,
    DistillConfig,
    DistributedConfig,
    EvaluationConfig,
    MeshConfig,
    OptimizerConfig,
    ScheduleConfig,
    TargetConfig,
    TokenizerConfig,
)
from unet.blt import BLTConfig
from unet.config import UNetConfig
from unet.hnet import HNetConfig
from unet.transformer import TransformerConfig


@dataclass(frozen=True)
class LevelConfig:
    """One level of tokens: its parts, the settings of its estimator, and its target rate."""

    parts: Level
    settings: EstimatorConfig
    rate: float

    @property
    def estimator(self) -> str:
        """The name of the estimator."""
        return self.parts.estimator.name


@dataclass(frozen=True)
class RunConfig:
    """Train a byte-level language model and its token boundaries."""

    unet: tyro.conf.AvoidSubcommands[UNetConfig | HNetConfig | BLTConfig | TransformerConfig]
    """Shape of the model; the preset's unless changed."""
    estimator: str = DEFAULT
    """How boundaries are drawn and learned."""
    dataset: str = "docs"
    """docs, stdlib, codeparrot, codeparrot-clean, fineweb, fineweb-edu (samples of ten billion tokens), fineweb-100BT,
    fineweb-edu-100BT, hub:owner/name or hub:owner/name/folder, both with @revision behind or not, or a file, folder or glob."""
    model: str = "tiny"
    """Preset that all other defaults come from."""
    length: Length = 4096
    """Bytes per sequence."""
    batch: Sequences = 32
    """Sequences per step."""
    bytes: Annotated[int, Within(1, LARGEST_BYTES)] = 6_000_000
    """Training bytes; rounded down to whole steps."""
    steps: Count | None = None
    """Training steps, instead of --bytes."""
    rate: Rate = 0.2
    """Target share of bytes with a boundary, of those that --constrain leaves free."""
    inner_estimators: tuple[str, ...] = ()
    """Estimators of the levels of tokens inside the first, from the outside in; --estimator for those not named."""
    inner_rates: tuple[Rate, ...] = ()
    """Target rates of these levels, as fractions of the tokens of the level around; --rate for those not named."""
    seed: Seed = 0
    """Seed of parameters, data order and boundaries."""
    init: str | None = None
    """Start from the weights of this model: a run's folder or an exported model, hub:owner/name, or a published model by name
    (cartesia-ai/hnet_1stage_L, facebook/blt-1b) or file; by default new ones are drawn."""
    out: Path | None = None
    """Folder for everything the run leaves; by default runs/ESTIMATOR-DATASET-MODEL-SEED."""
    plugin: tuple[str, ...] = ()
    """Modules with classes of your own that the run in --out or the model of --init holds, as package.module."""
    config: Path | None = None
    """Settings of a new run from a file: the config.json of another one, or TOML or YAML; flags count more."""
    resume: bool = False
    """Go on with the run in --out from its last checkpoint; with --bytes or --steps, to another end."""
    overwrite: bool = False
    """Delete what is in --out first."""
    chunker: str | None = None
    """How tokens come back to bytes: by default as the estimator was published."""
    pool: str | None = None
    """How a token is made of its bytes: by default as the estimator was published."""
    constrain: tuple[str, ...] = ()
    """Where boundaries may and must be, leaving the rest to the estimator and to --rate."""
    inner_constrain: tuple[str, ...] = ()
    """The same at the levels inside the first."""
    pool_boundary: bool = False
    """Add the position at the boundary to the pooled value (H-Net fig. 13, +Res)."""
    capacity_slack: Annotated[float, Within(1.0, 1e6)] = 1.35
    """Capacity in training (most tokens per sequence), as a multiple of the number expected at --rate, or at the rate of an
    untrained router where that is higher (about one half for hnet and sfe-cosine). Boundaries beyond it are dropped and
    counted."""
    buckets: Annotated[int, Within(1, 64)] = 4
    """Capacities to choose from, up to --capacity-slack x --rate x --length: each step runs the token level at the smallest that
    fits its tokens. There is one more where an untrained router draws more. 1: the largest alone. Each takes time to compile."""
    devices: Count | None = None
    """Devices that a run works on; by default as many as can share a batch evenly (a CPU counts as up to two)."""
    log_every: Count = 1
    """Steps between lines of metrics.jsonl."""
    log_seconds: Annotated[float, Within(0.0, 1e6)] = 30.0
    """Seconds between lines of progress where there is no terminal for a bar."""
    quiet: bool = False
    """Say nothing but errors."""
    tracker: tuple[str, ...] = ()
    """Where to send metrics, held-out text and boundaries beside metrics.jsonl: tensorboard, wandb, trackio, or a class of your
    own as package.module:Class."""
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    settings: tyro.conf.Suppress[Mapping[str, Mapping[str, object]]] = field(default_factory=dict)
    """Plain values of the settings of estimators, chunkers, pools and reductions, by section; those that are missing have their
    defaults. Sections of parts that are not chosen are of no effect."""

    def __post_init__(self):
        plain = json.loads(json.dumps(self.settings, default=str))
        object.__setattr__(self, "settings", plain)
        _require_amounts(self)
        _require_levels(self)
        _require_parts(self)
        _require_distillable(self)

    @property
    def bytes_per_step(self) -> int:
        return self.batch * self.length

    @property
    def samples(self) -> int:
        """Samples of boundaries for each sequence of a training batch."""
        return max((level.settings.samples for level in self.levels), default=1)

    @property
    def total_steps(self) -> int:
        return self.bytes // self.bytes_per_step if self.steps is None else self.steps

    @property
    def align_steps(self) -> int:
        """The training steps of an alignment with a teacher, 0 without one."""
        if self.distill.teacher is None:
            return 0
        given = self.distill.align_bytes
        steps = self.total_steps // 2 if given is None else given // self.bytes_per_step
        return min(steps, self.total_steps)

    @property
    def warmup_steps(self) -> int:
        warmup = self.optimizer.warmup_bytes
        share = 0.1 if self.optimizer.schedule == "wsd" else 0.05
        steps = share * self.total_steps if warmup is None else warmup / self.bytes_per_step
        return max(1, round(steps))

    @functools.cached_property
    def parts(self) -> tuple[Level, ...]:
        """The parts of each level of tokens, the outermost first; of the first level too where the model has none."""
        missing = max(self.unet.levels - 1, 0)
        names = [self.estimator, *self.inner_estimators, *[self.estimator] * missing][: 1 + missing]
        return levels_of(Names(tuple(names), self.chunker, self.pool, self.constrain, self.inner_constrain))

    @functools.cached_property
    def chosen(self) -> tuple[Part, ...]:
        """All parts, those that settings name included."""
        return tuple(chosen([part for level in self.parts for part in level.all], self.settings))

    @functools.cached_property
    def sections(self) -> Mapping[str, object]:
        """The settings of everything that was chosen, by section."""
        sections = sections_in(self.chosen, self.settings)
        return {name: section.read(self.settings) for name, section in sections.items()}

    @functools.cached_property
    def levels(self) -> tuple[LevelConfig, ...]:
        """Each level of tokens, the outermost first."""
        missing = max(self.unet.levels - 1, 0)
        rates = [self.rate, *self.inner_rates, *[self.rate] * missing]
        settings = [estimator_config(level.estimator, self.sections) for level in self.parts]
        if self.unet.levels == 0 or not settings[0].makes_tokens:
            return ()
        return tuple(LevelConfig(*one) for one in zip(self.parts, settings, rates, strict=False))

    @property
    def reads_tokens(self) -> bool:
        """Whether the model reads tokens of a byte-pair encoding instead of bytes."""
        return self.tokenizer.source is not None

    @property
    def depth(self) -> int:
        """The number of levels of tokens; those of a tokenizer are one."""
        return len(self.levels) + self.reads_tokens

    @property
    def first(self) -> EstimatorConfig:
        """The settings of the outermost estimator."""
        return estimator_config(self.parts[0].estimator, self.sections)

    @property
    def resolved(self) -> RunConfig:
        """The same run with all settings of what was chosen written out, and no others."""
        plain = {name: plain_values(section) for name, section in self.sections.items()}
        return dataclasses.replace(self, settings=plain)

    def with_settings(self, **sections: Mapping[str, object]) -> RunConfig:
        """The same run with some settings changed, as in `config.with_settings(policy={"window": 2})`."""
        changed = {name: {**self.settings.get(name, {}), **values} for name, values in sections.items()}
        return dataclasses.replace(self, settings={**self.settings, **changed})

    @property
    def run_dir(self) -> Path:
        """Where the run's files go."""
        if self.out is not None:
            return self.out
        dataset = "".join(c if c.isalnum() or c in "-." else "-" for c in Path(self.dataset).name)
        return Path("runs") / f"{self.estimator.rpartition(':')[2]}-{dataset}-{self.model}-{self.seed}"


def transformer_shape(config: RunConfig) -> UNetConfig:
    """The shape of a model of transformer blocks with one level of tokens. Raises `ConfigError` for one of another kind."""
    if not isinstance(config.unet, UNetConfig):
        raise ConfigError(
            f"--model {config.model} is no model of transformer blocks with one level of tokens: name one"
        )
    return config.unet


def _require_amounts(config: RunConfig) -> None:
    require_bounds(config)
    require(
        config.bytes_per_step <= LARGEST_INDEX,
        f"--batch {config.batch} x --length {config.length} must be at most {LARGEST_INDEX} bytes a step",
    )
    require(
        config.total_steps >= 1,
        f"--bytes {config.bytes} is less than one step of {config.batch} x {config.length} bytes",
    )
    require(
        config.total_steps <= LARGEST_INDEX,
        f"--bytes {config.bytes} in steps of {config.batch} x {config.length} bytes must be at most {LARGEST_INDEX} steps",
    )
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
    require(
        config.resume or not config.schedule.decay_now,
        "--schedule.decay-now is for a run that goes on: use --resume too",
    )
    start = config.schedule.decay_from
    require(
        start is None or start < config.total_steps * config.bytes_per_step,
        f"--schedule.decay-from {start} lies behind the end of the run: name more --bytes",
    )
    require(config.evaluation.bytes >= config.length, f"--evaluation.bytes must be at least --length, {config.length}")
    require(not (config.resume and config.overwrite), "--resume goes on with a run and --overwrite deletes it: use one")


def _require_distillable(config: RunConfig) -> None:
    """A model that a teacher can be distilled into reads bytes, has one level of tokens, and a router that learns."""
    if config.distill.teacher is None:
        given = [
            one.name for one in dataclasses.fields(DistillConfig) if getattr(config.distill, one.name) != one.default
        ]
        flags = ", ".join(f"--distill.{name.replace('_', '-')}" for name in given)
        require(not given, f"{flags}: there is no --distill.teacher to learn from")
        return
    what = f"--distill.teacher {config.distill.teacher}"
    require(not config.reads_tokens, f"{what} is distilled into a model of bytes: leave out --tokenizer.source")
    require(
        config.unet.levels == 1 and len(config.levels) == 1,
        f"{what} becomes the main network of a model with one level of tokens, and --model {config.model} --estimator "
        f"{config.estimator} has {len(config.levels)}",
    )
    require(
        not config.first.needs_text,
        f"{what}: --estimator {config.estimator} is prepared from text, and the teacher says where tokens end: name one whose "
        "router learns, such as hnet or sfe",
    )


def _require_levels(config: RunConfig) -> None:
    inside = max(config.unet.levels - 1, 0)
    given = max(len(config.inner_estimators), len(config.inner_rates))
    require(
        given <= inside,
        f"{given} inner levels are named (--inner-estimators, --inner-rates), but --model {config.model} has {inside} inside its "
        "first",
    )
    require(
        inside > 0 or not config.inner_constrain,
        f"--inner-constrain {' '.join(config.inner_constrain)}: --model {config.model} has no level of tokens inside its first",
    )


def require_free_names(sections: Iterable[str]) -> None:
    """Raise `ConfigError` where settings have the name of a flag of the run itself."""
    taken = {one.name for one in dataclasses.fields(RunConfig)}
    for name in sections:
        require(
            name not in taken,
            f"settings called {name} would hide --{name} of the run: give the class another `section`",
        )


def _require_parts(config: RunConfig) -> None:
    """The parts exist, their settings are possible, and they fit the model and each other."""
    try:
        levels = config.levels
    except PartError as error:
        raise refused(error) from error.__cause__
    first = config.first
    require(
        config.unet.levels > 0 or not first.makes_tokens,
        f"--model {config.model} has no level of tokens: use {WITHOUT_TOKENS}",
    )
    require(
        first.makes_tokens or config.unet.levels == 0 or not isinstance(config.unet, HNetConfig),
        f"--estimator {config.estimator} leaves out the only level of tokens, but the layout of --model {config.model} has "
        f"{config.unet.levels}: name a --unet.layout without any, such as '[\"m4\"]'",
    )
    require(
        first.makes_tokens or config.unet.levels == 0 or not isinstance(config.unet, BLTConfig),
        f"--estimator {config.estimator} leaves out the only level of tokens, but --model {config.model} has one: name a --model "
        "of bytes alone, such as blt-patcher",
    )
    require(
        bool(levels) or not config.constrain,
        f"--constrain {' '.join(config.constrain)}: there is no level of tokens whose boundaries it could constrain",
    )
    _require_no_bytes_inside(config, levels if config.reads_tokens else levels[1:])
    require_free_names(config.sections)
    part = config.batch // config.optimizer.accumulate
    for level in levels:
        with outside_errors(level.parts.all):
            try:
                level.settings.check(level.rate, part)
            except ValueError as error:
                raise ConfigError(f"--estimator {level.estimator}: {error}") from None
    require(
        config.chunker != "attend" or config.unet.attend != "none",
        "--chunker attend brings no token back itself: name the blocks that attend to them with --unet.attend first or every",
    )
    require(
        not (config.reads_tokens and config.unet.ngrams),
        "--unet.ngrams are embeddings of bytes, and a model with --tokenizer.source reads tokens: leave one of them out",
    )


def _require_no_bytes_inside(config: RunConfig, levels: Sequence[LevelConfig]) -> None:
    """Nothing that reads bytes draws or constrains boundaries at `levels` inside others, or inside a tokenizer."""
    for number, level in enumerate(levels):
        first = number == 0 and config.reads_tokens
        require(
            not (level.settings.outermost_only or (first and level.settings.reads_bytes)),
            f"{level.estimator} reads bytes, not tokens: use it for the first level, and name --inner-estimators"
            + (", and no --tokenizer.source" if config.reads_tokens else ""),
        )
        for part in level.parts.constraints:
            require(
                not getattr(part.cls, "outermost_only", False),
                f"--inner-constrain {part.name} reads bytes, not tokens: it can only constrain the first level (--constrain)",
            )
        require(
            not level.settings.needs_text and level.settings.makes_tokens,
            f"{level.estimator} cannot be inside another level{' or a tokenizer' if config.reads_tokens else ''}: it "
            + ("is prepared from text" if level.settings.needs_text else "makes no tokens"),
        )
