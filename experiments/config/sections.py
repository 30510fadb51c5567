"""The parts of a run's configuration, every field a command-line flag; each refuses values that are impossible by themselves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from experiments.config.errors import require


@dataclass(frozen=True)
class ScoreFunctionConfig:
    """The score-function objective (--estimator sfe and all that begin so), and the windowed policy of sfe."""

    window: int = 7
    """Past boundaries that the policy sees; 0 for a policy without memory."""
    discount: float = 0.99
    """Discount of rewards per byte (eq. 13); 1 leaves discounting out."""
    early_exit: bool = True
    """Rewards relative to a prediction from the encoder alone (eq. 11-12)."""
    early_weight: float = 0.1
    """Weight of the early head's own loss (eq. 22)."""
    critic: bool = False
    """Returns relative to what a linear critic on the encoder's states expects."""
    advantage_decay: float | None = None
    """Lambda of generalised advantage estimation, with a critic of its own; by default there is none of it."""
    centring: Literal["batch", "leave-one-out", "samples", "none"] = "batch"
    """Returns relative to the batch's mean at the same position (eq. 14), with or without the sequence itself in it; or to
    the other draws for the same sequence."""
    samples: int = 1
    """Draws of boundaries for each sequence and encoder pass; --sfe.centring samples needs 2 or more."""
    policy_weight: float = 1e-2
    """Weight of the policy loss (eq. 22)."""
    rate_weight: float | None = None
    """Weight of the loss that holds the rate; by default 0.01, and 0.3 for a chunker that smooths, whose own gradient pulls at
    the probabilities as hard as the likelihood does."""
    scale: float = 16.0
    """Divisor of the policy's raw logits (eq. 18); a smaller one makes the policy move faster."""
    cap: float = 6.0
    """Bound of the policy's logits in training (eq. 19)."""

    def __post_init__(self):
        require(self.window >= 0, f"--sfe.window counts past boundaries and cannot be negative; got {self.window}")
        require(0 <= self.discount <= 1, f"--sfe.discount lies between 0 and 1; got {self.discount}")
        require(self.scale > 0 and self.cap > 0, "--sfe.scale and --sfe.cap must be positive")
        require(
            self.advantage_decay is None or 0 <= self.advantage_decay <= 1,
            f"--sfe.advantage-decay lies between 0 and 1; got {self.advantage_decay}",
        )
        require(
            self.advantage_decay is None or not self.critic,
            "--sfe.advantage-decay brings a critic of its own: leave --sfe.critic out",
        )
        require(self.samples >= 1, f"--sfe.samples must be at least 1; got {self.samples}")
        require(
            self.centring != "samples" or self.samples > 1,
            "--sfe.centring samples compares draws for one sequence: ask for --sfe.samples 2 or more",
        )


@dataclass(frozen=True)
class StrideConfig:
    """Boundaries at every n-th byte (--estimator stride)."""

    stride: int | None = None
    """Bytes per token; by default the whole number nearest to 1 / rate."""

    def __post_init__(self):
        require(self.stride is None or self.stride >= 1, f"--stride.stride must be at least 1; got {self.stride}")


@dataclass(frozen=True)
class CharactersConfig:
    """Boundaries at UTF-8 characters (--estimator characters)."""

    every: int = 1
    """Characters per token, white space and punctuation among them; --rate has no say."""
    at: Literal["last", "first"] = "last"
    """The byte of a character at which a token closes."""

    def __post_init__(self):
        require(self.every >= 1, f"--characters.every must be at least 1; got {self.every}")


@dataclass(frozen=True)
class IsotropicConfig:
    """A byte-level baseline (--estimator isotropic)."""

    token_level: bool = True
    """Run the token level at every byte; without it only the windowed byte-level blocks remain."""


@dataclass(frozen=True)
class OffPolicyConfig:
    """Boundaries sampled independently at the target rate; importance weights train the policy (--estimator sfe-offpolicy)."""

    clip: float | None = 1.0
    """Upper bound of importance weights; None leaves them unbounded and unbiased."""

    def __post_init__(self):
        require(self.clip is None or self.clip > 0, f"--offpolicy.clip must be positive; got {self.clip}")


@dataclass(frozen=True)
class MLPConfig:
    """The perceptron that scores each byte alone (--estimator gumbel, sfe-mlp, and hnet with direct routing)."""

    inner: int | None = None
    """Width of its hidden layer; by default that of the model."""
    temperature: float = 0.5
    """Temperature of the relaxed draws."""
    prior_weight: float = 1.0
    """Weight of the binomial prior (gumbel only)."""

    def __post_init__(self):
        require(self.inner is None or self.inner >= 1, f"--mlp.inner must be at least 1; got {self.inner}")
        require(self.temperature > 0, f"--mlp.temperature must be positive; got {self.temperature}")


@dataclass(frozen=True)
class DynamicChunkingConfig:
    """H-Net's dynamic chunking (--estimator hnet)."""

    routing: Literal["cosine", "direct"] = "cosine"
    """Boundaries where neighbouring states differ, or scored from each state alone."""
    ratio_weight: float = 0.03
    """Weight of the ratio loss (H-Net eq. 10)."""


@dataclass(frozen=True)
class SmoothConfig:
    """The smoothing chunker (--chunker smooth; the default of hnet and sfe-smooth)."""

    smoothing: bool = True
    """Average tokens with the probabilities of their boundaries (H-Net eq. 5)."""
    weighting: Literal["straight-through", "confidence", "none"] | None = None
    """Weight of a token by the router's confidence (H-Net eq. 6-9); by default straight-through for hnet, none otherwise."""
    residual: Literal["plain", "projected"] = "plain"
    """What the bytes keep of the encoder: its states, or a projection of them that starts at zero (H-Net eq. 3)."""


@dataclass(frozen=True)
class PoolConfig:
    """How a token is pooled from its positions, for chunkers that would select the position at the boundary (all but mean)."""

    kind: Literal["last", "max", "mean", "attention"] = "last"
    """Select the position at the boundary (last); the maximum or the mean over the positions of the token; or attention to them
    (H-Net fig. 13; BLT's encoder)."""
    boundary: bool = False
    """Add the position at the boundary to the pooled value (H-Net fig. 13, +Res)."""
    heads: int = 4
    """Heads of the attention to the positions of a token."""

    def __post_init__(self):
        require(self.heads >= 1, f"--pool.heads must be at least 1; got {self.heads}")
        require(
            not self.boundary or self.kind != "last",
            "--pool.boundary adds the last position to a pool: name a --pool.kind",
        )


@dataclass(frozen=True)
class EntropyConfig:
    """Boundaries where a byte model is unsure (--estimator entropy)."""

    model: Path | None = None
    """Folder of the run that trained the byte model: one of --estimator isotropic, best without its token level."""
    rule: Literal["global", "rise", "combined"] = "global"
    """A token closes where the entropy of the next byte passes a threshold, where it rises by more than one, or both (BLT). The
    threshold is found from the data: that on the rise for the rule of that name, that on the entropy for the others."""
    increase: float = 0.0
    """Least rise of the entropy in nats, for the combined rule."""


@dataclass(frozen=True)
class BPEConfig:
    """Boundaries of a byte-pair encoding of the training text (--estimator bpe, bpe-distilled)."""

    vocabulary: int = 65_536
    """Tokens to learn at most. The first so many are used whose rate comes nearest to --rate; a run says which rate that is."""
    text_bytes: int = 2**24
    """Training text to learn them from, at most: the first that the run sees, and never more than it sees. Memory follows the
    different words in it: some 4 MB for each MB of English, 100 MB for each MB of a text without spaces."""
    imitation_weight: float = 0.1
    """Weight of the cross-entropy of the distilled policy (bpe-distilled)."""

    def __post_init__(self):
        require(self.vocabulary >= 257, "--bpe.vocabulary has 256 bytes and at least one merge: 257 or more")
        require(self.text_bytes >= 1, f"--bpe.text-bytes is an amount of text, at least 1; got {self.text_bytes}")


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
