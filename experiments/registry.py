"""Every estimator by name: how a configuration becomes a composition of router, chunker and objective."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import PRNGKeyArray

from estimators import (
    AbstractChunker,
    AbstractEstimator,
    AbstractReduction,
    BatchCentre,
    Discount,
    EarlyExit,
    Isotropic,
    ScoreFunction,
    Spacelike,
    Stride,
    Uniform,
    Whitespace,
)
from experiments.config import EstimatorName, RunConfig, ScoreFunctionConfig
from unet import SelectDeviate, SelectDistribute

Builder = Callable[[RunConfig, AbstractChunker, PRNGKeyArray], AbstractEstimator | None]


def reductions(config: ScoreFunctionConfig) -> tuple[AbstractReduction, ...]:
    """The variance reductions that a configuration asks for, in the order in which they apply."""
    early = (EarlyExit(config.early_weight),) if config.early_exit else ()
    centre = () if config.centring == "none" else (BatchCentre(config.centring == "leave-one-out"),)
    return (*early, Discount(config.discount), *centre)


def _score_function(config: RunConfig, chunker: AbstractChunker, key: PRNGKeyArray) -> AbstractEstimator:
    sfe = config.sfe
    return ScoreFunction(
        config.unet.dim,
        chunker=chunker,
        target_rate=config.rate,
        reductions=reductions(sfe),
        window=sfe.window,
        scale=sfe.scale,
        cap=sfe.cap,
        policy_weight=sfe.policy_weight,
        rate_weight=sfe.rate_weight,
    )


def _stride(config: RunConfig, chunker: AbstractChunker, key: PRNGKeyArray) -> AbstractEstimator:
    stride = config.stride.stride
    return Stride(chunker=chunker, stride=round(1 / config.rate) if stride is None else stride)


def _isotropic(config: RunConfig, chunker: AbstractChunker, key: PRNGKeyArray) -> AbstractEstimator | None:
    return Isotropic(chunker=chunker) if config.isotropic.token_level else None


REGISTRY: dict[EstimatorName, Builder] = {
    "sfe": _score_function,
    "uniform": lambda config, chunker, key: Uniform(chunker=chunker, target_rate=config.rate),
    "stride": _stride,
    "whitespace": lambda config, chunker, key: Whitespace(chunker=chunker),
    "spacelike": lambda config, chunker, key: Spacelike(chunker=chunker),
    "isotropic": _isotropic,
}


def build_estimator(config: RunConfig, key: PRNGKeyArray) -> AbstractEstimator | None:
    """The estimator of a run; None for a model without a token level."""
    chunker = SelectDeviate() if config.chunker == "deviate" else SelectDistribute()
    return REGISTRY[config.estimator](config, chunker, key)
