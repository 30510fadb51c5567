"""The state-space recurrence: against itself one row after another, against the differential equation, and row by row."""

import dataclasses
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from estimators.decode_state import update_state
from tests.conftest import needs, text_bytes
from unet.attention import BlockContext
from unet.likelihood import plain_layout
from unet.mamba import Mamba2
from unet.ops.ssd import ssd, ssd_sequential

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def inputs(length, seed=0, batch=2, heads=3, head_dim=4, state=5):
    keys = jax.random.split(jax.random.key(seed), 5)
    values = jax.random.normal(keys[0], (batch, length, heads, head_dim))
    decay = -jax.nn.softplus(3 * jax.random.normal(keys[1], (batch, length, heads)))
    writes, reads = (jax.random.normal(key, (batch, length, state)) for key in keys[2:4])
    starts = jax.random.bernoulli(keys[4], 0.1, (batch, length))
    return values, decay, writes, reads, starts


@pytest.mark.parametrize(("length", "chunk"), [(1, 4), (12, 4), (23, 5), (23, 64), (16, 1)])
def test_chunks_give_the_values_and_gradients_of_the_recurrence(length, chunk):
    *moving, starts = inputs(length)

    def weighed(form, *arrays):
        done = form(*arrays, starts)
        return jnp.sum(jnp.sin(done.y)) + jnp.sum(jnp.cos(done.h)), done

    def both(form):
        return jax.jit(jax.value_and_grad(lambda *a: weighed(form, *a), argnums=(0, 1, 2, 3), has_aux=True))

    (_, got), gradients = both(lambda *a: ssd(*a, chunk=chunk))(*moving)
    (_, expected), wanted = both(ssd_sequential)(*moving)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), (got, gradients), (expected, wanted))


def test_fast_decay_within_a_chunk_neither_overflows_nor_spoils_gradients():
    values, _, writes, reads, starts = inputs(64)
    decay = jnp.full((2, 64, 3), -40.0)
    gradient = jax.grad(lambda d: jnp.sum(ssd(values, d, writes, reads, starts).y))(decay)
    assert np.all(np.isfinite(gradient))


def test_a_chunk_of_no_rows_is_refused():
    with pytest.raises(ValueError, match="at least one position"):
        ssd(*inputs(4), chunk=0)


def solution(rate, write, value, seconds, state):
    """h after `seconds` of dh/dt = A h + x b^T with the input held, by diffrax."""
    diffrax = needs("lab", "diffrax")
    term = diffrax.ODETerm(lambda t, h, args: rate * h + value[:, None] * write)
    controller = diffrax.PIDController(rtol=1e-6, atol=1e-8)
    solved = diffrax.diffeqsolve(
        term, diffrax.Tsit5(), 0.0, seconds, 1e-3, state, stepsize_controller=controller, max_steps=10_000
    )
    return solved.ys[-1]


def test_steps_approach_the_differential_equation_at_first_order():
    """Twice as many steps of half the length: half the distance from the solution of dh/dt = A h + x b^T."""
    value, write = jnp.asarray([0.7, -1.1]), jnp.asarray([0.4, 1.0, -0.3])
    rate, seconds = -1.3, 1.5
    exact = jax.jit(solution)(rate, write, value, seconds, jnp.zeros((2, 3)))
    errors = []
    for steps in (8, 16, 32, 64):
        dt = seconds / steps
        rows = jnp.broadcast_to(dt * value, (1, steps, 1, 2)), jnp.full((1, steps, 1), dt * rate)
        vectors = (jnp.broadcast_to(write, (1, steps, 3)),) * 2
        state = ssd(*rows, *vectors, jnp.zeros((1, steps), bool), chunk=4).h[0, 0]
        errors.append(float(jnp.max(jnp.abs(state - exact))))
    assert errors[-1] < 0.03 * float(jnp.max(jnp.abs(exact)))
    for coarse, fine in itertools.pairwise(errors):
        assert 1.8 < coarse / fine < 2.2


def test_between_inputs_the_state_fades_as_the_differential_equation_says():
    """The decay is exact, however long the step: inputs that come all at once leave nothing to discretise."""
    keys = jax.random.split(jax.random.key(3), 3)
    steps = jnp.asarray([0.1, 2.5, 0.4, 1.2])
    rate, values, writes = -0.8, jax.random.normal(keys[0], (4, 2)), jax.random.normal(keys[1], (4, 3))
    state = jnp.zeros((2, 3))
    for number in range(4):
        state = jax.jit(solution)(rate, jnp.zeros(3), jnp.zeros(2), float(steps[number]), state)
        state = state + values[number][:, None] * writes[number]
    got = ssd(
        values[None, :, None],
        (steps * rate)[None, :, None],
        writes[None],
        writes[None],
        jnp.zeros((1, 4), bool),
        jnp.zeros((1, 1, 2, 3)),
    )
    np.testing.assert_allclose(got.h[0, 0], state, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def layer():
    return Mamba2(32, state=6, key=jax.random.key(0))


def mixed(layer, x, layout):
    return jax.jit(lambda x: layer(x, BlockContext(layout, None, None), layer.init_state(len(x))))(x)


def test_a_layer_steps_as_it_reads_sequences_of_all_lengths(layer):
    length, lengths = 11, jnp.asarray([1, 2, 5, 11])
    x = jax.random.normal(jax.random.key(1), (4, length, 32))
    whole = mixed(layer, x, plain_layout(text_bytes(4, length))).hidden
    mask = jnp.arange(length) < lengths[:, None]
    ready = mixed(layer, x, plain_layout(text_bytes(4, length), None, mask))
    np.testing.assert_allclose(ready.hidden[mask], whole[mask], **CLOSE)
    state, done = update_state(layer.init_state(4), ready.update, lengths), np.asarray(lengths)

    @jax.jit
    def step(x, state, count):
        layout = dataclasses.replace(plain_layout(text_bytes(4, 1)), before=count)
        return layer(x, BlockContext(layout, None, None), state)

    while (done < length).any():
        here, advance = np.minimum(done, length - 1), done < length
        after = step(x[np.arange(4), here][:, None], state, jnp.asarray(done, jnp.int32))
        np.testing.assert_allclose(after.hidden[advance, 0], whole[np.arange(4), here][advance], **CLOSE)
        state = update_state(state, after.update, jnp.asarray(advance, jnp.int32))
        done = done + advance


def test_documents_in_one_row_are_as_if_each_were_alone(layer):
    x = jax.random.normal(jax.random.key(1), (1, 12, 32))
    segments = jnp.asarray([[0] * 5 + [1] * 2 + [2] * 5])
    together = mixed(layer, x, plain_layout(text_bytes(1, 12), segments)).hidden
    for start, end in ((0, 5), (5, 7), (7, 12)):
        alone = mixed(layer, x[:, start:end], plain_layout(text_bytes(1, end - start))).hidden
        np.testing.assert_allclose(together[:, start:end], alone, **CLOSE)


def test_rows_see_nothing_after_them(layer):
    x = jax.random.normal(jax.random.key(1), (1, 9, 32))
    layout = plain_layout(text_bytes(1, 9))
    moved = mixed(layer, x.at[:, 6:].add(1.0), layout).hidden
    np.testing.assert_array_equal(moved[:, :6], mixed(layer, x, layout).hidden[:, :6])
    assert np.any(moved[:, 6] != mixed(layer, x, layout).hidden[:, 6])


def test_the_recurrence_is_float32_whatever_the_layer_reads(layer):
    x = jax.random.normal(jax.random.key(1), (2, 9, 32))
    layout = plain_layout(text_bytes(2, 9))
    low = mixed(layer, x.astype(jnp.bfloat16), layout)
    assert low.hidden.dtype == jnp.bfloat16
    assert low.update.ssm.dtype == jnp.float32
    np.testing.assert_allclose(low.hidden.astype(jnp.float32), mixed(layer, x, layout).hidden, rtol=0.1, atol=0.02)


def test_steps_and_rates_start_as_published():
    layer = eqx.filter_jit(Mamba2)(256, key=jax.random.key(2))
    steps, rates = jax.nn.softplus(layer.dt_bias), jnp.exp(layer.A_log)
    assert jnp.all((steps > 9e-4) & (steps < 0.11))
    assert jnp.all((rates >= 1.0) & (rates <= 16.0))
    with pytest.raises(ValueError, match="multiple of 64"):
        Mamba2(20, key=jax.random.key(0))
