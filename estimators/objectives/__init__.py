"""Objectives: what trains a router beside the language-model loss, one idea a file."""

from estimators.objectives.binomial_prior import BinomialPrior
from estimators.objectives.imitation import Imitation, NoObjective
from estimators.objectives.ratio import RatioObjective
from estimators.objectives.reductions import (
    AbstractReduction,
    BatchCentre,
    Credit,
    Critic,
    Discount,
    EarlyExit,
    GeneralisedAdvantage,
    ImportanceWeight,
    SampleCentre,
)
from estimators.objectives.score_function import ScoreFunctionObjective

__all__ = [
    "AbstractReduction",
    "BatchCentre",
    "BinomialPrior",
    "Credit",
    "Critic",
    "Discount",
    "EarlyExit",
    "GeneralisedAdvantage",
    "Imitation",
    "ImportanceWeight",
    "NoObjective",
    "RatioObjective",
    "SampleCentre",
    "ScoreFunctionObjective",
]
