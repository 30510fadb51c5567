"""Models under the user's own `jax.shard_map`, with its default checks, and under that of a training mesh."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from estimators import BatchCentre, ScoreFunctionObjective
from estimators.equations import batch_centred, weighted_batch_centred
from estimators.sharding import BATCH_AXES
from tests.compositions import registered
from tests.conftest import text_bytes
from tests.enumeration import BEHAVIOUR
from tests.enumeration import world as enumerated_world


@pytest.mark.parametrize("name", ["sfe", "hnet", "gumbel", "bpe"])
def test_a_loss_under_shard_map_is_the_mean_of_its_shards(name):
    model, bytes = registered(name), text_bytes(4, 16)
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(AxisType.Auto,))

    def loss(model, bytes):
        return model.loss(bytes, key=jax.random.key(1), capacities=((8, 16),)).loss

    @eqx.filter_jit
    def both(model, bytes):
        def shard(bytes):
            return jax.lax.pmean(loss(model, bytes), "batch")

        whole = jax.shard_map(shard, mesh=mesh, in_specs=PartitionSpec("batch"), out_specs=PartitionSpec())(bytes)
        return whole, jnp.mean(jnp.stack([loss(model, bytes[:2]), loss(model, bytes[2:])]))

    together, apart = both(model, bytes)
    assert float(together) == pytest.approx(float(apart), rel=1e-6)


def on_two_devices(function, *args):
    """`function` in the `jax.shard_map` of a training mesh of two devices, each with half of the rows of `args` and results."""
    mesh = jax.make_mesh((1, 2), BATCH_AXES, axis_types=(AxisType.Auto,) * 2)
    rows = PartitionSpec(BATCH_AXES)
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=rows, out_specs=rows))(*args)


@pytest.mark.parametrize("name", ["sfe", "gumbel", "uniform"])
def test_boundaries_are_those_of_one_device_bit_for_bit(name):
    model, bytes = registered(name), text_bytes(4, 16)

    def drawn(bytes):
        boundaries = model(bytes, key=jax.random.key(1), training=True).levels[0].boundaries
        return boundaries.actions, boundaries.logits

    here, there = jax.jit(drawn)(bytes), on_two_devices(drawn, bytes)
    np.testing.assert_array_equal(here[0], there[0])
    assert np.asarray(here[0])[:2].tolist() != np.asarray(here[0])[2:].tolist()


@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_returns_are_centred_over_all_devices_or_over_each(leave_one_out, weighted):
    keys = jax.random.split(jax.random.key(0), 3)
    returns, weights = (jax.random.uniform(key, (4, 5), jnp.float32) for key in keys[:2])
    mask = jax.random.uniform(keys[2], (4, 5)) < 0.8

    def centred(returns, weights, mask, *, whole_batch=True):
        if weighted:
            return weighted_batch_centred(returns, weights, mask, leave_one_out, whole_batch)
        return batch_centred(returns, mask, leave_one_out, whole_batch)

    def of_each(*parts):
        return centred(*parts, whole_batch=False)

    here = centred(returns, weights, mask)
    np.testing.assert_allclose(on_two_devices(centred, returns, weights, mask), here, rtol=1e-5, atol=1e-6)
    halves = [centred(returns[rows], weights[rows], mask[rows]) for rows in (slice(0, 2), slice(2, 4))]
    apart = on_two_devices(of_each, returns, weights, mask)
    np.testing.assert_allclose(apart, np.concatenate(halves), rtol=1e-5, atol=1e-6)
    assert not np.allclose(apart, here)


@pytest.fixture(scope="module")
def four_sequences():
    """All ways in which four short sequences can draw their boundaries, and the gradient of the expected likelihood."""
    world = enumerated_world(batch=4, length=3)
    return world, world.exact(1.0)


@pytest.mark.parametrize(
    ("over", "leave_one_out", "share"),
    [("batch", False, 3 / 4), ("shard", False, 1 / 2), ("batch", True, 1.0), ("shard", True, 1.0)],
)
def test_centring_over_each_device_shrinks_the_expected_gradient_by_its_own_number(
    four_sequences, over, leave_one_out, share
):
    """Exactly, over all boundary strings: (B - 1)/B over the batch, (B - D)/B over each of D devices, none of it left one out."""
    world, exact = four_sequences
    objective = ScoreFunctionObjective((BatchCentre(leave_one_out, over),), BEHAVIOUR)

    def credited(inputs):
        own = dataclasses.replace(inputs.boundaries, behaviour_log_prob=None)
        advantages = objective.advantages(dataclasses.replace(inputs, boundaries=own))
        return jnp.where(own.decided, advantages, 0.0)

    mesh = jax.make_mesh((1, 2), BATCH_AXES, axis_types=(AxisType.Auto,) * 2)
    rows = PartitionSpec(None, BATCH_AXES)
    on_each = jax.shard_map(jax.vmap(credited), mesh=mesh, in_specs=rows, out_specs=rows)
    gradients = jnp.einsum("obi,obitd->oitd", jax.jit(on_each)(world.signals), world.scores)
    expected = jnp.tensordot(world.on, gradients, 1)
    np.testing.assert_allclose(expected, share * exact, rtol=1e-4, atol=1e-5)
    assert float(jnp.max(jnp.abs(exact))) > 0.1
