"""The benchmark: interleaved timing, parsing of compiled programs, and output of the command."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import bench
from experiments.benchmark import pipeline, rates, recurrence, timing, whole_step
from experiments.benchmark.deviceless import TARGETS, missing
from experiments.benchmark.ops import Sizes, operations
from experiments.benchmark.overhead import overhead
from experiments.benchmark.roofline import Kernel, costs_by_part, kernels_of
from experiments.benchmark.timing import time_interleaved
from experiments.benchmark.whole_step import compile_in_subprocess
from experiments.config.errors import ConfigError
from experiments.config.presets import PRESETS
from experiments.config.settings import transformer_shape
from tests.test_run import corpus as corpus
from tests.test_run import usual_promotion as usual_promotion
from unet import UNetConfig

PROGRAM = """
%fused (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %n = f32[4]{0} negate(%p)
}

ENTRY %main (x: bf16[8,32], w: bf16[16,32]) -> (f32[8,16]) {
  %x = bf16[8,32]{1,0} parameter(0)
  %w = bf16[16,32]{1,0} parameter(1)
  %b = bf16[8,32]{1,0} bitcast(%x)
  %mm.1 = (f32[8,16]{1,0}, s8[33554432]{0}) custom-call(%b, %w), custom_call_target="__cublas$lt$matmul", \
metadata={op_name="jit(f)/transpose(jvp(mid))/checkpoint/dot_general"}, backend_config={"gemm_backend_config":\
{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"]}}}
  %g = f32[8,16]{1,0} get-tuple-element(%mm.1), index=0
  %loop = f32[8,16]{1,0} fusion(%g), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/jvp(loss)/jvp(heads)/mul"}
  %scan = (s32[4,8]{1,0}, pred[8]{0}) custom-call(%loop), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(f)/cond"}
  ROOT %out = (f32[8,16]{1,0}) tuple(%loop)
}
"""


def test_a_program_is_read_kernel_by_kernel():
    assert kernels_of(PROGRAM) == [
        Kernel("mid", "__cublas$lt$matmul", 2.0 * 8 * 16 * 32, 2.0 * 8 * 32 + 2 * 16 * 32 + 4 * 8 * 16),
        Kernel("heads", "fusion", 0.0, 2.0 * 4 * 8 * 16),
        Kernel("other", "mosaic_gpu_v2", 0.0, 4.0 * 8 * 16 + 4 * 4 * 8 + 8),
    ]
    with pytest.raises(ValueError, match="no ENTRY"):
        kernels_of("HloModule empty")


SLICED = """
%rotated (p: bf16[8,96], q: bf16[8,32]) -> bf16[8,32] {
  %p = bf16[8,96]{1,0} parameter(0)
  %q = bf16[8,32]{1,0} parameter(1)
  %r = bf16[8,1,96]{2,1,0} bitcast(%p)
  %s = bf16[8,1,32]{2,1,0} slice(%r), slice={[0:8], [0:1], [32:64]}
  %t = bf16[8,32]{1,0} bitcast(%s)
  ROOT %n = bf16[8,32]{1,0} multiply(%t, %q)
}

ENTRY %main (x: bf16[8,96], q: bf16[2,4,3,64], k: bf16[2,6,3,64], m: f32[2,3,4], s: s8[2,1,4,6]) -> bf16[8,32] {
  %x = bf16[8,96]{1,0} parameter(0)
  %q = bf16[2,4,3,64]{3,2,1,0} parameter(1)
  %k = bf16[2,6,3,64]{3,2,1,0} parameter(2)
  %m = f32[2,3,4]{2,1,0} parameter(3)
  %s = s8[2,1,4,6]{3,2,1,0} parameter(4)
  %v = bf16[8,32]{1,0} slice(%x), slice={[0:8], [64:96]}
  %a = (bf16[2,4,3,64]{3,2,1,0}, f32[2,3,4]{2,1,0}) custom-call(%q, %k, %k, %s), custom_call_target="mosaic_gpu_v2", \
metadata={op_name="jit(f)/jvp(mid)/fused_attention/run"}
  %b = (bf16[2,6,3,64]{3,2,1,0}, bf16[2,6,3,64]{3,2,1,0}) custom-call(%q, %k, %k, %q, %m, %s), \
custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(f)/mid/fused_attention/run"}
  ROOT %fused = bf16[8,32]{1,0} fusion(%x, %v), kind=kLoop, calls=%rotated, metadata={op_name="jit(f)/mid/mul"}
}
"""


def test_a_fused_kernel_reads_only_its_slices_and_attention_counts_its_products():
    _, forward, backward, fused = kernels_of(SLICED)
    assert fused.bytes == 3 * 2.0 * 8 * 32
    pairs = 2.0 * 2 * 4 * 3 * 64 * 6
    assert (forward.flops, backward.flops) == (2 * pairs, 4 * pairs)


def test_a_kernel_takes_as_long_as_what_binds_it():
    gpu = dataclasses.replace(TARGETS["h100"], bandwidth=10.0, bfloat16=100.0)
    kernels = [Kernel("mid", "a", 1000.0, 20.0), Kernel("mid", "b", 0.0, 50.0), Kernel("other", "c", 0.0, 10.0)]
    assert [(one.part, one.kernels, one.seconds) for one in costs_by_part(kernels, gpu)] == [
        ("mid", 2, 15.0),
        ("other", 1, 1.0),
    ]


def test_alternatives_take_turns_and_ratios_are_within_rounds(monkeypatch):
    calls, clock = [], iter([0, 1, 1, 3, 10, 12, 12, 14, 20, 23, 23, 24])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))

    def work(name):
        return lambda: calls.append(name) or jnp.zeros(())

    found = time_interleaved({"a": work("a"), "b": work("b")}, baseline="a", rounds=3)
    assert calls == ["a", "b"] * 4
    assert (found["a"].seconds, found["b"].seconds) == (2, 2)
    assert found["b"].speedup == 1.0
    assert (found["b"].rounds, found["b"].ratio) == (3, "1.00 (3 rounds) ≈")
    with pytest.raises(ValueError, match="not one of a"):
        time_interleaved({"a": work("a")}, baseline="c")


@pytest.mark.parametrize(
    ("ratios", "shown"),
    [
        ((1.0, 1.5, 1.2, 1.3, 1.1, 1.4), "1.25 [1.00, 1.50] ≈"),
        ((1.1, 1.5, 1.2, 1.3, 1.1, 1.4), "1.25 [1.10, 1.50]"),
        ((0.9, 1.2, 0.95, 0.8, 0.7), "0.90 (5 rounds) ≈"),
    ],
)
def test_a_ratio_comes_with_its_interval(monkeypatch, ratios, shown):
    """In each round the baseline takes `ratio` seconds and the other function takes one second."""
    ticks = [tick for round_, ratio in enumerate(ratios) for tick in (10 * round_, 10 * round_ + ratio, 0, 1)]
    clock = iter(ticks)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    found = time_interleaved({name: lambda: jnp.zeros(()) for name in "ab"}, baseline="a", rounds=len(ratios))
    assert found["b"].ratio == shown


@pytest.fixture
def small_tiny(monkeypatch):
    """`tiny` in its smallest shape, which compiles in a fraction of the time."""
    unet = UNetConfig(dim=16, heads=2, encoder_layers=1, main_layers=1, decoder_layers=1, window=4)
    monkeypatch.setitem(bench.PRESETS, "tiny", dataclasses.replace(PRESETS["tiny"], unet=unet, buckets=2))


def test_the_command_times_estimators_against_uniform(small_tiny, corpus, tmp_path):
    path = tmp_path / "bench.json"
    arguments = (
        "steps",
        "--estimators",
        "sfe",
        "--dataset",
        str(corpus),
        "--batch",
        "2",
        "--length",
        "32",
        "--rounds",
        "1",
    )
    assert bench.main([*arguments, "--calls", "1", "--json", str(path)]) == 0
    found = json.loads(path.read_text())["steps"]
    assert list(found) == ["uniform", "sfe"]
    assert found["uniform"]["speedup"] == 1.0
    assert all(one["seconds"] > 0 for one in found.values())


def test_invalid_input_is_one_sentence(corpus, capsys):
    assert bench.main(["steps", "--rounds", "0"]) == 2
    assert "--rounds" in capsys.readouterr().err
    assert bench.main(["steps", "--dataset", str(corpus), "--early-exit-fraction", "0"]) == 2
    assert "--early-exit-fraction must be a number from 1e-06 to 1; got" in " ".join(capsys.readouterr().err.split())
    assert bench.main(["steps", "--dataset", str(corpus), "--length", "0"]) == 2
    assert "error:" in capsys.readouterr().err


def test_without_the_compiler_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(whole_step, "missing", lambda: "install it")
    assert bench.main(["compile", "h100"]) == 2
    assert "install it" in capsys.readouterr().err


@pytest.mark.skipif(missing() is not None, reason=missing() or "")
def test_a_whole_step_compiles_for_a_gpu_that_is_not_there():
    tiny = PRESETS["tiny"]
    unet = dataclasses.replace(transformer_shape(tiny), dim=128, main_layers=1, compute="bfloat16")
    config = dataclasses.replace(tiny, unet=unet, batch=2, length=128)
    config = config.with_settings(policy={"window": 2})
    report = compile_in_subprocess(config, "h100")
    assert [part.part for part in report.parts][:7] == [
        *("embed", "encode", "boundary", "downsample", "mid", "upsample", "decode")
    ]
    products = {part.part: part.flops for part in report.parts}
    # Forward and backward of the one token-level block: 6 FLOPs per weight and token.
    tokens, weights = 2 * 40, 128 * (4 * 128) + 3 * 128 * 512
    assert products["mid"] == pytest.approx(6 * tokens * weights, rel=0.25)
    assert report.peak_bytes > report.state_bytes > 0
    # Boundary scan, gathers and span sum, forward and backward.
    assert report.pallas >= 4
    assert report.loops == 0


@pytest.mark.skipif(missing() is not None, reason=missing() or "")
@pytest.mark.parametrize(("estimator", "message"), [("bpe", "built from data"), ("spacelike", "the data's own")])
def test_steps_that_depend_on_data_are_not_compiled(estimator, message):
    with pytest.raises(ConfigError, match=message):
        whole_step.compile_step(dataclasses.replace(PRESETS["tiny"], estimator=estimator), "h100")


def test_the_overhead_is_the_policy_and_the_early_head():
    config = dataclasses.replace(PRESETS["18M"], length=512)
    one = overhead(config)
    dim, vocab = 384, 256
    assert one.early_head == pytest.approx(6 * dim * vocab, rel=0.05)
    assert 6 * dim * 8 < one.policy < 8 * dim * 8
    assert abs(one.objective) < 1e-4 * one.prescribed
    assert one.share_without_early_head < 1e-3


def test_the_command_measures_alternatives(small_tiny, corpus, tmp_path, capsys):
    """PyTorch is one of them only if it is installed; the tests do not need it."""
    out = tmp_path / "bench.json"
    small = ("--dataset", corpus, "--length", "32", "--batch", "4", "--rounds", "1", "--calls", "1", "--json", out)
    assert bench.main([str(word) for word in ("alternatives", *small, "--against", "square", "pytorch")]) == 0
    ways = json.loads(out.read_text())["alternatives"]
    assert "square" in ways
    assert "pytorch" in ways or "pip install 'caesura-lm[bench]'" in " ".join(capsys.readouterr().err.split())


def test_operations_and_their_plain_ways_agree():
    sizes = Sizes(batch=2, length=96, dim=16)
    pairs = operations(sizes, jax.random.key(0))
    assert len(pairs) == 6
    for name, (_, works) in pairs.items():
        own, other = works["own"](), works["other"]()
        jax.tree.map(
            lambda a, b, name=name: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4, err_msg=name), own, other
        )


def test_the_command_measures_operations(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "Sizes", lambda: Sizes(batch=2, length=32, dim=16))
    out = tmp_path / "bench.json"
    assert bench.main(["ops", "--rounds", "1", "--calls", "1", "--json", str(out)]) == 0
    assert {"downsample", "smoothing"} <= json.loads(out.read_text())["ops"].keys()


def test_the_command_measures_models(small_tiny, corpus, tmp_path):
    out = tmp_path / "bench.json"
    small = ["--batch", "2", "--length", "32", "--rounds", "1", "--calls", "1", "--json", str(out)]
    assert bench.main(["models", "tiny", "--estimator", "uniform", "--dataset", str(corpus), *small]) == 0
    tiny = json.loads(out.read_text())["models"]["tiny"]
    assert all(tiny[name] > 0 for name in ("parameters", "compile_seconds", "peak_bytes", "training", "evaluation"))


def test_the_token_level_is_measured_at_several_rates(small_tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(rates, "RATES", (0.5, 0.25))
    out = tmp_path / "bench.json"
    small = ["--batch", "2", "--length", "32", "--rounds", "1", "--calls", "1", "--json", str(out)]
    assert bench.main(["rates", *small]) == 0
    assert list(json.loads(out.read_text())["rates"]) == ["0.5", "0.25"]


def test_the_recurrence_is_measured_at_several_lengths(monkeypatch, tmp_path):
    monkeypatch.setattr(recurrence, "LENGTHS", (16, 32))
    monkeypatch.setattr(recurrence, "COMPARED", 32)
    out = tmp_path / "bench.json"
    assert bench.main(["recurrence", "--rounds", "1", "--calls", "1", "--json", str(out)]) == 0
    found = json.loads(out.read_text())["recurrence"]
    assert list(found) == ["16", "32"]
    assert found["16"]["per_position"] == 1.0
    assert found["32"]["times_a_scan"] > 0


def test_a_measurement_has_to_be_named(capsys):
    for arguments in ([], ["everything"], ["ops", "--model", "tiny"]):
        with pytest.raises(SystemExit) as stopped:
            bench.main(arguments)
        assert stopped.value.code == 2
    assert "recurrence" in capsys.readouterr().err


def test_the_command_measures_the_data_pipeline(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "HELD_OUT", 0.5)
    out = tmp_path / "bench.json"
    small = ("--dataset", corpus, "--megabytes", "0.5", "--length", "32", "--seconds", "0.01", "--workers", "0")
    assert bench.main([str(word) for word in ("data", *small, "--json", out)]) == 0
    found = json.loads(out.read_text())["data"]
    assert {".jsonl", ".jsonl.gz", ".txt"} <= found.keys()
    for one in found.values():
        assert all(one[name] > 0 for name in ("reading", "starting", "memory", "streamed"))
        assert list(one["by_workers"]) == ["0"]
