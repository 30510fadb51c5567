"""Data sets by name."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from data.builtin import StandardLibraryCode, StandardLibraryDocs
from data.documents import AbstractSource, Extent, Shard
from data.files import Files
from data.fixed import corpus_source
from data.hub import HubSource, default_cache
from data.hub_names import HUB_DATASETS, hub_dataset
from data.ranges import ByteRange, named_span


def open_source(
    name: str, *, text_field: str | None = None, cache: Path | None = None, cache_bytes: int = 8 * 2**30
) -> AbstractSource:
    """The source called `name`.

    `docs` and `stdlib` come with Python. `codeparrot`, `codeparrot-clean`, `fineweb`, `fineweb-edu` (samples of ten billion
    tokens), `fineweb-100BT`, `fineweb-edu-100BT` and `hub:owner/name/folder@revision` (folder and revision are optional) are
    data sets on the Hugging Face hub. `enwik8` and `text8`, or `enwik8:PATH`, are these texts with their usual split. Every other
    name is the path of a file, a folder or a glob; a plain text file may be followed by byte offsets, as in `text.gz[:90e6]`.

    `text_field`: the field with the text in structured files (default: that of the named data set, else `text`). `cache`: the
    cache folder for data sets on the hub, which holds up to `cache_bytes` of each. A file or folder that is called like a named
    data set is not read, which the notes of the source say. Raises `DataError` for an unknown name.
    """
    # The file of a corpus may well be called as the corpus is.
    if (corpus := corpus_source(name, default_cache() if cache is None else cache)) is not None:
        return corpus
    if (span := named_span(name)) is not None:
        return ByteRange(span)
    source = _open(name, text_field, cache, cache_bytes)
    if isinstance(source, Files) or not os.path.lexists(name):
        return source
    kind = "folder" if os.path.isdir(name) else "file"
    return Noted(
        source, f"{name} is the data set of that name; write {os.path.join('.', name)} for the {kind} called so"
    )


class Noted(AbstractSource):
    """A source with one more note to the user."""

    def __init__(self, source: AbstractSource, note: str):
        self._source = source
        self._note = note

    @property
    def name(self) -> str:
        return self._source.name

    @property
    def streamed(self) -> bool:
        return self._source.streamed

    @property
    def held_out_source(self) -> AbstractSource | None:
        return self._source.held_out_source

    @property
    def test_source(self) -> AbstractSource | None:
        return self._source.test_source

    @property
    def notes(self) -> tuple[str, ...]:
        return (self._note, *self._source.notes)

    def extents(self) -> Sequence[Extent]:
        return self._source.extents()

    def shards(self) -> Sequence[Shard]:
        return self._source.shards()

    def documents(self, shard: Shard) -> Iterator[bytes]:
        return self._source.documents(shard)


def _open(name: str, text_field: str | None, cache: Path | None, cache_bytes: int) -> AbstractSource:
    if name == "docs":
        return StandardLibraryDocs()
    if name == "stdlib":
        return StandardLibraryCode()
    if name in HUB_DATASETS:
        dataset = HUB_DATASETS[name]
    elif name.startswith("hub:"):
        dataset = hub_dataset(name)
    else:
        return Files(name, text_field or "text")
    return HubSource(dataset, text_field=text_field or dataset.text_field, cache=cache, cache_bytes=cache_bytes)
