"""Collectives read from the text of programs, and counted on paper."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from experiments.benchmark.collectives import Collective, collectives_of, costs_by_kind, of_shared_layers, on_paper
from experiments.training.sharding import PlacedLeaf, placed_leaves
from unet import UNet, UNetConfig
from unet.tensor import require_divisible

MESH = {"data": 2, "fsdp": 4, "tensor": 1}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "  %a = f32[16,8]{1,0} all-gather(%p), channel_id=1, replica_groups={{0,1},{2,3}}, dimensions={0}",
            [("all-gather", 512, 2, 128)],
        ),
        (
            "  %r = f32[4,8]{1,0} reduce-scatter(%d), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add",
            [("reduce-scatter", 512, 4, 128)],
        ),
        (
            "  %s = ((f32[2,8]{1,0}, bf16[4]{0}), (f32[16,8]{1,0}, /*index=1*/bf16[32]{0})) all-gather-start(%p, %q), "
            "replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}",
            [("all-gather", 512, 8, 128), ("all-gather", 64, 8, 32)],
        ),
        (
            "  %b = f32[513]{0} all-reduce-start(%w), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, to_apply=%add",
            [("all-reduce", 2052, 4, 513)],
        ),
        ("  %c = pred[] all-reduce(%w), replica_groups={{0},{1}}, to_apply=%or", []),
        ("  %d = f32[513]{0} all-reduce-done(%b)", []),
        ("  %e = f32[8]{0} fusion(%all-gather.1), kind=kLoop, calls=%f", []),
    ],
)
def test_each_array_that_is_exchanged_is_read(line, expected):
    assert collectives_of(f"HloModule m\n{line}\n") == [Collective(*one) for one in expected]


def test_on_paper_each_divided_leaf_is_gathered_and_scattered_and_each_whole_one_summed():
    tree = {"head": jnp.zeros((8, 8)), "bias": jnp.zeros(2)}
    found = on_paper(placed_leaves(tree, MESH, 10), MESH)
    assert sorted(found, key=lambda one: one.kind) == [
        Collective("all-gather", 256, 4, 64),
        Collective("all-reduce", 8, 8, 2),
        Collective("all-reduce", 64, 2, 16),
        Collective("reduce-scatter", 256, 4, 64),
    ]
    gathered, *_ = costs_by_kind(found)
    assert (gathered.kind, gathered.count, gathered.bytes, gathered.moved) == ("all-gather", 1, 256, 192.0)


def test_on_paper_blocks_are_gathered_as_often_as_widths_say():
    (leaf,) = placed_leaves({"stack.blocks[0]": jnp.zeros((8, 8))}, MESH, 10)
    assert [one.bytes for one in on_paper([leaf], MESH, widths=(2, 4)) if one.kind == "all-gather"] == [128, 256]


def test_on_paper_gradients_of_shared_layers_are_summed_where_their_weights_are_not_divided():
    """Piece by piece: of queries, keys and values each device has its own heads."""
    mesh = {**MESH, "data": 1, "tensor": 2}
    leaf = PlacedLeaf(".blocks[0].attention.qkv.weight", (12, 36), PartitionSpec(), 1728, 1728)
    for spec, reduced in (
        (PartitionSpec(), [Collective("all-reduce", 1728, 4, 432), *[Collective("all-reduce", 576, 2, 144)] * 3]),
        (PartitionSpec(None, ("fsdp", "tensor")), []),
        (PartitionSpec(None, "fsdp"), [Collective("all-reduce", 576, 2, 144)] * 3),
    ):
        found = on_paper([dataclasses.replace(leaf, spec=spec)], mesh)
        assert [one for one in found if one.kind == "all-reduce"] == reduced


def test_on_paper_shared_layers_sum_their_outputs_and_the_gradients_of_their_inputs():
    assert of_shared_layers(2, (2, 3, 4), MESH, width=2) == []
    assert of_shared_layers(2, (2, 3, 4), {**MESH, "tensor": 2}, width=2) == [Collective("all-reduce", 48, 2, 24)] * 4


@pytest.mark.parametrize(("parts", "message"), [(4, "cannot share the 2 heads of .*attention"), (2, "")])
def test_devices_that_do_not_divide_heads_are_refused(parts, message):
    shape = UNetConfig(dim=16, heads=2, encoder_layers=1, main_layers=1, decoder_layers=0, window=4)
    model = jax.eval_shape(lambda: UNet(shape, None, key=jax.random.key(0)))
    if not message:
        require_divisible(model, parts)
        return
    with pytest.raises(ValueError, match=message):
        require_divisible(model, parts)
