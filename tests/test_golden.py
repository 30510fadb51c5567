"""Against inputs and outputs of the programs that the papers' authors released."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from estimators import BatchCentre, Boundaries, Discount, EarlyExit, ObjectiveInputs, ScoreFunctionObjective
from estimators import equations as eq
from unet.attention import BlockContext, Visibility
from unet.blocks import Block
from unet.layers import Rotary
from unet.likelihood import plain_layout
from unet.ops import downsample, upsample

VALUES = {"rtol": 1e-5, "atol": 1e-5}
GRADIENTS = {"rtol": 1e-4, "atol": 1e-5}


def test_downsample_selects_the_same_rows(golden):
    z = golden("score_function")
    actions = jnp.asarray(z["actions"] > 0)
    rows = downsample(jnp.asarray(z["hidden"]), actions, z["downsampled"].shape[1])
    np.testing.assert_array_equal(rows.values, z["downsampled"])
    np.testing.assert_array_equal(rows.lengths, z["lengths"])
    np.testing.assert_array_equal(jnp.where(rows.mask, rows.positions, 0), np.where(rows.mask, z["positions"], 0))
    assert not rows.overflow.any()
    gradient = jax.grad(lambda x: jnp.sum(downsample(x, actions, 20).values * z["cotangent_down"]))(
        jnp.asarray(z["hidden"])
    )
    np.testing.assert_allclose(gradient, z["grad_hidden"], **GRADIENTS)


def test_upsample_distributes_the_same_rows(golden):
    z = golden("score_function")
    actions = jnp.asarray(z["actions"] > 0)
    np.testing.assert_array_equal(upsample(jnp.asarray(z["tokens"]), actions), z["upsampled"])
    gradient = jax.grad(lambda t: jnp.sum(upsample(t, actions) * z["cotangent_up"]))(jnp.asarray(z["tokens"]))
    np.testing.assert_allclose(gradient, z["grad_tokens"], **GRADIENTS)


def test_returns_advantages_and_policy_loss_are_the_same(golden):
    z = golden("score_function")
    pad = ((0, 0), (0, 1))
    final, early = (jnp.asarray(np.pad(-z[f"next_byte_nll_{name}"], pad)) for name in ("final", "early"))
    returns = eq.discounted_returns(final - early, float(z["discount"]))
    np.testing.assert_allclose(returns, -z["negative_returns"], **VALUES)
    advantages = eq.batch_centred(returns)
    np.testing.assert_allclose(advantages, -z["negative_advantages"], rtol=1e-5, atol=2e-5)
    logits, actions = jnp.asarray(z["boundary_logits"]), jnp.asarray(z["actions"] > 0)
    np.testing.assert_allclose(eq.action_log_prob(logits, actions), -z["action_nll"], **VALUES)
    everywhere = jnp.ones(actions.shape, bool)

    def loss(logits):
        return eq.policy_loss(eq.action_log_prob(logits, actions), advantages, everywhere)

    assert float(loss(logits)) == pytest.approx(float(z["policy_loss"]), rel=1e-5)
    np.testing.assert_allclose(jax.grad(loss)(logits), z["grad_boundary_logits"], **GRADIENTS)


def test_the_objective_assembles_the_same_policy_loss(golden):
    z = golden("score_function")
    pad = ((0, 0), (0, 1))
    final, early = (jnp.asarray(np.pad(-z[f"next_byte_nll_{name}"], pad)) for name in ("final", "early"))
    logits, actions = jnp.asarray(z["boundary_logits"]), jnp.asarray(z["actions"] > 0)
    everywhere = jnp.ones(actions.shape, bool)
    boundaries = Boundaries(actions, logits, jax.nn.sigmoid(logits), everywhere, ~everywhere)
    reductions = (EarlyExit(), Discount(float(z["discount"])), BatchCentre())
    objective = ScoreFunctionObjective(reductions, 0.2)
    output = objective(
        ObjectiveInputs(boundaries, jnp.zeros((*actions.shape, 1)), final, early, everywhere, everywhere)
    )
    assert float(output.metrics["policy_loss"]) == pytest.approx(float(z["policy_loss"]), rel=1e-5)


@pytest.mark.parametrize(("name", "window"), [("gemma2_byte_block", 8), ("gemma2_token_block", None)])
def test_a_block_equals_the_gemma_2_layer(golden, name, window):
    z = golden(name)

    def parameter(part):
        return jnp.asarray(z[f"param.{part}.weight"])

    dim, mlp_dim = z["x"].shape[-1], z["param.mlp.gate_proj.weight"].shape[0]
    block = Block(dim, int(z["heads"]), mlp_dim, key=jax.random.key(0))
    names = {
        "attention.qkv": [f"self_attn.{part}_proj" for part in "qkv"],
        "attention.out": ["self_attn.o_proj"],
        "mlp.gate_up": ["mlp.gate_proj", "mlp.up_proj"],
        "mlp.down": ["mlp.down_proj"],
        "before_attention": ["input_layernorm"],
        "after_attention": ["post_attention_layernorm"],
        "before_mlp": ["pre_feedforward_layernorm"],
        "after_mlp": ["post_feedforward_layernorm"],
    }

    def weight_of(block, path):
        for part in path.split("."):
            block = getattr(block, part)
        return block.weight

    weights = [
        jnp.concatenate([parameter(part) for part in parts]).T if "." in path else parameter(parts[0])
        for path, parts in names.items()
    ]
    block = eqx.tree_at(lambda b: [weight_of(b, path) for path in names], block, weights)
    positions = jnp.asarray(z["positions"], jnp.int32)
    layout = plain_layout(jnp.zeros_like(positions))
    rotary = Rotary(positions, dim // int(z["heads"]))

    def run(block, x):
        return block(x, BlockContext(layout, rotary, Visibility(layout, window))).hidden

    x = jnp.asarray(z["x"])

    @eqx.filter_jit
    @functools.partial(eqx.filter_value_and_grad, has_aux=True)
    def value_and_gradient(both):
        y = run(*both)
        return jnp.sum(y * z["cotangent"]), y

    (_, y), (gradient_block, gradient_x) = value_and_gradient((block, x))
    # Rounding the input alone moves values by 6e-6 of 6.5, and those of the file are 9e-6 from what float64 gives.
    np.testing.assert_allclose(y, z["y"], rtol=1e-5, atol=5e-5)

    def close(found, wanted, name):
        # Sums of hundreds of terms of either sign: absolute errors go with the largest entry.
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=2e-5 * np.abs(wanted).max(), err_msg=name)

    close(gradient_x, z["grad_x"], "x")
    for path, parts in names.items():
        expected = np.concatenate([z[f"grad.{part}.weight"] for part in parts]).T
        close(weight_of(gradient_block, path), expected, path)
