"""The baselines of the papers as presets."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from estimators.base import Boundaries
from experiments.config.build import build_estimators
from experiments.config.presets import PRESETS
from unet import Chunker, HNetConfig, Insert, Select, UNet

GPT2 = 50_257
"""Tokens of GPT-2's tokenizer."""
SIZES = {
    # Millions of parameters, as H-Net's table 1 rounds them.
    "transformer-760M": (760, 0.01),
    "transformer-1.3B": (1300, 0.02),
    "spacebyte-L": (570, 0.01),
}


def parameters(name, part=jax.tree.leaves):
    """Millions of those in a part of a preset's model."""
    config = PRESETS[name]
    vocab = GPT2 if config.reads_tokens else 256
    model = eqx.filter_eval_shape(
        lambda key: UNet(config.unet, build_estimators(config, key), key=key, vocab=vocab), jax.random.key(0)
    )
    return sum(leaf.size for leaf in part(model) if hasattr(leaf, "size")) / 1e6


@pytest.mark.parametrize("name", SIZES)
def test_presets_have_the_published_sizes(name):
    size, tolerance = SIZES[name]
    assert parameters(name) == pytest.approx(size, rel=tolerance)


SPACEBYTE = {"spacebyte-201M-50M": (201, 50), "spacebyte-151M-38M": (151, 38), "spacebyte-793M-184M": (793, 184)}
"""Millions of parameters of the blocks at words and at bytes, as SpaceByte's table 3 and its repository round them."""


@pytest.mark.parametrize("name", SPACEBYTE)
def test_spacebytes_have_the_published_parameters_at_words_and_at_bytes(name):
    words, bytes = SPACEBYTE[name]
    assert parameters(name, lambda model: jax.tree.leaves(model.stage.inner)) == pytest.approx(words, rel=0.005)
    outside = parameters(name, lambda model: jax.tree.leaves((model.stage.encoder, model.stage.decoder)))
    assert outside == pytest.approx(bytes, rel=0.01)


@pytest.mark.parametrize("name", ["tiny", "18M", "32M", "73M", "130M", "147M", "346M"])
def test_transformers_of_tokens_have_as_many_parameters_in_their_blocks(name):
    def matrices(model):
        # Of the blocks, not of the policy.
        parts = [leaf for leaf in jax.tree.leaves(model.stage) if getattr(leaf, "ndim", 0) == 2]
        return [leaf for leaf in parts if min(leaf.shape) >= 64]

    ours, theirs = PRESETS[name], PRESETS[f"transformer-{name}"]
    assert parameters(f"transformer-{name}", matrices) == pytest.approx(parameters(name, matrices), rel=0.04)
    assert theirs.unet.widths[0] == ours.unet.widths[0]
    same = ("length", "batch", "bytes", "optimizer", "evaluation", "data", "seed")
    assert [getattr(theirs, one) for one in same] == [getattr(ours, one) for one in same]


def test_a_hybrid_main_network_has_three_mamba_layers_to_one_of_attention():
    shape = PRESETS["hnet-2stage-XL-hybrid"].unet
    assert isinstance(shape, HNetConfig)
    main: str = max(re.findall(r'"([mT\d]*)"', shape.layout), key=len)
    counts = {kind: sum(int(count) for one, count in re.findall(r"([mT])(\d+)", main) if one == kind) for kind in "mT"}
    assert counts == {"m": 20, "T": 7}


def test_inserting_adds_a_token_at_the_position_that_closed_it():
    actions = jnp.asarray([[True, False, True, False]])
    half = jnp.full((1, 4), 0.5)
    boundaries = Boundaries(actions, jnp.zeros((1, 4)), half, actions, jnp.asarray([[True, False, False, False]]))
    hidden, outputs = jnp.ones((1, 4, 2)), jnp.asarray([[[1.0, 2.0], [3.0, 4.0]]])
    chunker = Chunker(Select(), Insert())
    down = chunker.down(hidden, boundaries, capacity=2, mask=jnp.ones((1, 4), bool), state=None)
    up = chunker.up(outputs, down.tokens, hidden, boundaries, state=None)
    np.testing.assert_array_equal(up.hidden[0], [[2.0, 3.0], [1.0, 1.0], [4.0, 5.0], [1.0, 1.0]])
