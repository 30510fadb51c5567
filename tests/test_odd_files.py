"""Data files that are odd, damaged, cut short, or hostile."""

import gzip
import io
import json
import os

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from data import DataError, load, open_batches, open_source
from data.files import Files
from data.json_lines import MOST_VALUES
from data.plain import PLAIN_DOCUMENT, plain_documents
from experiments.training.data import DataNotes

TEXT = b"".join(b"line %d of a text that is not short\n" % number for number in range(60))


def read(path, text_field=None):
    source = open_source(str(path), text_field=text_field)
    return [document for shard in source.shards() for document in source.documents(shard)]


def notes_after_reading(path):
    source = open_source(str(path))
    for shard in source.shards():
        list(source.documents(shard))
    return source.notes


def blocks(text, size=500):
    """A Zstandard frame of several blocks, which says neither its size nor a checksum."""
    stream = zstandard.ZstdCompressor(write_checksum=False).compressobj()
    parts = [stream.compress(text[at : at + size]) + stream.flush(1) for at in range(0, len(text), size)]
    return b"".join(parts) + stream.flush()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt.zst", zstandard.compress(TEXT)),
        ("a.txt.zst", blocks(TEXT)),
        ("a.txt.zst", zstandard.ZstdCompressor(write_checksum=True, write_content_size=False).compress(TEXT)),
        ("a.txt.gz", gzip.compress(TEXT, mtime=0)),
    ],
)
def test_a_compressed_file_that_breaks_off_anywhere_is_refused(tmp_path, name, content):
    path = tmp_path / name
    for end in (*range(30), *range(30, len(content) - 20, 7), *range(len(content) - 20, len(content))):
        path.write_bytes(content[:end])
        with pytest.raises(DataError, match=r"cannot read .*a\.txt"):
            read(path)
    path.write_bytes(content)
    assert b"".join(read(path)) == TEXT


def test_frames_and_members_one_after_another_are_read_in_full(tmp_path):
    skippable = (0x184D2A53).to_bytes(4, "little") + (5).to_bytes(4, "little") + b"bytes"
    half = len(TEXT) // 2
    frames = [zstandard.compress(TEXT[:half]), skippable, zstandard.compress(b""), blocks(TEXT[half:])]
    (tmp_path / "a.txt.zst").write_bytes(b"".join(frames))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(TEXT[:half]) + gzip.compress(TEXT[half:]) + bytes(9))
    for name in ("a.txt.zst", "b.txt.gz"):
        assert b"".join(read(tmp_path / name)) == TEXT
    for rest in (skippable[:-1], b"\0", b"more"):
        (tmp_path / "a.txt.zst").write_bytes(b"".join(frames) + rest)
        with pytest.raises(DataError, match=r"cut short|no Zstandard frame"):
            read(tmp_path / "a.txt.zst")


def test_long_windows_and_long_runs_are_read(tmp_path):
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.txt.zst").write_bytes(stream.compress(TEXT) + stream.flush())
    assert b"".join(read(tmp_path / "a.txt.zst")) == TEXT
    same = b"z" * 300_000 + b"\n"
    (tmp_path / "same.txt.zst").write_bytes(zstandard.compress(same))
    assert b"".join(read(tmp_path / "same.txt.zst")) == same


def test_suffixes_may_be_in_upper_case(tmp_path):
    (tmp_path / "A.JSONL.GZ").write_bytes(gzip.compress(b'{"text": "a"}\n{"text": "b"}\n'))
    (tmp_path / "A.Txt.Zst").write_bytes(zstandard.compress(b"text"))
    assert read(tmp_path / "A.JSONL.GZ") == [b"a", b"b"]
    assert read(tmp_path / "A.Txt.Zst") == [b"text"]


def json_file(folder, *lines, end="\n"):
    path = folder / "a.jsonl"
    path.write_text("\n".join(lines) + end)
    return path


def test_rows_without_text_are_left_out_and_counted(tmp_path):
    path = json_file(tmp_path, '{"text": "a"}', '{"text": null}', '{"id": 7}', '{"text": ""}', '{"text": "b"}')
    assert read(path) == [b"a", b"b"]
    assert notes_after_reading(path) == (
        f"2 row(s) of {path} without text (null, or no such field) were left out so far",
    )
    table = pyarrow.table({"text": ["a", None, "b", None, None]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [b"a", b"b"]
    assert "3 row(s)" in notes_after_reading(tmp_path / "a.parquet")[0]
    split = load(open_source(str(path)), length=2, protocol="crop", held_out_share=0.5, held_out_bytes=2)
    assert any("2 row(s)" in note for note in split.notes)
    with pytest.raises(DataError, match="line 1, has no text field 'nothing': it has text"):
        read(path, "nothing")


def test_what_a_stream_leaves_out_is_said_at_the_end(tmp_path):
    for number in range(3):
        rows = [json.dumps({"text": f"text {number} {row}"}) for row in range(9)] + ['{"text": null}'] * 2
        (tmp_path / f"{number}.jsonl").write_text("\n".join(rows))
    (tmp_path / "test.jsonl").write_text('{"text": "held out"}\n{"text": null}\n{"text": "held out too"}')
    source = Files(str(tmp_path), "text", memory_limit=0)
    split = load(source, length=4, protocol="crop", held_out_share=0.5, held_out_bytes=99)
    assert f"1 row(s) of {tmp_path} without text" in split.notes[-2]
    batches = open_batches(split, batch=4, seed=0)
    notes = DataNotes(split, batches)
    next(batches)
    assert not any("row(s)" in note for note in notes.after(1, 9, batches.reading))
    while batches.epochs < 2:
        next(batches)
    assert f"7 row(s) of {tmp_path} without text (null, or no such field) were left out so far" in notes.after(
        9, 9, batches.reading
    )
    batches.close()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": 42}', r"the text field 'text' of .*a\.jsonl, line 2, is a number; texts must be strings"),
        ('{"text": true}', "is true or false"),
        ('{"text": [1]}', "is a list"),
        ('{"text": {"body": "b"}}', "is an object"),
        ('{"text": "a", "text": "b"}', "line 2, has more than one field 'text'"),
        ("7", "line 2, has no text field 'text': it has a number; one JSON object a line"),
        ("null", "it has null; one JSON object a line"),
        ('{"text": "b", "deep": ' + "[" * 100_000 + "]" * 100_000 + "}", "line 2, is nested too deeply"),
        ('{"text": "b", "many": [' + "[]," * MOST_VALUES + "0]}", "has more than 4,000,000 values"),
        ('{"text": "b\x00', "line 2, is not JSON"),
    ],
)
def test_lines_that_hold_no_text_are_named(tmp_path, line, message):
    with pytest.raises(DataError, match=message):
        read(json_file(tmp_path, '{"text": "a"}', line, '{"text": "c"}'))


def test_what_is_in_fields_that_nobody_asked_for_does_not_matter(tmp_path):
    odd = '{"text": "b", "id": %s, "x": 1e999, "y": NaN, "text2": "\\ud800", "in": {"a": 1, "a": 2}}' % ("9" * 5000)
    long = json.dumps({"commas": "," * 5_000_000, "text": "c"})
    assert read(json_file(tmp_path, '{"text": "a"}', odd, long)) == [b"a", b"b", b"c"]


@pytest.mark.parametrize(
    "rest", ['{"te', '{"text": "b"', "\0\0\0", '{"text": "\u00e9"}'.encode()[:11].decode("latin1")]
)
def test_json_lines_that_break_off_say_so(tmp_path, rest):
    path = json_file(tmp_path, '{"text": "a"}', rest, end="")
    with pytest.raises(DataError, match=r"line 2, breaks off .*was cut short"):
        read(path)
    assert read(json_file(tmp_path, '{"text": "a"}', '{"text": "b"}', end="")) == [b"a", b"b"]


@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_of_objects_is_named_with_the_way_out(tmp_path, indent):
    (tmp_path / "a.json").write_text(json.dumps([{"text": "a"}, {"text": "b"}], indent=indent))
    with pytest.raises(DataError, match=r"one JSON object a line is wanted, which jq -c '\.\[\]' makes of a list"):
        read(tmp_path / "a.json")


TEXTS = ["first", "zwei ü", "three"]


@pytest.mark.parametrize(
    "kind",
    [
        *(pyarrow.string(), pyarrow.large_string(), pyarrow.string_view(), pyarrow.binary(), pyarrow.large_binary()),
        *(pyarrow.binary_view(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())),
    ],
    ids=str,
)
def test_every_kind_of_text_column_is_read(tmp_path, kind):
    column = pyarrow.array(TEXTS)
    if pyarrow.types.is_dictionary(kind):
        column = column.dictionary_encode()
    elif kind != column.type:
        column = pyarrow.array([text.encode() for text in TEXTS], pyarrow.binary()).cast(kind)
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2, 3], "text": column}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [text.encode() for text in TEXTS]


@pytest.mark.parametrize(
    ("columns", "names", "message"),
    [
        ([[["a"]] * 3], ["text"], r"the column 'text' of .*a\.parquet is of the kind list<.*>; texts must be"),
        ([[{"body": "a"}] * 3], ["text"], "of the kind struct<body: string>"),
        ([[1, 2, 3]], ["text"], "of the kind int64"),
        ([TEXTS, ["b"] * 3], ["text", "text"], "has 2 columns called 'text'"),
        ([TEXTS], ["doc"], "has no text field 'text': it has doc; name one with --data.text-field"),
        ([[b"good", b"bad \xff", b""]], ["text"], r"a\.parquet, row 1, is not UTF-8 text: byte 0xff at offset 4"),
    ],
)
def test_columns_that_are_no_text_are_named(tmp_path, columns, names, message):
    table = pyarrow.Table.from_arrays([pyarrow.array(column) for column in columns], names=names)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.parquet")


def test_strings_of_a_parquet_file_that_are_not_utf_8_are_named(tmp_path):
    wrong = pyarrow.StringArray.from_buffers(
        2, pyarrow.py_buffer(np.array([0, 2, 4], np.int32)), pyarrow.py_buffer(b"ok\xff\xfe")
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": wrong}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet, row 1, is not UTF-8 text"):
        read(tmp_path / "a.parquet")


def test_a_flipped_bit_in_a_checked_page_is_found(tmp_path):
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": ["a text that can be found"] * 3})
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    pyarrow.parquet.write_table(table, path, write_page_checksum=True, **options)
    content = path.read_bytes()
    at = content.index(b"can be found")
    path.write_bytes(content[:at] + b"C" + content[at + 1 :])
    with pytest.raises(DataError, match=r"cannot read .*a\.parquet"):
        read(path)


def test_a_file_without_line_ends_is_cut_after_spaces_or_between_characters():
    words, letters = b"word " * 300, "本文".encode() * 200
    for text, ends in ((words, b" "), (letters, b"")):
        cut = list(plain_documents(io.BufferedReader(io.BytesIO(text)), "x", 100))
        assert b"".join(cut) == text
        assert all(document.decode() and document.endswith(ends) for document in cut)
        assert all(100 <= len(document) <= 200 for document in cut[:-1])


@pytest.mark.parametrize(("size", "documents"), [(5_000, 8), (40_000, 10), (1_000_000, 32), (2_200_000, 34)])
@pytest.mark.parametrize("end", ["\n", " "])
def test_one_small_file_is_enough(tmp_path, size, documents, end):
    path = tmp_path / "own.txt"
    sentence = "sentence {number} of my own" + " again" * (size // 10_000)
    text = end.join(sentence.format(number=number) for number in range(size // len(sentence)))
    text = text.ljust(size, ".")
    path.write_text(text)
    split = load(open_source(str(path)), length=8, protocol="cut", held_out_share=0.05, held_out_bytes=256)
    documents_read = read(path)
    count = len(documents_read)
    assert 0 < count - len(split.training or ()) <= count / 4
    # Rows of the usual length can be cut of them, where there is enough text.
    assert size < 40_000 or min(map(len, documents_read[:-1])) >= 4096
    assert documents * (0.7 if end == "\n" else 0.4) <= count <= documents
    assert ("is one small file: it is split into documents of about" in split.notes[0]) == (size < 2**21)
    assert b"".join(documents_read) == text.encode()
    assert max(map(len, documents_read)) <= 3 * PLAIN_DOCUMENT


def test_too_little_text_says_what_to_do(tmp_path):
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(DataError, match="two are needed, one of them to hold out; name more text"):
        load(open_source(str(tmp_path)), length=4, protocol="crop", held_out_share=0.5, held_out_bytes=4)


MARK = b"\xef\xbb\xbf"


def test_a_byte_order_mark_is_no_text(tmp_path):
    for name, content, expected in [
        ("a.txt", b"text\n", b"text\n"),
        ("a.jsonl", b'{"text": "text"}\n' + MARK + b'{"text": "text"}\n', b"texttext"),
        ("a.fa", b">x\nACGT\n", b"ACGT"),
        ("b.txt.gz", b"text", b"text"),
    ]:
        packed = gzip.compress(MARK + content) if name.endswith("gz") else MARK + content
        (tmp_path / name).write_bytes(packed)
        assert b"".join(read(tmp_path / name)) == expected
    (tmp_path / "a.txt").write_bytes(MARK + b"bad \xff")
    with pytest.raises(DataError, match="byte 0xff at offset 7"):
        read(tmp_path / "a.txt")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.fa"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_encodings_are_named(tmp_path, name, encoding):
    (tmp_path / name).write_bytes('{"text": "a text in another encoding"}\n'.encode(encoding))
    with pytest.raises(DataError, match=rf"is {encoding[:6].upper()} text; convert it to UTF-8: iconv -f"):
        read(tmp_path / name)


def test_nul_bytes_are_kept_and_counted(tmp_path):
    for number, content in enumerate((b"a\0b", b"plain", b"power loss" + bytes(30))):
        (tmp_path / f"{number}.txt").write_bytes(content)
    assert read(tmp_path) == [b"a\0b", b"plain", b"power loss" + bytes(30)]
    assert notes_after_reading(tmp_path) == (f"2 document(s) of {tmp_path} so far have NUL bytes, which are kept",)


def test_text_that_breaks_off_within_a_character_says_so(tmp_path):
    (tmp_path / "a.txt").write_bytes("good\nä".encode()[:-1])
    with pytest.raises(DataError, match=r"ends within a character \(at offset 6\).*was cut short"):
        read(tmp_path / "a.txt")


def test_a_genome_that_breaks_off_says_so(tmp_path):
    (tmp_path / "a.fa").write_bytes(b">x\nACGT\n>chr")
    with pytest.raises(DataError, match=r"ends within a header \(line 3\).*was cut short"):
        read(tmp_path / "a.fa")
    (tmp_path / "a.fa").write_bytes(b">x\nACGT\nAC")
    assert read(tmp_path / "a.fa") == [b"ACGTAC"]
    assert notes_after_reading(tmp_path / "a.fa")[0].startswith("1 file(s) of ")
    assert "end without a line end" in notes_after_reading(tmp_path / "a.fa")[0]


def test_lines_of_a_genome_may_have_any_length(tmp_path, monkeypatch):
    bases = b"ACGT" * 50
    (tmp_path / "a.fa").write_bytes(b">" + b"name " * 99 + b"\r\n" + bases + b"\r\n" + bases + b"  \r\n>y\nGG\n")
    for part in (7, 33, 200, 201, 202, 203):
        monkeypatch.setattr("data.fasta._PART", part)
        assert read(tmp_path / "a.fa") == [bases + bases, b"GG"]
    (tmp_path / "a.fa").write_bytes(b">x\nAC" + b" " * 500 + b"GT\n")
    with pytest.raises(DataError, match="line 2: ' ' is not a nucleotide"):
        read(tmp_path / "a.fa")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_one_line_that_expands_without_bound_is_refused(tmp_path, name):
    line = b'{"text": "' + bytes(33 * 2**20)
    (tmp_path / name).write_bytes((gzip.compress if name.endswith("gz") else zstandard.compress)(line))
    with pytest.raises(
        DataError, match=r"line 1, has more than 32 MiB, the most that a document and its line may have"
    ):
        read(tmp_path / name)


def test_what_comes_out_of_a_file_decides_whether_it_is_streamed(tmp_path):
    zeros = bytes(300_000)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(zeros))
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(zeros))
    table = pyarrow.table({"text": pyarrow.DictionaryArray.from_arrays(np.zeros(300, np.int32), ["x" * 1000])})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    for name in ("a.txt.gz", "a.txt.zst", "a.parquet"):
        assert (tmp_path / name).stat().st_size < 10_000
        assert Files(str(tmp_path / name), "text", memory_limit=299_999).streamed
        assert not Files(str(tmp_path / name), "text", memory_limit=300_000).streamed
    assert not Files(str(tmp_path), "text", memory_limit=900_000).streamed
    assert Files(str(tmp_path), "text", memory_limit=899_999).streamed


def test_names_need_not_be_utf_8(tmp_path):
    for number in range(4):
        name = os.fsdecode(b"caf\xe9 [%d].txt" % number)
        (tmp_path / name).write_text(f"the text of number {number} " * 9)
    split = load(open_source(str(tmp_path)), length=16, protocol="crop", held_out_share=0.3, held_out_bytes=64)
    assert len(split.fingerprint) == 16
    one = tmp_path / os.fsdecode(b"caf\xe9 [1].txt")
    assert b"number 1" in read(one)[0]
    assert open_source(str(one)).name.endswith(r"caf\xe9 [1].txt")
    one.write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"caf\\xe9 \[1\]\.txt .*is not UTF-8 text"):
        read(one)


def linked(folder):
    """Two files, one of them in a linked folder, with loops and further names."""
    for name in ("in/real", "in/real/deep", "outside", "in/.git"):
        (folder / name).mkdir(parents=True)
    (folder / "in/real/one.txt").write_text("one")
    (folder / "in/.git/hidden.txt").write_text("hidden")
    (folder / "outside/two.txt").write_text("two")
    (folder / "in/linked").symlink_to(folder / "outside")
    (folder / "in/real/loop").symlink_to(folder / "in")
    (folder / "in/real/deep/loop").symlink_to(folder / "in")
    (folder / "in/again.txt").symlink_to(folder / "in/real/one.txt")
    (folder / "in/gone.txt").symlink_to(folder / "nowhere")
    return folder / "in"


def test_links_are_followed_and_every_file_is_read_once(tmp_path):
    folder = linked(tmp_path)
    for pattern in (str(folder), f"{folder}/**/*.txt", f"{folder}/**"):
        source = open_source(pattern)
        assert [shard.name for shard in source.shards()] == [f"{folder}/linked/two.txt", f"{folder}/real/one.txt"]
    (note,) = open_source(str(folder)).notes
    assert note.startswith(
        f"passed over in {folder}: 1 link(s) to nothing, 3 further name(s) of the same files and folders"
    )
    assert note.endswith(", 1 hidden file(s) and folder(s)")
    assert [shard.name for shard in open_source(f"{folder}/*.txt").shards()] == [f"{folder}/again.txt"]
    assert [shard.name for shard in open_source(f"{folder}/**/.git/*.txt").shards()] == [f"{folder}/.git/hidden.txt"]


def test_what_cannot_be_opened_is_counted(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "c.txt").write_text(name)
    listed = os.listdir

    def refusing(folder):
        if os.path.basename(folder) == "a":
            raise PermissionError(13, "Permission denied")
        return listed(folder)

    monkeypatch.setattr(os, "listdir", refusing)
    source = open_source(str(tmp_path))
    assert [shard.name for shard in source.shards()] == [str(tmp_path / "b" / "c.txt")]
    assert source.notes[0] == f"passed over in {tmp_path}: 1 that could not be opened ({tmp_path}/a)"


@pytest.mark.parametrize(
    ("start", "command"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
        ("/annex/objects/SHA256E-s9--00.txt\n", "git annex get"),
    ],
)
def test_files_that_only_point_to_others_are_refused(tmp_path, start, command):
    (tmp_path / "real.txt").write_text("text")
    for name in ("a.txt", "b.parquet"):
        (tmp_path / name).write_text(start)
    with pytest.raises(DataError, match=rf"2 of 3 file\(s\) only point to the real ones \(.*a\.txt …\).*'{command}'"):
        open_source(str(tmp_path))


def test_a_folder_called_like_a_data_set_is_named(tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_text("mine")
    (tmp_path / "fineweb").write_text("mine")
    monkeypatch.chdir(tmp_path)
    assert open_source("docs").notes[0] == "docs is the data set of that name; write ./docs for the folder called so"
    assert not open_source("stdlib").notes
    assert read("./docs") == [b"mine"]
    assert not any("data set of that name" in note for note in open_source("./docs").notes)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("~nobodyhere/x.txt", "there is no such user's home folder"),
        ("x" * 5000, "cannot look for x.*: File name too long"),
        ("a\0b", "there is no data set, file or folder called"),
        ("line\nend\x1b[31m", r"called 'line end\\x1b\[31m'"),
        ("/dev/null", "is neither a file nor a folder"),
    ],
)
def test_names_of_nothing_are_refused_in_one_printable_line(name, message):
    with pytest.raises(DataError, match=message) as raised:
        open_source(name)
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) <= 600
