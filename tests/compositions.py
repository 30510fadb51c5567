"""Small models around every registered estimator, and around others."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree

from estimators import trainable
from estimators.routers.entropy import find_threshold, next_byte_entropy
from experiments.config.presets import PRESETS
from experiments.config.registry import ByteModel, Prepared, Vocabulary, build_estimator, patch_rule
from experiments.config.settings import EstimatorName, RunConfig
from tests.conftest import text_bytes
from unet import UNet, UNetConfig
from unet.likelihood import plain_layout

Tree = TypeVar("Tree", bound=PyTree)

LENGTH = 24
SHAPE = UNetConfig(dim=16, heads=2, encoder_layers=1, main_layers=1, decoder_layers=1, window=4)
FROM_DATA = ("entropy", "bpe", "bpe-distilled")


def config_of(name: EstimatorName) -> RunConfig:
    """A run of that estimator on a small model."""
    config = dataclasses.replace(PRESETS["tiny"], unet=SHAPE, estimator=name, rate=0.3)
    return dataclasses.replace(config, sfe=dataclasses.replace(config.sfe, window=2))


def registered(name: EstimatorName, config: RunConfig | None = None) -> UNet:
    """The model of such a run."""
    config = config_of(name) if config is None else config
    estimator = build_estimator(config, jax.random.key(1), found(config) if name in FROM_DATA else Prepared())
    return UNet(config.unet, lively(estimator), key=jax.random.key(2))


def found(config: RunConfig) -> Prepared:
    """What entropy and BPE would take from data."""
    words = [b"th", b"he", b"in", b"an", b"ab", b"abc", b"qu", b" a", b" an"]
    vocabulary = tuple([bytes([value]) for value in range(256)] + words)
    byte_model = UNet(SHAPE, None, key=jax.random.key(5))
    layout = plain_layout(text_bytes(8, LENGTH, seed=9))
    measured = eqx.filter_jit(next_byte_entropy)(byte_model, layout)
    rule = patch_rule(config.entropy)
    threshold = find_threshold(np.asarray(measured), np.asarray(layout.document_positions), config.rate, rule)
    return Prepared(Vocabulary(vocabulary, config.rate, 0), ByteModel(config, byte_model), threshold)


def trains(node: Tree) -> Tree:
    """The leaves of a tree that training moves, everything else None."""

    return eqx.filter(node, trainable(node))


def lively(estimator: Tree) -> Tree:
    """Parameters that start at zero moved a little, so that everything has an effect and a gradient."""
    leaves, tree = jax.tree.flatten(trains(estimator))
    keys = jax.random.split(jax.random.key(6), max(1, len(leaves)))
    moved = [leaf + 0.3 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=False)]
    return eqx.combine(jax.tree.unflatten(tree, moved), estimator)
