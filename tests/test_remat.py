"""`--unet.remat auto`: what is counted, what is decided, and that the model is the same either way."""

import dataclasses

import equinox as eqx
import jax
import pytest

from estimators.base import has_gradient
from experiments.config.build import build_model
from experiments.config.presets import PRESETS
from experiments.config.sections import MeshConfig
from experiments.run import parse
from experiments.training.remat import GIB, KEPT, MemoryPlan, activation_bytes, memory_plan
from experiments.training.sharding import placed_leaves
from experiments.training.step import fresh_state
from experiments.training.trainer import Trainer
from tests.test_run import usual_promotion as usual_promotion
from unet import UNet, UNetConfig
from unet.blocks import Stack, computed


def model_of(layers, dim=16):
    shape = UNetConfig(dim, 2, layers, 0, 0, window=4)
    return eqx.filter_eval_shape(lambda: UNet(shape, None, key=jax.random.key(0)))


def test_activations_are_counted_in_proportion_to_blocks_and_bytes():
    one, two, three = (activation_bytes(model_of(layers), (2, 32), ()) for layers in (1, 2, 3))
    assert three - two == pytest.approx(two - one, abs=2)
    # A block needs at least the inputs of its four matrices: two of the width, one of it, and the product of the gated halves.
    assert two - one > KEPT * 4 * 2 * 32 * (4 * 16)
    parameters = 4 * sum(leaf.size for leaf in jax.tree.leaves(model_of(1)))
    assert activation_bytes(model_of(1), (8, 32), ()) > 4 * (one - parameters)


def test_blocks_are_recomputed_only_where_activations_do_not_fit():
    assert MemoryPlan(8 * GIB, GIB, 9 * GIB).remat
    assert not MemoryPlan(7 * GIB, GIB, 9 * GIB).remat
    assert MemoryPlan(1, 1, None).remat
    note = "blocks are recomputed in the backward pass, since 8.0 GiB of activations and 1.0 GiB of parameters and moments do not"
    assert MemoryPlan(8 * GIB, GIB, 9 * GIB).note.startswith(note)


def test_the_trainer_recomputes_blocks_by_the_memory_that_is_stated_and_leaves_the_model_alone(usual_promotion):
    run = dataclasses.replace(
        PRESETS["tiny"], unet=UNetConfig(16, 2, 1, 1, 1, window=4), estimator="uniform", length=32
    )
    model = eqx.filter_jit(lambda: build_model(run, jax.random.key(0)))()

    def trainer(memory):
        shape = dataclasses.replace(run.unet, remat="auto", memory=memory)
        return Trainer.of(dataclasses.replace(run, unet=shape), model, (16,))

    def remats(tree):
        stacks = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, Stack))
        return {stack.remat for stack in stacks if isinstance(stack, Stack)}

    roomy, narrow, told = trainer(1.0), trainer(1e-4), Trainer.of(run, computed(model, remat=True), (16,))
    assert [one.memory and one.memory.remat for one in (roomy, narrow, told)] == [False, True, None]
    assert remats(roomy.static) == remats(narrow.static) == {False}
    assert remats(told.static) == {True}

    def recomputed(trainer):
        state = eqx.filter_eval_shape(lambda: fresh_state(trainer.params, trainer.optimizer))
        dtypes = {"bytes": "uint8", "segments": "int32", "mask": "bool"}
        batch = {name: jax.ShapeDtypeStruct((run.batch, 32), dtype) for name, dtype in dtypes.items()}
        return "remat" in str(jax.make_jaxpr(trainer.step)(state, batch, jax.random.key(0)))

    assert (recomputed(roomy), recomputed(narrow), recomputed(told)) == (False, True, True)


def test_parameters_are_counted_as_they_lie_on_a_mesh(monkeypatch):
    """Those that are whole on every device whole; the memory of a machine by all devices that take part."""
    monkeypatch.setattr("experiments.training.remat.machine_memory", lambda: 4 * GIB)
    model = model_of(1)
    params = eqx.filter(model, has_gradient)

    def planned(mesh):
        run = dataclasses.replace(PRESETS["tiny"], unet=UNetConfig(16, 2, 1, 0, 0, window=4), length=32, mesh=mesh)
        return memory_plan(run, model, ())

    alone = planned(MeshConfig(data=1))
    assert alone.state == 16 * sum(leaf.size for leaf in jax.tree.leaves(params))
    shape = MeshConfig(data=2, fsdp=2, tensor=2, whole_below=1000)
    leaves = placed_leaves(params, {"data": 2, "fsdp": 2, "tensor": 2}, 1000)
    assert planned(shape).state == 4 * sum(leaf.bytes_per_device for leaf in leaves)
    assert alone.state / 8 < planned(shape).state < alone.state
    assert (alone.memory, planned(shape).memory) == (4 * GIB, GIB // 2)


@pytest.mark.parametrize(("given", "remat"), [("auto", "auto"), ("True", True), ("False", False)])
def test_the_command_line_takes_a_truth_value_or_auto(given, remat):
    assert parse(["--unet.remat", given]).unet.remat is remat or remat == "auto"


def test_paper_presets_leave_it_to_the_memory():
    assert PRESETS["147M"].unet.remat == "auto"
    assert PRESETS["tiny"].unet.remat is False
