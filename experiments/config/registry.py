"""Every estimator by name: how a configuration becomes a composition of router, chunker and objective."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from jaxtyping import PRNGKeyArray

from estimators import (
    AbstractChunker,
    AbstractEstimator,
    AbstractPatchRule,
    AbstractReduction,
    AbstractRouter,
    BatchCentre,
    Bernoulli,
    BPEGuided,
    Characters,
    CombinedRule,
    CosineRouter,
    Critic,
    Discount,
    Distilled,
    DynamicChunking,
    EarlyExit,
    Entropy,
    EntropyRouter,
    Estimator,
    GeneralisedAdvantage,
    GlobalRule,
    ImportanceWeight,
    Isotropic,
    MLPRouter,
    OffPolicy,
    RiseRule,
    SampleCentre,
    ScoreFunction,
    Spacelike,
    StraightThroughGumbel,
    Stride,
    Uniform,
    Whitespace,
)
from estimators.keys import named_key
from experiments.config.sections import EntropyConfig
from experiments.config.settings import EstimatorName, LevelConfig, RunConfig
from unet import UNet
from unet.chunkers import (
    AbstractDownsampler,
    AbstractUpsampler,
    AttentionPool,
    AveragePool,
    Chunker,
    Deviation,
    Distribute,
    LeaveToDecoder,
    MaxPool,
    MeanPool,
    Projection,
    Select,
    Smooth,
    WithBoundary,
)


@dataclass(frozen=True)
class ByteModel:
    """A byte-level model without tokens, and the configuration of the run that trained it."""

    config: RunConfig
    model: UNet


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a byte-pair encoding, single bytes first; the `rate` at which they begin in training text, as a fraction of
    its bytes; how many bytes they were `learned_from`; and whether the rate was measured `apart` from these."""

    tokens: tuple[bytes, ...]
    rate: float
    learned_from: int
    apart: bool = True


@dataclass(frozen=True)
class Prepared:
    """What an estimator takes from data before training: the `vocabulary` of a byte-pair encoding; or the `byte_model` whose
    entropy draws the boundaries, and the `threshold` on it."""

    vocabulary: Vocabulary | None = None
    byte_model: ByteModel | None = None
    threshold: float | None = None


@dataclass(frozen=True)
class Ingredients:
    """Everything an estimator is made from: the settings of the run, the `level` that asks for it by name and rate, and the
    width of the hidden states that it sees."""

    config: RunConfig
    level: LevelConfig
    dim: int
    chunker: AbstractChunker
    key: PRNGKeyArray
    prepared: Prepared


Builder = Callable[[Ingredients], AbstractEstimator | None]

CHUNKERS: dict[EstimatorName, Literal["mean", "smooth"]] = {"gumbel": "mean", "hnet": "smooth", "sfe-smooth": "smooth"}
"""The chunkers of estimators that do not simply select and distribute."""


def reductions(config: RunConfig, estimator: EstimatorName, dim: int) -> tuple[AbstractReduction, ...]:
    """The variance reductions that a configuration asks for on hidden states of width `dim`, in the order in which they apply."""
    sfe = config.sfe
    steps: list[AbstractReduction] = []
    if sfe.early_exit:
        steps.append(EarlyExit(sfe.early_weight))
    if estimator == "sfe-offpolicy":
        steps.append(ImportanceWeight(config.offpolicy.clip))
    if sfe.advantage_decay is not None:
        steps.append(GeneralisedAdvantage(dim, sfe.discount, sfe.advantage_decay))
    else:
        steps.append(Discount(sfe.discount))
    if sfe.critic:
        steps.append(Critic(dim))
    if sfe.centring == "samples":
        steps.append(SampleCentre())
    elif sfe.centring != "none":
        steps.append(BatchCentre(sfe.centring == "leave-one-out"))
    return tuple(steps)


def _score_function(given: Ingredients) -> AbstractEstimator:
    config, sfe = given.config, given.config.sfe
    rate_weight = sfe.rate_weight
    if rate_weight is None:
        smooth = isinstance(given.chunker, Chunker) and isinstance(given.chunker.upsampler, Smooth)
        rate_weight = 0.3 if smooth else 1e-2
    return ScoreFunction(
        given.dim,
        chunker=given.chunker,
        target_rate=given.level.rate,
        reductions=reductions(config, given.level.estimator, given.dim),
        window=sfe.window,
        scale=sfe.scale,
        cap=sfe.cap,
        policy_weight=sfe.policy_weight,
        rate_weight=rate_weight,
    )


def _under_score_function(router: Callable[[Ingredients], AbstractRouter]) -> Builder:
    """Another router under the same objective."""

    def build(given: Ingredients) -> AbstractEstimator:
        return Estimator(router(given), given.chunker, _score_function(given).objective)

    return build


def _off_policy(given: Ingredients) -> AbstractRouter:
    return OffPolicy(_score_function(given).router, Bernoulli(given.level.rate))


def _mlp(given: Ingredients, start: float | None = None) -> AbstractRouter:
    mlp, rate = given.config.mlp, given.level.rate
    return MLPRouter(given.dim, mlp.inner, target_rate=rate, temperature=mlp.temperature, start=start, key=given.key)


def _gumbel(given: Ingredients) -> AbstractEstimator:
    mlp = given.config.mlp
    return StraightThroughGumbel(
        given.dim,
        chunker=given.chunker,
        target_rate=given.level.rate,
        inner=mlp.inner,
        temperature=mlp.temperature,
        prior_weight=mlp.prior_weight,
        key=given.key,
    )


def _dynamic_chunking(given: Ingredients) -> AbstractEstimator:
    hnet = given.config.hnet
    return DynamicChunking(
        given.dim,
        chunker=given.chunker,
        target_rate=given.level.rate,
        ratio_weight=hnet.ratio_weight,
        # Greedy actions: with probabilities below one half there would be no boundary to learn from.
        router=_mlp(given, start=0.5) if hnet.routing == "direct" else None,
    )


def patch_rule(settings: EntropyConfig) -> Callable[[float], AbstractPatchRule]:
    """Makes the rule that a configuration asks for, of the threshold found for it."""
    if settings.rule == "combined":
        return functools.partial(CombinedRule, increase=settings.increase)
    return RiseRule if settings.rule == "rise" else GlobalRule


def _entropy(given: Ingredients) -> AbstractEstimator:
    prepared, settings = given.prepared, given.config.entropy
    if prepared.byte_model is None or prepared.threshold is None:
        raise ValueError("the entropy estimator needs a byte model and a threshold")
    router = EntropyRouter(
        prepared.byte_model.model, patch_rule(settings)(prepared.threshold), target_rate=given.level.rate
    )
    return Entropy(router, chunker=given.chunker)


def _bpe(given: Ingredients) -> BPEGuided:
    vocabulary = given.prepared.vocabulary
    if vocabulary is None:
        raise ValueError("the BPE-guided estimator needs a vocabulary")
    return BPEGuided(vocabulary.tokens, chunker=given.chunker, rate=vocabulary.rate)


def _distilled(given: Ingredients) -> AbstractEstimator:
    weight = given.config.bpe.imitation_weight
    return Distilled(_score_function(given).router, _bpe(given).router, chunker=given.chunker, weight=weight)


def _stride(given: Ingredients) -> AbstractEstimator:
    stride = given.config.stride.stride
    return Stride(chunker=given.chunker, stride=round(1 / given.level.rate) if stride is None else stride)


def _characters(given: Ingredients) -> AbstractEstimator:
    characters = given.config.characters
    return Characters(chunker=given.chunker, every=characters.every, at=characters.at)


def _isotropic(given: Ingredients) -> AbstractEstimator | None:
    return Isotropic(chunker=given.chunker) if given.config.isotropic.token_level else None


REGISTRY: dict[EstimatorName, Builder] = {
    "sfe": _score_function,
    "sfe-cosine": _under_score_function(lambda given: CosineRouter(given.dim, target_rate=given.level.rate)),
    "sfe-mlp": _under_score_function(_mlp),
    "sfe-smooth": _score_function,
    "sfe-offpolicy": _under_score_function(_off_policy),
    "gumbel": _gumbel,
    "hnet": _dynamic_chunking,
    "entropy": _entropy,
    "bpe": _bpe,
    "bpe-distilled": _distilled,
    "uniform": lambda given: Uniform(chunker=given.chunker, target_rate=given.level.rate),
    "stride": _stride,
    "characters": _characters,
    "whitespace": lambda given: Whitespace(chunker=given.chunker),
    "spacelike": lambda given: Spacelike(chunker=given.chunker),
    "isotropic": _isotropic,
}


def build_chunker(config: RunConfig, estimator: EstimatorName, dim: int, key: PRNGKeyArray) -> AbstractChunker:
    """The chunker that a configuration asks for, or else its estimator's own, for states of width `dim`."""
    name = CHUNKERS.get(estimator, "distribute") if config.chunker is None else config.chunker
    down = _downsampler(config, dim, name, key)
    return Chunker(down, _upsampler(config, estimator, dim, name, named_key(key, "chunker")))


def _downsampler(config: RunConfig, dim: int, name: str, key: PRNGKeyArray) -> AbstractDownsampler:
    pool, implementation = config.pool, config.unet.implementation
    if name == "mean":
        return MeanPool(dim, key=named_key(key, "chunker"), implementation=implementation)
    if pool.kind == "last":
        return Select(implementation)
    made: AbstractDownsampler = MaxPool(implementation) if pool.kind == "max" else AveragePool(implementation)
    if pool.kind == "attention":
        made = AttentionPool(dim, pool.heads, implementation=implementation, key=named_key(key, "pool"))
    return WithBoundary(made, implementation) if pool.boundary else made


def _upsampler(
    config: RunConfig, estimator: EstimatorName, dim: int, name: str, key: PRNGKeyArray
) -> AbstractUpsampler:
    smooth, implementation = config.smooth, config.unet.implementation
    if name == "smooth":
        published = "straight-through" if estimator == "hnet" else "none"
        weighting = published if smooth.weighting is None else smooth.weighting
        projection = Projection(dim, key=key) if smooth.residual == "projected" else None
        return Smooth(projection, smooth.smoothing, weighting, implementation)
    if name == "attend":
        return LeaveToDecoder()
    return Deviation(implementation) if name == "deviate" else Distribute(implementation)


def build_model(config: RunConfig, key: PRNGKeyArray, prepared: Prepared | None = None) -> UNet:
    """A new model of a run."""
    estimators = build_estimators(config, named_key(key, "estimators"), prepared)
    return UNet(config.unet, estimators, key=named_key(key, "model"))


def build_estimator(config: RunConfig, key: PRNGKeyArray, prepared: Prepared | None = None) -> AbstractEstimator | None:
    """The estimator of a run at its outermost level; None for a model without a token level."""
    return next(iter(build_estimators(config, key, prepared)), None)


def build_estimators(
    config: RunConfig, key: PRNGKeyArray, prepared: Prepared | None = None
) -> tuple[AbstractEstimator, ...]:
    """The estimators of a run, the outermost first."""
    built = []
    for number, level in enumerate(config.levels):
        dim, key_level = config.unet.widths[number], named_key(key, f"level {number}")
        chunker = build_chunker(config, level.estimator, dim, key_level)
        own = named_key(key_level, "estimator")
        built.append(REGISTRY[level.estimator](Ingredients(config, level, dim, chunker, own, prepared or Prepared())))
    return tuple(one for one in built if one is not None)
