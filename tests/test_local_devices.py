"""Rows of a batch on all devices of this process: two, in these tests."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import unet
from experiments.evaluation.byte_results import LocalPass, evaluate_batch
from tests.conftest import small_model, small_score_function, text_bytes
from unet.likelihood import plain_layout
from unet.local_devices import LocalDevices, by_row, on_all_devices, sharing, usable_devices

TWO = jax.local_devices()[:2]


@pytest.fixture(autouse=True)
def two_devices_compute_rows(monkeypatch):
    """As outside of the tests."""
    monkeypatch.setattr("unet.local_devices.usable_devices", usable_devices)


@pytest.mark.parametrize(
    ("rows", "devices", "used"), [(6, 4, 3), (7, 4, 1), (2, 4, 2), (1, 4, 1), (0, 4, 1), (8, 3, 2)]
)
def test_as_many_devices_compute_as_share_the_rows_evenly(rows, devices, used):
    assert sharing(rows, devices) == used


def test_a_model_that_was_put_elsewhere_stays_there():
    numbers = jnp.ones(4)
    assert list(usable_devices(numbers)) == jax.local_devices()
    assert list(usable_devices(LocalDevices.of(2, None).everywhere(numbers))) == jax.local_devices()
    assert usable_devices(jax.device_put(numbers, TWO[1])) == []
    assert usable_devices(LocalDevices.of(2, None).rows(numbers)) == []
    with jax.default_device(TWO[1]):
        assert usable_devices(numbers) == []


def test_a_model_that_is_on_all_devices_is_not_copied_again():
    model = on_all_devices({"weight": jnp.ones(4), "name": "a"})
    assert (model["name"], model["weight"].sharding.device_set) == ("a", set(TWO))
    again = LocalDevices.of(4, model).everywhere(model)
    places = [
        [shard.data.unsafe_buffer_pointer() for shard in one["weight"].addressable_shards] for one in (model, again)
    ]
    assert places[0] == places[1]
    # A batch of one row would be computed by all of them.
    alone = LocalDevices.of(1, model).everywhere(model)
    assert (alone["weight"].devices(), alone["name"]) == ({TWO[0]}, "a")


def test_each_device_computes_its_own_rows_with_the_whole_model_and_nothing_is_exchanged():
    devices = LocalDevices.of(4, None)

    def scaled(weight, rows, number, shift):
        return {"rows": rows * weight + shift, "number": jnp.broadcast_to(number, rows.shape[:1])}

    weight, rows = devices.everywhere(jnp.float32(3.0)), devices.rows(jnp.arange(8.0).reshape(4, 2))
    found = by_row(scaled)(weight, rows, jnp.int32(5), 1.0)
    np.testing.assert_array_equal(found["rows"], 3 * np.arange(8.0).reshape(4, 2) + 1)
    np.testing.assert_array_equal(found["number"], [5, 5, 5, 5])
    for array in found.values():
        assert [shard.data.shape[0] for shard in array.addressable_shards] == [2, 2]
        assert {shard.device for shard in array.addressable_shards} == set(TWO)


def test_rows_on_one_device_are_computed_there():
    found = by_row(lambda weight, rows: rows * weight)(jnp.float32(2.0), jax.device_put(jnp.ones(4), TWO[1]))
    assert found.devices() == {TWO[1]}


def test_arguments_by_name_are_refused():
    with pytest.raises(TypeError, match="given by position"):
        by_row(lambda weight, rows: rows * weight)(jnp.float32(2.0), rows=jnp.ones(4))


def test_boundaries_and_likelihoods_are_those_of_one_device():
    """One key draws the numbers of the whole batch."""
    model, layout, key = small_model(small_score_function()), plain_layout(text_bytes(4, 24)), jax.random.key(5)
    ours, theirs = evaluate_batch(model, layout, key, 12), LocalPass(model).results(layout, key, 12)
    assert theirs.log_prob.sharding.device_set == set(TWO)
    np.testing.assert_array_equal(ours.drawn, theirs.drawn)
    np.testing.assert_allclose(ours.log_prob, theirs.log_prob, atol=1e-5)
    raw = LocalPass(model).results(layout, jax.random.key_data(key), 12)
    np.testing.assert_array_equal(ours.drawn, raw.drawn)


def test_texts_do_not_depend_on_the_devices():
    """Two prompts are divided, three are not."""
    model, key = small_model(small_score_function()), jax.random.key(2)
    keys, prompts = jax.random.split(key, 3), ["so ", "then it ", "a"]
    three = unet.generate(model, prompts, max_bytes=12, key=keys)
    two = unet.generate(model, prompts[:2], max_bytes=12, key=keys[:2])
    assert [text.text for text in two.texts] == [text.text for text in three.texts[:2]]
