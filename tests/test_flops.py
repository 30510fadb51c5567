"""Operation counts: by hand, against each other, and against the compiler's own."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

from estimators import Entropy, EntropyRouter, GlobalRule
from tests.conftest import small_model, small_score_function, text_bytes
from unet import Chunker, Distribute, Select, UNet, UNetConfig
from unet.flops import layer_flops, matrix_flops


def test_matrices_count_six_a_parameter_and_tokens_only_their_share():
    model = small_model(small_score_function(dim=16))
    dim, vocab = 16, 256
    norms = 4 * dim
    byte_block, token_block = 4 * dim * dim + 3 * dim * dim + norms, 4 * dim * dim + 12 * dim * dim + norms
    flops = matrix_flops(model, rate=0.25)
    assert flops.encode == flops.decode == 6 * byte_block
    assert flops.mid == pytest.approx(6 * 0.25 * token_block)
    assert flops.heads == 2 * 6 * (vocab * dim + dim)
    assert flops.boundary == 6 * 3 * dim
    assert flops.total == flops.encode + flops.boundary + flops.mid + flops.decode + flops.heads


def test_several_samples_cost_everything_behind_the_encoder_again():
    model = small_model(small_score_function())
    one, three = (matrix_flops(model, rate=0.2, samples=samples) for samples in (1, 3))
    assert three.encode == one.encode
    assert three.mid == pytest.approx(3 * one.mid)
    assert three.decode == 3 * one.decode
    # Two heads of one size: the early one serves all samples.
    assert three.heads == 2 * one.heads
    one, three = (layer_flops(model, length=64, rate=0.2, samples=samples) for samples in (1, 3))
    assert three.heads == 2 * one.heads


def test_a_frozen_model_counts_its_forward_pass():
    router = EntropyRouter(small_model(seed=1), GlobalRule(5.0), target_rate=0.3)
    model = small_model(Entropy(router, chunker=Chunker(Select(), Distribute())))
    frozen = sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(router, eqx.is_inexact_array)))
    assert matrix_flops(model, rate=0.3).boundary == 2 * frozen


def test_attention_to_tokens_by_hand():
    """Queries and outputs count at every byte, vectors and what is made of them at every token."""
    dim, heads, vectors, rate = 16, 2, 3, 0.2

    def made(attend):
        config = UNetConfig(dim, heads, 1, 1, 2, window=4, attend=attend, attend_vectors=vectors)
        return UNet(config, small_score_function(dim=dim), key=jax.random.key(0))

    plain, attending = made("none"), made("every")
    by_matrix, by_layer = (
        rule(attending).decode - rule(plain).decode
        for rule in (lambda m: matrix_flops(m, rate=rate), lambda m: layer_flops(m, length=100, rate=rate))
    )
    at_bytes, at_tokens = 2 * dim * dim, 2 * dim * dim
    unfold = dim * vectors * dim
    assert by_matrix == pytest.approx(6 * (2 * (at_bytes + dim + rate * (at_tokens + dim)) + rate * unfold))
    mixing = 4 * vectors * dim + 3 * heads * vectors
    products = 2 * (2 * at_bytes + mixing + rate * 2 * vectors * at_tokens) + rate * 2 * unfold
    assert by_layer == pytest.approx(3 * products)


@pytest.mark.parametrize("rate", [0.25, 0.5])
def test_the_counts_agree_with_the_compilers(rate):
    """XLA counts every elementwise operation, and products as they are padded; the rules leave those out."""
    config = UNetConfig(64, 4, 2, 4, 2, window=32)
    model = UNet(config, small_score_function(dim=64), key=jax.random.key(0))
    bytes = text_bytes(4, 128)
    capacity = int(rate * 128)

    def loss(model):
        return model.loss(bytes, key=jax.random.key(0), capacities=(capacity,)).loss

    params, static = eqx.partition(model, eqx.is_inexact_array)
    compiled = jax.jit(jax.grad(lambda params: loss(eqx.combine(params, static)))).lower(params).compile()
    analysis = compiled.cost_analysis()
    assert analysis is not None
    counted = analysis["flops"] / bytes.size
    for rule in (matrix_flops(model, rate=rate), layer_flops(model, length=128, rate=rate)):
        assert 0.6 < rule.total / counted < 1.2, (rule.total, counted)


def test_the_layers_rule_by_hand():
    model = small_model(small_score_function(dim=16))
    flops = layer_flops(model, length=100, rate=0.2)
    dim, heads, window, tokens = 16, 2, 4, 20.0
    attention = 6 * dim * dim + 4 * window * dim + 3 * heads * window + 2 * dim * dim
    assert flops.encode == pytest.approx(3 * (attention + 6 * dim * dim + 5 * dim))
    attention = 6 * dim * dim + 4 * tokens * dim + 3 * heads * tokens + 2 * dim * dim
    assert flops.mid == pytest.approx(3 * 0.2 * (attention + 6 * dim * 4 * dim + 5 * dim))
    assert flops.embed == 3 * 2 * 256 * dim
    assert flops.heads == 2 * flops.embed


def test_a_purely_byte_level_model_is_all_encoder():
    flops = matrix_flops(small_model(), rate=1.0)
    assert flops.mid == flops.decode == flops.boundary == 0.0
    assert flops.encode > 0
    assert jnp.isfinite(flops.total)
