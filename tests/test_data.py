"""Sources, protocols and the loader."""

import gzip
import json

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data import DataError, load, open_batches, open_source
from data.builtin import as_prose
from data.documents import AbstractSource, Shard, document_rank
from data.files import PLAIN_DOCUMENT
from data.loader import split_documents
from data.rows import MemoryRows, Protocol, make_row, pieces, with_bos


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


def first_batches(split, count, seed=3, workers=0, state=None):
    batches = open_batches(split, batch=4, seed=seed, workers=workers, state=state)
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


def test_the_number_of_workers_changes_nothing():
    split = split_of()
    none, _ = first_batches(split, 4)
    two, _ = first_batches(split, 4, workers=2)
    assert_equal(none, two)


def test_batches_of_one_sequence_are_the_rows_of_larger_ones():
    def rows(batch: int):
        batches = open_batches(split_of(), batch=batch, seed=0)
        read = [next(batches)["bytes"] for _ in range(8 // batch)]
        batches.close()
        return np.concatenate(read)

    np.testing.assert_array_equal(rows(1), rows(4))


def test_a_stream_has_one_reader():
    with pytest.raises(DataError, match="one worker process at most"):
        open_batches(split_of(streamed=True), batch=2, seed=0, workers=2)


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
    note = split_of("cut").notes[0]
    assert "are shorter than 32 bytes and left out by the protocol 'cut'" in note


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


LINES = [{"text": f"line {i} é", "code": f"code {i}"} for i in range(6)]


def write(path, kind):
    jsonl = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in LINES).encode()
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(LINES), path)
    else:
        path.write_bytes({"gz": gzip.compress, "zst": zstandard.compress, "plain": bytes}[kind](jsonl))


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
    (tmp_path / name).write_bytes(content)
    source = open_source(str(tmp_path / name))
    with pytest.raises(DataError, match=message):
        list(source.documents(source.shards()[0]))


@pytest.mark.parametrize("name", ["no-such-data", "hub:name-only", "hub:a/b/c", "hub:/x"])
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
    monkeypatch.setattr("data.fasta.STRETCH", 10)
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
        (b">protein\nACGT\nMKLV\n", r"genome.fa, line 3: 'L' is no nucleotide"),
        (b">x\nAC GT\n", r"line 2: ' ' is no nucleotide"),
    ],
)
def test_what_is_no_sequence_of_bases_is_refused(tmp_path, content, message):
    (tmp_path / "genome.fa").write_bytes(content)
    source = open_source(str(tmp_path / "genome.fa"))
    with pytest.raises(DataError, match=message):
        list(source.documents(source.shards()[0]))
