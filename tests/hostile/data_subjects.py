"""Data sets: files of every kind that is read, and what the hub and its cache have."""

from __future__ import annotations

import gzip
import io
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx2
import pyarrow
import pyarrow.parquet
import zstandard
from huggingface_hub import set_client_factory

from data import DataError
from data.files import Files
from data.hub import HubSource
from data.hub_names import HubDataset
from tests.hostile.subject import Structure, Subject

COMMIT = "c0ffee" + "0" * 34
REPOSITORY = "someone/text"
PARQUET = [f"text {number} é" * (number % 5) for number in range(40)]


def _file(name: str) -> Callable[[Path, bytes], object]:
    def read(folder: Path, content: bytes) -> object:
        (folder / name).write_bytes(content)
        source = Files(str(folder / name), "text", memory_limit=2**20)
        documents = [[*source.documents(shard)] for shard in source.shards()]
        assert all(map(str.isprintable, source.notes))
        return documents, source.streamed

    return read


def _file_subject(
    name: str, seeds: Callable[[], Sequence[bytes]], structure: Structure = "bytes", checked: bool = False
) -> Subject:
    return Subject(name, lambda folder: seeds(), _file(name), (DataError,), structure, checked)


def _letters(size: int) -> bytes:
    """Text that hardly compresses: mutations cannot repeat or remove a whole file of it."""
    rng = random.Random(0)
    return "".join(rng.choices("abcdefghijklmnopqrstuvwxyzåßé \n", k=size)).encode()


def _gzip() -> Sequence[bytes]:
    text = _letters(16_000)
    return gzip.compress(text, mtime=0), gzip.compress(text[:7000], mtime=0) + gzip.compress(text[7000:], mtime=0)


def _zstd() -> Sequence[bytes]:
    text = _letters(16_000)
    whole = zstandard.ZstdCompressor(write_checksum=True)
    stream = zstandard.ZstdCompressor(
        write_checksum=True
    ).compressobj()  # without the content's size, in several blocks
    blocks = b"".join(stream.compress(text[at : at + 3000]) + stream.flush(1) for at in range(0, len(text), 3000))
    return whole.compress(text), whole.compress(text[:7000]) + whole.compress(text[7000:]), blocks + stream.flush()


def _json_lines() -> Sequence[bytes]:
    records: list[dict[str, object]] = [
        {"text": f"line {number} é", "id": number, "meta": {"tags": ["a", None], "score": 0.5}} for number in range(9)
    ]
    records[3]["text"] = None
    return ["".join(json.dumps(record) + "\n" for record in records).encode()]


def _parquet() -> Sequence[bytes]:
    contents = []
    for options in ({}, {"compression": "zstd", "use_dictionary": False}, {"data_page_version": "2.0"}):
        table = pyarrow.table({"id": range(40), "text": PARQUET})
        stream = io.BytesIO()
        pyarrow.parquet.write_table(table, stream, write_page_checksum=True, row_group_size=15, **options)
        contents.append(stream.getvalue())
    return contents


def _fasta() -> Sequence[bytes]:
    return [b">chr1 first\nACGTacgt\nNNNNNNacg\nt\n; a comment\n\n>chr2\n" + b"GGCCnn-nTTRY*\r\n" * 20]


def _entries() -> list[dict[str, object]]:
    lfs = {"oid": "ab" * 32, "size": 1000, "pointerSize": 100}
    names = ("data/train-0.jsonl", "data/train-1.jsonl", "data/test-0.jsonl", "README.md")
    return [
        {"type": "directory", "path": "data", "oid": "cd" * 20},
        *({"type": "file", "path": name, "size": 1000, "oid": "cd" * 20, "lfs": lfs} for name in names),
    ]


def _manifest(folder: Path) -> Sequence[bytes]:
    files = [{"path": f"train-{number}.jsonl", "size": 9, "sha256": "ab" * 32} for number in range(3)]
    return [json.dumps({"repository": REPOSITORY, "commit": COMMIT, "files": files}, indent=1).encode()]


def _hub(folder: Path) -> HubSource:
    return HubSource(
        HubDataset("mine", REPOSITORY),
        text_field="text",
        cache=folder,
        endpoint="http://hub.invalid",
        wait=lambda seconds: None,
        patience=5.0,
    )


def _listed(source: HubSource, folder: Path) -> object:
    """The shards; all of them must lie in the folder, apart from the library's own files."""
    shards = [(shard.name, shard.size) for shard in source.shards()]
    for name, _ in shards:
        inside = (folder / name).resolve().relative_to(folder.resolve())
        if inside.parts[0].lower() in ("manifest.json", ".cache") or not inside.parts:
            raise AssertionError(f"{name!r} is taken")
    return shards, source.notes


def _read_manifest(folder: Path, content: bytes) -> object:
    place = folder / "hub" / "someone--text" / "all"
    place.mkdir(parents=True)
    (place / "manifest.json").write_bytes(content)
    return _listed(_hub(folder), folder)


_answers: dict[str, bytes] = {}


def _answer(request: httpx2.Request) -> httpx2.Response:
    kind = "tree" if "/tree/" in request.url.path else "info"
    return httpx2.Response(200, content=_answers[kind], headers={"content-type": "application/json"})


def _answered(kind: str) -> Callable[[Path, bytes], object]:
    """The real client, given `content` as the hub's answer of one kind."""

    def read(folder: Path, content: bytes) -> object:
        good = {"info": json.dumps({"id": REPOSITORY, "sha": COMMIT}), "tree": json.dumps(_entries())}
        _answers.update({name: answer.encode() for name, answer in good.items()})
        _answers[kind] = content
        return _listed(_hub(folder), folder)

    return read


def _hub_seeds(kind: str) -> Callable[[Path], Sequence[bytes]]:
    def seeds(folder: Path) -> Sequence[bytes]:
        # In this process alone, which has no other client.
        set_client_factory(lambda: httpx2.Client(transport=httpx2.MockTransport(_answer), follow_redirects=True))
        info = {"id": REPOSITORY, "sha": COMMIT, "tags": ["a"], "cardData": {"license": "mit"}, "siblings": []}
        return [json.dumps(info if kind == "info" else _entries()).encode()]

    return seeds


SUBJECTS: tuple[Subject, ...] = (
    _file_subject("plain.txt", lambda: ["A line.\nAnd one with ü and 本.\n".encode() * 30, b"x" * 3000]),
    _file_subject("gzip.txt.gz", _gzip, checked=True),
    _file_subject("zstd.txt.zst", _zstd, checked=True),
    _file_subject("lines.jsonl", _json_lines, "json lines"),
    _file_subject("packed.jsonl.gz", lambda: [gzip.compress(content) for content in _json_lines()]),
    _file_subject("table.parquet", _parquet),
    _file_subject("genome.fa", _fasta),
    Subject("hub manifest", _manifest, _read_manifest, (DataError,), "json"),
    Subject("hub info", _hub_seeds("info"), _answered("info"), (DataError,), "json"),
    Subject("hub tree", _hub_seeds("tree"), _answered("tree"), (DataError,), "json"),
)
