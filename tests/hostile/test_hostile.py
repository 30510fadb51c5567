"""Thousands of mutated files of every kind: each is read as what it is, or refused in one sentence, fast and in little memory."""

import mmap
import time
from pathlib import Path

import pytest

from tests.hostile import trial
from tests.hostile.crashing import ends_the_process
from tests.hostile.drive import failures
from tests.hostile.mutation import mutations
from tests.hostile.subject import Subject
from tests.hostile.subjects import SUBJECTS

COUNT = 2000


def test_mutated_files_are_read_or_refused(tmp_path: Path):
    found = failures([subject.name for subject in SUBJECTS], tmp_path, COUNT)
    assert not found, "\n".join(map(str, found[:20]))


def test_mutations_are_the_same_for_the_same_seed():
    seeds = [b'{"a": [1, 2], "b": {"c": "d"}}']
    for structure in ("bytes", "json"):
        first, again, other = (list(mutations(seeds, structure, 50, seed)) for seed in (0, 0, 1))
        assert first == again != other
        assert len(set(first)) > 25


def _subject(read, **settings) -> Subject:
    return Subject("one", lambda folder: [b"seed"], read, (ValueError,), **settings)


def _raise(error: BaseException):
    raise error


def _large():
    """Takes 20 MiB from the system: the process may have that much free otherwise."""
    with mmap.mmap(-1, 20 * 2**20) as memory:
        for page in range(0, len(memory), mmap.PAGESIZE):
            memory[page] = 1
    return b"seed"


def _busy():
    while time.process_time() >= 0:
        pass


@pytest.mark.parametrize(
    ("read", "settings", "problem"),
    [
        (lambda: b"seed", {"checked": True}, None),
        (lambda: b"other", {}, None),
        (lambda: b"other", {"checked": True}, "something else"),
        (lambda: _raise(ValueError("one sentence")), {}, None),
        (lambda: _raise(ValueError("two\nlines")), {}, "control characters"),
        (lambda: _raise(ValueError("\x1b[31m")), {}, "control characters"),
        (lambda: _raise(ValueError("long" * 200)), {}, "800 characters"),
        (lambda: _raise(KeyError("other kind")), {}, "KeyError"),
        (_busy, {"seconds": 0.05}, "more than 0.05 s"),
        (_large, {"memory": 2**20}, "memory grew by"),
    ],
)
def test_what_a_trial_notices(read, settings, problem, tmp_path: Path):
    found = trial.what_is_wrong(_subject(lambda folder, content: read(), **settings), b"", tmp_path / "in", b"seed")
    assert (found is None) if problem is None else (problem in (found or ""))


def test_an_input_that_ends_its_process_is_named_and_the_next_is_tried(tmp_path: Path):
    contents = mutations([b"0123456789"], "bytes", 40, 0)
    ends = [number for number, content in enumerate(contents) if ends_the_process(content)]
    assert 1 < len(ends) < 20
    found = failures(["crashing"], tmp_path, 40, module="tests.hostile.crashing")
    assert [one.number for one in found] == ends
    assert all("ended the process (3)" in one.problem for one in found)
