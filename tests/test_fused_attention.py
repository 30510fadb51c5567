"""Attention in the kernels of tokamax: its blocks and masks, when it is taken, and what is said where it cannot be."""

import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from estimators.base import Layout
from experiments.benchmark import deviceless
from unet import fused_attention
from unet.attention import Visibility, attend
from unet.config import UNetConfig
from unet.fused_attention import AttentionForm, attend_fused, missing, refusal


def plain_kernel(query, key, value, *, mask, is_causal, logits_soft_cap, implementation):
    """What `tokamax.dot_product_attention` computes, in a few lines."""
    assert implementation == "mosaic"
    assert query.shape[1] % fused_attention.TILE == key.shape[1] % fused_attention.TILE == 0
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
    if logits_soft_cap is not None:
        logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)
    if is_causal:
        mask = mask & jnp.tril(jnp.ones((query.shape[1], key.shape[1]), bool))
    weights = jax.nn.softmax(jnp.where(mask, logits, -jnp.inf), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


def inputs(length, dtype="float32", heads=2, head_dim=4):
    """Queries, keys and values of two sequences: two documents in the second one, padding at the end of the first."""
    keys = jax.random.split(jax.random.key(0), 3)
    segments = jnp.zeros((2, length), jnp.int32).at[1, length // 3 :].set(1)
    mask = jnp.ones((2, length), bool).at[0, length - length // 4 :].set(False)
    layout = Layout(jnp.zeros_like(segments), segments, segments, mask)
    return layout, [jax.random.normal(k, (2, length, heads, head_dim)).astype(dtype) for k in keys]


def value_and_gradient(attention, parts):
    def scored(*parts):
        mixed = attention(*parts)
        weight = jax.random.normal(jax.random.key(1), mixed.shape)
        return jnp.sum(mixed.astype(jnp.float32) * weight), mixed

    return jax.jit(jax.value_and_grad(scored, argnums=(0, 1, 2), has_aux=True))(*parts)


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize(("length", "window"), [(19, None), (16, None), (23, 1), (23, 4), (32, 6), (41, 13), (7, 4)])
def test_the_blocks_and_masks_of_the_kernels_give_attention_in_value_and_gradient(length, window, cap, monkeypatch):
    monkeypatch.setattr(fused_attention, "TILE", 4)
    monkeypatch.setattr(fused_attention, "BLOCK", 8)
    layout, parts = inputs(length)
    visibility = Visibility(layout, window, "xla")
    fused = functools.partial(attend_fused, kernel=plain_kernel)
    found = value_and_gradient(lambda q, k, v: fused(q, k, v, visibility.segments, visibility.window, cap), parts)
    wanted = value_and_gradient(lambda q, k, v: attend(q, k, v, visibility, cap=cap), parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, wanted)


def test_without_a_gpu_attention_is_that_of_xla_and_the_kernels_are_refused_in_a_sentence():
    layout, parts = inputs(8)

    def attended(form: AttentionForm):
        return jax.jit(lambda q, k, v: attend(q, k, v, Visibility(layout, 4, form), cap=5.0))

    assert attended("auto").lower(*parts).as_text() == attended("xla").lower(*parts).as_text()
    with pytest.raises(ValueError, match="the kernel of attention cannot run: there is no CUDA device"):
        attended("tokamax")(*parts)


class Device:
    platform = "gpu"

    def __init__(self, capability):
        self.compute_capability = capability


@pytest.mark.parametrize(
    ("capability", "shape", "reason"),
    [
        ("8.0", (64, 64, None, "bfloat16"), "compute capability 8.0"),
        ("12.0", (64, 64, None, "bfloat16"), "compute capability 12.0"),
        ("9.0", (64, 64, None, "float32"), "in float32, not in bfloat16"),
        ("9.0", (64, 40, None, "bfloat16"), "heads are 40 wide"),
        ("10.0", (20_000, 64, None, "bfloat16"), "20000 positions are more than 16384"),
        ("10.0", (20_000, 64, 64, "bfloat16"), None),
        ("9.0", (4096, 128, None, "bfloat16"), None),
    ],
)
def test_what_the_kernels_cannot_do_is_named(capability, shape, reason, monkeypatch):
    length, head_dim, window, dtype = shape
    monkeypatch.setattr(fused_attention, "get_default_device", lambda: Device(capability))
    monkeypatch.setattr(fused_attention, "missing", lambda: None)
    found = refusal(length, head_dim, window, jnp.dtype(dtype))
    assert found is None if reason is None else reason in (found or "")


def test_devices_that_share_a_step_attend_in_xla(monkeypatch):
    monkeypatch.setattr(fused_attention, "get_default_device", lambda: Device("9.0"))
    monkeypatch.setattr(fused_attention, "missing", lambda: None)
    layout, (query, key, value) = inputs(8, "bfloat16", head_dim=64)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))

    def lowered(form: AttentionForm) -> str:
        def attended(query, key, value, layout):
            return attend(query, key, value, Visibility(layout, 4, form), cap=5.0)

        shared = jax.shard_map(attended, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data"))
        return jax.jit(shared).lower(query, key, value, layout).as_text()

    assert lowered("auto") == lowered("xla")
    with pytest.raises(ValueError, match="several devices share a step"):
        lowered("tokamax")


def test_where_tokamax_is_missing_the_sentence_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(fused_attention, "get_default_device", lambda: Device("9.0"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'caesura-lm[gpu]'" in (refusal(64, 64, None, jnp.dtype("bfloat16")) or "")


def test_a_loss_that_is_differentiated_twice_has_attention_in_xla():
    shape = UNetConfig(16, 2, 1, 1, 1, window=4, attention="tokamax", implementation="native")
    assert shape.attention_form == "xla"
    assert UNetConfig(16, 2, 1, 1, 1, window=4).attention_form == "auto"


@pytest.mark.skipif(missing() is not None, reason=missing() or "")
@pytest.mark.parametrize("window", [None, 64])
def test_what_tokamax_defines_in_xla_is_this_attention(window):
    from tokamax import dot_product_attention  # pyrefly: ignore[missing-import] -- of the extra `gpu`

    def kernel(*parts, implementation, **options):
        return dot_product_attention(*parts, implementation="xla", **options)

    layout, parts = inputs(300, "bfloat16", head_dim=64)
    visibility = Visibility(layout, window, "xla")
    # tokamax relies on JAX's usual dtype promotion.
    with jax.numpy_dtype_promotion("standard"):
        _, found = value_and_gradient(
            lambda q, k, v: attend_fused(q, k, v, visibility.segments, window, 50.0, kernel=kernel), parts
        )
    _, wanted = value_and_gradient(lambda q, k, v: attend(q, k, v, visibility, cap=50.0), parts)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a.astype("float32"), b.astype("float32"), rtol=2e-2, atol=2e-2)


@pytest.mark.skipif(missing() is not None, reason=missing() or "")
@pytest.mark.skipif(deviceless.missing() is not None, reason=deviceless.missing() or "")
@pytest.mark.parametrize("target", ["h100", "b200"])
def test_the_kernels_compile_to_machine_code_forward_and_backward(target):
    # tokamax relies on JAX's usual promotion, of dtypes and ranks, which the tests make strict.
    usual = {"JAX_NUMPY_DTYPE_PROMOTION": "standard", "JAX_NUMPY_RANK_PROMOTION": "allow"}
    environment = {**os.environ, **deviceless.ENVIRONMENT, **usual, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])
    program = Path(__file__).parent / "compile_attention.py"
    done = subprocess.run([sys.executable, program, target], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    # One kernel forward and two backward; nothing of the logits is left to XLA.
    # Beside what ptxas says.
    assert {"full 3", "windowed 3"} <= set(done.stdout.splitlines())
