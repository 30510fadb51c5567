"""Trackers and callbacks: what they are told of a run, and what they leave where others read it."""

import json
import sqlite3

import numpy as np
import pytest

from experiments import run as run_module
from experiments.config.errors import ConfigError
from experiments.evaluation.evaluate import probability_shares
from experiments.reporting.display import Display
from experiments.reporting.metrics import metric_of
from experiments.tracking.follow import numbers, probabilities
from experiments.tracking.tracker import Tracker, require_trackers
from experiments.training.metrics_log import read_metrics
from experiments.training.setup import set_up
from experiments.training.step import part_of
from experiments.training.train import train
from tests.conftest import needs
from tests.test_run import SMALL, curve, message, start
from tests.test_run import corpus as corpus
from tests.test_run import finished as finished
from tests.test_run import usual_promotion as usual_promotion


class Remembering:
    """A tracker of one's own that keeps what it was told."""

    told: tuple[tuple[str, int, object], ...] = ()

    def __init__(self, run_dir, config, step):
        type(self).told = (("begin", step, (run_dir, config)),)

    def _keep(self, kind, step, value):
        type(self).told = (*self.told, (kind, step, value))

    def scalars(self, step, values):
        self._keep("scalars", step, values)

    def histogram(self, step, name, edges, shares):
        self._keep("histogram", step, (name, edges, shares))

    def html(self, step, name, page):
        self._keep("html", step, (name, page))

    def picture(self, step, name, png):
        self._keep("picture", step, (name, png))

    def close(self):
        self._keep("close", 0, None)


class Failing(Remembering):
    """One whose service is gone at the third step."""

    def scalars(self, step, values):
        if step == 3:
            raise ConnectionError("no\nroute")
        super().scalars(step, values)


@pytest.fixture(scope="module")
def tracked(corpus, tmp_path_factory):
    """The run of `finished` with two trackers, one of which fails; what they and its log say."""
    folder = tmp_path_factory.mktemp("tracked") / "run"
    names = [f"{__name__}:{cls.__name__}" for cls in (Remembering, Failing)]
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr(Display, "note", lambda self, text: said.append(text))
        assert start("--dataset", corpus, "--out", folder, *SMALL, "--tracker", *names) == 0
    return folder, Remembering.told, Failing.told, said


def test_a_tracker_is_told_what_the_log_says(tracked, finished):
    folder, told, _, _ = tracked
    assert curve(folder) == curve(finished)
    (_, step, (run_dir, config)), *rest = told
    assert (step, run_dir) == (0, folder)
    assert config == json.loads((folder / "config.json").read_text())
    assert "tracker" not in config
    records = list(read_metrics(folder))
    assert [(step, values) for kind, step, values in rest if kind == "scalars"] == [
        (record["step"], numbers(record)) for record in records
    ]
    validations = [record for record in records if "val_bpb" in record]
    assert [step for kind, step, _ in rest if kind == "html"] == [4, 8]
    for record, (name, edges, shares) in zip(
        validations, [value for kind, _, value in rest if kind == "histogram"], strict=True
    ):
        assert name == "val_probability"
        assert edges == pytest.approx(np.arange(11) / 10)
        assert shares == probabilities(record)
        assert sum(shares) == pytest.approx(1.0)
    (name, page), (_, png) = (next(value for kind, _, value in rest if kind == what) for what in ("html", "picture"))
    assert name == "held_out_text"
    assert page.startswith("<!doctype html>")
    assert page.count("<span") > 20
    assert png.startswith(b"\x89PNG")
    assert rest[-1][0] == "close"


def test_a_tracker_that_fails_costs_no_run(tracked):
    _, _, told, said = tracked
    assert [step for kind, step, _ in told if kind == "scalars"] == [1, 2]
    assert told[-1][0] == "scalars"
    failed = [text for text in said if "failed and is left out from here on (ConnectionError: no route)" in text]
    assert len(failed) == 1


def test_gradients_have_norms_by_part(tracked):
    """Their squares add up to that of the whole."""
    folder, _, _, _ = tracked
    for record in read_metrics(folder):
        parts = {name: value for name, value in record.items() if name.startswith("gradient_norm_")}
        if "loss" in record:
            assert {name.removeprefix("gradient_norm_") for name in parts} == {
                *("embedding", "encoder", "router", "main", "decoder", "head", "early_head")
            }
            assert all(metric_of(name) is not None for name in parts)
            whole = sum(value**2 for value in parts.values() if isinstance(value, float))
            assert np.sqrt(whole) == pytest.approx(record["gradient_norm"], rel=1e-5)


def test_parts_of_a_hierarchy_have_the_names_of_their_levels():
    found = {
        ".embedding": "embedding",
        ".norm.weight": "head",
        ".early_norm.weight": "early_head",
        ".ngrams.tables[0]": "embedding",
        ".stage.encoder.blocks[0].mlp": "encoder",
        ".stage.estimator.router.router.key": "router",
        ".stage.estimator.objective.reductions[1].weight": "objective",
        ".stage.inner.estimator.chunker.upsampler.projection.bias": "level1_chunker",
        ".stage.inner.decoder.norm.weight": "level1_decoder",
        ".stage.inner.inner.stage.stack.blocks[0]": "main",
        ".stage.inner.inner.padding": "main",
        ".stage.stack.blocks[0]": "main",
        ".inner.embedding": "embedding",
        ".inner.stage.inner.estimator.router.key": "level1_router",
    }
    assert {path: part_of(path) for path in found} == found
    assert metric_of("level1_gradient_norm_router") is not None


def test_shares_of_probabilities():
    shares = probability_shares(np.array([0.0, 0.05, 0.1, 0.999, 1.0], np.float32))
    assert shares == {"0": 0.4, "1": 0.2, **{str(number): 0.0 for number in range(2, 9)}, "9": 0.4}
    assert probability_shares(np.zeros(0)) == {}


def test_callbacks_are_told_of_steps_and_validations(corpus, tmp_path):
    config = run_module.parse(["--dataset", str(corpus), "--out", str(tmp_path), *SMALL, "--steps", "2"])
    steps, validations = [], []
    train(
        config,
        set_up(config),
        tmp_path,
        Display(quiet=True),
        on_step=lambda step, record: steps.append((step, record["bpb"])),
        on_validation=lambda step, record, model: validations.append(
            (step, record["val_bpb"], model().unet.embedding.shape)
        ),
    )
    records = list(read_metrics(tmp_path))
    assert steps == [(record["step"], record["bpb"]) for record in records if "bpb" in record]
    assert validations == [(record["step"], record["val_bpb"], (256, 8)) for record in records if "val_bpb" in record]


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["tensorbord"], "there are tensorboard, wandb, trackio, and classes"),
        (["no_such_module:Mine"], "there is no module no_such_module"),
        ([f"{__name__}:SMALL"], "has no class SMALL with the methods of a tracker"),
        (["a:b", "a:b"], "names one of them twice"),
    ],
)
def test_trackers_that_are_not_there_are_one_sentence(tmp_path, capsys, names, sentence):
    assert start("--out", tmp_path / "out", "--tracker", *names) == 2
    assert sentence in message(capsys)
    assert not (tmp_path / "out").exists()


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"wandb is not installed: pip install 'caesura-lm\[wandb\]'"):
        require_trackers(["wandb"])


def told(tracker: Tracker):
    """A tracker after a validation and a step."""
    import io

    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", (3, 2), (255, 0, 0)).save(stream, format="png")
    tracker.scalars(3, {"bpb": 2.5, "rate": 0.25})
    tracker.scalars(4, {"bpb": 2.25, "val_bpb": 2.75})
    tracker.histogram(4, "val_probability", [0.0, 0.5, 1.0], [0.75, 0.25])
    tracker.html(4, "held_out_text", "<p>ab|c</p>")
    tracker.picture(4, "boundaries", stream.getvalue())
    tracker.close()


def test_event_files_are_read_back(tmp_path):
    """By the format: records of a length, a checksum, a message and a checksum."""
    Event = needs("tensorboard", "tensorboardX.proto.event_pb2").Event
    from experiments.tracking.tensorboard import NamedTracker

    told(NamedTracker(tmp_path, {"rate": 0.2}, 2))
    (path,) = (tmp_path / "tensorboard").iterdir()
    content, events = path.read_bytes(), []
    while content:
        size = int.from_bytes(content[:8], "little")
        events.append(Event.FromString(content[12 : 12 + size]))
        content = content[16 + size :]
    values = [(event.step, value) for event in events for value in event.summary.value]
    plain = {
        (step, value.tag, value.simple_value) for step, value in values if value.WhichOneof("value") == "simple_value"
    }
    assert plain == {(3, "bpb", 2.5), (3, "rate", 0.25), (4, "bpb", 2.25), (4, "val_bpb", 2.75)}
    found = {value.tag.removesuffix("/text_summary"): value for _, value in values}
    assert b'"rate": 0.2' in found["config"].tensor.string_val[0]
    assert found["held_out_text"].tensor.string_val[0] == b"<p>ab|c</p>"
    assert (found["boundaries"].image.width, found["boundaries"].image.height) == (3, 2)
    assert list(found["val_probability"].histo.bucket) == [0.75, 0.25]
    assert list(found["val_probability"].histo.bucket_limit) == [0.5, 1.0]
    assert any(event.session_log.status == event.session_log.START and event.step == 3 for event in events)


def wandb_messages(content):
    """The messages in a log of W&B: after a header of 7 bytes, blocks of 32 KiB with parts of messages, each behind its checksum,
    length and kind (1 whole, 2 first, 3 middle, 4 last)."""
    place, message = 7, b""
    while place + 7 <= len(content):
        if (left := -place % 2**15) and left < 7:
            place += left
            continue
        size, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        message += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):
            yield message
            message = b""


@pytest.mark.filterwarnings("default")
def test_wandb_keeps_a_run_offline(tmp_path, monkeypatch):
    wandb = needs("wandb", "wandb")
    Record = needs("wandb", "wandb.proto.wandb_internal_pb2").Record
    from experiments.tracking.wandb import NamedTracker

    monkeypatch.setenv("WANDB_MODE", "offline")
    told(NamedTracker(tmp_path, {"rate": 0.2}, 0))
    # Its process has written everything when it has ended, as at the end of a command.
    wandb.teardown()
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    history, config = {}, {}
    for record in map(Record.FromString, wandb_messages(path.read_bytes())):
        for item in record.history.item:
            history["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
        for item in record.run.config.update:
            config[item.key] = json.loads(item.value_json)
    assert (history["bpb"], history["val_bpb"], history["rate"], config["rate"]) == (2.25, 2.75, 0.25, 0.2)
    assert (tmp_path / "wandb" / "caesura-run-id").exists()
    files = [one.suffix for one in path.parent.rglob("media/**/*") if one.is_file()]
    assert sorted(files) == [".html", ".png"]


@pytest.mark.filterwarnings("default")
def test_trackio_keeps_a_run_on_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "there"))
    needs("trackio", "trackio")
    from experiments.tracking.trackio import NamedTracker

    told(NamedTracker(tmp_path, {"rate": 0.2}, 0))
    (path,) = (tmp_path / "there").glob("*.db")
    with sqlite3.connect(path) as database:
        rows = [
            (step, json.loads(text)) for step, text in database.execute("select step, metrics from metrics order by id")
        ]
    whole = [(step, name, value) for step, row in rows for name, value in row.items()]
    assert {(3, "bpb", 2.5), (3, "rate", 0.25), (4, "bpb", 2.25), (4, "val_bpb", 2.75)} <= {
        one for one in whole if isinstance(one[2], float)
    }
    assert {"val_probability", "held_out_text", "boundaries"} <= {name for _, name, _ in whole}
