"""`bench gpu` without a GPU: everything that it measures at a small size, its time limits, and its report."""

import dataclasses
import json
import math
import sys
import textwrap
from pathlib import Path

import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from experiments import bench
from experiments.benchmark import gpu
from experiments.benchmark.cards import BFLOAT16, peak_of
from experiments.benchmark.device import asked, kernels, models
from experiments.benchmark.device.asked import Asked, Item
from experiments.benchmark.device.gathered import Gathered, Part, columns
from experiments.benchmark.device.worker import Request, device, measure, run_part
from experiments.benchmark.deviceless import TARGETS
from experiments.benchmark.gpu import Gpu
from experiments.benchmark.profile import ProfileError, kernel_durations, summed
from experiments.benchmark.timing import Timing
from experiments.config.presets import PRESETS
from experiments.config.structure import parsed, structured
from experiments.reporting.display import Display
from experiments.training.run_dir import json_text
from tests.test_run import corpus as corpus
from tests.test_run import usual_promotion as usual_promotion
from unet import UNetConfig

ASKED = Asked(
    models=("tiny",),
    dataset="",
    batch=2,
    length=32,
    compute="float32",
    rounds=1,
    calls=1,
    generated=128,
    batches=(1, 2),
    dtypes=("float32",),
)


@pytest.fixture
def small(monkeypatch):
    """`tiny` in its smallest shape, as the only preset."""
    unet = UNetConfig(dim=16, heads=2, encoder_layers=1, main_layers=1, decoder_layers=1, window=4)
    tiny = dataclasses.replace(PRESETS["tiny"], unet=unet, buckets=2).with_settings(policy={"window": 2})
    for module in (asked, kernels):
        monkeypatch.setattr(module, "PRESETS", {"tiny": tiny})


def heard(part, corpus):
    """What a part says, by item."""
    gathered = Part(part)
    run_part(part, dataclasses.replace(ASKED, dataset=str(corpus)), gathered.hear, deadline=1e18)
    return gathered


def positive(result, *names):
    """Whether the result has numbers above 0 of these names."""
    values = [result[name] for name in names]
    return all(isinstance(value, float) and value > 0 for value in values)


def test_kernels_are_compared_with_xla_in_value_gradient_and_time(small, corpus):
    found = heard("kernels", corpus)
    assert not found.without
    assert len(found.done) == 10
    for result in found.done.values():
        assert result["agrees"]
        assert positive(result, "ms", "XLA, ms", "times XLA's speed")
        assert "no CUDA device" in str(result["in XLA, since"]) or "XLA" in str(result["in XLA, since"])
        assert result["never slower"] is None


@pytest.mark.parametrize(
    ("speedup", "high", "expected"), [(0.9, math.nan, True), (0.9, 1.0, True), (0.9, 0.99, False), (1.2, 1.3, True)]
)
def test_a_kernel_is_slower_only_if_that_is_distinguishable(small, monkeypatch, speedup, high, expected):
    def stub(works, **settings):
        return {name: Timing(3.0, speedup, 7, speedup, high) for name in works}

    monkeypatch.setattr(kernels, "time_interleaved", stub)
    monkeypatch.setattr(kernels.Case, "refused", None)
    monkeypatch.setattr(kernels, "_work", lambda case, form: lambda: (jnp.ones(2), jnp.ones(2)))
    several = dataclasses.replace(ASKED, calls=2)
    found = kernels.compare(kernels.cases(several)[1], several)
    assert found["never slower"] is expected
    assert found["ms"] == 1500.0


def test_steps_are_timed_alone_where_the_first_could_not_be(small, corpus, monkeypatch):
    def step(config, split):
        if len(tried) < broken:
            tried.append(config)
            raise MemoryError("too large")
        return models.Compiled(lambda: (), 1.0, 2**30)

    monkeypatch.setattr(models, "compiled_step", step)
    for broken in (0, 1):
        tried = []
        found = heard("step of tiny", corpus)
        ratios = [result["times its speed as it is"] for result in found.done.values()]
        if broken:
            assert found.without == {"tiny, as it is": "MemoryError: too large"}
            assert ratios == [None, None, None]
        else:
            assert not found.without
            assert ratios[0] is None
            assert all(isinstance(ratio, float) for ratio in ratios[1:])


def test_steps_generation_a_profile_and_capacities_are_measured(small, corpus, monkeypatch):
    switches = list(models.SWITCHES.items())
    assert [name for name, _ in switches[2:]] == ["attention in XLA", "own kernels in XLA"]
    monkeypatch.setattr(models, "SWITCHES", dict(switches[:2]))
    steps = heard("step of tiny", corpus)
    assert not steps.without
    assert list(steps.done) == ["tiny, as it is", "tiny, all in XLA"]
    for result in steps.done.values():
        assert positive(result, "ms", "bytes/s", "GiB by XLA", "s to compile")
        assert result["MFU"] is None
    generated = heard("generation", corpus)
    assert not generated.without
    assert list(generated.done) == ["tiny, generation, 1 at once", "tiny, generation, 2 at once", "tiny, scoring"]
    assert all(positive(result, "bytes/s") for result in generated.done.values())
    profile = heard("profile", corpus)
    assert not profile.without
    shares = [share for result in profile.done.values() if isinstance(share := result["share"], float)]
    assert len(shares) == 10
    assert shares == sorted(shares, reverse=True)
    assert 0.1 < sum(shares) <= 1
    capacities = heard("capacities", corpus)
    assert not capacities.without
    assert capacities.done["tiny"]["sizes"] == 2
    assert positive(capacities.done["tiny"], "times the speed of one size")


def test_dynamic_chunking_is_measured_and_pytorch_where_it_is_installed(small, corpus):
    found = heard("chunking", corpus)
    assert not found.without
    assert len(found.done) == 2
    for part in ("PyTorch", "PyTorch chunking"):
        other = heard(part, corpus)
        assert other.done or "is not installed" in str(other.without)


def test_a_part_skips_what_no_longer_fits_and_goes_on_after_a_failure():
    now, lines = [0.0], []

    def takes(seconds):
        def run():
            now[0] += seconds
            return {"seconds": seconds}

        return run

    def fails():
        raise MemoryError("too large\nby far")

    items = [Item("a", takes(6)), Item("b", fails), Item("c", takes(2)), Item("d", takes(2)), Item("e", takes(1))]
    measure(items, lines.append, deadline=12.0, clock=lambda: now[0])
    assert [(line["kind"], line["name"]) for line in lines[5:]] == [
        ("done", "a"),
        ("failed", "b"),
        ("done", "c"),
        ("done", "d"),
        ("skipped", "e"),
    ]
    assert lines[6]["why"] == "MemoryError: too large"


def command_of(script, *arguments):
    """Stands for the process of a part: a script that may call `say`."""
    head = """
        import json, os, sys, tempfile, time
        name = open(sys.argv[1] + ".name").read()
        def say(kind, item="", why="", **result):
            with open(sys.argv[1].removesuffix("request") + "jsonl", "a") as stream:
                stream.write(json.dumps({"kind": kind, "name": item, "why": why, "result": result}) + "\\n")
    """

    def command(request):
        request.with_name(f"{request.name}.name").write_text(request.stem)
        return [
            sys.executable,
            "-c",
            textwrap.dedent(head) + textwrap.dedent(script),
            str(request),
            *map(str, arguments),
        ]

    return command


def test_a_request_is_json_that_is_read_with_its_types():
    request = Request("kernels", ASKED, Path("lines.jsonl"), deadline=1.5, grace=2.0)
    assert structured(parsed(json_text(request)), Request) == request


def test_results_are_written_as_they_come_and_the_time_is_kept(monkeypatch, tmp_path):
    script = """
        if name != "PyTorch chunking":
            say("device", card="NVIDIA H100 80GB HBM3", **{"peak TFLOP/s in bfloat16, dense": 989.0})
        if name == "chunking":
            sys.exit("the device is gone")
        if name == "PyTorch chunking":
            time.sleep(60)
        for item in ("first", "second"):
            say("planned", item)
        say("done", "first", ms=1.5, agrees=True)
        if name == "kernels":
            where = {os.environ[one] for one in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "JAX_COMPILATION_CACHE_DIR")}
            own = tempfile.mkdtemp()
            assert {os.path.dirname(one) for one in where} == {os.path.dirname(os.path.dirname(own))}
            open(sys.argv[2], "w").write(own)
        if name == "profile":
            time.sleep(60)
        say("failed", "second", "MemoryError: too large")
    """
    monkeypatch.setattr(gpu, "command", command_of(script, tmp_path / "folder.txt"))
    monkeypatch.setattr(gpu, "GRACE", 0.2)
    monkeypatch.setattr(gpu, "POLL", 0.02)
    out = tmp_path / "found.md"
    parts = "kernels", "profile", "chunking", "PyTorch chunking"
    Gpu(minutes=12 / 60, out=out, parts=parts).measure(Display(quiet=True))
    written = Path((tmp_path / "folder.txt").read_text())
    report, content = out.read_text(), json.loads(out.with_suffix(".json").read_text())
    parts = {part["name"]: part for part in content["parts"]}
    first = {"first": {"ms": 1.5, "agrees": True}}
    assert [part["done"] for part in parts.values()] == [first, first, {}, {}]
    assert parts["profile"]["without"] == {"second": "not reached"}
    assert parts["profile"]["ended"] == "The time of this part was over after 1 of 2 rows"
    assert parts["PyTorch chunking"]["ended"] == "The time of this part was over before it began"
    assert "All of it took 0.2 of 0.2 minutes." in report
    assert parts["kernels"]["without"] == {"second": "MemoryError: too large"}
    assert parts["chunking"]["ended"] == "This part broke off with exit code 1 after 0 of 0 rows: the device is gone"
    # Nothing stays of what the parts wrote.
    assert not written.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"found.md", "found.json", "folder.txt"}
    assert report.startswith("# On NVIDIA H100 80GB HBM3\n")
    assert "- second: MemoryError: too large" in report
    assert "| first | 1.5 | yes |" in report


def test_every_part_has_its_share_and_what_cannot_be_measured_is_refused(capsys):
    shares = Gpu().shares
    assert sum(shares.values()) == pytest.approx(1.0)
    assert list(shares)[:4] == ["step of 147M", "step of 90M", "step of 18M", "kernels"]
    steps = list(shares.values())[:3]
    assert steps == sorted(steps, reverse=True)
    assert steps[2] > 0.34 / 6
    assert Gpu().rounds >= 6
    for arguments, message in (
        (["--models", "70B"], "--models 70B is none of tiny, 18M"),
        (["--parts", "everything"], "--parts everything: there is no such part"),
        (["--out", "found.txt"], "name a file that ends with .md"),
        (["--minutes", "0"], "--minutes must be a number from 0.01"),
    ):
        assert bench.main(["gpu", *arguments]) == 2
        assert message in " ".join(capsys.readouterr().err.split())


def test_a_report_has_speeds_as_ratios_to_pytorch_and_says_what_is_missing():
    gathered = Gathered([Part("step of 18M"), Part("PyTorch"), Part("profile")], {"command": "bench gpu"})
    assert "a device that has not answered yet" in gathered.markdown()
    gathered.device = {"card": "NVIDIA X1", "peak TFLOP/s in bfloat16, dense": None}
    gathered.part("step of 18M").done["18M, as it is"] = {"bytes/s": 30e6}
    gathered.part("PyTorch").done["18M, eager, drawing at once"] = {"bytes/s": 10e6}
    report = gathered.markdown()
    assert "The peak of NVIDIA X1 is not known" in report
    assert "| 18M | eager, drawing at once | 3.00 |" in report
    assert "Not begun yet." in report
    assert columns({"a": {"x": None, "y": 12345.6}, "b": {"y": False}}) == (
        ["", "y"],
        [["a", "12,346"], ["b", "**no**"]],
    )


def test_the_card_is_known_by_its_name():
    known = {
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA A10": 125e12,
        "NVIDIA L40S": 362e12,
        "NVIDIA L4": 121e12,
        "NVIDIA H200": 989e12,
        "NVIDIA GeForce RTX 4090": 165.2e12,
    }
    assert {name: peak_of(name) for name in known} == known
    assert peak_of("cpu") is None
    assert all(peak_of(target.name) == target.bfloat16 for target in TARGETS.values())
    assert len(BFLOAT16) > 20
    assert device()["card"] == "cpu"


PROFILE = """
planes { name: "/host:CPU" event_metadata { key: 1 value { id: 1 name: "call" } }
  lines { name: "python" events { metadata_id: 1 duration_ps: 9000000000 } } }
planes { name: "/device:GPU:0"
  event_metadata { key: 1 value { id: 1 name: "gemm" } } event_metadata { key: 2 value { id: 2 name: "norm" } }
  lines { name: "Stream #13(Compute)" events { metadata_id: 1 duration_ps: 3000000000 }
    events { metadata_id: 2 duration_ps: 1000000000 } events { metadata_id: 1 duration_ps: 2000000000 } }
  lines { name: "XLA Ops" events { metadata_id: 1 duration_ps: 5000000000 } } }
"""


def test_kernels_of_a_profile_are_those_of_the_streams():
    durations = list(kernel_durations(ProfileData.from_text_proto(PROFILE), on_gpu=True))
    first, second = summed(durations, calls=2)
    assert dataclasses.astuple(first) == ("gemm", 1.0, 2.5, pytest.approx(5 / 6))
    assert (second.name, second.launches) == ("norm", 0.5)
    host = PROFILE.split('planes { name: "/device')[0]
    with pytest.raises(ProfileError, match="the profile has nothing of the GPU"):
        list(kernel_durations(ProfileData.from_text_proto(host), on_gpu=True))
