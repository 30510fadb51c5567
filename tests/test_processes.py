"""Several processes that train one model: how they find each other, learn of each other's end, and leave what one would leave."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.config.errors import ConfigError
from experiments.config.sections import DistributedConfig
from experiments.processes.launchers import Place, place_of
from experiments.processes.peers import listening_at
from experiments.processes.processes import ALONE
from experiments.processes.stopping import Stop, meet
from experiments.processes.watch import Sign, Waiting, Watch
from experiments.run import parse
from tests.hostile.forked import weights

ROOT = Path(__file__).parent.parent


def several(folder, *names):
    """What `tests.several` prints of these scenarios."""
    command = [sys.executable, "-m", "tests.several", str(folder), *names]
    # JAX warns of proxies, which may be in its way.
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


ENDS = (
    *("killed", "frozen", "leader-killed", "leader-frozen", "stuck", "computing", "failing", "well"),
    *("alone", "unreachable", "apart", "twice"),
)


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """Processes that meet, until one of them ends."""
    return several(tmp_path_factory.mktemp("ends"), *ENDS)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Runs of two, four and one process that go on with each other, and their folder."""
    folder = tmp_path_factory.mktemp("chain")
    return several(folder, "chain")["chain"], folder / "chain"


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    """A run on a stream in two processes and in one, and their folder."""
    folder = tmp_path_factory.mktemp("stream")
    return several(folder, "stream")["stream"], folder / "stream"


def last_line(text):
    return text.strip().splitlines()[-1] if text.strip() else ""


class TestEnds:
    def test_processes_that_are_well_exchange_codes_and_leave(self, ends):
        assert ends["well"]["codes"] == [0, 0, 0]
        assert ends["well"]["output"] == ["codes [10, 11, 12]\n", "", ""]

    @pytest.mark.parametrize(
        ("name", "who", "sentence", "seconds"),
        [
            ("killed", 1, "has died or hangs: it gave no sign of life for 3 s; go on with --resume", 3),
            ("frozen", 1, "has died or hangs: it gave no sign of life for 3 s; go on with --resume", 3),
            ("leader-killed", 0, "has died or cannot be reached any more; go on with --resume", 0),
            ("leader-frozen", 0, "has died or hangs: it did not answer for 3 s; go on with --resume", 3),
            ("stuck", 1, "hangs: the others have waited for it for 2 s; go on with --resume", 2),
            ("computing", 1, "hangs: the others have waited for it for 2 s; go on with --resume", 2),
            ("failing", 1, "has failed (its data are gone)", 0),
        ],
    )
    def test_the_end_of_one_ends_the_others_with_a_sentence_that_names_it(self, ends, name, who, sentence, seconds):
        ended = ends[name]
        for index, (code, output) in enumerate(zip(ended["codes"], ended["output"], strict=True)):
            if index != who:
                assert code == 1
                line = last_line(output)
                assert line.startswith(f"process {index}: error: "), output
                assert f"process {who} (" in line
                assert line.endswith(sentence)
        # Three seconds of lingering, and what a busy machine takes.
        assert ended["seconds"] < seconds + 15

    def test_two_that_take_the_same_place_are_told_apart(self, ends):
        assert ends["twice"]["codes"] == [1, 1, 1]
        assert all("index from 0 to 2 was started, each once" in text for text in ends["twice"]["output"])
        assert any("(ALREADY_EXISTS" in text for text in ends["twice"]["output"])

    def test_the_one_that_fails_says_why_itself(self, ends):
        assert ends["failing"]["codes"][1] == 2
        assert ends["failing"]["output"][1] == "process 1: error: its data are gone\n"

    def test_a_process_that_waits_in_vain_says_for_whom(self, ends):
        assert ends["alone"]["codes"] == ends["unreachable"]["codes"] == [1]
        [line] = ends["alone"]["output"][0].splitlines()
        assert line.startswith("process 0: error: not all of the 2 processes came to 127.0.0.1:")
        assert " within 1 s (DEADLINE_EXCEEDED" in line
        [line] = ends["unreachable"]["output"][0].splitlines()
        assert line.startswith("process 1: error: --distributed.coordinator 127.0.0.1:")
        assert " was not reached within 1 s (Connection refused): see that process 0 runs there" in line

    def test_processes_that_see_different_folders_are_refused(self, ends):
        assert ends["apart"]["codes"] == [2, 2]
        [line] = ends["apart"]["output"][0].splitlines()
        assert line.startswith("process 0: error: process 1 does not see the folder ")
        # Said once.
        assert ends["apart"]["output"][1] == ""


class TestChain:
    def test_a_signal_to_one_stops_all_after_the_same_step_which_is_saved_once(self, chain):
        ended, _ = chain
        assert ended["two"]["codes"] == [143, 143]
        assert ended["saved"] == ["5"]
        assert "SIGTERM (process 1): stopped at step 5 of 20 and saved" in ended["two"]["output"][0]
        assert ended["two"]["output"][1] == ""

    def test_four_go_on_from_there_until_one_is_killed(self, chain):
        ended, _ = chain
        assert ended["four"]["codes"] == [1, 1, -9, 1]
        assert "resumed at step 5 of 20" in ended["four"]["output"][0]
        for index in (0, 1, 3):
            assert last_line(ended["four"]["output"][index]).startswith(f"process {index}: error: process 2 (")
        assert ended["kept"] == ["10", "5"]

    def test_what_they_leave_is_what_one_leaves(self, chain):
        """Batches, boundaries, losses and parameters."""
        ended, folder = chain
        assert ended["one"]["codes"] == ended["whole"]["codes"] == [0]
        assert "resumed at step 10 of 20" in ended["one"]["output"][0]
        lines = [
            [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
            for name in ("whole", "chain")
        ]
        assert len(lines[0]) == len(lines[1]) == 21
        for one, other in zip(*lines, strict=True):
            assert one.keys() == other.keys()
            for name in ("step", "bytes", "epochs", "rate", "padding", "drawn_so_far"):
                assert one.get(name) == other.get(name)
            for name in ("loss", "bpb", "early_bpb", "gradient_norm", "val_bpb"):
                if one.get(name) is not None:
                    np.testing.assert_allclose(other[name], one[name], rtol=1e-5)
        whole, parts = (weights(folder / name) for name in ("whole", "chain"))
        for name, value in whole.items():
            np.testing.assert_allclose(
                np.frombuffer(parts[name], np.float32), np.frombuffer(value, np.float32), atol=1e-5
            )

    def test_one_process_writes_and_leaves_no_trace_of_the_others(self, chain):
        _, folder = chain
        assert sorted(path.name for path in (folder / "chain").iterdir()) == sorted(
            path.name for path in (folder / "whole").iterdir()
        )
        assert (folder / "chain" / "config.json").read_text().replace("chain/chain", "chain/whole") == (
            (folder / "whole" / "config.json").read_text()
        )


class TestStream:
    def test_what_is_read_before_training_is_read_by_the_first_process_for_all(self, stream):
        ended, _ = stream
        assert (ended["two"]["codes"], ended["one"]["codes"]) == ([0, 0], [0]), ended["two"]["output"]
        first, second = ended["two opened"]
        # Held-out text comes from the first shard, and what the vocabulary is learned from out of both lanes.
        assert (first[0], "0" in second) == ("0", False)
        assert set(first) & set(second)
        assert len(set(first)) < len(first)
        assert len(set(second)) == len(second)

    def test_both_train_on_the_batches_of_one(self, stream):
        _, folder = stream
        one, two = (
            [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
            for name in ("one", "two")
        )
        assert len(one) == len(two) == 7
        for mine, other in zip(one, two, strict=True):
            assert mine["rate" if "rate" in mine else "val_rate"] == other["rate" if "rate" in mine else "val_rate"]
            name = "loss" if "loss" in mine else "val_bpb"
            np.testing.assert_allclose(other[name], mine[name], rtol=1e-5)


def given(*flags):
    return parse(["--distributed.coordinator", "node:1", "--distributed.processes", "2", "--distributed.index", *flags])


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"processes": 2, "index": 0}, "go together: --distributed.coordinator is missing"),
        ({"coordinator": "node:1"}, "go together: --distributed.processes, --distributed.index is missing"),
        ({"coordinator": "node:1", "processes": 2, "index": 2}, r"index 2 is none of 0 to 1, of which there are"),
        ({"coordinator": "node", "processes": 2, "index": 0}, "coordinator node is not HOST:PORT"),
        ({"coordinator": "node:99999", "processes": 2, "index": 0}, "coordinator node:99999 is not HOST:PORT"),
        ({"coordinator": "node:1", "processes": 2, "index": 0, "launcher": "slurm"}, "use one of them"),
        ({"timeout": 0.0}, r"--distributed\.timeout must be a number from 1 to"),
    ],
)
def test_places_that_cannot_be_are_refused(flags, sentence):
    with pytest.raises(ConfigError, match=sentence):
        DistributedConfig(**flags)


SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "node[007-010]",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}


def place_in(monkeypatch, environment, **flags):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return place_of(DistributedConfig(**flags), environment)


def test_a_launcher_that_started_several_says_where_they_meet(monkeypatch):
    assert place_in(monkeypatch, SLURM) == Place("node007:61441", 4, 3, (1,))
    found = place_in(monkeypatch, OPEN_MPI)
    assert found is not None
    assert (found.coordinator.partition(":")[0], found.processes, found.index, found.local_devices) == (
        "10.96.0.1",
        2,
        1,
        (1,),
    )


def test_a_process_that_is_alone_on_its_machine_has_all_of_its_devices(monkeypatch):
    found = place_in(monkeypatch, {**SLURM, "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1(x4)"})
    assert found == Place("node007:61441", 4, 3)
    eight = place_in(monkeypatch, {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "8(x4)"})
    assert eight is not None
    assert eight.local_devices == (1,)


def test_nothing_is_asked_of_a_cluster_by_one_process(monkeypatch):
    """A shell within a job has its variables too."""
    monkeypatch.setattr("experiments.processes.launchers._detected", None)
    assert place_of(DistributedConfig(), {}) is None
    assert place_of(DistributedConfig(), {**SLURM, "SLURM_STEP_NUM_TASKS": "1"}) is None
    assert place_of(DistributedConfig(launcher="none"), SLURM) is None
    assert place_of(DistributedConfig("node:1", 1, 0), SLURM) is None
    assert place_of(DistributedConfig("node:1", 2, 1), SLURM) == Place("node:1", 2, 1)


@pytest.mark.parametrize("launcher", ["slurm", "ompi", "k8s"])
def test_a_launcher_that_says_too_little_is_named_with_what_to_say_instead(launcher):
    with pytest.raises(
        ConfigError, match=rf"--distributed.launcher {launcher}: .*; name --distributed.coordinator HOST:PORT"
    ):
        place_of(DistributedConfig(launcher=launcher), {})


def test_processes_of_a_launcher_that_jax_does_not_know_do_not_train_side_by_side():
    """Newer versions of Open MPI leave out the variable that JAX reads."""
    with pytest.raises(ConfigError, match=r"--distributed\.index \$OMPI_COMM_WORLD_RANK"):
        place_of(DistributedConfig(), {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"})


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_a_coordinator_on_loopback_listens_there_alone(host):
    assert listening_at(f"{host}:61441") == f"{host}:61441"


@pytest.mark.parametrize("host", ["node7", "10.96.0.1", "[fe80::1]", "localhost.example.org"])
def test_others_are_heard_on_all_addresses(host):
    assert listening_at(f"{host}:61441") is None


class TestWatch:
    NAMES = ("first", "second", "third")

    def watch(self):
        watch = Watch(0, self.NAMES, timeout=10.0, patience=100.0, now=0.0)
        return lambda now, *told, **more: watch.verdict(float(now), *told, **more)

    def test_a_process_is_dead_after_its_timeout_and_not_before(self):
        watch = self.watch()
        signs = {index: Sign(1, 0) for index in range(3)}
        assert all(watch(now, signs | {2: Sign(now, 0)}, {}) is None for now in range(1, 12))
        assert watch(12, signs | {2: Sign(12, 0)}, {}) == "second has died or hangs: it gave no sign of life for 10 s"

    def test_one_that_never_gave_a_sign_is_dead_as_well(self):
        watch = self.watch()
        assert all(watch(now, {1: Sign(now, 0)}, {}) is None for now in range(1, 11))
        assert watch(11, {1: Sign(11, 0)}, {}) == "third has died or hangs: it gave no sign of life for 10 s"

    def test_a_process_that_was_frozen_itself_does_not_blame_the_others(self):
        watch = self.watch()
        signs = {index: Sign(1, 0) for index in range(3)}
        assert watch(1, signs, {}) is None
        assert watch(500, signs, {}) is None
        assert watch(501, {index: Sign(2, 0) for index in range(3)}, {}) is None

    def test_a_failure_is_told_at_once_and_ones_own_is_not(self):
        assert self.watch()(1, {}, {0: "mine"}) is None
        assert self.watch()(1, {}, {2: "no data"}) == "third has failed (no data)"

    def test_one_that_others_wait_for_hangs_after_their_patience(self):
        watch = self.watch()

        def at(now, meetings):
            signs = {1: Sign(now, 8), 2: Sign(now, meetings)}
            return watch(now, signs, {}, waiting=Waiting(8, 1.0))

        assert all(at(now, 7) is None for now in range(2, 102))
        # It has left the meeting, which this process is about to do.
        assert at(102, 9) is None
        assert at(103, 7) == "third hangs: the others have waited for it for 100 s"

    def test_where_all_wait_in_the_same_exchange_nobody_is_named(self):
        watch = self.watch()

        def at(now, last=8, **more):
            return watch(now, {1: Sign(now, 8), 2: Sign(now, last)}, {}, waiting=Waiting(8, 1.0, **more))

        # From when the last of them came.
        assert all(at(now, 7) is None for now in range(2, 51))
        assert all(at(now) is None for now in range(51, 152))
        # Files may be slow, and what comes after them is counted from its own beginning.
        assert at(152, files=True) is None
        assert all(at(now) is None for now in range(153, 254))
        assert at(254) == (
            "all 3 processes have been in the same exchange for 100 s: one of their devices, or the network between them, hangs"
        )


class Told(type(ALONE)):  # type: ignore[invalid-inheritance]  # what others say is given
    """One of several processes that say these codes."""

    def __init__(self, *codes):
        self.said_codes = codes
        self.count = len(codes)

    def codes(self, own):
        return [own, *self.said_codes[1:]]


def test_what_one_process_is_asked_all_do():
    assert meet(ALONE, 0, lacks_batch=False) == (None, [])
    assert meet(ALONE, 15, lacks_batch=False) == (Stop(15, 0), [])
    assert meet(Told(0, 2, 15), 0, lacks_batch=False) == (Stop(2, 1), [])
    assert meet(Told(0, 0, (1 << 16) + 15), 0, lacks_batch=True) == (Stop(15, 2), [0, 2])


def test_the_settings_of_a_run_do_not_keep_its_place():
    config = given("1")
    assert config.distributed.index == 1
    with pytest.raises(ConfigError, match="index 2 is none of 0 to 1"):
        given("2")
