"""Small models around every registered estimator, and around others."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree

from estimators import AbstractConstraint, AbstractRouter, Constrained, trainable
from estimators.bpe import BPEConfig
from estimators.entropy import EntropyConfig, Measured
from estimators.routers.entropy import find_threshold, next_byte_entropy
from estimators.vocabulary import Vocabulary
from experiments.config.build import build_estimator
from experiments.config.presets import PRESETS
from experiments.config.settings import RunConfig
from tests.conftest import text_bytes
from unet import UNet, UNetConfig
from unet.likelihood import plain_layout

Tree = TypeVar("Tree", bound=PyTree)

LENGTH = 24
SHAPE = UNetConfig(dim=16, heads=2, encoder_layers=1, main_layers=1, decoder_layers=1, window=4)
FROM_DATA = ("entropy", "bpe", "bpe-distilled")


def config_of(name: str) -> RunConfig:
    """A run of that estimator on a small model."""
    config = dataclasses.replace(PRESETS["tiny"], unet=SHAPE, estimator=name, rate=0.3)
    return config.with_settings(policy={"window": 2})


def registered(name: str, config: RunConfig | None = None) -> UNet:
    """The model of such a run."""
    config = config_of(name) if config is None else config
    estimator = build_estimator(config, jax.random.key(1), prepared_for(config))
    return UNet(config.unet, lively(estimator), key=jax.random.key(2))


def under(model: UNet, constraints: tuple[AbstractConstraint, ...]) -> UNet:
    """The model with the boundaries of its outermost level constrained."""

    def router(model: UNet) -> AbstractRouter:
        return model.stage.estimators[0].router

    return eqx.tree_at(router, model, Constrained(router(model), constraints))


def prepared_for(config: RunConfig) -> PyTree:
    """What its estimator would take from data."""
    settings = config.first
    if isinstance(settings, BPEConfig):
        words = [b"th", b"he", b"in", b"an", b"ab", b"abc", b"qu", b" a", b" an"]
        return Vocabulary([bytes([value]) for value in range(256)] + words, config.rate)
    if isinstance(settings, EntropyConfig):
        byte_model = UNet(SHAPE, None, key=jax.random.key(5))
        layout = plain_layout(text_bytes(8, LENGTH, seed=9))
        measured = eqx.filter_jit(next_byte_entropy)(byte_model, layout)
        positions = np.asarray(layout.document_positions)
        threshold = find_threshold(np.asarray(measured), positions, config.rate, settings.patch_rule)
        return Measured(byte_model, threshold)
    return None


def trains(node: Tree) -> Tree:
    """The leaves of a tree that training moves, everything else None."""

    return eqx.filter(node, trainable(node))


def lively(estimator: Tree) -> Tree:
    """Parameters that start at zero moved a little, so that everything has an effect and a gradient."""
    leaves, tree = jax.tree.flatten(trains(estimator))
    keys = jax.random.split(jax.random.key(6), max(1, len(leaves)))
    moved = [leaf + 0.3 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=False)]
    return eqx.combine(jax.tree.unflatten(tree, moved), estimator)
