"""Routers: where boundaries are drawn, one idea a file."""

from estimators.routers.constrained import AbstractConstraint, Constrained
from estimators.routers.cosine import CosineRouter, Greedy
from estimators.routers.entropy import AbstractPatchRule, CombinedRule, EntropyRouter, GlobalRule, RiseRule
from estimators.routers.mlp import MLPRouter
from estimators.routers.off_policy import AbstractOffPolicyRouter, Guided, OffPolicy
from estimators.routers.policy import WindowedPolicy
from estimators.routers.prefixes import PrefixRouter, PrefixTree
from estimators.routers.random import Bernoulli, UniformRouter
from estimators.routers.rules import EveryNth, RuleRouter, Thinned

__all__ = [
    "AbstractConstraint",
    "AbstractOffPolicyRouter",
    "AbstractPatchRule",
    "Bernoulli",
    "CombinedRule",
    "Constrained",
    "CosineRouter",
    "EntropyRouter",
    "EveryNth",
    "GlobalRule",
    "Greedy",
    "Guided",
    "MLPRouter",
    "OffPolicy",
    "PrefixRouter",
    "PrefixTree",
    "RiseRule",
    "RuleRouter",
    "Thinned",
    "UniformRouter",
    "WindowedPolicy",
]
