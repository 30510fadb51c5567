"""The Mosaic GPU kernels without a GPU: interpreted against XLA, lowered for CUDA, compiled to machine code."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from estimators.base import Limits
from experiments.benchmark.deviceless import ENVIRONMENT, missing
from unet.attention import Attention
from unet.blocks import Block, PreNorm, Stack
from unet.layers import SwiGLU
from unet.likelihood import plain_layout
from unet.ops import boundary_scan, downsample, mean_pool, smooth, upsample
from unet.ops.gating import ACTIVATIONS, WITH_SLOPE, gated
from unet.ops.norms import add_rms_norm, rms_norm
from unet.ops.rows import gather_rows, sum_spans

CLOSE = {"float32": {"rtol": 1e-5, "atol": 1e-5}, "bfloat16": {"rtol": 1e-2, "atol": 1e-2}}


def normal(*shape, dtype="float32", seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def drawn(batch, length, rate=0.4, seed=1):
    return jnp.asarray(np.random.default_rng(seed).random((batch, length)) < rate).at[:, 0].set(True)


def down(hidden, implementation, capacity=5):
    return downsample(hidden, drawn(*hidden.shape[:2]), capacity, implementation=implementation).values


def up(tokens, implementation):
    return upsample(tokens, drawn(tokens.shape[0], 19), implementation=implementation)


def pool(hidden, implementation):
    actions = drawn(*hidden.shape[:2])
    starts = jnp.zeros(actions.shape, bool).at[:, 0].set(True)
    return mean_pool(hidden, actions, 5, starts=starts, implementation=implementation).values


def average(tokens, implementation):
    probs = jax.nn.sigmoid(normal(*tokens.shape[:2], seed=2))
    starts = jnp.zeros(probs.shape, bool).at[0, 3].set(True)
    return smooth(tokens, probs, starts, implementation=implementation)


def norm(hidden, implementation):
    rows, norms = rms_norm(hidden, 1.0 + normal(hidden.shape[-1], seed=2), 1e-6, implementation=implementation)
    return rows + norms


def norm_and_sum(hidden, implementation):
    residual, scale = normal(*hidden.shape, dtype=hidden.dtype, seed=4), 1.0 + normal(hidden.shape[-1], seed=2)
    return add_rms_norm(residual, hidden, scale, 1e-6, implementation=implementation)


def gates(halves, activation, implementation):
    return gated(halves, activation, implementation=implementation)


OPS = {
    "downsample": down,
    "upsample": up,
    "mean_pool": pool,
    "smooth": average,
    "rms_norm": norm,
    "add_rms_norm": norm_and_sum,
    "geglu": lambda hidden, implementation: gates(hidden, "gelu", implementation),
    "swiglu": lambda hidden, implementation: gates(hidden, "silu", implementation),
}


def value_and_gradient(op, rows, implementation):
    def total(rows):
        out = op(rows, implementation)
        return jnp.sum(out.astype(jnp.float32) * normal(*out.shape, seed=3)), out

    (_, out), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(rows)
    return out, gradient


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", OPS)
def test_an_interpreted_kernel_equals_xla_in_value_and_gradient(name, dtype):
    # Five token rows are fewer than there are boundaries.
    rows = normal(2, {"smooth": 16, "upsample": 5}.get(name, 13), 256, dtype=dtype)
    value, gradient = value_and_gradient(OPS[name], rows, "xla")
    if name.endswith("glu"):
        # XLA rounds between the steps of an activation; the kernel, whose gradient is float32 inside, does not.
        gradient = value_and_gradient(OPS[name], rows.astype("float32"), "xla")[1].astype(dtype)
    for found, wanted in zip(value_and_gradient(OPS[name], rows, "interpret"), (value, gradient), strict=True):
        assert found.dtype == wanted.dtype
        np.testing.assert_allclose(found.astype("float32"), wanted.astype("float32"), **CLOSE[dtype])


def test_the_kernel_of_smoothing_has_the_gradient_of_its_probabilities():
    tokens = normal(2, 8, 128)
    probs = jax.nn.sigmoid(normal(2, 8, seed=2))
    starts = jnp.zeros(probs.shape, bool).at[0, 3].set(True)

    def total(probs, implementation):
        return jnp.sum(smooth(tokens, probs, starts, implementation=implementation) * normal(2, 8, 128, seed=3))

    found, wanted = (
        jax.jit(jax.grad(functools.partial(total, implementation=way)))(probs) for way in ("interpret", "xla")
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_the_kernels_of_norms_have_the_gradient_of_the_scale_and_give_rows_in_another_dtype():
    """19 rows are one program of 16 and one of 3; a residual stream in float32 has norms in bfloat16."""
    rows, scale = normal(19, 128), 1.0 + normal(128, seed=2)

    def total(scale, implementation):
        summed = add_rms_norm(rows, rows.astype("bfloat16"), scale, 1e-6, implementation=implementation)
        found = rms_norm(summed, scale, 1e-6, dtype="bfloat16", implementation=implementation)
        assert (found.rows.dtype, found.norms.dtype) == (jnp.float32, jnp.bfloat16)
        return jnp.sum((found.rows + found.norms.astype(jnp.float32)) * normal(19, 128, seed=3))

    found, wanted, native = (
        jax.jit(jax.grad(functools.partial(total, implementation=way)))(scale) for way in ("interpret", "xla", "native")
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(native, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", WITH_SLOPE)
def test_slopes_of_activations_are_their_derivatives(name):
    x = jnp.linspace(-9.0, 9.0, 181)
    active, slope = WITH_SLOPE[name](x)
    wanted = jax.jvp(ACTIVATIONS[name], (x,), (jnp.ones_like(x),))
    np.testing.assert_allclose(active, wanted[0], rtol=1e-5, atol=5e-6)
    np.testing.assert_allclose(slope, wanted[1], rtol=1e-5, atol=5e-6)


def test_rows_that_do_not_fit_into_registers_are_normed_in_xla(caplog):
    with caplog.at_level("INFO", "unet.ops.mosaic"):
        way = functools.partial(norm, implementation=None)
        assert "mosaic_gpu" not in lowered(way, normal(2, 2176), platform="cuda")
    assert "rms_norm runs in XLA on every platform: rows of 2176 values are wider than 2048" in caplog.text
    np.testing.assert_array_equal(norm(normal(2, 2176), "interpret"), norm(normal(2, 2176), "xla"))


@pytest.mark.parametrize("tokens", [1, 7])
def test_smoothing_runs_over_any_number_of_tokens(tokens):
    rows = normal(1, tokens, 128)
    np.testing.assert_allclose(average(rows, "interpret"), average(rows, "xla"), **CLOSE["float32"])


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("lags", [2, 5])
def test_the_interpreted_scan_draws_what_xla_draws(lags, cap):
    q, u = 2.0 * normal(3, 21, lags), jnp.asarray(np.random.default_rng(4).random((3, 21)), jnp.float32)
    starts = jnp.zeros((3, 21), bool).at[:, 0].set(True).at[1, 9].set(True)
    found, wanted = (boundary_scan(q, u, starts, cap, implementation=way) for way in ("interpret", "xla"))
    assert jnp.min(jnp.abs(u - jax.nn.sigmoid(wanted.logits))) > 1e-5
    np.testing.assert_array_equal(found.actions, wanted.actions)
    np.testing.assert_allclose(found.logits, wanted.logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_no_index_leaves_its_rows(implementation):
    values = normal(2, 3, 128)
    index = jnp.array([[-1, 0, 2, 7], [-5, 1, 1, 3]])
    rows = gather_rows(values, index, implementation=implementation)
    np.testing.assert_array_equal(rows[0], jnp.stack([jnp.zeros(128), values[0, 0], values[0, 2], values[0, 2]]))
    np.testing.assert_array_equal(rows[1], jnp.stack([jnp.zeros(128), values[1, 1], values[1, 1], values[1, 2]]))


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_spans_may_be_empty_begin_late_end_early_and_end_beyond(implementation):
    values = normal(2, 6, 128)
    bounds = jnp.array([[1, 3, 3, 5], [0, 2, 6, 9]])
    sums = sum_spans(values, bounds, implementation=implementation)
    wanted = [[values[0, 1:3].sum(0), jnp.zeros(128), values[0, 3:5].sum(0)]]
    wanted.append([values[1, :2].sum(0), values[1, 2:].sum(0), jnp.zeros(128)])
    np.testing.assert_allclose(sums, jnp.asarray(wanted), rtol=1e-6, atol=1e-6)


def test_a_gradient_of_upsample_is_summed_in_float32():
    """320 bytes of one token, each with a gradient of one: from 256 on, bfloat16 has no odd numbers."""
    tokens, actions = jnp.zeros((1, 1, 128), jnp.bfloat16), jnp.zeros((1, 320), bool).at[:, 0].set(True)

    def total(rows, implementation):
        return upsample(rows, actions, implementation=implementation).sum()

    for implementation in ("xla", "interpret"):
        gradient = jax.grad(functools.partial(total, implementation=implementation))(tokens)
        np.testing.assert_array_equal(gradient.astype(jnp.float32), 320.0)


def lowered(function, *args, platform):
    shapes = [jax.ShapeDtypeStruct(arg.shape, arg.dtype) for arg in args]
    return jax.jit(function).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("name", OPS)
def test_a_kernel_is_in_what_is_lowered_for_cuda_and_nowhere_else(name):
    def gradient(rows):
        return jax.grad(lambda rows: OPS[name](rows, None).sum())(rows)

    rows = normal(2, 16, 768)
    assert "mosaic_gpu" in lowered(gradient, rows, platform="cuda")
    assert "mosaic_gpu" not in lowered(gradient, rows, platform="cpu")


def test_the_scan_is_a_kernel_on_cuda_and_a_loop_elsewhere():
    args = normal(2, 8, 5), normal(2, 8)
    assert "mosaic_gpu" in lowered(boundary_scan, *args, platform="cuda")
    assert "while" not in lowered(boundary_scan, *args, platform="cuda")
    assert "while" in lowered(boundary_scan, *args, platform="cpu")


@pytest.mark.parametrize("kind", ["Gemma", "H-Net"])
def test_blocks_have_kernels_for_norms_and_gates_unless_the_stack_says_xla(kind):
    keys, layout = jax.random.split(jax.random.key(0)), plain_layout(jnp.zeros((1, 8), jnp.int32))
    attention, mlp = Attention(128, 2, key=keys[0]), SwiGLU(128, 128, key=keys[1])
    block = Block(128, 2, 128, key=keys[0]) if kind == "Gemma" else PreNorm(128, attention, mlp)

    def gradient(implementation, rows):
        stack = Stack([block], attention="xla", implementation=implementation)
        return jax.grad(lambda rows: stack(rows, layout).hidden.sum())(rows)

    for implementation, kernels in ((None, True), ("xla", False), ("native", False)):
        found = lowered(functools.partial(gradient, implementation), normal(1, 8, 128), platform="cuda")
        assert ("mosaic_gpu" in found) == kernels


def test_limits_on_sizes_are_kept_in_the_same_kernel():
    def scan(projections, uniforms, least, most):
        return boundary_scan(projections, uniforms, limits=Limits(least, most))

    args = normal(2, 8, 1), normal(2, 8), *(jnp.full((2, 8), size, jnp.int32) for size in (2, 5))
    assert "mosaic_gpu" in lowered(scan, *args, platform="cuda")
    assert "while" not in lowered(scan, *args, platform="cuda")


def test_shapes_that_kernels_do_not_take_run_in_xla_and_say_so(caplog):
    rows = normal(2, 16, 192)
    with caplog.at_level("INFO", "unet.ops.mosaic"):
        assert "mosaic_gpu" not in lowered(functools.partial(down, implementation=None), rows, platform="cuda")
    assert "not a multiple of 128" in caplog.text
    with pytest.raises(ValueError, match="kernel of gather_rows cannot run: rows of 192 values"):
        down(rows, "pallas")


def test_a_kernel_asked_for_by_name_does_not_fall_back_on_a_host_without_cuda():
    with pytest.raises(Exception, match="cpu"):
        lowered(functools.partial(down, implementation="pallas"), normal(2, 16, 128), platform="cpu")


@pytest.mark.skipif(missing() is not None, reason=missing() or "")
@pytest.mark.parametrize("target", ["h100", "b200"])
def test_every_kernel_compiles_to_machine_code_without_spilling_registers(target):
    program = Path(__file__).parent / "compile_kernels.py"
    # Not from a cache: ptxas speaks only when it is at work.
    environment = {**os.environ, **ENVIRONMENT, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    environment["PYTHONPATH"] = os.pathsep.join([str(program.parent.parent), *sys.path])
    done = subprocess.run([sys.executable, program, target], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = dict(line.rsplit(" ", 1) for line in done.stdout.splitlines() if re.fullmatch(r"[a-z_0-9-]+ \d+", line))
    # Forward and backward, but for the scan, which has no gradient.
    assert found.pop("boundary_scan") == found.pop("limited_scan") == "1"
    assert {found.pop(f"norms-{dim}-{dtype}") for dim in (384, 512, 768, 2048) for dtype in (*CLOSE, "both")} == {"4"}
    assert {found.pop(f"gates-{dim}-{dtype}") for dim in (384, 3072) for dtype in CLOSE} == {"2"}
    assert len(found) == 3 * 4 * 2
    assert set(found.values()) == {"2"}
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stdout + done.stderr)
    # Some of the programs share a kernel, which is compiled once.
    assert len(spills) >= 70
    assert set(spills) == {("0", "0")}
