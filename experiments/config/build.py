"""From a configuration to a model."""

from __future__ import annotations

from collections.abc import Callable

import equinox as eqx
import jax
from jaxtyping import PRNGKeyArray, PyTree

from estimators import AbstractChunker, AbstractEstimator
from estimators.constraints import AbstractConstraint, constrained
from estimators.keys import named_key
from estimators.lookup import PartError
from estimators.settings import Context
from experiments.config.errors import ConfigError, outside_errors, refused, require
from experiments.config.settings import LevelConfig, RunConfig
from unet import UNet
from unet.blocks import Stack
from unet.chunkers.named import ChunkerNames
from unet.distillation import Teacher, distilled
from unet.hierarchy import Flat
from unet.language_model import AbstractLanguageModel
from unet.tokens.model import TokenModel

ADAPTER = 8 / 3
"""Inner width of the adapters around a teacher's layers, as a multiple of its width: 8192 for 3072 in H-Net's appendix F."""


def build_model(config: RunConfig, key: PRNGKeyArray, prepared: PyTree = None) -> AbstractLanguageModel:
    """A new model of a run; `prepared` is what the outermost estimator took from text, the tokenizer of one that reads tokens,
    or the teacher of one that is distilled. Raises `ValueError` for parts that do not fit."""
    if config.distill.teacher is not None:
        return _with_teacher(config, build_byte_model(config, key), prepared, key)
    if config.reads_tokens:
        estimators = build_estimators(config, named_key(key, "estimators"))
        vocab = prepared.size
        return TokenModel(prepared, UNet(config.unet, estimators, key=named_key(key, "model"), vocab=vocab))
    return build_byte_model(config, key, prepared)


def new_model(
    config: RunConfig,
    key: PRNGKeyArray,
    prepared: PyTree = None,
    kept: Callable[[AbstractLanguageModel], AbstractLanguageModel] = lambda model: model,
) -> AbstractLanguageModel:
    """`build_model`, compiled whole: a fraction of the time that its operations take to be compiled one by one. `kept` says
    inside the compiled function where arrays lie; those of a teacher are read, and lie on one device."""
    if config.distill.teacher is None:
        return eqx.filter_jit(lambda: kept(build_model(config, key, prepared)))()
    # The main network is the teacher's. What is not returned here is not computed either.
    empty = Flat(Stack(()))
    outside = eqx.filter_jit(lambda: eqx.tree_at(lambda one: one.stage.inner, build_byte_model(config, key), empty))()
    return _with_teacher(config, outside, prepared, key)


def _with_teacher(config: RunConfig, student: UNet, teacher: Teacher, key: PRNGKeyArray) -> UNet:
    """A fresh model with the teacher's layers as its main network. Raises `ConfigError` where they do not fit."""
    hidden = config.distill.adapter_dim or round(ADAPTER * teacher.dim)
    shape, where = config.unet, f"--distill.teacher {config.distill.teacher}"
    routers = [estimator.router for estimator in student.estimators]
    require(
        bool(jax.tree.leaves(eqx.filter(routers, eqx.is_inexact_array))),
        f"--estimator {config.estimator} draws boundaries by a rule, which cannot learn those of {where}: name one whose router "
        "learns, such as hnet or sfe",
    )
    own, remat, attention = named_key(key, "adapters"), shape.always_remat, shape.attention_form
    try:
        return distilled(student, teacher, hidden, remat=remat, attention=attention, key=own)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def build_byte_model(config: RunConfig, key: PRNGKeyArray, prepared: PyTree = None) -> UNet:
    """The same for a run that reads bytes. Raises `ConfigError` for one that reads tokens."""
    require(
        not config.reads_tokens,
        f"--model {config.model} reads tokens (--tokenizer.source {config.tokenizer.source}), and this is for models of bytes",
    )
    estimators = build_estimators(config, named_key(key, "estimators"), prepared)
    return UNet(config.unet, estimators, key=named_key(key, "model"))


def build_estimators(config: RunConfig, key: PRNGKeyArray, prepared: PyTree = None) -> tuple[AbstractEstimator, ...]:
    """The estimators of a run, the outermost first; none for a model without a token level."""
    built = []
    for number, level in enumerate(config.levels):
        dim, own = config.unet.widths[number], named_key(key, f"level {number}")
        chunker = build_chunker(config, level, dim, own)
        taken = prepared if number == 0 else None
        context = Context(dim, level.rate, chunker, named_key(own, "estimator"), taken, config.sections)
        built.append(constrained(_built(level, context), build_constraints(level, context, number)))
    return tuple(built)


def build_constraints(level: LevelConfig, context: Context, number: int) -> list[AbstractConstraint]:
    """The constraints of level `number`. Raises `ValueError` for impossible settings."""
    built = [context.part(part.kind, part.name, level=number) for part in level.parts.constraints]
    return [one for one in built if isinstance(one, AbstractConstraint)]


def _built(level: LevelConfig, context: Context) -> AbstractEstimator:
    made = level.settings.build(context)
    if not isinstance(made, AbstractEstimator):
        raise ValueError(f"--estimator {level.estimator} built a {type(made).__name__}, not an AbstractEstimator")
    return made


def build_estimator(config: RunConfig, key: PRNGKeyArray, prepared: PyTree = None) -> AbstractEstimator | None:
    """The estimator of a run at its outermost level; None for a model without a token level."""
    return next(iter(build_estimators(config, key, prepared)), None)


def build_chunker(config: RunConfig, level: LevelConfig, dim: int, key: PRNGKeyArray) -> AbstractChunker:
    """The chunker of a level whose positions have width `dim`. Raises `ValueError` for a chunker that passes no gradient to an
    estimator that learns through it."""
    names = ChunkerNames(level.parts.chunker, level.parts.pool, config.sections, config.pool_boundary)
    through = level.settings.learns_through
    chunker = names.build(dim, key, config.unet.implementation, trains_router=through is not None)
    if through is not None and through not in chunker.passes_gradient_to:
        raise ValueError(
            f"--estimator {level.estimator} learns through the {through} of boundaries: --chunker {level.parts.chunker.name} "
            f"with --pool {level.parts.pool.name} would pass them no gradient"
        )
    return chunker


def require_fit(config: RunConfig) -> None:
    """Raise `ConfigError` if the chunkers or the estimators of a run cannot be built. Estimators that need text first are left
    out, and nothing is computed."""
    require(
        not config.pool_boundary or all(level.parts.pool.name != "last" for level in config.levels),
        "--pool-boundary adds the last position to a pool: name a --pool",
    )

    def build() -> None:
        for number, level in enumerate(config.levels):
            dim, key = config.unet.widths[number], jax.random.key(0)
            context = Context(dim, level.rate, build_chunker(config, level, dim, key), key, None, config.sections)
            constraints = build_constraints(level, context, number)
            if not level.settings.needs_text:
                constrained(_built(level, context), constraints)

    with outside_errors(config.chosen):
        try:
            eqx.filter_eval_shape(build)
        except PartError as error:
            raise refused(error) from error.__cause__
        except ValueError as error:
            raise ConfigError(str(error)) from None
