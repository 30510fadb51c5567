"""The library's own estimators by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from estimators.base import AbstractEstimator, AbstractRouter, Estimator
from estimators.bpe import BPEConfig, DistilledConfig
from estimators.dynamic_chunking import DynamicChunkingConfig
from estimators.entropy import EntropyConfig
from estimators.fixed import CharactersConfig, IsotropicConfig, Spacelike, StrideConfig, Uniform, Whitespace
from estimators.gumbel import GumbelConfig
from estimators.lookup import Kind, Part, construct, is_configuration, shared_sections
from estimators.score_function import CosineConfig, MLPConfig, OffPolicyConfig, ScoreFunctionConfig, SmoothedConfig
from estimators.sections import ScoreFunctionSettings
from estimators.settings import Context, EstimatorConfig

ESTIMATORS = Kind(
    "--estimator",
    "caesura.estimators",
    {
        "sfe": ScoreFunctionConfig,
        "sfe-cosine": CosineConfig,
        "sfe-mlp": MLPConfig,
        "sfe-smooth": SmoothedConfig,
        "sfe-offpolicy": OffPolicyConfig,
        "gumbel": GumbelConfig,
        "hnet": DynamicChunkingConfig,
        "entropy": EntropyConfig,
        "bpe": BPEConfig,
        "bpe-distilled": DistilledConfig,
        "uniform": Uniform,
        "stride": StrideConfig,
        "characters": CharactersConfig,
        "whitespace": Whitespace,
        "spacelike": Spacelike,
        "isotropic": IsotropicConfig,
    },
    (EstimatorConfig, AbstractEstimator, AbstractRouter),
    frozenset({"dim", "target_rate", "chunker", "key"}),
)
"""Estimators by name."""

DEFAULT = "sfe"
"""The estimator of a run that names none."""
COMPARED = ("sfe", "gumbel", "hnet", "uniform")
"""The estimators of a comparison that names none."""
BASELINE = "uniform"
"""What others are measured against."""
REGULAR, EVERY_BYTE = "stride", "isotropic"
"""Rules whose boundaries cost nothing to draw, for measurements."""
WITHOUT_TOKENS = "--estimator isotropic --isotropic.no-token-level"
"""The flags for a model without a token level."""


@dataclass(frozen=True)
class Bare(EstimatorConfig):
    """An estimator class by itself, or a router class under the score function; `settings` are arguments of its constructor.

    The class may declare what a configuration declares (`default_chunker`, `outermost_only`, …).
    """

    part: Part
    settings: Mapping[str, object]
    sfe: ScoreFunctionSettings

    def __post_init__(self):
        for name in ("default_chunker", "default_pool", "learns_through", "outermost_only", "reads_bytes"):
            object.__setattr__(self, name, getattr(self.part.cls, name, getattr(EstimatorConfig, name)))

    @property
    def samples(self) -> int:
        return self.sfe.samples if is_router(self.part) else 1

    def check(self, rate: float, sequences: int) -> None:
        if is_router(self.part):
            self.sfe.check(rate, sequences)

    def build(self, context: Context) -> AbstractEstimator:
        made = construct(self.part, self.settings, context.given)
        if isinstance(made, AbstractRouter):
            return Estimator(made, context.chunker, self.sfe.objective(context))
        assert isinstance(made, AbstractEstimator)
        return made


def is_router(part: Part) -> bool:
    """Whether a part is a router class by itself."""
    return issubclass(part.cls, AbstractRouter)


def sections_of(part: Part) -> dict[str, type]:
    """The sections that an estimator shares with others, by name."""
    return {"sfe": ScoreFunctionSettings} if is_router(part) else shared_sections(part.cls)


def configuration(part: Part, own: Mapping[str, object], shared: Mapping[str, object]) -> EstimatorConfig:
    """The configuration of an estimator with its `own` settings and the sections that it shares. Raises `ValueError` for
    impossible values."""
    if is_configuration(part.cls):
        made = part.cls(**own, **shared)
        assert isinstance(made, EstimatorConfig)
        return made
    sfe = shared.get("sfe", ScoreFunctionSettings())
    assert isinstance(sfe, ScoreFunctionSettings)
    return Bare(part, own, sfe)
