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
from unet.ops import boundary_scan, downsample, mean_pool, smooth, upsample
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


OPS = {"downsample": down, "upsample": up, "mean_pool": pool, "smooth": average}


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
    for found, wanted in zip(
        value_and_gradient(OPS[name], rows, "interpret"), value_and_gradient(OPS[name], rows, "xla"), strict=True
    ):
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

    rows = normal(2, 16, 384)
    assert "mosaic_gpu" in lowered(gradient, rows, platform="cuda")
    assert "mosaic_gpu" not in lowered(gradient, rows, platform="cpu")


def test_the_scan_is_a_kernel_on_cuda_and_a_loop_elsewhere():
    args = normal(2, 8, 5), normal(2, 8)
    assert "mosaic_gpu" in lowered(boundary_scan, *args, platform="cuda")
    assert "while" not in lowered(boundary_scan, *args, platform="cuda")
    assert "while" in lowered(boundary_scan, *args, platform="cpu")


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
    assert len(found) == 3 * 4 * 2
    assert set(found.values()) == {"2"}
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stdout + done.stderr)
    # Some of the programs share a kernel, which is compiled once.
    assert len(spills) >= 30
    assert set(spills) == {("0", "0")}
