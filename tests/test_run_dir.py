"""The folder of a run: whom it belongs to, what is in its files, and what becomes of a run that is replaced."""

import contextlib
import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from experiments import export
from experiments.config.errors import ConfigError, RunError
from experiments.config.presets import PRESETS
from experiments.training import run_dir
from experiments.training.metrics_log import MetricsLog, read_metrics, undamaged_metrics
from experiments.training.replacing import discard_replaced, replacing
from experiments.training.rescue import RunFolder, save_elsewhere
from experiments.training.run_dir import held, make_folder, prepare_new, read_config, read_summary, require_free
from tests.conftest import small_model

OLD = {"config.json": "old", "metrics.jsonl": "lines", "summary.json": "{}", "checkpoints/4/state": "numbers"}


def files(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def old(tmp_path):
    """A folder with a run in it."""
    for name, content in OLD.items():
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return tmp_path / "run"


def begin(folder: Path, checkpoint: bool = False) -> None:
    """What a new run leaves."""
    (folder / "config.json").write_text("new")
    (folder / "checkpoints").mkdir()
    if checkpoint:
        (folder / "checkpoints" / "1").mkdir()


class Killed(BaseException):
    """Ends the process."""


def test_a_replaced_run_is_kept_until_the_new_one_has_a_checkpoint(old):
    with replacing(old, pytest.fail):
        assert files(old) == {f"replaced/{name}": content for name, content in OLD.items()}
        begin(old, checkpoint=True)
        discard_replaced(old)
    assert files(old) == {"config.json": "new"}
    assert sorted(path.name for path in old.iterdir()) == ["checkpoints", "config.json"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_replaced_run_is_put_back_where_the_new_one_fails_before(old, error):
    notes: list[str] = []

    def fail():
        with replacing(old, notes.append):
            begin(old)
            raise error

    with pytest.raises(error):
        fail()
    assert files(old) == OLD
    assert notes == [f"the run that was in {old} before is there again"]


def test_a_run_that_fails_after_its_first_checkpoint_keeps_it(old):
    """The checkpoint may have been being written when the run failed: nobody has discarded the old run then."""

    def fail():
        with replacing(old, pytest.fail):
            begin(old, checkpoint=True)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert files(old) == {"config.json": "new"}
    assert (old / "checkpoints" / "1").is_dir()


CHANGES = ("rename", "mkdir", "rmdir", "unlink")


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_kill_at_any_change_loses_neither_run(old, monkeypatch, checkpoint):
    """At each of the changes of the folder in turn; the next start puts everything in order."""
    before = shutil.copytree(old, old.with_name("copy"))
    limit = done = 0

    def counted(change):
        def call(*arguments, **options):
            nonlocal done
            done += 1
            # Nothing runs in a killed process, no handler of exceptions either.
            if done >= limit:
                raise Killed
            return change(*arguments, **options)

        return call

    def whole():
        with replacing(old, lambda note: None):
            begin(old, checkpoint)
            if checkpoint:
                discard_replaced(old)
            else:
                raise RuntimeError

    for limit in range(1, 40):
        shutil.rmtree(old)
        shutil.copytree(before, old)
        done = 0
        with monkeypatch.context() as patch:
            for name in CHANGES:
                patch.setattr(Path, name, counted(getattr(Path, name)))
            patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
            with contextlib.suppress(Killed, RuntimeError):
                whole()
        discarded = checkpoint and (old / "checkpoints" / "1").is_dir()
        with replacing(old, pytest.fail):
            there = files(old / "replaced") if (old / "replaced").is_dir() else {}
            discard_replaced(old)
        assert there == ({"config.json": "new"} if discarded else OLD)
        if done < limit:
            break
    assert 8 < done < limit < 39


def test_what_cannot_be_moved_aside_is_as_before(old, monkeypatch):
    rename = Path.rename

    def refuse(path, target):
        if path.name == "metrics.jsonl" and path.parent.name == "run":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(RunError, match=r"cannot be replaced: .*Permission denied"), replacing(old, pytest.fail):
        pytest.fail("there is no room")
    assert files(old) == OLD


def test_a_file_system_without_locks_is_gone_on_with(tmp_path, monkeypatch):
    for number in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF):

        def refuse(*_, number=number):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(run_dir.fcntl, "flock", refuse)
        notes: list[str] = []
        with held(tmp_path / "run", notes.append):
            assert (tmp_path / "run").is_dir()
        assert "lies on a file system without locks" in notes[0]


@pytest.mark.parametrize("out", ["file/run", "/proc/run", "x" * 300, "sealed/deep/run"])
def test_a_folder_that_cannot_be_used_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch, out):
    (tmp_path / "file").write_text("mine")
    write = Path.write_bytes

    def refuse(path, content):
        if "sealed" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises((RunError, ConfigError), match="--out"), held(tmp_path / out):
        pytest.fail("it was taken")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_held_folder_stays_where_something_was_put_there(tmp_path):
    with held(tmp_path / "a" / "b"):
        pass
    assert not (tmp_path / "a").exists()
    with held(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "config.json").write_text("x")
    assert make_folder(tmp_path / "a" / "b") == []


def test_what_a_killed_process_left_half_written_is_no_run(tmp_path):
    config = dataclasses.replace(PRESETS["tiny"], out=tmp_path)
    (tmp_path / ".config.json.tmp").write_text("{")
    prepare_new(config)
    assert read_config(tmp_path).out == tmp_path
    with pytest.raises(ConfigError, match="is not empty"):
        require_free(config)


def test_a_run_that_was_being_replaced_is_named(tmp_path):
    (tmp_path / "replaced").mkdir()
    with pytest.raises(ConfigError, match=r"the run that was to be replaced is in .*replaced$"):
        read_config(tmp_path)


RECORDS = [{"step": step, "bytes": 64 * step, "loss": 1.5, "note": None} for step in (1, 2, 3)]
LINES = [json.dumps(record).encode() + b"\n" for record in RECORDS]


@pytest.mark.parametrize("tail", [b"", b"\0" * 600, LINES[0][:-1], LINES[0][:9] + b"\0" * 50, b"\0\0\n", b"\n"])
def test_a_cut_or_zeroed_tail_of_the_log_is_left_out(tmp_path, tail):
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(LINES) + tail)
    assert list(read_metrics(tmp_path)) == RECORDS
    log = MetricsLog(tmp_path, keep_steps=2)
    assert (log.kept, log.damaged) == (RECORDS[:2], 0)
    log.write(RECORDS[2])
    log.sync()
    log.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(LINES)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"\0" * 30 + b'{"step": 1}\n', "Expecting value"),
        (b'{"step": 1, "bytes": 2, "loss": NaN}\n', "JSON has no NaN"),
        (b'{"step": 1, "bytes": 2, "loss": 1e999}\n', "loss is too large a number"),
        (b'{"step": 1, "bytes": 2, "loss": [1]}\n', "loss is neither a number nor a text"),
        (b'{"step": "1", "bytes": 2}\n', "its step is no whole number"),
        (b'{"step": 1}\n', "its bytes is no whole number"),
        (b"[" * 20_000 + b"\n", "nested too deep"),
        (b"\xff\n", "not UTF-8"),
        (b"3\n", "no JSON object"),
    ],
)
def test_a_damaged_line_of_the_log_is_named_and_a_run_goes_on_without_it(tmp_path, line, said):
    (tmp_path / "metrics.jsonl").write_bytes(LINES[0] + line + LINES[2])
    with pytest.raises(ConfigError, match=f"metrics.jsonl is damaged in line 2 .*{said}"):
        list(read_metrics(tmp_path))
    assert undamaged_metrics(tmp_path) == ([RECORDS[0], RECORDS[2]], 1)


def test_a_log_that_cannot_be_written_for_a_while_loses_nothing(tmp_path, monkeypatch):
    log, write, room = MetricsLog(tmp_path, 0), os.write, 10

    def full(descriptor, content):
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = write(descriptor, content[:room])
        room -= written
        return written

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        assert all(isinstance(log.write(record), OSError) for record in RECORDS[:2])
        with pytest.raises(OSError, match="No space"):
            log.sync()
        assert log.content() == b"".join(LINES[:2])
    assert log.write(RECORDS[2]) is None
    log.close()
    assert list(read_metrics(tmp_path)) == RECORDS


def test_what_is_no_number_is_null_in_the_log(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.write({"step": 1, "bytes": 2, "advantage_rms": float("nan"), "ratio_loss": float("-inf")})
    log.close()
    assert list(read_metrics(tmp_path)) == [{"step": 1, "bytes": 2, "advantage_rms": None, "ratio_loss": None}]


@pytest.mark.parametrize("content", [b"", b"\0" * 40, b"[]", b'{"parameters": "many"}', b'{"parameters": 1, "a": {}}'])
def test_a_damaged_summary_is_one_sentence(tmp_path, content):
    (tmp_path / "summary.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"summary.json is damaged \(.*\): --resume of that run writes it again"):
        read_summary(tmp_path)


def test_a_folder_that_was_deleted_and_made_again_is_another(tmp_path):
    folder = tmp_path / "run"
    with held(folder):
        ours = RunFolder(folder)
        ours.require_there()
        folder.rmdir()
        with pytest.raises(FileNotFoundError, match="has vanished"):
            ours.require_there()
        folder.mkdir()
        with pytest.raises(FileNotFoundError, match="has vanished"):
            ours.require_there()


def test_a_rescue_goes_beside_the_run_or_else_to_the_folder_for_temporary_files(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    run, tried = tmp_path / "runs" / "run", []

    def write(place):
        tried.append(place)
        (place / "model").write_text("half")
        if len(tried) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    run.mkdir(parents=True)
    assert save_elsewhere(run, write) == run.with_name("run-rescued")
    assert save_elsewhere(run, write) is None
    assert tried[1] == run.with_name("run-rescued-2")
    assert tried[2].parent == tmp_path / "temporary"
    assert sorted(path.name for path in run.parent.iterdir()) == ["run", "run-rescued"]
    assert not list((tmp_path / "temporary").iterdir())


def test_an_export_that_was_killed_can_be_done_again_and_takes_nobody_s_files(tmp_path, monkeypatch):
    folder, names = tmp_path / "exported", ["README.md", "config.json", "model.safetensors"]

    def write():
        export._require_free(folder)
        export._write_to(folder, model, PRESETS["tiny"], {"parameters": 8184}, "own")

    def kill(*_):
        raise Killed

    model = small_model()
    for place, name in ((export, "save"), (Path, "rename"), (Path, "rmdir")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, kill)
            with pytest.raises(Killed):
                write()
        (folder / "mine.txt").write_text("mine")
        with pytest.raises(ConfigError, match="is not empty"):
            write()
        assert (folder / "mine.txt").read_text() == "mine"
        (folder / "mine.txt").unlink()
    write()
    assert sorted(path.name for path in folder.iterdir()) == names
    with pytest.raises(ConfigError, match="is not empty"):
        write()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "README.md").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty"):
        export._require_free(tmp_path / "other")
