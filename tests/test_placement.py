"""How batches and parameters lie on a mesh of two devices, and checkpoints read on another mesh than they were written on."""

import dataclasses
import hashlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from experiments.config.build import build_byte_model, new_model
from experiments.config.errors import ConfigError
from experiments.config.files import to_json
from experiments.config.presets import PRESETS
from experiments.config.sections import MeshConfig
from experiments.training.checkpoint import Checkpoints, Progress, as_written
from experiments.training.digests import described
from experiments.training.placement import Placement, mesh_shape
from experiments.training.run_dir import CHECKPOINTS, CONFIG
from experiments.training.sharding import partition_spec, placed_leaves
from experiments.training.stored import stored_model
from experiments.training.trainer import Trainer
from unet import UNet, UNetConfig

TINY = dataclasses.replace(PRESETS["tiny"], batch=8)
MESHES = (MeshConfig(data=2, whole_below=1), MeshConfig(fsdp=2, whole_below=1))


def placement(mesh: MeshConfig) -> Placement:
    return Placement.of(dataclasses.replace(TINY, mesh=mesh))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((6, 8, 8), PartitionSpec(None, "fsdp")),
        ((64, 8), PartitionSpec("fsdp")),
        ((8, 64), PartitionSpec(None, "fsdp")),
        ((66, 8), PartitionSpec(None, "fsdp")),
        ((66, 6), PartitionSpec()),
        ((9,), PartitionSpec()),
        ((), PartitionSpec()),
    ],
)
def test_the_largest_axis_that_divides_is_divided_and_small_leaves_are_whole(shape, expected):
    mesh = {"data": 2, "fsdp": 4, "tensor": 1}
    assert partition_spec("weight", shape, mesh, 10) == expected
    assert partition_spec("weight", shape, mesh, 10**6) == PartitionSpec()
    assert partition_spec("weight", shape, {**mesh, "fsdp": 1}, 1) == PartitionSpec()


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((8, 24), PartitionSpec(None, ("fsdp", "tensor"))),
        ((12, 36), PartitionSpec(None, "fsdp")),
        ((6, 4), PartitionSpec(None, "fsdp")),
        ((6, 6), PartitionSpec()),
    ],
)
def test_a_shared_weight_that_both_axes_do_not_divide_is_divided_over_one(shape, expected):
    mesh = {"data": 1, "fsdp": 4, "tensor": 2}
    assert partition_spec(".stage.blocks[0].attention.qkv.weight", shape, mesh, 1) == expected
    alone = PartitionSpec(*[None if part is None else "fsdp" for part in expected])
    assert partition_spec(".embedding", shape, mesh, 1) == alone


def test_what_a_device_holds_is_counted():
    tree = {"a": jnp.zeros((4, 8)), "b": jnp.zeros(3)}
    leaves = placed_leaves(tree, {"data": 1, "fsdp": 2, "tensor": 1}, 4)
    assert [(one.path, one.bytes, one.bytes_per_device) for one in leaves] == [("['a']", 128, 64), ("['b']", 12, 12)]
    shown = placement(MeshConfig(fsdp=2, whole_below=4)).shown(tree)
    assert "| `['a']` | 4 × 8 | (None, 'fsdp') | 64 |" in shown
    assert "mesh data 1 × fsdp 2 × tensor 1: 76 of 140 bytes of parameters on each device" in shown


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mesh": MeshConfig(fsdp=3)}, "--mesh.fsdp 3 are 3 devices, and there are 2"),
        (
            {"batch": 3, "mesh": MeshConfig(fsdp=2)},
            "--mesh.fsdp 2 cannot share a batch of 3: --mesh.fsdp must divide it",
        ),
        ({"batch": 3, "mesh": MeshConfig(data=2)}, "--mesh.data 2 x --mesh.fsdp 1 cannot share a batch of 3"),
        ({"devices": 1, "mesh": MeshConfig(fsdp=2)}, "--devices 1 are not --mesh.data -1 x --mesh.fsdp 2"),
        ({"devices": 3}, "--devices 3 cannot share a batch of 8"),
    ],
)
def test_what_does_not_divide_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        mesh_shape(dataclasses.replace(TINY, **settings), 2)


def test_an_axis_takes_what_the_others_leave():
    assert mesh_shape(TINY, 2) == (2, 1, 1)
    assert mesh_shape(dataclasses.replace(TINY, mesh=MeshConfig(fsdp=2)), 2) == (1, 2, 1)
    assert mesh_shape(dataclasses.replace(TINY, batch=3), 2) == (1, 1, 1)


def test_a_process_gives_its_own_rows():
    there = placement(MESHES[1])
    assert there.own_rows == slice(0, 8)
    rows = np.arange(16).reshape(8, 2)
    placed = there.inputs({"rows": rows})["rows"]
    assert placed.sharding.spec == PartitionSpec(("data", "fsdp"))
    np.testing.assert_array_equal(placed, rows)


def numbers() -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((6, 8)).astype(np.float32)
    return {"a": jnp.asarray(values), "b": jnp.asarray(values[:4, :2], jnp.bfloat16), "c": jnp.asarray(3, jnp.int32)}


def test_digests_do_not_depend_on_the_mesh_and_tell_any_change():
    first = described(numbers())
    assert all(described(placement(mesh).divided(numbers())) == first for mesh in MESHES)
    assert described(jax.tree.map(np.asarray, numbers())) == first
    flipped = np.asarray(numbers()["a"]).copy()
    flipped[5, 7] = np.nextafter(flipped[5, 7], np.inf)
    swapped = np.asarray(numbers()["a"])[::-1]
    digests = {described({"a": one})["['a']"] for one in (numbers()["a"], flipped, swapped, -flipped, 0 * flipped)}
    assert len(digests) == 5


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_checkpoint_of_one_mesh_is_read_on_another_bit_for_bit(tmp_path, order):
    written, read = (placement(MESHES[number]) for number in order)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(written.divided(numbers()), Progress(1, 1.0, {}, "f"))
    found = checkpoints.restore(read.divided(jax.tree.map(jnp.zeros_like, numbers())), pytest.fail)
    checkpoints.close()
    assert found is not None
    assert {name: leaf.sharding.spec for name, leaf in found.arrays.items()} == read.specs(numbers())
    for name, leaf in numbers().items():
        np.testing.assert_array_equal(np.asarray(found.arrays[name]), np.asarray(leaf))


def test_hashes_of_earlier_versions_are_those_of_whole_arrays(monkeypatch):
    """Also where the parts of an array lie in several processes, each of which can reach its own only."""
    there = placement(MESHES[1]).divided(numbers())
    leaves = {
        name: (shape, dtype, hashlib.sha256(np.asarray(numbers()[name[2:-2]]).tobytes()).hexdigest())
        for name, (shape, dtype, _) in described(numbers()).items()
    }
    assert as_written(there, leaves)
    assert not as_written({**there, "a": -there["a"]}, leaves)
    gathered = []

    def gather(leaf, *, tiled):
        gathered.append((leaf.shape, tiled))
        return np.asarray(numbers()["a" if leaf.shape == (6, 8) else "b"])

    monkeypatch.setattr("jax.experimental.multihost_utils.process_allgather", gather)
    monkeypatch.setattr(
        type(there["a"]), "is_fully_addressable", property(lambda leaf: len(leaf.sharding.device_set) == 1)
    )
    assert as_written(there, leaves)
    assert gathered == [((6, 8), True), ((4, 2), True)]


def test_what_a_mesh_trained_is_read_on_one_device(tmp_path):
    """Also what cannot be trained here, and where the memory of a step would be planned for its mesh."""
    shape = UNetConfig(8, 2, 1, 1, 1, window=4, remat="auto")
    run = dataclasses.replace(TINY, unet=shape, estimator="uniform", length=16, out=tmp_path, mesh=MeshConfig(fsdp=64))
    (tmp_path / CONFIG).write_text(to_json(run))
    model = new_model(run, jax.random.key(3), None)
    here = dataclasses.replace(run, devices=1, mesh=MeshConfig())
    checkpoints = Checkpoints(tmp_path / CHECKPOINTS, keep=1)
    checkpoints.save(Trainer.of(here, model, (16,)).first_state(), Progress(7, 1.0, {}, "f"))
    checkpoints.close()
    found, step = stored_model(tmp_path)
    assert step == 7
    assert eqx.tree_equal(eqx.filter(found, eqx.is_array), eqx.filter(model, eqx.is_array))


def test_a_fresh_model_is_never_whole_and_has_the_bits_of_one_that_is():
    """Its parameters and moments lie in parts; what has no gradient can be used without the mesh."""
    shape = UNetConfig(16, 2, 1, 1, 1, window=4)
    run = dataclasses.replace(TINY, unet=shape, estimator="sfe", length=16, mesh=MeshConfig(fsdp=2, whole_below=64))
    there, key = Placement.of(run), jax.random.key(3)
    alone = new_model(run, key)
    model = there.with_local_rest(new_model(run, key, kept=there.model_kept))
    assert eqx.tree_equal(model, alone)
    trainer = Trainer.of(run, model, (16,))
    state = trainer.first_state_on(there)
    divided = [one.spec != PartitionSpec() for one in there.leaves(state)]
    assert sum(divided) > 30
    for leaf, in_parts in zip(jax.tree.leaves(state), divided, strict=True):
        assert {shard.data.size for shard in leaf.addressable_shards} == {leaf.size // 2 if in_parts else leaf.size}
    assert all(
        leaf.sharding == sharding
        for leaf, sharding in zip(*map(jax.tree.leaves, (trainer.params, there.shardings(trainer.params))), strict=True)
    )
    assert eqx.tree_equal(there.whole(state.params), jax.tree.map(np.asarray, Trainer.of(run, alone, (16,)).params))


def test_a_metric_of_one_devices_sequences_is_refused():
    """As in an objective of one's own that takes the mean over the sequences that it is given."""

    def gradient(model_of, params, batch):
        return {"w": params["w"]}, jnp.mean(batch["rows"])

    there, params = placement(MESHES[0]), {"w": jnp.zeros(2)}
    batch = there.inputs({"rows": np.ones((8, 2), np.float32)})
    static = UNet(TINY.unet, None, key=jax.random.key(0))
    with pytest.raises(ConfigError, match="not of the batch: in a class of your own"):
        there.by_sequence(gradient, static)(params, batch)


@pytest.mark.parametrize(
    ("preset", "estimator"),
    [("hnet-2stage-tiny", "hnet"), ("llamabyte-moe-tiny", "isotropic"), ("blt-tiny", "stride")],
)
def test_steps_of_every_kind_of_model_are_those_of_a_mesh(preset, estimator):
    """Hierarchies, Mamba-2, mixtures of experts, attention to tokens: traced, with JAX's checks that what should be the same on
    all devices is, but not compiled."""
    run = dataclasses.replace(PRESETS[preset], estimator=estimator, mesh=MESHES[1])
    there, rows = Placement.of(run), (run.batch, run.length)

    def stepped(key, bytes):
        model = build_byte_model(run, key)
        trainer = Trainer.of(run, model, (run.length,))
        batch = {"bytes": bytes, "segments": jnp.zeros(rows, jnp.int32), "mask": jnp.ones(rows, bool)}
        state = trainer.first_state()
        return state, trainer.step_on(there)(state, batch, key)[0]

    with jax.numpy_dtype_promotion("standard"):
        key = jax.eval_shape(lambda: jax.random.key(0))
        before, after = jax.eval_shape(stepped, key, jax.ShapeDtypeStruct(rows, jnp.uint8))
    assert jax.tree.structure(after) == jax.tree.structure(before)
