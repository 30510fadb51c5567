"""Following runs, giving them another end, and repeating them."""

import dataclasses
import io
import json
import math
import shutil
import sys
from typing import Literal

import pytest

from experiments import run as run_module
from experiments.config.errors import ConfigError
from experiments.config.presets import PRESETS
from experiments.config.sections import ScheduleConfig
from experiments.reporting import display as display_module
from experiments.reporting.display import Display, ProgressLines, duration
from experiments.reporting.shading import Character
from experiments.runs import main as list_runs
from experiments.training.extending import change, resumed
from experiments.training.metrics_log import read_metrics
from experiments.training.optimizer import learning_rate
from experiments.training.run_dir import held, read_config
from tests.test_run import corpus as corpus
from tests.test_run import curve, message, start, summary
from tests.test_run import finished as finished
from tests.test_run import usual_promotion as usual_promotion

TINY = dataclasses.replace(PRESETS["tiny"], steps=100, length=16, batch=4)
RECORD: dict[str, float | int | None] = {"bytes": 640, "bpb": 2.5, "rate": 0.25}


def scheduled(steps=100, schedule: Literal["cosine", "wsd"] = "cosine", **settings):
    optimizer = dataclasses.replace(TINY.optimizer, schedule=schedule, learning_rate=1.0, final_fraction=0.1)
    return dataclasses.replace(TINY, steps=steps, optimizer=optimizer, schedule=ScheduleConfig(**settings))


def test_a_learning_rate_that_decays_now_begins_where_it_is_and_ends_at_the_end():
    """A cosine of 100 steps that decays to step 60 from step 50 on, where it was at about a half; and a constant one."""
    whole, cut = scheduled(), scheduled(60, decay_from=50 * 64, planned_bytes=100 * 64)
    assert [learning_rate(cut, step) for step in (1, 20, 50)] == [learning_rate(whole, step) for step in (1, 20, 50)]
    half = learning_rate(whole, 50)
    assert learning_rate(cut, 55) == pytest.approx((half + 0.1) / 2)
    assert learning_rate(cut, 60) == pytest.approx(0.1)
    # A warm-up that was a share of the planned steps does not grow with the end.
    later = scheduled(4000, decay_from=50 * 64, planned_bytes=100 * 64)
    assert [learning_rate(later, step) for step in (1, 20, 50)] == [learning_rate(whole, step) for step in (1, 20, 50)]
    stable, early = scheduled(schedule="wsd"), scheduled(80, "wsd", decay_from=40 * 64, planned_bytes=100 * 64)
    assert learning_rate(stable, 40) == learning_rate(early, 40) == 1.0
    assert [learning_rate(early, 40 + 40 * share // 4) for share in range(5)] == pytest.approx(
        [learning_rate(stable, 80 + 20 * share // 4) for share in range(5)]
    )


def test_a_run_goes_on_to_another_end(finished, corpus, tmp_path, capsys):
    """A finished run of 8 steps, to 12. What it was before stays, and meanwhile it counts as unfinished."""
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    begun = curve(copy)
    assert start("--resume", "--out", copy, "--steps", "4") == 2
    assert "is at step 8 (0.00 MB) already, and is asked to end at step 4" in message(capsys)
    assert start("--resume", "--out", copy, "--schedule.decay-now") == 2
    assert "has ended, so its learning rate cannot decay" in message(capsys)
    assert (copy / "summary.json").exists()
    assert start("--resume", "--out", copy, "--bytes", "768", "--schedule.decay-now", "--rate", "0.3") == 2
    assert "other settings for rate" in message(capsys)

    def stopped(*arguments, **callbacks):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "train", stopped)
        assert start("--resume", "--out", copy, "--bytes", "768") == 130
    said = message(capsys)
    assert (
        "the run ends at step 12 (0.00 MB) instead of step 8 (0.00 MB); it is at step 8: its learning rate is" in said
    )
    assert "from here on, where it was 0, and falls along a cosine to 0" in said
    assert (read_config(copy).steps, read_config(copy).bytes) == (None, 768)
    # The model of the old end is not taken for that of the newest checkpoint.
    assert not (copy / "summary.json").exists()
    assert not (copy / "model.safetensors").exists()
    # --quiet holds for this command alone.
    assert start("--resume", "--out", copy, "--quiet", "--log-seconds", "0") == 0
    assert message(capsys) == ""
    assert not read_config(copy).quiet
    assert json.loads((copy / "summary.json").read_text())["steps"] == 12
    assert curve(copy)[: len(begun)] == begun
    assert [record["step"] for record in read_metrics(copy) if "loss" in record] == list(range(1, 13))


def test_a_run_decays_from_where_it_is(finished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    shutil.rmtree(copy / "checkpoints" / "8")
    config = run_module.parse(["--resume", "--out", str(copy), "--schedule.decay-now"])
    assert config.schedule == ScheduleConfig(decay_from=6 * 64, planned_bytes=8 * 64)
    again = dataclasses.replace(config, steps=20, schedule=ScheduleConfig(decay_now=True))
    with pytest.raises(
        ConfigError, match=r"decays from 0\.00 MB on already, to step 8: leave out --schedule\.decay-now"
    ):
        resumed(again, config)
    with pytest.raises(ConfigError, match=r"--schedule\.decay-now is for a run that goes on"):
        run_module.parse(["--schedule.decay-now"])


def test_another_end_says_what_becomes_of_the_rate_asked_for():
    run = dataclasses.replace(scheduled(100), rate=0.2, target=dataclasses.replace(TINY.target, start=0.9, until=0.5))
    assert "rate asked for" not in change(dataclasses.replace(run, steps=200), run, 200)
    assert "the rate asked for is 0.55 from here on, where it was 0.2" in change(
        dataclasses.replace(run, steps=200), run, 50
    )


@pytest.mark.parametrize("name", ["again.toml", "again.yaml", "config.json"])
def test_a_run_is_repeated_from_a_file_with_flags_on_top(finished, tmp_path, name):
    path = finished / name
    if name != "config.json":
        path = tmp_path / name
        values = {"dataset": "x", "steps": 8, "length": 16, "batch": 4, "unet": {"dim": 8, "heads": 2}}
        lines = [f"{key} = {json.dumps(value)}" for key, value in values.items() if not isinstance(value, dict)]
        text = "\n".join([*lines, "unet.dim = 8", "unet.heads = 2", "policy.window = 3"])
        path.write_text(text if name.endswith("toml") else json.dumps({**values, "policy": {"window": 3}}))
    config = run_module.parse(["--config", str(path), "--seed", "5", "--bytes", "6400"])
    assert (config.seed, config.total_steps, config.unet.widths[0]) == (5, 100, 8)
    if name == "config.json":
        was = read_config(finished)
        again = run_module.parse(["--config", str(path), "--out", str(finished)])
        assert dataclasses.replace(again, config=None) == was
        assert config.out is None
    else:
        assert config.settings["policy"]["window"] == 3


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("rat = 0.3", "there is no setting rat (did you mean rate?)"),
        ("policy.windw = 3", "--policy: there is no setting windw (did you mean window?)"),
        ("hnet.ratio-weight = 3", "hnet: these are settings of --estimator hnet, which was not chosen"),
        ("estimator = 'evil:Mine'", "was made with evil:Mine"),
        ("rate = ", "Invalid value"),
        ("resume = true", "resume: it is for the command line"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_file_of_wrong_settings_is_one_sentence(tmp_path, capsys, text, sentence):
    path = tmp_path / "mine.toml"
    if text is not None:
        path.write_text(text)
    assert start("--config", path, "--out", tmp_path / "out") == 2
    said = message(capsys)
    assert said.startswith(f"error: --config {path}")
    assert sentence in said
    assert not (tmp_path / "out").exists()


def test_files_have_their_own_words_for_what_they_cannot_say(tmp_path, finished):
    (tmp_path / "x.ini").write_text("")
    for arguments, sentence in (
        (["--config", str(tmp_path / "x.ini")], "ends in none of"),
        (["--config", "x.toml", "--resume"], "--config is for new runs"),
        (["--config", str(finished / "config.json"), "--model", "18M"], "--model 18M would have no effect"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            run_module.parse(arguments)


class Terminal(io.StringIO):
    """A terminal of some width and encoding."""

    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so."""
    now = [0.0]
    monkeypatch.setattr(display_module.time, "monotonic", lambda: now[0])
    return now


def test_lines_of_progress_come_every_so_many_seconds(clock):
    lines = ProgressLines(100, 6400, 30.0)
    clock[0] = 29.0
    assert lines.after(9, RECORD, 2000.0) == ""
    clock[0] = 31.0
    assert lines.after(10, RECORD, 2.0) == (
        "step 10 of 100, 0.00 of 0.01 MB, bpb 2.500, rate 0.250, 0.0 kB/s, 48 min 00 s left"
    )
    clock[0] = 60.0
    assert lines.after(11, RECORD, 2.0) == ""
    clock[0] = 61.0
    assert lines.after(12, {**RECORD, "rate": None}, math.nan) == "step 12 of 100, 0.00 of 0.01 MB, bpb 2.500, rate -"
    assert [duration(seconds) for seconds in (59.6, 3725.0, 90000.0)] == ["1 min 00 s", "1 h 02 min", "1 d 01 h"]


def shown(monkeypatch, stream, quiet=False, **environment):
    """What a display writes of a run that trains for a step, fails, and has a sample to show."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm-256color", **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", stream)
    display = Display(quiet)
    display.start(dataclasses.replace(TINY, log_seconds=0.0), 10, 4, 1)
    display.progress(2, RECORD, 2000.0)
    display.stop()
    display.sample([[Character(one, 0.5, one == "b") for one in "ab±"]])
    display.error("no")
    return stream.getvalue()


def test_off_a_terminal_there_are_plain_lines_and_marks(monkeypatch):
    said = shown(monkeypatch, io.StringIO())
    assert "step 2 of 100, 0.00 of 0.01 MB, bpb 2.500, rate 0.250, 2.0 kB/s, 3 s left\n" in said
    assert "\x1b" not in said
    assert said.endswith("held-out text, with a mark behind each sampled boundary:\nab·±\nerror: no\n")
    dumb = shown(monkeypatch, Terminal(), TERM="dumb")
    assert "step 2 of 100" in dumb
    assert "\x1b" not in dumb


def test_terminals_have_the_bar_in_the_room_and_the_colours_that_they_have(monkeypatch):
    for width, parts in (
        ("120", "training ━ bpb rate kB/s"),
        ("70", "━ bpb rate kB/s"),
        ("60", "bpb rate"),
        ("30", "bpb"),
    ):
        said = shown(monkeypatch, Terminal(), COLUMNS=width)
        assert [part for part in parts.split() if part not in said] == [], width
        assert ("rate 0.250" in said) == (width != "30")
        assert "48;2;" in said or "48;5;" in said
        assert "step 2 of" not in said
    plain = shown(monkeypatch, Terminal(), NO_COLOR="1", COLUMNS="100")
    assert "48;" not in plain
    assert "ab·±" in plain

    class Latin(Terminal):
        encoding = "ascii"

    ascii_only = shown(monkeypatch, Latin(), COLUMNS="100")
    ascii_only.encode("ascii")
    assert "+-" in ascii_only


def test_a_quiet_run_says_errors_alone(monkeypatch):
    assert shown(monkeypatch, io.StringIO(), quiet=True) == "error: no\n"
    assert shown(monkeypatch, Terminal(), quiet=True) == "error: no\n"


def test_runs_of_a_folder_are_listed_with_what_differs(finished, tmp_path, capsys):
    """One that is finished, at work, stopped, has not begun, and is damaged, of whatever classes they are made."""
    for name in ("done", "deep/work", "stopped-$x|<b>", "new", "bad"):
        shutil.copytree(finished, tmp_path / "runs" / name)
        values = json.loads((finished / "config.json").read_text())
        changes = {"seed": len(name), "estimator": "sfe" if name != "new" else "elsewhere:Mine", "out": name}
        (tmp_path / "runs" / name / "config.json").write_text(json.dumps({**values, **changes}))
    for name in ("deep/work", "stopped-$x|<b>", "new"):
        (tmp_path / "runs" / name / "summary.json").unlink()
    (tmp_path / "runs" / "new" / "metrics.jsonl").unlink()
    shutil.rmtree(tmp_path / "runs" / "new" / "checkpoints")
    (tmp_path / "runs" / "bad" / "summary.json").write_text("{")
    lines = (finished / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "runs" / "stopped-$x|<b>" / "metrics.jsonl").write_text("".join(lines[:5]))
    (tmp_path / "runs" / "export").mkdir()
    (tmp_path / "runs" / "export" / "config.json").write_text("{}")
    with held(tmp_path / "runs" / "deep" / "work"):
        assert list_runs([str(tmp_path / "runs"), "--html", str(tmp_path / "page.html")]) == 0
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head == "| run | state | steps | bits per byte | rate | estimator | seed |"
    last, four = summary(finished), json.loads(lines[4])
    ended = f"8 of 8 (100%) | {last['val_bpb']:.4f} | {last['val_rate']:.3f} | sfe |"
    assert rows[0].startswith("| bad | damaged: ")
    assert rows[1:] == [
        f"| deep/work | running | {ended} 9 |",
        f"| done | finished | {ended} 4 |",
        "| new | not begun | 0 of 8 (0%) | – | – | elsewhere:Mine | 3 |",
        f"| stopped-$x\\|<b> | stopped | 4 of 8 (50%) | {four['val_bpb']:.4f} | {four['val_rate']:.3f} | sfe | 14 |",
    ]
    page = (tmp_path / "page.html").read_text()
    assert "stopped-$x|&lt;b&gt;" in page
    assert "http" not in page
    assert list_runs([str(tmp_path / "runs"), "--html", str(tmp_path / "page.html")]) == 2
    assert "is there already: replace it (--overwrite)" in message(capsys)
    assert list_runs([str(tmp_path / "runs" / "export")]) == 2
    assert "holds no run" in message(capsys)
    assert list_runs([str(tmp_path / "nowhere")]) == 2
    assert list_runs([str(finished)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("| whole | finished |")
