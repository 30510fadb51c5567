"""Data sets whose training, validation and test text are settled: by the user, or by those who published them."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.documents import AbstractSource, DataError, Extent, Shard
from data.paths import expanded
from data.ranges import ByteRange, Span, read_bytes


class FixedSplits(AbstractSource):
    """A source with a validation and a test text of its own, which never train."""

    def __init__(
        self, name: str, training: AbstractSource, held_out: AbstractSource | None, test: AbstractSource | None = None
    ):
        """`held_out`: None to hold out what `training` does itself. Raises `DataError` if the same text is in two of them."""
        parts = (training, training.held_out_source if held_out is None else held_out, test)
        for one, other in itertools.combinations((part for part in parts if part is not None), 2):
            _refuse_common_text(one, other)
        self._name, self._training, self._held_out, self._test = name, training, held_out, test

    @property
    def name(self) -> str:
        return self._name

    @property
    def streamed(self) -> bool:
        return self._training.streamed

    @property
    def held_out_source(self) -> AbstractSource | None:
        return self._training.held_out_source if self._held_out is None else self._held_out

    @property
    def test_source(self) -> AbstractSource | None:
        return self._training.test_source if self._test is None else self._test

    @property
    def notes(self) -> tuple[str, ...]:
        return self._training.notes

    def extents(self) -> Sequence[Extent]:
        return self._training.extents()

    def shards(self) -> Sequence[Shard]:
        return self._training.shards()

    def documents(self, shard: Shard) -> Iterator[bytes]:
        return self._training.documents(shard)


def _refuse_common_text(one: AbstractSource, other: AbstractSource) -> None:
    """Raises `DataError` where two sources read the same file or the same bytes of a file."""
    by_resource: dict[str, list[Extent]] = {}
    for extent in one.extents():
        by_resource.setdefault(extent.resource, []).append(extent)
    if any(mine.overlaps(theirs) for theirs in other.extents() for mine in by_resource.get(theirs.resource, ())):
        raise DataError(f"{one.name} and {other.name} have text in common; training, validation and test text must not")


@dataclass(frozen=True)
class Corpus:
    """A published text of one file: its name, its size in bytes, the SHA-256 of it where that is known, and where training and
    validation text end. What follows is the test text."""

    name: str
    size: int
    training: int
    validation: int
    sha256: str | None = None


CORPORA: dict[str, Corpus] = {
    corpus.name: corpus
    for corpus in (
        Corpus(
            "enwik8",
            100_000_000,
            90_000_000,
            95_000_000,
            "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8",
        ),
        Corpus("text8", 100_000_000, 90_000_000, 95_000_000),
    )
}
"""The texts of the Large Text Compression Benchmark (mattmahoney.net/dc), split as language models are compared on them."""

_SUFFIXES = ("", ".gz", ".zip", ".zst")


def corpus_source(name: str, cache: Path) -> AbstractSource | None:
    """The corpus of a name such as `enwik8` or `enwik8:PATH`; None for any other name.

    Without a path, the file `enwik8`, `enwik8.gz`, `enwik8.zip` or `enwik8.zst` of the current folder or of the folder `cache`
    is read. Raises `DataError` if there is none, or if its content is not that of the corpus.
    """
    known, _, given = name.partition(":")
    corpus = CORPORA.get(known)
    if corpus is None:
        return None
    path = expanded(given) if given else _found(corpus, cache)
    _check(corpus, path)
    parts = (0, corpus.training), (corpus.training, corpus.validation), (corpus.validation, corpus.size)
    return FixedSplits(known, *(ByteRange(Span(path, *part)) for part in parts))


def without_place(name: str) -> str:
    """The name of a data set without the path of its file where its content is known: `enwik8` for `enwik8:PATH`."""
    known = name.partition(":")[0]
    return known if known in CORPORA else name


def _found(corpus: Corpus, cache: Path) -> Path:
    for folder in (Path(), cache):
        for suffix in _SUFFIXES:
            if (path := folder / f"{corpus.name}{suffix}").is_file():
                return path
    raise DataError(
        f"{corpus.name} is neither in this folder nor in {cache}: download {corpus.name}.zip from mattmahoney.net/dc, and put it "
        f"there or name it as {corpus.name}:PATH"
    )


def _check(corpus: Corpus, path: Path) -> None:
    if not path.is_file():
        raise DataError(
            f"there is no file {path}; {corpus.name}:PATH must name the file with the text of {corpus.name}"
        )
    _, content = read_bytes(path, 0, corpus.size + 1)
    if len(content) != corpus.size:
        held = "more" if len(content) > corpus.size else f"{len(content):,}"
        raise DataError(f"{path} is not {corpus.name}, which has {corpus.size:,} bytes: it holds {held}")
    if corpus.sha256 is not None and hashlib.sha256(content).hexdigest() != corpus.sha256:
        raise DataError(f"{path} is not {corpus.name}: its content has another SHA-256 than the published file")
