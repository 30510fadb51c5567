"""Models under the user's own `jax.shard_map`, with its default checks."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from tests.compositions import registered
from tests.conftest import text_bytes


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
