"""Runs that begin with the alignment of a hierarchy to a model of tokens."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from data import Split
from estimators.objectives import Imitation
from experiments.config.errors import ConfigError, require
from experiments.config.models import load_any
from experiments.config.plugins import import_plugins, modules_of
from experiments.config.settings import RunConfig
from experiments.training.capacity import MEASURED_BYTES
from experiments.training.placement import Placement
from experiments.training.step import Inputs, StepMetrics, TrainState, compiler_options, make_step
from experiments.training.trainer import Trainer
from unet.distillation import Alignment, Teacher, token_targets
from unet.language_model import AbstractLanguageModel
from unet.losses import LossOutput
from unet.tokens.batch import TokenBatch, padded_length, tokenised
from unet.tokens.model import TokenModel
from unet.tokens.spelling import ExpectedBytes, Spelling
from unet.wrapped import Positioned

AlignmentStep = Callable[[TrainState, Inputs, PRNGKeyArray], tuple[TrainState, StepMetrics]]
"""A training step of an alignment, compiled."""

SLACK = 1.25
"""Capacity of the alignment, as a multiple of the most tokens of a sequence of held-out text."""


def read_teacher(config: RunConfig) -> Teacher:
    """The model of tokens that `--distill.teacher` names. Raises `ConfigError` for any other, and `LoadError` for none."""
    where = config.distill.teacher
    assert where is not None
    model = load_any(where, (*modules_of(config), *import_plugins(config.plugin))).model
    if not isinstance(model, TokenModel):
        raise ConfigError(f"--distill.teacher {where} is a model of bytes: name one of tokens")
    try:
        return Teacher.of(model)
    except ValueError as error:
        raise ConfigError(f"--distill.teacher {where}: {error}") from None


def require_one_process(config: RunConfig, placement: Placement) -> None:
    """Raise `ConfigError` for a distilled run in several processes or on several GPUs: the compiler divides the alignment, which
    no kernel can be."""
    divided = jax.process_count() > 1 or (jax.default_backend() == "gpu" and not placement.alone)
    alone = config.distill.teacher is None or not divided
    require(alone, "--distill.teacher: the alignment runs in one process, on one GPU: add --devices 1")


@dataclass(frozen=True)
class AlignmentStage:
    """The first `steps` steps of a distilled run: the teacher's tokens for each batch, the loss, and the most tokens of a
    sequence (`capacity`). `rate`: the teacher's tokens per byte of held-out text."""

    config: RunConfig
    teacher: Teacher
    placement: Placement
    capacity: int
    rate: float

    @classmethod
    def of(cls, config: RunConfig, teacher: Teacher, split: Split, placement: Placement) -> AlignmentStage:
        """That of a run. Raises `ConfigError` for a tokenizer that changes the text, and for one with too few positions."""
        rows = split.held_out_rows(min(config.evaluation.bytes, MEASURED_BYTES))
        stacked = {name: np.stack([row[name] for row in rows]) for name in ("bytes", "segments", "mask")}
        try:
            actions = np.asarray(token_targets(_tokens(teacher, stacked), stacked, config.distill.boundaries).actions)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"--distill.teacher {config.distill.teacher}: {error}") from None
        most = 4 * math.ceil(SLACK * int(np.max(np.sum(actions, axis=1))) / 4)
        learned = teacher.stage.table.shape[0] if isinstance(teacher.stage, Positioned) else most
        require(
            most <= learned,
            f"--distill.teacher {config.distill.teacher} has embeddings of {learned} positions, and --length {config.length} may "
            f"have {most} tokens: name a shorter one",
        )
        rate = float(np.sum(actions) / np.sum(stacked["mask"]))
        return cls(config, teacher, placement, min(most, config.length), rate)

    @functools.cached_property
    def alignment(self) -> Alignment:
        """The loss. A run that goes on after its alignment does not need it."""
        settings, teacher = self.config.distill, self.teacher
        expected = (
            ExpectedBytes(teacher.model, Spelling.of(teacher.tokenizer.written)) if settings.byte_weight else None
        )
        return Alignment(
            teacher.embedding,
            Imitation(settings.boundary_weight),
            expected,
            embedding_weight=settings.embedding_weight,
            byte_weight=settings.byte_weight,
        )

    @property
    def steps(self) -> int:
        return self.config.align_steps

    @property
    def note(self) -> str:
        """What a user should know of it."""
        aligned = self.steps * self.config.bytes_per_step / 1e6
        return (
            f"the first {aligned:.2f} MB align the model with {self.config.distill.teacher}, whose tokens begin at "
            f"{self.rate:.4f} of the bytes; --rate is {self.config.rate:g}"
        )

    def inputs(self, batch: Mapping[str, np.ndarray]) -> dict[str, PyTree[np.ndarray]]:
        """What the loss reads of a batch of text. Runs on the host."""
        tokens, expected = _tokens(self.teacher, batch, shortest=self.capacity), self.alignment.expected
        read = {**batch, "targets": token_targets(tokens, batch, self.config.distill.boundaries)}
        if expected is None:
            return read
        # Of one length, so that one program is compiled; there is no room for the tokens that are cut off.
        columns = slice(padded_length(self.capacity, self.config.length))
        cut = jax.tree.map(lambda leaf: leaf[:, columns], tokens)
        return {**read, "tokens": cut, "next_bytes": expected.spelling.next_bytes(cut, self.config.length)}

    def compiled(self, trainer: Trainer) -> AlignmentStep:
        """The training step of the alignment, jitted; the buffers of the state are reused."""
        arrays, static = eqx.partition(self.alignment, lambda leaf: isinstance(leaf, jax.Array | np.ndarray))
        held, settings = None, self.config
        # What is drawn now is the teacher's, and says nothing of what the estimator would draw.
        settings = dataclasses.replace(settings, target=dataclasses.replace(settings.target, control=0.0))
        if self.config.distill.hold:
            everything = jax.tree.map(lambda leaf: False, trainer.params)
            held = eqx.tree_at(lambda model: model.stage.inner.stage, everything, replace_fn=_all_true)

        def aligned(
            arrays: PyTree[Array], state: TrainState, batch: Inputs, key: PRNGKeyArray
        ) -> tuple[TrainState, StepMetrics]:
            alignment: Alignment = eqx.combine(arrays, static)

            def loss(
                model: AbstractLanguageModel, batch: Inputs, key: PRNGKeyArray, target_rate: Float[Array, ""]
            ) -> LossOutput:
                return alignment(model.unet, batch, capacity=self.capacity)

            remat = None if trainer.memory is None else trainer.memory.remat
            step = make_step(settings, trainer.static, trainer.optimizer, loss=loss, remat=remat, held=held)
            return step(state, batch, key)

        # As an argument, since a constant of this size would be compiled into the program.
        step = jax.jit(aligned, donate_argnums=1, compiler_options=compiler_options())
        return functools.partial(step, jax.device_put(arrays, self.placement.everywhere))


def _all_true(tree: PyTree[bool]) -> PyTree[bool]:
    return jax.tree.map(lambda leaf: True, tree)


def _tokens(teacher: Teacher, batch: Mapping[str, np.ndarray], shortest: int = 0) -> TokenBatch:
    """Raises `ImportError` and `ValueError` as the tokenizer does."""
    rows = (np.asarray(batch[name]) for name in ("bytes", "segments", "mask"))
    return tokenised(teacher.tokenizer, *rows, shortest=shortest)


def distill_figures(teacher: Teacher) -> dict[str, float | int]:
    """What the summary of a run says of its teacher."""
    return {"vocabulary": teacher.tokenizer.size, "vocabulary_bytes": teacher.tokenizer.learned_from}
