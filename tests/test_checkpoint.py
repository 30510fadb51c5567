"""Checkpoints of a few numbers: which of them is gone on from, and what is said of damaged ones."""

import json
import re
import resource
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.config.errors import ConfigError
from experiments.processes.processes import ALONE
from experiments.training.checkpoint import Checkpoints, Progress, SaveError, require_undamaged

ARRAYS = {"weights": jnp.arange(6, dtype=jnp.float32).reshape(2, 3), "count": jnp.zeros((), jnp.int32)}


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def zeroed(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))


def arrays(step: int) -> dict[str, jnp.ndarray]:
    return {name: value + step for name, value in ARRAYS.items()}


@pytest.fixture
def saved(tmp_path):
    """Checkpoints of steps 4 and 6."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    for step in (2, 4, 6):
        checkpoints.save(arrays(step), Progress(step, 1.5 * step, {"step": step}, "f"))
    yield tmp_path / "checkpoints"
    checkpoints.close()


def restored(folder: Path):
    """The step of the checkpoint that is gone on from, and what was noted."""
    notes: list[str] = []
    checkpoints = Checkpoints(folder, keep=2)
    found = checkpoints.restore(ARRAYS, notes.append)
    assert found is not None
    step = found.progress.step
    np.testing.assert_array_equal(found.arrays["weights"], arrays(step)["weights"])
    assert found.progress == Progress(step, 1.5 * step, {"step": step}, "f")
    # The damaged one is not taken for the one that is written when its step is reached again.
    checkpoints.save(arrays(6), Progress(6, 9.0, {"step": 6}, "f"))
    require_undamaged(folder / "6")
    checkpoints.close()
    assert sorted(path.name for path in folder.iterdir()) == ["4", "6"]
    return step, notes


def without_list(change):
    def damage(folder: Path) -> None:
        (folder / "files.json").unlink()
        change(folder)

    return damage


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lambda folder: cut(largest(folder / "state")), "is not as it was written"),
        (lambda folder: zeroed(folder / "state" / "manifest.ocdbt"), "state/manifest.ocdbt is not as it was written"),
        (lambda folder: largest(folder / "state").unlink(), "is missing"),
        (lambda folder: (folder / "state" / "more").write_text("x"), "state/more is not as it was written"),
        (lambda folder: cut(folder / "files.json"), "files.json: ValueError"),
        (lambda folder: zeroed(folder / "files.json"), "files.json: ValueError"),
        (without_list(lambda folder: cut(folder / "meta" / "metadata")), "JSONDecodeError"),
        (without_list(lambda folder: zeroed(largest(folder / "state"))), ""),
    ],
)
def test_a_damaged_checkpoint_is_said_and_the_one_before_it_is_gone_on_from(saved, damage, found):
    damage(saved / "6")
    step, notes = restored(saved)
    assert step == 4
    (note,) = notes
    assert note.startswith(f"the checkpoint {saved / '6'} is damaged (")
    assert found in note
    assert note.endswith("): going on from that of step 4")


def test_an_undamaged_checkpoint_is_gone_on_from_without_a_word(saved):
    assert restored(saved) == (6, [])


class Second(type(ALONE)):  # type: ignore[invalid-inheritance]  # what process 0 says is given
    """The second of two processes, the first of which says these things and then what this one says."""

    index, count = 1, 2

    def __init__(self, *first):
        self.first = [*first]

    def said(self, own):
        return [self.first.pop(0) if self.first else own, own]


def test_all_go_on_from_the_checkpoint_that_process_0_finds(saved):
    checkpoints = Checkpoints(saved, 2, Second("[4]"))
    found = checkpoints.restore(ARRAYS, pytest.fail)
    assert found is not None
    assert found.progress.step == 4
    checkpoints.close()
    checkpoints = Checkpoints(saved, 2, Second("[]"))
    assert checkpoints.restore(ARRAYS, pytest.fail) is None
    checkpoints.close()
    checkpoints = Checkpoints(saved, 2, Second("[6]", "", "another"))
    with pytest.raises(ConfigError, match="process 1 has other checkpoint than process 0"):
        checkpoints.restore(ARRAYS, pytest.fail)
    checkpoints.close()


def test_where_all_are_damaged_nothing_is_touched(saved):
    for step in ("4", "6"):
        cut(saved / step / "files.json")
    before = sorted(saved.rglob("*"))
    checkpoints = Checkpoints(saved, keep=2)
    with pytest.raises(ConfigError, match=r"6 is damaged .* and .*4 is damaged .*start again with --overwrite"):
        checkpoints.restore(ARRAYS, pytest.fail)
    checkpoints.close()
    assert sorted(saved.rglob("*")) == before


def test_metadata_of_other_types_is_damage(saved):
    (saved / "6" / "files.json").unlink()
    path = saved / "6" / "meta" / "metadata"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"step": "6"}))
    _, (note,) = restored(saved)
    assert "step: '6' is no whole number" in note


def test_a_checkpoint_of_another_model_is_no_damage(saved):
    checkpoints = Checkpoints(saved, keep=2)
    with pytest.raises(ConfigError, match=r"6 does not fit this model: \['more'\] differs"):
        checkpoints.restore({**ARRAYS, "more": jnp.zeros(3)}, pytest.fail)
    checkpoints.close()


def many_numbers() -> dict[str, jnp.ndarray]:
    """Arrays that are written side by side."""
    rng = np.random.default_rng(0)
    return {f"array {number}": jnp.asarray(rng.random(5000)) for number in range(20)}


@contextmanager
def limited_files(size: int):
    """No file can be written beyond `size` bytes: what a full disk does, in this process alone."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [10, 3500])
def test_a_checkpoint_that_cannot_be_written_leaves_nothing_and_can_be_tried_again(saved, capfd, size):
    checkpoints, large = Checkpoints(saved, keep=2), many_numbers()
    sentence = re.escape("the checkpoint of step 8 cannot be written (File too large)")
    with limited_files(size), pytest.raises(SaveError, match=f"^{sentence}$"):
        checkpoints.save(large, Progress(8, 0.0, {}, "f"))
    assert checkpoints.latest == 6
    checkpoints.save(large, Progress(8, 0.0, {}, "f"))
    require_undamaged(saved / "8")
    checkpoints.close()
    assert sorted(path.name for path in saved.iterdir()) == ["6", "8"]
    assert "Traceback" not in capfd.readouterr().err


def test_what_is_trained_on_while_a_checkpoint_is_written_is_not_in_it(tmp_path):
    """The step that follows reuses the buffers of what is being saved."""
    checkpoints, values = Checkpoints(tmp_path / "checkpoints", keep=2), jnp.arange(2**20, dtype=jnp.float32)
    moved = jax.jit(lambda numbers: {"numbers": numbers["numbers"] + 1}, donate_argnums=0)
    state = moved({"numbers": values - 1})
    checkpoints.begin(state, Progress(3, 0.0, {}, "f"))
    assert checkpoints.latest is None
    for _ in range(5):
        state = moved(state)
    assert checkpoints.finish()
    assert not checkpoints.finish()
    found = checkpoints.restore(state, print)
    assert found is not None
    np.testing.assert_array_equal(found.arrays["numbers"], values)
    checkpoints.close()
