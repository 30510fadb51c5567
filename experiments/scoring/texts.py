"""The text that models are evaluated on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from data import AbstractSource, DataError, open_source
from data.documents import is_held_out
from data.loader import split_documents
from estimators.base import BOS, EOS
from experiments.config.errors import ConfigError, require
from experiments.config.sections import DataConfig
from experiments.evaluation.byte_scores import Text

SplitName = Literal["held-out", "training", "all"]

DATASET_BYTES = 1_000_000
"""How much of a data set is evaluated by default."""


def read_file(path: Path, max_bytes: int | None) -> Text:
    """A file as one document, byte for byte. It may end within a character.

    Raises `ConfigError` if it cannot be read, is empty, or holds the byte BOS or EOS.
    """
    try:
        with path.open("rb") as stream:
            content = stream.read() if max_bytes is None else stream.read(max_bytes)
    except OSError as error:
        raise ConfigError(f"--text {path} cannot be read: {error.strerror}") from None
    require(bool(content), f"--text {path} is empty")
    for value in (BOS, EOS):
        require(
            value not in content,
            f"--text {path} holds the byte {value} at offset {content.find(value)}, which marks the ends of documents and occurs "
            "in no UTF-8",
        )
    return Text(str(path), (content,))


def read_dataset(dataset: str, split: SplitName, data: DataConfig, max_bytes: int | None) -> Text:
    """The first documents of a split of a data set, cut at `max_bytes`.

    The held-out and the training documents are those of runs with the same settings of `data`. Raises `DataError`.
    """
    source = open_source(
        dataset, text_field=data.text_field, cache=data.cache, cache_bytes=round(data.cache_gib * 2**30)
    )
    chosen = _documents(source, split, data.held_out)
    documents = tuple(_cut(chosen, DATASET_BYTES if max_bytes is None else max_bytes))
    if not documents:
        raise DataError(f"{dataset} has no {split} text")
    return Text(f"{dataset}, {split}" if split != "all" else dataset, documents)


def _documents(source: AbstractSource, split: SplitName, share: float) -> Iterable[bytes]:
    separate = source.held_out_source
    if split == "held-out" and separate is not None:
        return _all(separate)
    if split == "all" or separate is not None:
        return _all(source)
    if source.streamed:
        return (one for one in _all(source) if is_held_out(one, share) == (split == "held-out"))
    training, held_out = split_documents(list(_all(source)), share, source.name)
    return held_out if split == "held-out" else training


def _all(source: AbstractSource) -> Iterator[bytes]:
    return (document for shard in source.shards() for document in source.documents(shard) if document)


def _cut(documents: Iterable[bytes], max_bytes: int) -> Iterator[bytes]:
    """The first `max_bytes` of some documents. The last one may end within a character."""
    left = max_bytes
    for document in documents:
        yield document[:left]
        left -= len(document)
        if left <= 0:
            return
