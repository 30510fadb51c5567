"""`bench gpu` without a GPU: everything that it measures at a small size, its time limits, and its report."""

import dataclasses
import json
import sys
import textwrap
import types

import pytest

from experiments import bench
from experiments.benchmark import gpu
from experiments.benchmark.cards import BFLOAT16, peak_of
from experiments.benchmark.device.asked import Asked, Item
from experiments.benchmark.device.gathered import Gathered, Part, columns
from experiments.benchmark.device.worker import device, measure, run_part
from experiments.benchmark.deviceless import TARGETS
from experiments.benchmark.gpu import Gpu
from experiments.benchmark.profile import kernel_durations, summed
from experiments.config.presets import PRESETS
from experiments.reporting.display import Display
from tests.test_run import corpus as corpus
from unet import UNetConfig

ASKED = Asked(
    models=("tiny",),
    dataset="",
    batch=2,
    length=32,
    compute="float32",
    rounds=1,
    calls=1,
    generated=4,
    batches=(1, 2),
    dtypes=("float32",),
)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """`tiny` in its smallest shape, as the only preset."""
    unet = UNetConfig(dim=16, heads=2, encoder_layers=1, main_layers=1, decoder_layers=1, window=4)
    tiny = dataclasses.replace(PRESETS["tiny"], unet=unet, buckets=2).with_settings(policy={"window": 2})
    with pytest.MonkeyPatch.context() as patch:
        for name in list(PRESETS):
            if name != "tiny":
                patch.delitem(PRESETS, name)
        patch.setitem(PRESETS, "tiny", tiny)
        yield


def heard(part, corpus):
    """What a part says, by item."""
    gathered = Part(part)
    run_part(part, dataclasses.replace(ASKED, dataset=str(corpus)), gathered.hear, deadline=1e18)
    return gathered


def test_kernels_are_compared_with_xla_in_value_gradient_and_time(small, corpus):
    found = heard("kernels", corpus)
    assert not found.without
    assert len(found.done) == 7
    for result in found.done.values():
        assert result["agrees"]
        assert result["ms"] > 0
        assert "no CUDA device" in str(result["in XLA, since"]) or "XLA" in str(result["in XLA, since"])
        assert result["never slower"] is None


def test_steps_generation_a_profile_and_capacities_are_measured(small, corpus):
    steps = heard("step of tiny", corpus)
    assert not steps.without
    assert list(steps.done) == [
        f"tiny, {name}" for name in ("as it is", "all in XLA", "attention in XLA", "ragged operations in XLA")
    ]
    for result in steps.done.values():
        assert result["bytes/s"] > 0
        assert result["GiB by XLA"] > 0
        assert result["MFU"] is None
    generated = heard("generation", corpus)
    assert not generated.without
    assert list(generated.done) == ["tiny, generation, 1 at once", "tiny, generation, 2 at once", "tiny, scoring"]
    assert all(result["bytes/s"] > 0 for result in generated.done.values())
    profile = heard("profile", corpus)
    assert not profile.without
    shares = [result["share"] for result in profile.done.values()]
    assert shares == sorted(shares, reverse=True)
    assert 0.1 < sum(shares) <= 1
    capacities = heard("capacities", corpus)
    assert not capacities.without
    assert capacities.done["tiny"]["sizes"] == 2
    assert capacities.done["tiny"]["times the speed of one size"] > 0


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


def command_of(script):
    """Stands for the process of a part: a script that may call `say`."""
    head = """
        import json, pickle, sys, time, types
        name = open(sys.argv[1] + ".name").read()
        def say(kind, item="", why="", **result):
            with open(sys.argv[1].removesuffix("request") + "jsonl", "a") as stream:
                stream.write(json.dumps({"kind": kind, "name": item, "why": why, "result": result}) + "\\n")
    """

    def command(request):
        request.with_name(f"{request.name}.name").write_text(request.stem)
        return [sys.executable, "-c", textwrap.dedent(head) + textwrap.dedent(script), str(request)]

    return command


def test_results_are_written_as_they_come_and_the_time_is_kept(monkeypatch, tmp_path):
    script = """
        say("device", card="NVIDIA H100 80GB HBM3", **{"peak TFLOP/s in bfloat16, dense": 989.0})
        if name == "chunking":
            sys.exit("the device is gone")
        for item in ("first", "second"):
            say("planned", item)
        say("done", "first", ms=1.5, agrees=True)
        if name == "profile":
            time.sleep(60)
        say("failed", "second", "MemoryError: too large")
    """
    monkeypatch.setattr(gpu, "command", command_of(script))
    monkeypatch.setattr(gpu, "GRACE", 0.2)
    monkeypatch.setattr(gpu, "POLL", 0.02)
    out = tmp_path / "found.md"
    asked = Gpu(minutes=6 / 60, out=out, parts=("kernels", "profile", "chunking", "PyTorch chunking"))
    asked.measure(Display(quiet=True))
    report, content = out.read_text(), json.loads(out.with_suffix(".json").read_text())
    parts = {part["name"]: part for part in content["parts"]}
    assert [part["done"] for part in parts.values()] == [{"first": {"ms": 1.5, "agrees": True}}] * 2 + [{}] + [
        {"first": {"ms": 1.5, "agrees": True}}
    ]
    assert parts["profile"]["without"] == {"second": "not reached"}
    assert parts["profile"]["ended"] == "The time of this part was over"
    assert parts["kernels"]["without"] == {"second": "MemoryError: too large"}
    assert parts["chunking"]["ended"] == "This part broke off with exit code 1: the device is gone"
    assert report.startswith("# On NVIDIA H100 80GB HBM3\n")
    assert "- second: MemoryError: too large" in report
    assert "| first | 1.5 | yes |" in report


def test_every_part_has_its_share_and_what_cannot_be_measured_is_refused(capsys):
    shares = Gpu().shares
    assert sum(shares.values()) == pytest.approx(1.0)
    assert list(shares)[:4] == ["kernels", "step of 147M", "step of 90M", "step of 18M"]
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


def test_kernels_of_a_profile_are_those_of_the_streams():
    def line(name, *events):
        return types.SimpleNamespace(
            name=name, events=[types.SimpleNamespace(name=n, duration_ns=d) for n, d in events]
        )

    planes = [
        types.SimpleNamespace(name="/host:CPU", lines=[line("python", ("call", 9e9))]),
        types.SimpleNamespace(
            name="/device:GPU:0",
            lines=[
                line("Stream #13(Compute)", ("gemm", 3e6), ("norm", 1e6), ("gemm", 2e6)),
                line("XLA Ops", ("gemm", 5e6)),
            ],
        ),
    ]
    durations = list(kernel_durations(types.SimpleNamespace(planes=planes)))
    first, second = summed(durations, calls=2)
    assert dataclasses.astuple(first) == ("gemm", 1.0, 2.5, 5 / 6)
    assert (second.name, second.launches) == ("norm", 0.5)
