"""Sources, protocols and the loader."""

import dataclasses
import gzip
import json
import signal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import Batches, DataError, WorkerError, load, open_batches, open_source
from data.builtin import as_prose
from data.coverage import Coverage, shown_bytes
from data.documents import AbstractSource, Shard, document_rank
from data.files import PLAIN_DOCUMENT
from data.loader import split_documents
from data.places import Reading
from data.rows import HeldOutRows, MemoryRows, Protocol, make_row, pieces, with_bos
from data.splits import named_split
from data.stream import StreamRows
from data.stream_batches import StreamBatches
from experiments.config.presets import PRESETS
from experiments.training.data import DataNotes, data_record
from tests.conftest import needs


class Listed(AbstractSource):
    """Documents in memory, in two shards."""

    def __init__(self, documents, streamed=False):
        self._documents = documents
        self._streamed = streamed

    @property
    def name(self):
        return "listed"

    @property
    def streamed(self):
        return self._streamed

    def shards(self):
        return [Shard("even", 0), Shard("odd", 0)]

    def documents(self, shard):
        return iter(self._documents[0 if shard.name == "even" else 1 :: 2])


def documents(count=60, seed=0):
    rng = np.random.default_rng(seed)
    return [b"%d: " % i + bytes(rng.integers(97, 123, rng.integers(5, 120)).tolist()) for i in range(count)]


def first_batches(split, count, seed=3, workers=0, state=None, rows=None, lanes=1):
    batches = open_batches(split, batch=4, seed=seed, workers=workers, state=state, rows=rows, lanes=lanes)
    result = [next(batches) for _ in range(count)]
    state = json.loads(json.dumps(batches.state()))
    batches.close()
    return result, state


def assert_equal(left, right):
    for a, b in zip(left, right, strict=True):
        for name in ("bytes", "segments", "mask"):
            np.testing.assert_array_equal(a[name], b[name])


def split_of(protocol: Protocol = "crop", length=32, streamed=False, docs=None):
    source = Listed(documents() if docs is None else docs, streamed)
    return load(source, length=length, protocol=protocol, held_out_share=0.2, held_out_bytes=300)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("protocol", ["crop", "cut", "pack"])
class TestBatches:
    def test_the_same_seed_gives_the_same_batches_and_another_one_others(self, protocol, streamed):
        split = split_of(protocol, streamed=streamed)
        once, _ = first_batches(split, 6)
        again, _ = first_batches(split, 6)
        other, _ = first_batches(split, 6, seed=4)
        assert_equal(once, again)
        assert any((a["bytes"] != b["bytes"]).any() for a, b in zip(once, other, strict=True))

    @pytest.mark.parametrize("step", [0, 1, 7])
    def test_any_step_can_be_resumed_from_its_state(self, protocol, streamed, step):
        split = split_of(protocol, streamed=streamed)
        whole, _ = first_batches(split, step + 5)
        _, state = first_batches(split, step)
        rest, _ = first_batches(split, 5, state=state)
        assert_equal(whole[step:], rest)

    def test_processes_read_the_parts_of_the_same_batches_and_go_on_in_another_number(self, protocol, streamed):
        split = split_of(protocol, streamed=streamed)
        whole, state = first_batches(split, 5)
        halves = [first_batches(split, 2, rows=slice(start, start + 2)) for start in (0, 2)]
        # What a checkpoint holds of the data is the same whoever saves it.
        assert halves[0][1] == halves[1][1]
        uneven = [first_batches(split, 3, state=halves[0][1], rows=rows) for rows in (slice(0, 3), slice(3, 4))]
        assert all(later == state for _, later in uneven)
        for parts, expected in (([part for part, _ in halves], whole[:2]), ([part for part, _ in uneven], whole[2:])):
            for number, batch in enumerate(expected):
                for name in ("bytes", "segments", "mask"):
                    np.testing.assert_array_equal(np.concatenate([part[number][name] for part in parts]), batch[name])

    def test_no_row_holds_a_held_out_document(self, protocol, streamed):
        split = split_of(protocol, streamed=streamed)
        held_out = set(split_documents(documents(), 0.2, "it")[1])
        batches, _ = first_batches(split, 20)
        for batch in batches:
            for row in range(4):
                for segment in np.unique(batch["segments"][row][batch["mask"][row]]):
                    here = batch["mask"][row] & (batch["segments"][row] == segment)
                    part = bytes(batch["bytes"][row][here].tolist()).removeprefix(b"\xfe")
                    assert len(part) < 4 or not any(part in document for document in held_out)


@pytest.mark.parametrize("streamed", [False, True])
def test_the_number_of_workers_changes_nothing(streamed):
    split, lanes = split_of(streamed=streamed), 2 if streamed else 1
    none, _ = first_batches(split, 8, lanes=lanes)
    two, state = first_batches(split, 3, workers=2, lanes=lanes)
    rest, _ = first_batches(split, 5, state=state, lanes=lanes)
    assert_equal(none, [*two, *rest])


def test_worker_processes_of_a_stream_make_every_batch_once():
    def batches(first, every):
        found = StreamBatches(StreamRows(Listed(documents()), 32, "crop", 0.2, seed=3), 4, None)
        found.set_slice(slice(first, None, every))
        return [batch for batch, _ in zip(found, range(4), strict=False)]

    whole = batches(0, 1)
    assert_equal(whole[1:4:2], batches(1, 2)[:2])
    assert [batch["state"] for batch in whole[2:3]] == [batches(2, 3)[0]["state"]]


def test_a_process_may_take_its_rows_of_each_batch():
    split = split_of()
    none, _ = first_batches(split, 4)
    own, _ = first_batches(split, 4, workers=2, rows=slice(1, 4))
    assert_equal([{name: batch[name][1:] for name in ("bytes", "segments", "mask")} for batch in none], own)


def test_batches_of_one_sequence_are_the_rows_of_larger_ones():
    def rows(batch: int):
        batches = open_batches(split_of(), batch=batch, seed=0)
        read = [next(batches)["bytes"] for _ in range(8 // batch)]
        batches.close()
        return np.concatenate(read)

    np.testing.assert_array_equal(rows(1), rows(4))


def test_crops_begin_anywhere_and_keep_their_length():
    docs = [bytes(range(97, 123)) * 40, b"other"]
    rows = MemoryRows(docs, 16, "crop", random=True)
    rng = np.random.default_rng(0)
    starts = {int(rows.row(0, rng)["bytes"][0]) for _ in range(300)}
    assert len(starts) > 20
    assert rows.row(0, rng)["mask"].all()


def test_cut_keeps_long_documents_only_and_says_how_many_it_left():
    rows = MemoryRows([b"x" * 31, b"y" * 30, b"z" * 100], 32, "cut", random=True)
    assert len(rows) == 2
    assert rows.dropped == 1
    assert bytes(rows.row(1, None)["bytes"].tolist()) == b"\xfe" + b"z" * 31
    split = split_of("cut")
    short = sum(len(document) < 31 for document in split.training or ())
    assert f"; {short} of them are shorter than 32 bytes and left out; --data.protocol crop or pack" in split.notes[0]
    assert "held-out documents of listed are shorter than 32 bytes and not evaluated" in split.notes[1]


@pytest.mark.parametrize("protocol", ["crop", "cut", "pack"])
@pytest.mark.parametrize("size", [5, 30, 31, 32, 100])
def test_a_protocol_can_show_what_it_says(protocol, size):
    """Compared with the bytes that occur in many sampled rows."""
    document = bytes(range(100, 100 + size))
    rows, rng = MemoryRows([document], 32, protocol, random=True), np.random.default_rng(0)
    drawn = [rows.row(number, rng) for _ in range(300) for number in range(len(rows))]
    shown = {value for row in drawn for value in row["bytes"][row["mask"]].tolist()} - {254}
    assert shown_bytes(size, 32, protocol) == len(shown)


def genome_of(path, bases=40_000):
    """A source with one chromosome, with a run of unknown bases in its middle."""
    sequence = bytes(np.random.default_rng(0).choice(list(b"ACGT"), bases).tolist())
    path.write_bytes(b">chr1\n" + sequence[: bases // 2] + b"\n" + b"N" * 500 + b"\n" + sequence[bases // 2 :] + b"\n")
    return open_source(str(path))


def test_presets_for_dna_can_show_the_whole_genome_and_cut_says_how_little_it_can(tmp_path, monkeypatch):
    monkeypatch.setattr("data.fasta.DOCUMENT_BASES", 10_000)
    source = genome_of(tmp_path / "genome.fa")

    def loaded(protocol):
        return load(source, length=80, protocol=protocol, held_out_share=0.05, held_out_bytes=400)

    for name in ("dna-transformer", "dna-mamba", "dna-hnet", "dna-hnet-mamba"):
        whole = loaded(PRESETS[name].data.protocol)
        assert whole.coverage is not None
        assert whole.coverage.share == 1.0
        assert any("can show 100 % of the bytes of the 3 training documents" in note for note in whole.notes)
        assert not any("--data.protocol" in note for note in whole.notes)
    little = loaded("cut")
    assert little.coverage == Coverage(documents=3, left_out=0, bytes=30_000, shown=3 * 79)
    assert any(
        "can show 0.79 % of the bytes" in note and "--data.protocol crop or pack" in note for note in little.notes
    )
    assert "500 unknown bases and gaps (N, ., -, *)" in little.notes[0]


@pytest.mark.parametrize("protocol", ["crop", "cut", "pack"])
def test_a_stream_counts_what_it_has_read(protocol):
    """After the first epoch, the coverage of a stream is that of all its training documents."""
    memory, stream = split_of(protocol), split_of(protocol, streamed=True)
    share = stream.held_out_share
    training = [document for document in documents() if document_rank(document) >= share]
    expected = Coverage()
    for document in training:
        expected = expected.plus(len(document), 32, protocol)
    rows = StreamRows(stream.source, 32, protocol, share, seed=0)
    again = next(row for row in rows if row.epochs >= 1)
    # The first row of the second epoch may follow documents that are too short for a row, or contain several documents.
    for document in stream.source.documents(stream.source.shards()[rows.order(1, 2)[0]]):
        if expected.documents < again.coverage.documents and document_rank(document) >= share:
            expected = expected.plus(len(document), 32, protocol)
    assert again.coverage == expected
    assert memory.coverage is not None
    assert memory.coverage.share == pytest.approx(expected.share, abs=0.1)
    assert stream.coverage is None


@pytest.mark.parametrize("streamed", [False, True])
def test_epochs_are_counted_and_go_on_from_any_state(streamed):
    # A stream without held-out documents.
    split = dataclasses.replace(split_of("cut", streamed=streamed), held_out_share=0.0)
    rows = sum(len(document) >= 31 for document in (documents() if split.training is None else split.training))
    batches, counted, state = open_batches(split, batch=4, seed=0), [], {}
    for _ in range(30):
        next(batches)
        counted.append(batches.epochs)
        state = json.loads(json.dumps(batches.state())) if len(counted) == 10 else state
    batches.close()
    # The shuffle buffer of a stream has 1024 rows, many epochs of this data set.
    np.testing.assert_allclose(counted, np.arange(1, 31) * 4 / rows, rtol=0.05 if streamed else 1e-12)
    assert counted[0] < 0.2 < 2 < counted[-1]
    resumed = open_batches(split, batch=4, seed=0, state=state)
    assert resumed.epochs == counted[9]
    for expected in counted[10:]:
        next(resumed)
        assert resumed.epochs == expected
    resumed.close()


def test_a_run_says_once_that_a_second_epoch_begins_and_that_a_stream_shows_little():
    split = split_of("cut", streamed=True)
    batches = open_batches(split, batch=4, seed=0)
    notes = DataNotes(split, batches)
    said = []
    for step in range(1, 50):
        next(batches)
        said += notes.after(step, 50, batches.reading)
    batches.close()
    assert len(said) == 2
    assert "of the bytes of the" in said[0]
    assert "training documents of listed read so far" in said[0]
    assert "--data.protocol crop or pack" in said[0]
    assert "a second epoch begins" in said[1]
    (again,) = DataNotes(split, batches).after(50, 60, batches.reading)
    assert "read so far" in again
    assert data_record(batches.reading)["epochs"] == batches.epochs > 1
    assert data_record(batches.reading)["shown_fraction"] == pytest.approx(0.35, abs=0.01)


def test_packing_loses_no_byte_and_numbers_the_documents():
    docs = documents()
    rows = MemoryRows(docs, 32, "pack", random=True, order_seed=5)
    packed = [rows.row(i, None) for i in range(len(rows))]
    content = np.concatenate([row["bytes"][row["mask"]] for row in packed])
    assert sorted(bytes(content.tolist()).split(b"\xfe")[1:]) == sorted(docs)
    for row in packed:
        begins = np.flatnonzero(row["bytes"][1:] == 254) + 1
        changes = np.flatnonzero(np.diff(row["segments"])[: int(row["mask"].sum()) - 1]) + 1
        np.testing.assert_array_equal(begins, changes)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 200), st.integers(2, 50))
def test_side_by_side_pieces_cover_a_document_once(size, length):
    cut = pieces(size, length, "crop", random=False)
    covered = [i for piece in cut for i in range(piece.start or 0, piece.stop)]
    assert covered == list(range(size))


def test_padding_is_masked():
    row = make_row([with_bos(b"ab"), with_bos(b"c")], 8)
    np.testing.assert_array_equal(row["mask"], [True] * 5 + [False] * 3)
    np.testing.assert_array_equal(row["segments"][:5], [0, 0, 0, 1, 1])


def test_what_is_held_out_depends_on_content_alone():
    docs = documents()
    _, held_out = split_documents(docs, 0.2, "it")
    _, shuffled = split_documents([*docs[::-1], b"one more"], 0.2, "it")
    assert set(held_out) <= set(shuffled)
    assert 0 < len(held_out) < len(docs) / 2
    assert all(0 <= document_rank(document) < 1 for document in docs)


def test_both_sides_of_the_split_have_text_even_of_two_documents():
    training, held_out = split_documents([b"one", b"two"], 1e-9, "it")
    assert len(training) == len(held_out) == 1
    with pytest.raises(DataError, match="two are needed"):
        split_documents([b"same", b"same"], 0.5, "it")


def test_the_fingerprint_changes_with_the_data():
    assert split_of().fingerprint == split_of().fingerprint
    assert split_of().fingerprint != split_of(docs=documents(seed=1)).fingerprint


def test_held_out_rows_do_not_depend_on_a_run():
    rows = split_of().held_out_rows(200)
    assert_equal(rows, split_of().held_out_rows(200))
    assert len(rows) == 200 // 32


@pytest.mark.parametrize("protocol", ["crop", "cut", "pack"])
def test_held_out_rows_know_their_documents_and_copies_share_a_number(protocol):
    twice = documents(8) + documents(8)[:4]
    rows = MemoryRows(twice, 32, protocol, random=False)
    held_out = HeldOutRows(rows, np.arange(len(rows)))
    parts: dict[int, bytes] = {}
    for row in held_out:
        assert ((row["documents"] < 0) == ~row["mask"]).all()
        for segment in np.unique(row["segments"][row["mask"]]):
            here = row["mask"] & (row["segments"] == segment)
            (number,) = set(row["documents"][here].tolist())
            parts[number] = parts.get(number, b"") + row["bytes"][here].tobytes()
    distinct = set(twice) if protocol != "cut" else {document for document in twice if len(document) >= 31}
    assert len(parts) == len(distinct)
    whole = {document[:31] if protocol == "cut" else document for document in distinct}
    assert {part.split(b"\xfe")[1] for part in parts.values()} == whole
    assert [len(held_out[1:3]), len(held_out[-1]["bytes"])] == [2, 32]


def test_validation_on_less_than_was_asked_for_is_said():
    split = load(Listed(documents()), length=32, protocol="crop", held_out_share=0.2, held_out_bytes=10**6)
    assert f"{len(split.held_out)} rows of 32 bytes; --evaluation.bytes asks for 31,250" in split.notes[-1]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("test-00000-of-00002.parquet", "test"),
        ("data/validation-0.jsonl.gz", "validation"),
        ("valid/0.jsonl", "validation"),
        ("en/dev/part1.json", "validation"),
        ("data/my_val.parquet", "validation"),
        ("held-out.jsonl", "validation"),
        ("held_out/a.parquet", "validation"),
        ("Test/a.parquet", "test"),
        ("data/train-0.parquet", "training"),
        ("test/train-0.parquet", "training"),
        ("sample/100BT/000_00000.parquet", None),
        ("data/CC-MAIN-2013-20/000_00000.parquet", None),
        ("latest/contest-0.parquet", None),
        ("file-000000000007.json.gz", None),
    ],
)
def test_files_are_recognised_as_a_split_by_their_names(path, expected):
    assert named_split(path) == expected


def test_held_out_files_of_a_folder_never_train(tmp_path):
    for name in ("test/train/part-0", "test/train/part-1", "test/validation", "test/test"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"text": f"{name} {number} " * 5}) for number in range(9)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    (tmp_path / "test/test_code.py").write_text("assert True  # source code, whatever its name is")
    split = load(open_source(str(tmp_path)), length=32, protocol="crop", held_out_share=0.2, held_out_bytes=9999)
    assert split.training is not None
    assert len(split.training) == 19
    assert not any(b"valid" in document or b"test/test" in document for document in split.training)
    rows = [row["bytes"][row["mask"]].tobytes() for row in split.held_out_rows(9999)]
    assert sum(row.startswith(b"\xfetest/validation") for row in rows) == 9
    assert "1 file(s)" in split.notes[0]
    assert "1 of its test split" in split.notes[0]
    test = split.source.test_source
    assert test is not None
    documents = [one for shard in test.shards() for one in test.documents(shard)]
    assert [one.startswith(b"test/test") for one in documents] == [True] * 9
    (tmp_path / "test/validation.jsonl").unlink()
    of_both = open_source(str(tmp_path))
    held_out, test = of_both.held_out_source, of_both.test_source
    assert held_out is not None
    assert test is not None
    assert held_out.shards() == test.shards()
    alone = open_source(str(tmp_path / "test" / "test.jsonl"))
    assert alone.held_out_source is None
    assert len(alone.shards()) == 1


LINES = [{"text": f"line {i} é", "code": f"code {i}"} for i in range(6)]


def write(path, kind):
    jsonl = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in LINES).encode()
    if kind == "parquet":
        pyarrow, parquet = needs("parquet", "pyarrow"), needs("parquet", "pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(LINES), path)
    else:
        compress = needs("zstd", "zstandard").compress if kind == "zst" else {"gz": gzip.compress, "plain": bytes}[kind]
        path.write_bytes(compress(jsonl))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.jsonl", "plain"),
        ("a.json.gz", "gz"),
        ("a.jsonl.zst", "zst"),
        ("a.parquet", "parquet"),
        ("a.ndjson", "plain"),
    ],
)
def test_structured_files_give_their_text_field(tmp_path, name, kind):
    write(tmp_path / name, kind)
    for field in ("text", "code"):
        source = open_source(str(tmp_path / name), text_field=field)
        got = [document for part in source.shards() for document in source.documents(part)]
        assert got == [line[field].encode() for line in LINES]
    source = open_source(str(tmp_path / name), text_field="body")
    with pytest.raises(DataError, match=r"has no text field 'body'.*--data\.text-field"):
        list(source.documents(source.shards()[0]))


def test_folders_and_globs_give_every_file_but_hidden_ones(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "sub/a.txt", ".hidden.txt"):
        (tmp_path / name).write_text(name)
    for pattern, expected in [(tmp_path, [b"b.txt", b"sub/a.txt"]), (tmp_path / "*.txt", [b"b.txt"])]:
        source = open_source(str(pattern))
        assert [document for part in source.shards() for document in source.documents(part)] == expected


def test_a_long_text_file_is_cut_at_line_ends_without_loss(tmp_path):
    path = tmp_path / "long.txt"
    path.write_bytes(b"".join(b"line %d\n" % i for i in range(30_000)))
    source = open_source(str(path))
    got = list(source.documents(source.shards()[0]))
    assert len(got) > 3
    assert b"".join(got) == path.read_bytes()
    assert all(document.endswith(b"\n") and len(document) < PLAIN_DOCUMENT + 20 for document in got)


@pytest.mark.parametrize("bad", [b"ok\nbad \xfe here", b"bad \xff", b"latin \xe9 1"])
def test_what_is_not_utf_8_is_refused_with_its_file_and_offset(tmp_path, bad):
    (tmp_path / "bad.txt").write_bytes(bad)
    source = open_source(str(tmp_path / "bad.txt"))
    with pytest.raises(DataError, match=r"bad\.txt.* is not UTF-8 text: byte 0x.. at offset \d+"):
        list(source.documents(source.shards()[0]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{oops\n', r"a\.jsonl, line 2, is not JSON"),
        ("a.jsonl", b"[1]\n", r"line 1, has no text field 'text': it has a list"),
        ("a.json.gz", b"not gzip", r"cannot read .*a\.json\.gz"),
        ("a.json.gz", gzip.compress(b'{"text": "x"}\n' * 999, mtime=0)[:-20], r"cannot read .*a\.json\.gz"),
        ("a.jsonl.zst", b"not zstd", r"cannot read .*a\.jsonl\.zst"),
        ("a.parquet", b"PAR1 not really", r"cannot read .*a\.parquet"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "half of a surrogate pair"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, message):
    for suffix, extra, module in ((".zst", "zstd", "zstandard"), (".parquet", "parquet", "pyarrow")):
        if name.endswith(suffix):
            needs(extra, module)
    (tmp_path / name).write_bytes(content)
    source = open_source(str(tmp_path / name))
    with pytest.raises(DataError, match=message):
        list(source.documents(source.shards()[0]))


@pytest.mark.parametrize("name", ["no-such-data", "hub:name-only", "hub:a/b/", "hub:/x", "hub:a/b@", "hub:a/b/../c"])
def test_unknown_names_say_what_there_is(name):
    with pytest.raises(DataError, match=r"codeparrot|hub:owner/name"):
        open_source(name)


def test_pythons_own_text_is_there():
    docs, code = open_source("docs"), open_source("stdlib")
    prose = list(docs.documents(docs.shards()[0]))
    assert sum(map(len, prose)) > 1_500_000
    assert not any(b"  " in document for document in prose)
    assert sum(len(document) for document in code.documents(code.shards()[0])) > 8_000_000


def test_prose_has_one_paragraph_a_line():
    assert as_prose("  One\n  line.\n\n\n  And\tmore.\n") == "One line.\nAnd more."


GENOME = b""">chr1 first
ACGTacgt
NNNNNNacg
t
; a comment

>chr2
GGCCnn-nTTRY*
"""


@pytest.mark.parametrize("name", ["genome.fa", "genome.fasta.gz", "genome.fna"])
def test_bases_are_read_without_headers_and_unread_stretches(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(GENOME) if name.endswith(".gz") else GENOME)
    source = open_source(str(path))
    documents = [document for shard in source.shards() for document in source.documents(shard)]
    assert documents == [b"ACGTACGT", b"ACGT", b"GGCC", b"TTRY"]


def test_a_chromosome_is_several_documents(tmp_path, monkeypatch):
    monkeypatch.setattr("data.fasta.DOCUMENT_BASES", 10)
    lines = b"".join(b"ACGTACG\n" for _ in range(9))
    (tmp_path / "genome.fa").write_bytes(b">long\n" + lines)
    source = open_source(str(tmp_path / "genome.fa"))
    documents = [document for shard in source.shards() for document in source.documents(shard)]
    assert b"".join(documents) == b"ACGTACG" * 9
    assert max(map(len, documents)) == 10


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"ACGT\n", r"genome.fa, line 1: a FASTA file begins with a header"),
        (b">protein\nACGT\nMKLV\n", r"genome.fa, line 3: 'L' is not a nucleotide"),
        (b">x\nAC GT\n", r"line 2: ' ' is not a nucleotide"),
    ],
)
def test_what_is_no_sequence_of_bases_is_refused(tmp_path, content, message):
    (tmp_path / "genome.fa").write_bytes(content)
    source = open_source(str(tmp_path / "genome.fa"))
    with pytest.raises(DataError, match=message):
        list(source.documents(source.shards()[0]))


class Workers:
    """An iterator of batches that says whether SIGINT is held back, and ends like one whose worker process was killed."""

    def __init__(self):
        self.held_back = []

    def __next__(self):
        self.held_back.append(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        if len(self.held_back) == 3:
            raise RuntimeError("Worker process was terminated unexpectedly with exit code -9. Search the logs above.")
        return {"bytes": [], "segments": [], "mask": []}


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="signals are held back on Unix")
def test_processes_of_batches_are_not_stopped_by_an_interrupt_and_missed_when_they_are_killed():
    batches = object.__new__(Batches)
    workers = Workers()
    held = {"_iterator": workers, "_begun": False, "_step": 0, "_places": None, "_rows_per_epoch": 10}
    batches.__dict__.update(held, _batch=0, _rows=None, reading=Reading(0.0, None))
    next(batches)
    next(batches)
    with pytest.raises(WorkerError, match=r"ended from outside \(exit code -9\).* fewer --data.workers"):
        next(batches)
    assert workers.held_back == [True, False, False]
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
