"""Data sets of the hub, through the real client, against a hub on this machine."""

import contextlib
import gzip
import json
import re
import threading
import time

import pytest
from huggingface_hub import constants

from data import DataError, load, open_batches
from data.hub import HubSource
from data.hub_names import HUB_DATASETS, HubDataset, hub_dataset
from data.hub_requests import RequestError, request
from tests.hub_server import hub

REPOSITORY = "someone/text"


def shard(number, documents=40):
    lines = [json.dumps({"content": f"shard {number} document {i} " * 9}) for i in range(documents)]
    return gzip.compress("\n".join(lines).encode(), mtime=0)


FILES = {f"data/part-{number}.json.gz": shard(number) for number in range(3)} | {"README.md": b"# text\n"}


@pytest.fixture(autouse=True)
def no_outside_settings(monkeypatch, tmp_path):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "theirs"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)


@pytest.fixture
def server():
    with hub(REPOSITORY, FILES) as running:
        yield running


def source_at(server, tmp_path, waits=None, patterns=("*.json.gz",), **settings):
    dataset = HubDataset("mine", REPOSITORY, patterns=patterns, text_field="content")
    endpoint = server if isinstance(server, str) else server.url
    wait = (lambda seconds: None) if waits is None else waits.append
    return HubSource(dataset, text_field="content", cache=tmp_path / "ours", endpoint=endpoint, wait=wait, **settings)


def read_all(source):
    return [document for part in source.shards() for document in source.documents(part)]


def downloads(server):
    return [request for request in server.requests if request.startswith("GET")]


def test_shards_are_listed_once_and_downloaded_when_needed(server, tmp_path):
    source = source_at(server, tmp_path)
    assert [part.name for part in source.shards()] == sorted(name for name in FILES if name.endswith(".gz"))
    assert [part.size for part in source.shards()] == [len(FILES[part.name]) for part in source.shards()]
    assert not downloads(server)
    assert next(source.documents(source.shards()[1])).startswith(b"shard 1 document 0")
    assert len(downloads(server)) == 1
    assert sum(request.startswith("tree") for request in server.requests) == 1


def test_a_second_run_asks_the_hub_for_nothing(server, tmp_path):
    first = read_all(source_at(server, tmp_path))
    server.requests.clear()
    assert read_all(source_at(server, tmp_path)) == first
    assert server.requests == []


def test_the_cache_stays_within_its_bound_by_dropping_the_oldest(server, tmp_path):
    size = max(map(len, FILES.values()))
    source = source_at(server, tmp_path, cache_bytes=2 * size)
    assert len(read_all(source)) == 120
    kept = sorted(path.name for path in (tmp_path / "ours").rglob("*.json.gz"))
    assert kept == ["part-1.json.gz", "part-2.json.gz"]
    assert len(read_all(source)) == 120


def test_no_shard_goes_for_one_that_another_process_has_downloaded(server, tmp_path, monkeypatch):
    size = len(FILES["data/part-1.json.gz"])
    source = source_at(server, tmp_path, cache_bytes=2 * size)
    shards = source.shards()
    for one in shards[:2]:
        list(source.documents(one))
    [last] = (tmp_path / "ours").rglob("part-1.json.gz")
    content = FILES["data/part-2.json.gz"]

    @contextlib.contextmanager
    def waits_for_another(path):
        last.with_name("part-2.json.gz").write_bytes(content)
        yield

    monkeypatch.setattr("data.hub.WeakFileLock", waits_for_another)
    asked = len(downloads(server))
    assert len(list(source.documents(shards[2]))) == 40
    assert len(downloads(server)) == asked
    assert {path.name for path in last.parent.iterdir()} == {f"part-{number}.json.gz" for number in range(3)}


def test_no_shard_goes_for_what_a_shard_replaces(server, tmp_path):
    size = len(FILES["data/part-1.json.gz"])
    source = source_at(server, tmp_path, cache_bytes=2 * size)
    shards = source.shards()
    list(source.documents(shards[1]))
    [kept] = (tmp_path / "ours").rglob("part-1.json.gz")
    kept.with_name("part-2.json.gz").write_bytes(FILES["data/part-2.json.gz"][:-1])
    assert len(list(source.documents(shards[2]))) == 40
    assert {path.name for path in kept.parent.iterdir()} == {"part-1.json.gz", "part-2.json.gz"}


def test_a_shard_larger_than_the_cache_is_refused(server, tmp_path):
    with pytest.raises(DataError, match=r"more than the cache may hold; raise --data\.cache-gib"):
        read_all(source_at(server, tmp_path, cache_bytes=10))


@pytest.mark.parametrize(
    ("kind", "fault"), [("info", "500"), ("GET", "500"), ("GET", "wrong content"), ("GET", "wrong size")]
)
def test_a_passing_fault_is_tried_again_with_growing_pauses(server, tmp_path, kind, fault):
    server.faults[kind] = [fault, fault]
    waits = []
    assert len(read_all(source_at(server, tmp_path, waits))) == 120
    assert waits == [1.0, 2.0]


def test_a_truncated_download_is_never_used(server, tmp_path):
    server.faults["GET"] = ["truncated"]
    assert len(read_all(source_at(server, tmp_path))) == 120
    assert len(downloads(server)) == 4


@pytest.mark.parametrize("fault", ["500", "wrong content", "wrong size"])
def test_a_lasting_fault_ends_in_one_clear_sentence_and_leaves_no_shard(server, tmp_path, fault):
    server.faults["GET"] = [fault] * 50
    with pytest.raises(
        DataError, match=r"cannot download data/part-0.json.gz for the data set mine .*docs, stdlib, or the path"
    ):
        read_all(source_at(server, tmp_path))
    assert not list((tmp_path / "ours").rglob("*.json.gz"))


def test_an_unreachable_hub_is_named_with_the_alternatives(server, tmp_path):
    with hub(REPOSITORY, FILES) as gone:
        address = gone.url
    with pytest.raises(DataError, match=rf"cannot list its files for the data set mine \(someone/text at {address}\)"):
        read_all(source_at(address, tmp_path))


@pytest.mark.parametrize(
    ("fault", "message"), [("gated", "accept its terms on the hub and set HF_TOKEN"), ("missing", "no such repository")]
)
def test_a_refusal_is_not_tried_again(server, tmp_path, fault, message):
    server.faults["info"] = [fault]
    waits = []
    with pytest.raises(DataError, match=message):
        read_all(source_at(server, tmp_path, waits))
    assert waits == []


def entry(**changes):
    lfs = {"oid": "ab" * 32, "size": 9, "pointerSize": 100}
    return {"type": "file", "path": "a.json.gz", "size": 9, "oid": "cd" * 20, "lfs": lfs, **changes}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *((name, "leads out of the data set") for name in ("../a.json.gz", "b/../../a.json.gz", "/etc/a.json.gz")),
        *(
            (name, "leads out of the data set")
            for name in ("b//a.json.gz", "./a.json.gz", "C:/a.json.gz", "b\\a.json.gz")
        ),
        *((name, "unsafe characters") for name in ("a\n.json.gz", "\x1b[31m.json.gz", "\ud800.json.gz")),
        *((name, "the cache uses itself") for name in ("manifest.json", "Manifest.JSON/a.json.gz", ".cache/a.json.gz")),
    ],
)
def test_names_of_files_that_lead_elsewhere_are_refused(server, tmp_path, name, message):
    server.answers["tree"] = json.dumps([entry(), entry(path=name)]).encode()
    with pytest.raises(DataError, match=message) as raised:
        source_at(server, tmp_path, patterns=("*.json.gz", "*.json")).shards()
    assert str(raised.value).isprintable()
    assert not list(tmp_path.rglob("*.json"))
    # The same list, kept by an earlier version or put there by somebody else.
    folder = tmp_path / "ours" / "hub" / "someone--text" / "all"
    folder.mkdir(parents=True)
    values = {"repository": REPOSITORY, "commit": "c", "files": [{"path": name, "size": 1, "sha256": None}]}
    (folder / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match=rf"manifest\.json is damaged \(.*{message}.*delete it"):
        source_at(server, tmp_path).shards()


def test_a_manifest_of_the_repository_is_no_shard_and_does_no_harm(tmp_path):
    with hub(REPOSITORY, {"manifest.json": b"{}", "sub/manifest.json": b"{}", "a.jsonl": lines("a")}) as server:
        source = source_called(f"hub:{REPOSITORY}", server, tmp_path)
        assert [shard.name for shard in source.shards()] == ["a.jsonl"]
        assert len(read_all(source)) == 30


@pytest.mark.parametrize(
    ("kind", "answer", "message"),
    [
        (
            "tree",
            json.dumps([{"type": "file", "path": "a.json.gz", "oid": "ab"}]),
            r"not what it should be \(KeyError: 'size'",
        ),
        ("tree", json.dumps([entry(path=7)]), "7 is no path of a file"),
        ("tree", json.dumps([entry(path=None)]), "None is no path of a file"),
        ("tree", json.dumps([entry(size="9")]), "the size of a.json.gz is '9'"),
        ("tree", json.dumps([entry(size=-1)]), "the size of a.json.gz is -1"),
        ("tree", json.dumps([entry(size=True)]), "the size of a.json.gz is True"),
        ("tree", json.dumps([entry(lfs={"oid": 5, "size": 9, "pointerSize": 9})]), "the SHA-256 of a.json.gz is 5"),
        ("tree", json.dumps([entry(), entry()]), "it has 'a.json.gz' twice"),
        ("tree", json.dumps({"error": "no"}), "not what it should be"),
        ("tree", "[" * 100_000, "not what it should be"),
        ("tree", "<html>", "not what it should be"),
        ("info", json.dumps({"id": REPOSITORY, "sha": 7}), "7 is no commit"),
        ("info", json.dumps({"id": REPOSITORY, "sha": "../x"}), "is no commit"),
        ("info", json.dumps({"sha": None}), "not what it should be"),
        ("info", "null", "not what it should be"),
    ],
)
def test_odd_answers_end_in_one_sentence_at_once(server, tmp_path, kind, answer, message):
    server.answers[kind] = answer.encode()
    waits = []
    with pytest.raises(DataError, match=message) as raised:
        source_at(server, tmp_path, waits).shards()
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) <= 600
    assert waits == []


@pytest.mark.parametrize("kind", ["GET", "tree"])
def test_a_hub_that_asks_for_an_hour_is_given_up_in_time(server, tmp_path, kind):
    server.faults[kind] = ["429 for an hour"] * 50
    start = time.monotonic()
    with pytest.raises(
        DataError, match=r"nothing has arrived for 0\.005 minutes; it may limit your rate, which HF_TOKEN"
    ):
        read_all(source_at(server, tmp_path, patience=0.3))
    assert time.monotonic() - start < 10
    assert not list((tmp_path / "ours").rglob("*.gz"))


def test_lasting_failures_of_a_request_end_after_half_a_minute(server, tmp_path):
    server.faults["GET"] = ["500"] * 50
    waits = []
    with pytest.raises(DataError, match="the hub answered 500"):
        read_all(source_at(server, tmp_path, waits))
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0]


def test_what_arrives_is_time_won(tmp_path):
    """A slow download is not given up while bytes arrive, however long it takes."""
    sizes = iter(range(100))
    gone = threading.Event()

    def slow():
        gone.wait(0.5)
        return "whole"

    assert request(slow, lambda seconds: None, patience=0.05, arrived=lambda: next(sizes)) == "whole"
    with pytest.raises(RequestError, match="nothing has arrived"):
        request(slow, lambda seconds: None, patience=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"files": []}, "it lists no files"),
        ({"files": 7}, "is damaged"),
        ({"files": [7]}, "is damaged"),
        ({"files": [{"path": "a", "size": 1}]}, "is damaged"),
        ({"files": [{"path": "a", "size": 1, "sha256": None, "more": 1}]}, "is damaged"),
        ({"files": [{"path": ["a"], "size": 1, "sha256": None}]}, "is no path of a file"),
        ({"repository": "else/where"}, "it is that of 'else/where'"),
        ({"commit": None}, "None is no commit"),
    ],
)
def test_a_kept_list_is_checked(server, tmp_path, changes, message):
    folder = tmp_path / "ours" / "hub" / "someone--text" / "all"
    folder.mkdir(parents=True)
    files = [{"path": "a.json.gz", "size": 1, "sha256": None}]
    kept = folder / "manifest.json"
    kept.write_text(json.dumps({"repository": REPOSITORY, "commit": "c", "files": files, **changes}))
    with pytest.raises(
        DataError, match=rf"manifest\.json is damaged .*{message}.*delete it" if message != "is damaged" else message
    ):
        source_at(server, tmp_path).shards()
    for content in (b"", bytes(99), b"[" * 100_000, b'{"files"'):
        kept.write_bytes(content)
        with pytest.raises(DataError, match=r"is damaged .*delete it"):
            source_at(server, tmp_path).shards()


def test_a_shard_is_in_its_place_only_once_it_is_checked(server, tmp_path, monkeypatch):
    """A process that ends before the check leaves nothing that a later one would take."""

    def ends(path, file):
        assert path.stat().st_size == file.size
        assert not list((tmp_path / "ours" / "hub" / "someone--text" / "all" / "data").glob("*"))
        raise KeyboardInterrupt

    source = source_at(server, tmp_path)
    source.shards()
    (tmp_path / "ours" / "hub" / "someone--text" / "all" / "data").mkdir()
    monkeypatch.setattr("data.hub._check_download", ends)
    with pytest.raises(KeyboardInterrupt):
        read_all(source)


def test_the_token_is_sent(tmp_path, monkeypatch):
    with hub(REPOSITORY, FILES, token="hf_secret") as server:
        with pytest.raises(DataError, match="HF_TOKEN is not set"):
            read_all(source_at(server, tmp_path))
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        assert len(read_all(source_at(server, tmp_path))) == 120


def test_offline_uses_what_is_cached_and_says_what_is_not(server, tmp_path, monkeypatch):
    source = source_at(server, tmp_path)
    first = list(source.documents(source.shards()[0]))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    server.requests.clear()
    again = source_at(server, tmp_path)
    assert list(again.documents(again.shards()[0])) == first
    with pytest.raises(DataError, match=r"cannot read data/part-1.json.gz .*this shard is not cached"):
        list(again.documents(again.shards()[1]))
    assert server.requests == []


def test_offline_reads_the_users_own_hugging_face_cache(tmp_path, monkeypatch):
    snapshot = tmp_path / "theirs" / "datasets--someone--text" / "snapshots" / ("a" * 40)
    for name, content in FILES.items():
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).write_bytes(content)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert len(read_all(source_at("http://127.0.0.1:9", tmp_path))) == 120


def test_offline_without_any_cache_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="no file of it is cached"):
        source_at("http://127.0.0.1:9", tmp_path).shards()


def test_a_repository_without_text_files_is_refused(tmp_path):
    with (
        hub(REPOSITORY, {"README.md": b"#"}) as server,
        pytest.raises(DataError, match=r"has no files like \*\.json\.gz"),
    ):
        source_at(server, tmp_path).shards()


def test_unnamed_data_sets_use_the_best_format_there_is(tmp_path):
    files = {"a.jsonl": b"{}", "b.parquet": b"PAR1", "c.txt": b"text"}
    with hub(REPOSITORY, files) as server:
        dataset = HubDataset("any", REPOSITORY)
        source = HubSource(dataset, text_field="text", cache=tmp_path, endpoint=server.url)
        assert [part.name for part in source.shards()] == ["b.parquet"]


def lines(name, count=30):
    return "\n".join(json.dumps({"text": f"{name} {number} " * 9}) for number in range(count)).encode()


SPLITS = {
    **{f"data/train-{number}.jsonl": lines(f"train {number}") for number in range(2)},
    "data/test-0.jsonl": lines("test"),
    "data/validation-0.jsonl": lines("validation"),
    "other/dev/part.jsonl": lines("dev"),
    "other/more.jsonl": lines("more"),
    "held/test.jsonl": lines("only a test"),
}


def source_called(name, server, tmp_path):
    return HubSource(
        hub_dataset(name), text_field="text", cache=tmp_path / "ours", endpoint=server.url, wait=lambda s: None
    )


def loaded(source):
    return load(source, length=64, protocol="pack", held_out_share=0.2, held_out_bytes=2000)


def text_of(rows):
    return b"".join(row["bytes"][row["mask"]].tobytes() for row in rows)


def test_a_validation_or_test_split_never_trains_and_is_the_held_out_text(tmp_path):
    with hub(REPOSITORY, SPLITS) as server:
        split = loaded(source_called(f"hub:{REPOSITORY}/data", server, tmp_path))
        assert split.held_out_share == 0.0
        held_out = text_of(split.held_out_rows(2000))
        assert b"validation" in held_out
        assert not any(word in held_out for word in (b"train", b"test"))
        batches = open_batches(split, batch=4, seed=0)
        trained = text_of(row for _ in range(60) for row in [next(batches)])
        batches.close()
        assert {b"train 0 %d " % number for number in range(30)} <= set(re.findall(rb"train 0 [0-9]+ ", trained))
        assert not any(word in trained for word in (b"validation", b"test", b"dev"))
        note = "1 file(s) of hub:someone/text/data named as a held-out split (data/validation-0.jsonl …) are the held-out text"
        assert split.notes[0].startswith(note)
        assert "1 of its test split (data/test-0.jsonl …) are for evaluation only" in split.notes[0]
        test = split.source.test_source
        assert test is not None
        assert test.name == f"hub:{REPOSITORY}/data (test split)"
        assert [shard.name for shard in test.shards()] == ["data/test-0.jsonl"]
        assert all(b"test" in document for document in test.documents(test.shards()[0]))
        assert test.test_source is None
        other = loaded(source_called(f"hub:{REPOSITORY}/other", server, tmp_path))
        assert [shard.name for shard in other.source.shards()] == ["other/more.jsonl"]
        assert b"dev" in text_of(other.held_out_rows(2000))
        assert other.source.test_source is None
        with pytest.raises(
            DataError,
            match=r"named as a test or validation split \(held/test.jsonl …\), which is never used for training",
        ):
            loaded(source_called(f"hub:{REPOSITORY}/held", server, tmp_path))
        with pytest.raises(DataError, match="it has no such folder or file"):
            loaded(source_called(f"hub:{REPOSITORY}/nowhere", server, tmp_path))


def test_each_split_may_have_a_format_of_its_own(tmp_path):
    files = {"train.jsonl": lines("train"), "test.parquet": b"PAR1", "notes.txt": b"notes"}
    with hub(REPOSITORY, files) as server:
        source = source_called(f"hub:{REPOSITORY}", server, tmp_path)
        assert [shard.name for shard in source.shards()] == ["train.jsonl"]
        held_out = source.held_out_source
        assert held_out is not None
        assert [shard.name for shard in held_out.shards()] == ["test.parquet"]
        assert held_out.held_out_source is None


def test_a_list_of_files_kept_by_an_earlier_version_is_split_too(server, tmp_path):
    source = source_called(f"hub:{REPOSITORY}", server, tmp_path)
    folder = tmp_path / "ours" / "hub" / "someone--text" / "all"
    folder.mkdir(parents=True)
    files = [{"path": name, "size": 1, "sha256": None} for name in ("test-0.parquet", "train-0.parquet")]
    (folder / "manifest.json").write_text(json.dumps({"repository": REPOSITORY, "commit": "c", "files": files}))
    assert [shard.name for shard in source.shards()] == ["train-0.parquet"]


def test_a_revision_is_read_at_its_own_commit_and_kept_apart(tmp_path):
    old = "0ld" + "0" * 37
    with hub(REPOSITORY, {"a.jsonl": lines("new")}, revisions={"v1": (old, {"a.jsonl": lines("old")})}) as server:
        for _ in range(2):
            for name, text in ((f"hub:{REPOSITORY}", b"new 0"), (f"hub:{REPOSITORY}@v1", b"old 0")):
                assert read_all(source_called(name, server, tmp_path))[0].startswith(text)
        assert sum(request.startswith("info") for request in server.requests) == 2
        with pytest.raises(DataError, match="it has no such revision"):
            source_called(f"hub:{REPOSITORY}@v9", server, tmp_path).shards()


def test_offline_a_revision_is_looked_for_in_the_users_own_cache(tmp_path, monkeypatch):
    root = tmp_path / "theirs" / "datasets--someone--text"
    for commit, word in (("a" * 40, "first"), ("b" * 40, "second")):
        (root / "snapshots" / commit).mkdir(parents=True)
        (root / "snapshots" / commit / "a.jsonl").write_bytes(lines(word))
    (root / "refs").mkdir()
    (root / "refs" / "v1").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for revision, word in (("v1", b"first"), ("b" * 40, b"second")):
        source = HubSource(hub_dataset(f"hub:{REPOSITORY}@{revision}"), text_field="text", cache=tmp_path / "ours")
        assert read_all(source)[0].startswith(word)
    with pytest.raises(DataError, match="no file of it of its revision v2 is cached"):
        HubSource(hub_dataset(f"hub:{REPOSITORY}@v2"), text_field="text", cache=tmp_path / "ours").shards()


@pytest.mark.parametrize(
    ("name", "repository", "folder", "revision"),
    [
        ("hub:a/b", "a/b", "", ""),
        ("hub:a/b/sample/350BT", "a/b", "sample/350BT", ""),
        ("hub:a/b@main", "a/b", "", "main"),
        ("hub:a/b/c@refs/convert/parquet", "a/b", "c", "refs/convert/parquet"),
    ],
)
def test_names_of_hub_data_sets(name, repository, folder, revision):
    dataset = hub_dataset(name)
    assert (dataset.name, dataset.repository, dataset.folder, dataset.revision) == (name, repository, folder, revision)


def test_streamed_batches_hold_out_documents_and_go_on_from_any_state(server, tmp_path):
    def split():
        return load(source_at(server, tmp_path), length=64, protocol="crop", held_out_share=0.2, held_out_bytes=500)

    batches = open_batches(split(), batch=4, seed=1)
    expected = [next(batches) for _ in range(3)]
    state = json.loads(json.dumps(batches.state()))
    expected += [next(batches) for _ in range(3)]
    batches.close()
    resumed = open_batches(split(), batch=4, seed=1, state=state)
    for batch in expected[3:]:
        assert (next(resumed)["bytes"] == batch["bytes"]).all()
    resumed.close()


def test_the_named_data_sets_lie_where_they_should():
    assert HUB_DATASETS["codeparrot"].repository == "transformersbook/codeparrot"
    assert HUB_DATASETS["codeparrot"].text_field == "content"
    assert HUB_DATASETS["codeparrot-clean"].held_out_repository == "codeparrot/codeparrot-clean-valid"
    assert HUB_DATASETS["fineweb"].folder == "sample/10BT"
    for name in ("fineweb", "fineweb-edu"):
        assert HUB_DATASETS[f"{name}-100BT"].repository == HUB_DATASETS[name].repository == f"HuggingFaceFW/{name}"
        assert HUB_DATASETS[f"{name}-100BT"].folder == "sample/100BT"


def test_processes_that_read_the_same_shards_download_each_once(server, tmp_path):
    """Threads stand for them: each has a source of its own. The list of files is there before, as where a run starts them."""
    shards = source_at(server, tmp_path).shards()
    begin, found = threading.Barrier(3), []

    def read():
        source = source_at(server, tmp_path)
        begin.wait()
        found.append(read_all(source))

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert len(found) == 3
    assert found[0] == found[1] == found[2] != []
    downloads = [request for request in server.requests if request.startswith("GET ")]
    assert len(downloads) == len(set(downloads)) == len(shards)
