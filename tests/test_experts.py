"""Mixtures of experts: their equations, exactly, and models made of them."""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import text_bytes
from unet import HNetConfig, UNet, load, save, score
from unet.experts import Experts, balance_loss, capacity_of, gates, slots
from unet.files.hnet_layout import to_reference
from unet.files.published import LayoutError
from unet.flops import matrix_flops
from unet.likelihood import next_logprobs

KEY = jax.random.key(0)
SHAPE = HNetConfig(
    layout='["T2"]', dims=(8,), mlp_dims=(16,), heads=(2,), rotary_dims=(4,), windows=(0,), experts=4, experts_chosen=2
)
EVERY = jnp.ones((2, 8), bool)


@pytest.fixture(scope="module")
def model():
    return UNet(SHAPE, None, key=KEY)


def experts(choices=2, capacity_factor=1.0):
    return Experts(
        4, 6, 3, choices=choices, capacity_factor=capacity_factor, balance_weight=0.01, std=0.5, out_std=0.5, key=KEY
    )


def test_the_balance_loss_is_1_for_a_uniform_router_and_the_number_of_experts_for_a_single_one():
    uniform, turns = jnp.full((2, 8, 4), 0.25), jnp.broadcast_to(jnp.arange(8)[None, :, None] % 4, (2, 8, 1))
    assert float(balance_loss(uniform, turns, EVERY)) == pytest.approx(1.0)
    # However uneven the choices are: with equal probabilities only ties are broken by them.
    assert float(balance_loss(uniform, jnp.zeros_like(turns), EVERY)) == pytest.approx(1.0)
    one = jax.nn.one_hot(jnp.full((2, 8), 3), 4)
    assert float(balance_loss(one, jnp.full((2, 8, 1), 3), EVERY)) == pytest.approx(4.0)
    # By hand: shares 3/4 and 1/4 of four valid positions, mean probabilities .7 and .3.
    probs = jnp.asarray([[[0.9, 0.1], [0.8, 0.2], [0.9, 0.1], [0.2, 0.8], [0.0, 1.0]]])
    mask = jnp.asarray([[True, True, True, True, False]])
    chosen = jnp.argmax(probs, axis=-1)[..., None]
    assert float(balance_loss(probs, chosen, mask)) == pytest.approx(2 * (0.75 * 0.7 + 0.25 * 0.3))
    gradient = jax.grad(lambda p: balance_loss(p, chosen, mask))(probs)
    np.testing.assert_allclose(gradient[0, :4], np.broadcast_to([2 * 0.75 / 4, 2 * 0.25 / 4], (4, 2)), rtol=1e-6)
    assert not np.any(gradient[0, 4])


def test_gates_are_the_probabilities_of_what_is_chosen():
    probs = jnp.asarray([[[0.5, 0.1, 0.4], [0.2, 0.2, 0.6]]])
    weights, chosen = gates(probs, 1)
    np.testing.assert_allclose(weights, [[[0.5], [0.6]]])
    assert chosen.tolist() == [[[0], [2]]]
    weights, chosen = gates(probs, 2)
    np.testing.assert_allclose(weights[0, 0], [5 / 9, 4 / 9], rtol=1e-6)
    assert chosen[0, 0].tolist() == [0, 2]


def test_slots_are_taken_in_order_and_by_text_alone():
    chosen = jnp.asarray([[[0, 1], [0, 2], [1, 0], [0, 1]]])
    mask = jnp.asarray([[True, True, False, True]])
    assert slots(chosen, mask, 3)[0].tolist() == [[0, 0], [1, 0], [0, 0], [2, 1]]
    later = chosen.at[0, 3].set(jnp.asarray([2, 0]))
    assert slots(later, mask, 3)[0, :3].tolist() == slots(chosen, mask, 3)[0, :3].tolist()
    assert [capacity_of(8, *rest) for rest in ((1, 4, 1.25), (2, 4, 1.0), (1, 1, 2.0))] == [3, 4, 8]


@pytest.mark.parametrize("choices", [1, 2])
def test_a_mixture_is_the_weighted_sum_of_the_experts_that_have_room(choices):
    mixture = experts(choices)
    x = jax.random.normal(jax.random.key(1), (2, 8, 4))
    probs = jax.nn.softmax(x @ mixture.router.weight, axis=-1)
    weights, chosen = gates(probs, choices)
    place, capacity = slots(chosen, EVERY, 3), capacity_of(8, choices, 3, 1.0)

    def expected(room):
        total = np.zeros(x.shape, np.float32)
        for row, position, choice in np.ndindex(*chosen.shape):
            number = int(chosen[row, position, choice])
            if place[row, position, choice] < room:
                value, gate = np.split(np.asarray(x[row, position] @ mixture.value_gate[number]), 2)
                hidden = value * np.asarray(jax.nn.silu(gate))
                total[row, position] += float(weights[row, position, choice]) * hidden @ np.asarray(mixture.out[number])
        return total

    trained, evaluated = (
        eqx.filter_jit(lambda m, x, training=training: m(x, EVERY, training=training))(mixture, x)
        for training in (True, False)
    )
    np.testing.assert_allclose(trained.hidden, expected(capacity), atol=1e-5)
    np.testing.assert_allclose(evaluated.hidden, expected(99), atol=1e-5)
    assert evaluated.loss is None
    assert trained.loss is not None
    assert float(trained.loss.dropped) == pytest.approx(float(jnp.mean(place >= capacity)))
    assert float(trained.loss.loss) == pytest.approx(0.01 * float(trained.loss.balance))


def test_a_model_of_mixtures_is_causal_and_reports_its_balance(model):
    bytes = text_bytes(2, 16)
    changed = bytes.at[0, 9:].set(ord("z"))
    predict = eqx.filter_jit(lambda m, b: m(b, training=True).logits)
    before, after = predict(model, bytes), predict(model, changed)
    np.testing.assert_allclose(before[0, :9], after[0, :9], atol=1e-6)
    np.testing.assert_allclose(before[1], after[1], atol=1e-6)
    assert np.abs(before - after)[0, 9:].max() > 1e-4
    loss = eqx.filter_jit(lambda m, b, training: m.loss(b, key=None, training=training))
    evaluated = loss(model, bytes, False)

    @eqx.filter_jit
    @functools.partial(eqx.filter_grad, has_aux=True)
    def gradient(model, bytes):
        output = model.loss(bytes, key=None)
        return output.loss, output

    slope, trained = gradient(model, bytes)
    assert set(trained.metrics) == {"balance_loss", "dropped_choices"}
    assert float(trained.loss + trained.log_prob) == pytest.approx(
        2 * 0.01 * float(trained.metrics["balance_loss"]), rel=1e-3
    )
    assert evaluated.metrics == {}
    assert float(evaluated.loss) == pytest.approx(-float(evaluated.log_prob))
    assert np.abs(slope.stage.stack.blocks[0].mlp.router.weight).max() > 0


def test_nothing_is_dropped_in_scores_and_they_do_not_depend_on_how_a_text_is_read(model, tmp_path):
    text = b"the cat sat on the mat"
    save(model, tmp_path)
    (scored,) = score(load(tmp_path).model, text, contexts=b"a", key=None, batch=1)
    row = jnp.asarray([[254, *b"a", *text]])
    whole = np.asarray(next_logprobs(eqx.filter_jit(lambda m, b: m(b).logits)(model, row), row))
    np.testing.assert_allclose(scored.logprobs, whole[0, 1:-1], rtol=1e-3, atol=1e-4)


def test_only_what_is_chosen_costs_flops(model):
    plain = UNet(dataclasses.replace(SHAPE, experts=1, experts_chosen=1), None, key=KEY)
    two, one = matrix_flops(model, rate=0.0).total, matrix_flops(plain, rate=0.0).total
    # One more expert at each of two layers, and their routers.
    assert two - one == pytest.approx(6 * 2 * (3 * 8 * 16 + 8 * 4))


def test_impossible_mixtures_are_refused_in_one_sentence(model):
    with pytest.raises(ValueError, match="more than there are experts"):
        dataclasses.replace(SHAPE, experts_chosen=5)
    inside = {name: getattr(SHAPE, name) * 2 for name in ("dims", "mlp_dims", "heads", "rotary_dims", "windows")}
    with pytest.raises(ValueError, match="without token levels"):
        dataclasses.replace(SHAPE, layout='["T1", ["T1"], "T1"]', **inside)
    with pytest.raises(LayoutError):
        to_reference(model)
