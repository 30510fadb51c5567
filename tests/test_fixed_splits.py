"""Byte ranges of a file, training, validation and test text settled by the user, and corpora with a usual split."""

import dataclasses
import gzip
import hashlib
import zipfile
from pathlib import Path

import pytest
import zstandard

from data import DataError, FixedSplits, load, open_source
from data.documents import Extent
from data.fixed import CORPORA, Corpus
from data.ranges import check_cut_utf8, named_span
from experiments.config.presets import PRESETS
from experiments.scoring.texts import read_dataset
from experiments.training.data import load_split, open_data

TEXT = "".join(f"line {number}: the cat sat on the mat\n" for number in range(300)).encode()


@pytest.fixture
def corpus(tmp_path, monkeypatch) -> Path:
    """A corpus of the size of `TEXT` under the name enwik8, which lies in a file of that name."""
    known = Corpus("enwik8", len(TEXT), 8000, 9000, hashlib.sha256(TEXT).hexdigest())
    monkeypatch.setitem(CORPORA, "enwik8", known)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "enwik8").write_bytes(TEXT)
    return tmp_path / "enwik8"


def _documents(source) -> list[bytes]:
    return [document for shard in source.shards() for document in source.documents(shard)]


@pytest.mark.parametrize(
    ("offsets", "start", "stop"),
    [
        ("[:9e1]", 0, 90),
        ("[1_000:2000]", 1000, 2000),
        ("[ 5E2 : ]", 500, None),
        ("[:]", 0, None),
    ],
)
def test_a_range_is_one_document_whatever_the_file_is_packed_in(offsets, start, stop, tmp_path):
    plain = tmp_path / "text"
    plain.write_bytes(TEXT)
    (tmp_path / "text.gz").write_bytes(gzip.compress(TEXT))
    (tmp_path / "text.zst").write_bytes(zstandard.ZstdCompressor().compress(TEXT))
    with zipfile.ZipFile(tmp_path / "text.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("folder/text", TEXT)
    for name in ("text", "text.gz", "text.zst", "text.zip"):
        source = open_source(f"{tmp_path / name}{offsets}")
        assert _documents(source) == [TEXT[start:stop]]
        assert not source.streamed


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("text[5:5]", "is empty"),
        ("text[9:5]", "is empty"),
        ("text[-5:]", "'-5' is no number of bytes"),
        ("text[1_:]", "'1_' is no number of bytes"),
        ("text[1.5e3:]", "'1.5e3' is no number of bytes"),
        ("text[:9e99]", "ends behind the end of the file, which has 9,790 bytes"),
        ("text[2e6:3e6]", "starts behind the end of the file, which has 9,790 bytes"),
        ("text[9790:]", "starts behind the end of the file, which has 9,790 bytes"),
        ("nothing[:5]", "there is no file"),
        ("lines.jsonl[:5]", "holds records"),
        ("two.zip[:5]", "holds 2 files"),
        ("broken.zip[:5]", "cannot read"),
        ("cut.gz[:5000]", "cannot read"),
        ("bytes[:9]", "is not UTF-8 text"),
    ],
)
def test_what_cannot_be_taken_is_said(name, said, tmp_path):
    (tmp_path / "text").write_bytes(TEXT)
    (tmp_path / "lines.jsonl").write_bytes(b"{}\n")
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.writestr("a", "a")
        archive.writestr("b", "b")
    (tmp_path / "broken.zip").write_bytes(b"PK\3\4 no archive")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(TEXT)[:200])
    (tmp_path / "bytes").write_bytes(b"abc\xff\xfe defg")
    with pytest.raises(DataError, match=said.replace("[", r"\[")):
        _documents(open_source(f"{tmp_path / name}"))


def test_brackets_in_the_name_of_a_file_are_no_offsets(tmp_path):
    (tmp_path / "a[1:2].txt").write_bytes(TEXT)
    (tmp_path / "a[1:2]").write_bytes(TEXT)
    assert named_span(str(tmp_path / "a[1:2]")) is None
    assert b"".join(_documents(open_source(str(tmp_path / "a[1:2]")))) == TEXT


def test_a_range_may_cut_characters_at_its_ends_and_nowhere_else():
    content = "日本語のテキスト🙂é".encode()
    for start in range(len(content)):
        for stop in range(start + 1, len(content) + 1):
            check_cut_utf8(content[start:stop], "here")
    for broken in (b"a\x80b", b"\x80\x80\x80\x80a", b"a\xe6\xc3", b"\xe6a", b"ab\xff", b"\xf8"):
        with pytest.raises(DataError, match="is not UTF-8"):
            check_cut_utf8(broken, "here")


def test_extents_overlap_where_they_share_a_byte():
    assert Extent("one", 0, 10).overlaps(Extent("one", 9, 20))
    assert Extent("one", 0).overlaps(Extent("one", 5, 6))
    assert Extent("one", 3).overlaps(Extent("one", 5))
    assert not Extent("one", 0, 10).overlaps(Extent("one", 10, 20))
    assert not Extent("one", 10).overlaps(Extent("one", 0, 10))
    assert not Extent("one", 0, 10).overlaps(Extent("other", 0, 10))


@pytest.mark.parametrize("name", ["enwik8", "enwik8:enwik8", "enwik8:packed.gz"])
def test_a_corpus_has_its_usual_split(name, corpus):
    (corpus.parent / "packed.gz").write_bytes(gzip.compress(TEXT))
    source = open_source(name)
    assert source.name == "enwik8"
    held_out, test = source.held_out_source, source.test_source
    assert held_out is not None
    assert test is not None
    assert [_documents(part) for part in (source, held_out, test)] == [[TEXT[:8000]], [TEXT[8000:9000]], [TEXT[9000:]]]
    split = load(source, length=64, protocol="crop", held_out_share=0.05, held_out_bytes=10_000)
    assert list(split.training or ()) == [TEXT[:8000]]
    assert sum(int(row["mask"].sum()) for row in split.held_out_rows(10_000)) == 1001  # with BOS


@pytest.mark.parametrize("content", [TEXT + b"x", TEXT[:-1], TEXT.replace(b"cat", b"dog")])
def test_another_text_is_no_corpus(content, corpus):
    corpus.write_bytes(content)
    with pytest.raises(DataError, match="is not enwik8"):
        open_source("enwik8")


def test_a_corpus_that_is_not_there(corpus, tmp_path):
    corpus.unlink()
    with pytest.raises(DataError, match="neither in this folder nor in "):
        open_source("enwik8", cache=tmp_path / "cache")
    with pytest.raises(DataError, match="there is no file elsewhere"):
        open_source("enwik8:elsewhere")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "enwik8.gz").write_bytes(gzip.compress(TEXT))
    assert isinstance(open_source("enwik8", cache=tmp_path / "cache"), FixedSplits)


def _config(**data):
    tiny = PRESETS["tiny"]
    evaluation = dataclasses.replace(tiny.evaluation, bytes=512)
    settings = dataclasses.replace(tiny.data, protocol="crop", **data)
    return dataclasses.replace(tiny, dataset="nowhere", length=64, batch=2, data=settings, evaluation=evaluation)


def test_the_user_settles_the_splits(tmp_path):
    text = tmp_path / "text"
    text.write_bytes(TEXT)
    config = _config(train=f"{text}[:8000]", valid=f"{text}[8000:9000]", test=f"{text}[9000:]")
    split = load_split(config)
    assert list(split.training or ()) == [TEXT[:8000]]
    assert split.held_out_rows(64)[0]["bytes"].tobytes() in b"\xfe" + TEXT[8000:9000]
    test = open_data(config.dataset, config.data).test_source
    assert test is not None
    assert _documents(test) == [TEXT[9000:]]


@pytest.mark.parametrize(("train", "valid"), [("[:8000]", "[7999:9000]"), ("", ""), ("[:]", "[3:9]"), ("", "[9e3:]")])
def test_validation_text_is_never_in_the_training_text(train, valid, tmp_path):
    text = tmp_path / "text"
    text.write_bytes(TEXT)
    with pytest.raises(DataError, match="have text in common"):
        load_split(_config(train=f"{text}{train}", valid=f"{text}{valid}"))


def test_one_document_is_not_cut_to_its_start(tmp_path):
    (tmp_path / "text").write_bytes(TEXT)
    (tmp_path / "valid").write_bytes(TEXT[:5000])
    config = _config(train=f"{tmp_path / 'text'}[:]", valid=str(tmp_path / "valid"))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, protocol="cut"))
    with pytest.raises(DataError, match="is one document, and the protocol 'cut' shows only its first 64 bytes"):
        load_split(config)


def test_evaluation_reads_the_text_that_training_never_does(corpus):
    data = PRESETS["tiny"].data
    read = {
        split: read_dataset("enwik8", split, data, 2 * len(TEXT)).documents for split in ("held-out", "test", "all")
    }
    assert read == {"held-out": (TEXT[8000:9000],), "test": (TEXT[9000:],), "all": (TEXT[:8000], TEXT[8000:9000])}
    (corpus.parent / "own.txt").write_bytes(TEXT)
    with pytest.raises(DataError, match="has no settled test text"):
        read_dataset("own.txt", "test", data, None)
