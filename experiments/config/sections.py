"""The parts of a run's configuration, every field a command-line flag; each refuses values that are impossible by themselves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from estimators.bounds import LARGEST_BYTES, LARGEST_INDEX, MARGIN, Count, Positive, Rate, Share, Weight, Width, Within
from experiments.config.errors import require, require_bounds
from unet.distillation import Places
from unet.tokens.tokenizer import TokenizerSize

Decay = Annotated[float, Within(0.0, 1.0 - MARGIN)]


@dataclass(frozen=True)
class TargetConfig:
    """How the target rate moves during training. Uniform boundaries follow it at once, learned ones through their losses."""

    start: Rate | None = None
    """Target at the first step, from which it goes to --rate in a straight line; by default --rate itself."""
    until: Annotated[float, Within(MARGIN, 1.0)] = 0.5
    """Share of training after which --rate is reached."""
    control: Weight = 0.0
    """Gain of a slow controller that moves an estimator's own target, in log-odds per step and unit of relative error, until
    the measured rate is the one asked for; 0 leaves the target alone. Rules draw at their own rate all the same, and so does the
    policy of sfe-offpolicy: the rate measured there is that of the independent boundaries."""

    def __post_init__(self):
        require_bounds(self, "--target.")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW under a schedule with linear warm-up."""

    learning_rate: Positive = 3e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """After the warm-up a cosine to the end; or the peak until the last fifth, then an inverse square root (H-Net)."""
    warmup_bytes: Annotated[int, Within(0, LARGEST_BYTES)] | None = None
    """Training bytes over which the learning rate rises from 0; by default 5 % of all, 10 % for wsd."""
    stage_multipliers: Positive | None = None
    """Multiply the learning rate of each stage by what H-Net's eq. 11 says for so many bytes per token of a usual tokenizer
    (4.6 for English); by default all stages learn alike."""
    decay: Literal["all", "matrices"] = "all"
    """What decays: all parameters, or matrices alone, and no bias, norm or other vector."""
    final_fraction: Share = 0.0
    """Learning rate at the end, as a share of the peak."""
    beta1: Decay = 0.9
    """Decay of the first moment."""
    beta2: Decay = 0.999
    """Decay of the second moment."""
    weight_decay: Weight = 0.01
    """Decoupled weight decay."""
    clip: Positive = 1.0
    """Global norm to which gradients are clipped."""
    accumulate: Count = 1
    """Gradient accumulation: parts of a batch that are computed one after another; batch centring works within a part."""

    def __post_init__(self):
        require_bounds(self, "--optimizer.")


@dataclass(frozen=True)
class ScheduleConfig:
    """The end of a run that was given another one while it trained."""

    decay_now: bool = False
    """With --resume: the learning rate decays from where the run is to its end, which --bytes or --steps may move."""
    decay_from: Annotated[int, Within(0, LARGEST_BYTES)] | None = None
    """Training bytes from which on it decays, in the manner of --optimizer.schedule; by default that schedule holds to the end.
    --schedule.decay-now sets it."""
    planned_bytes: Annotated[int, Within(1, LARGEST_BYTES)] | None = None
    """Training bytes that the schedule was made for that holds until then; by default all."""

    def __post_init__(self):
        require_bounds(self, "--schedule.")


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
    held_out: Rate = 0.05
    """Share of documents held out for validation, chosen by their content; none of a data set that has a validation or test
    split of its own, by the names of its files, which is used instead and never trains."""
    workers: Annotated[int, Within(0, 256)] = 0
    """Processes that prepare batches; their number never changes a batch."""
    lanes: Annotated[int, Within(1, 1024)] | None = None
    """Parts that a data set of the hub is divided into, each with shards of its own, so that of several processes each downloads
    its own alone. Another number makes other batches of the same text. By default as many as the processes that begin the run,
    or the next smaller number that divides --batch and is not more than the shards; a run that goes on keeps its number."""
    cache: Path | None = None
    """Where shards of hub data sets are kept; by default ~/.cache/caesura."""
    cache_gib: Annotated[float, Within(MARGIN, 1e9)] = 8.0
    """Size to which that cache is kept for each data set, in GiB; the oldest shards go first."""

    def __post_init__(self):
        require_bounds(self, "--data.")


@dataclass(frozen=True)
class TokenizerConfig:
    """Tokens of a byte-pair encoding as the outermost level, which a model reads instead of bytes (pip install
    'caesura-lm[bpe]'). Results stay in bits per byte, over the same bytes."""

    source: str | None = None
    """bpe: learned from the training text; a tokenizer.json of a byte-level encoding, such as GPT-2's; or a model of tokens (a
    run's folder, an export, hub:owner/name), whose tokenizer is used. None: the model reads bytes."""
    vocabulary: TokenizerSize = 50_257
    """Tokens to learn at most, the 256 bytes among them."""
    text_bytes: Annotated[int, Within(1, LARGEST_BYTES)] = 2**28
    """Training text to learn them from, at most: the first that the run sees, and no more than one pass."""

    def __post_init__(self):
        require_bounds(self, "--tokenizer.")


@dataclass(frozen=True)
class DistillConfig:
    """Distillation of a model of tokens into this one: its layers become the main network, its tokens are the boundaries and its
    embeddings what the encoder learns, until the loss is that of the run alone (H-Net appendix F)."""

    teacher: str | None = None
    """A model of tokens whose layers are one network: a run's folder, an export, hub:owner/name, or a Llama or GPT-2 of
    transformers with its tokenizer.json, by its folder or its name on the hub. The shape of this run is that of everything but
    the main network."""
    align_bytes: Annotated[int, Within(0, LARGEST_BYTES)] | None = None
    """Training bytes of the alignment; from there on boundaries and losses are those of the run. By default half of all;
    where a run goes on to another end, as many as before."""
    boundaries: Places = "starts"
    """Where a token closes in the alignment: at the first byte of the next token (H-Net), or at its own last byte."""
    boundary_weight: Weight = 1.0
    """Weight of the cross-entropy of the router with the teacher's boundaries."""
    embedding_weight: Weight = 1.0
    """Weight of the squared distance to the teacher's embeddings, relative to their size."""
    byte_weight: Weight = 1.0
    """Weight of the divergence of the next byte from what the teacher expects, in the alignment; 0 leaves it out."""
    adapter_dim: Width | None = None
    """Inner width of the two MLPs around the teacher's layers; by default 8/3 of the teacher's width."""
    hold: bool = True
    """Leave the teacher's layers as they are until the alignment ends."""

    def __post_init__(self):
        require_bounds(self, "--distill.")


@dataclass(frozen=True)
class EvaluationConfig:
    """Validation on held-out text."""

    bytes: Annotated[int, Within(1, 2**34)] = 262_144
    """Held-out bytes to evaluate on, at most."""
    times: Count = 10
    """How often during training, evenly spread, the last at the end."""

    def __post_init__(self):
        require_bounds(self, "--evaluation.")


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept to go on from."""

    times: Count = 10
    """How often during training, evenly spread; there is always one at the end and when a run is stopped."""
    keep: Count = 2
    """How many of the latest are kept."""

    def __post_init__(self):
        require_bounds(self, "--checkpoint.")


@dataclass(frozen=True)
class DistributedConfig:
    """Which of several processes this is. They train one model together, on one machine or many, in one folder that all see."""

    coordinator: str | None = None
    """HOST:PORT of process 0, where all processes meet."""
    processes: Count | None = None
    """How many there are."""
    index: Annotated[int, Within(0, LARGEST_INDEX)] | None = None
    """Which of them this is, from 0 on; 0 writes the files, the reports and the terminal."""
    launcher: Literal["auto", "none", "slurm", "ompi", "k8s"] = "auto"
    """Who says all that instead: auto: srun or mpirun, where one of them started several; k8s: an indexed Kubernetes job."""
    wait: Annotated[float, Within(1.0, 1e6)] = 300.0
    """Seconds to wait at the start until all processes are there."""
    timeout: Annotated[float, Within(1.0, 1e6)] = 60.0
    """Seconds without a sign of life after which a process counts as dead, and the others end."""
    patience: Annotated[float, Within(1.0, 1e6)] = 1800.0
    """Seconds that a process may be busy with something else, such as its report, while others wait for it, and that all may take
    for one exchange."""

    def __post_init__(self):
        require_bounds(self, "--distributed.")
        given = {"coordinator": self.coordinator, "processes": self.processes, "index": self.index}
        missing = [f"--distributed.{name}" for name, value in given.items() if value is None]
        if len(missing) == len(given):
            return
        require(
            not missing,
            f"--distributed.coordinator, .processes and .index go together: {', '.join(missing)} is missing",
        )
        require(
            self.launcher in ("auto", "none"),
            f"--distributed.launcher {self.launcher} says what --distributed.coordinator says: use one of them",
        )
        host, colon, port = (self.coordinator or "").rpartition(":")
        require(
            bool(host and colon) and port.isascii() and port.isdigit() and 0 < int(port) < 65536,
            f"--distributed.coordinator {self.coordinator} is not HOST:PORT, such as node1:12345",
        )
        require(
            self.index is None or self.processes is None or self.index < self.processes,
            f"--distributed.index {self.index} is none of 0 to {(self.processes or 1) - 1}, of which there are "
            f"--distributed.processes {self.processes}",
        )


@dataclass(frozen=True)
class MeshConfig:
    """How the devices of all processes share a run: a mesh with the axes `data`, `fsdp` and `tensor`."""

    data: Annotated[int, Within(-1, LARGEST_INDEX)] = -1
    """Groups of devices that share the sequences of a batch; -1: as many as the other axes leave."""
    fsdp: Count = 1
    """Devices of a group that share its sequences too, and hold each a part of the parameters, gradients and moments."""
    tensor: Count = 1
    """Devices that share the heads and MLPs of the same sequences."""
    whole_below: Annotated[int, Within(0, LARGEST_INDEX)] = 16_384
    """Parameters of fewer numbers than this are whole on every device."""
    show: bool = False
    """List how the parameters lie on the devices."""

    def __post_init__(self):
        require_bounds(self, "--mesh.")
        require(self.data != 0, "--mesh.data must be at least 1, or -1 for as many as the other axes leave; got 0")

    @property
    def named(self) -> int:
        """The devices that the axes name, those left to `data` aside."""
        return max(self.data, 1) * self.fsdp * self.tensor
