"""The text that models are evaluated on."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from data import AbstractSource, DataError
from data.documents import is_held_out
from data.loader import split_documents
from estimators.base import BOS, EOS
from experiments.config.errors import ConfigError, require
from experiments.config.sections import DataConfig
from experiments.evaluation.byte_scores import Text
from experiments.training.data import open_data

SplitName = Literal["held-out", "training", "test", "all"]

DATASET_BYTES = 1_000_000
"""How much of a data set is evaluated by default."""


def read_file(path: Path, max_bytes: int | None, flag: str = "--text") -> Text:
    """A file, which `flag` names, as one document, byte for byte. It may end within a character.

    Raises `ConfigError` if it cannot be read, is empty, or holds the byte BOS or EOS.
    """
    try:
        with path.open("rb") as stream:
            content = stream.read() if max_bytes is None else stream.read(max_bytes)
            cut = bool(stream.read(1))
    except OSError as error:
        raise ConfigError(f"{flag} {path} cannot be read: {error.strerror}") from None
    return text_of(content, _name(str(path), len(content) if cut else None), f"{flag} {path}")


def text_of(content: bytes, name: str, where: str) -> Text:
    """A document, which came from `where`. Raises `ConfigError` if it is empty or holds the byte BOS or EOS."""
    require(bool(content), f"{where} is empty")
    for value in (BOS, EOS):
        require(
            value not in content,
            f"{where} holds the byte {value} at offset {content.find(value)}, which marks the ends of documents and occurs in no "
            "UTF-8",
        )
    return Text(name, (content,))


def read_dataset(dataset: str, split: SplitName, data: DataConfig, max_bytes: int | None) -> Text:
    """The first documents of a split of a data set, cut at `max_bytes`.

    The held-out and the training documents are those of runs with the same settings of `data`. Raises `DataError`.
    """
    source = open_data(dataset, data)
    most = DATASET_BYTES if max_bytes is None else max_bytes
    documents, is_cut = _first_bytes(_documents(source, split, data.held_out), most)
    if not documents:
        raise DataError(f"{dataset} has no {split} text")
    name = f"{dataset}, {split}" if split != "all" else dataset
    return Text(_name(name, most if is_cut else None), tuple(documents))


def _name(name: str, cut_at: int | None) -> str:
    """The name of a text in tables, which says how much of it was left."""
    return name if cut_at is None else f"{name}, first {cut_at:,} bytes"


def _documents(source: AbstractSource, split: SplitName, share: float) -> Iterable[bytes]:
    if split == "test":
        if source.test_source is None:
            raise DataError(
                f"{source.name} has no settled test text, as enwik8, text8, data sets with files named as a test split and runs "
                "with --data.test have: name its files with --dataset or --text"
            )
        return _all(source.test_source)
    separate = source.held_out_source
    if split == "held-out" and separate is not None:
        return _all(separate)
    if split == "all":
        return itertools.chain(_all(source), () if separate is None else _all(separate))
    if separate is not None:
        return _all(source)
    if source.streamed:
        return (one for one in _all(source) if is_held_out(one, share) == (split == "held-out"))
    training, held_out = split_documents(_all(source), share, source.name)
    return held_out if split == "held-out" else training


def _all(source: AbstractSource) -> Iterator[bytes]:
    return (document for shard in source.shards() for document in source.documents(shard) if document)


def _first_bytes(documents: Iterable[bytes], most: int) -> tuple[list[bytes], bool]:
    """The first `most` bytes of some documents, and whether there are more. The last document may end within a character."""
    chosen: list[bytes] = []
    left = most
    for document in documents:
        if left <= 0:
            return chosen, True
        chosen.append(document[:left])
        left -= len(document)
    return chosen, left < 0
