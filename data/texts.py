"""Documents in memory, one after another in one buffer."""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from array import array
from collections.abc import Iterable, Sequence
from typing import IO, overload

import numpy as np
from jaxtyping import Int64, UInt8

from data.documents import BOS

_BOS = bytes([BOS])


def packed(documents: Sequence[bytes]) -> bytes:
    """Documents as one string of bytes: their number and sizes, then their bytes."""
    sizes = np.array([len(documents), *map(len, documents)], np.int64)
    return b"".join([sizes.tobytes(), *documents])


def unpacked(content: bytes) -> list[bytes]:
    """The documents that were `packed`."""
    count = int(np.frombuffer(content, np.int64, 1)[0])
    ends = np.cumsum(np.frombuffer(content, np.int64, count + 1)[1:], dtype=np.int64) + 8 * (count + 1)
    starts = [8 * (count + 1), *ends[:-1].tolist()]
    return [content[start:end] for start, end in zip(starts, ends.tolist(), strict=True)] if count else []


class Texts(Sequence[bytes]):
    """Documents in one buffer, each after a BOS: a byte of memory for each of theirs, and 16 for each document.

    The buffer is a file without a name that is mapped into memory, where the system has such files in memory itself. A copy for
    another process on Linux reads the same memory. `sizes`: bytes of each document, BOS included. Documents are read-only.
    """

    sizes: Int64[np.ndarray, " documents"]

    def __init__(
        self, buffer: _Buffer, starts: Int64[np.ndarray, " documents"], sizes: Int64[np.ndarray, " documents"]
    ):
        """`starts`: where each document begins in the buffer, with its BOS."""
        self._buffer, self._starts, self.sizes = buffer, starts, sizes

    @classmethod
    def of(cls, documents: Iterable[bytes]) -> Texts:
        """These documents, read one at a time. Raises `OSError` if they cannot be kept."""
        if isinstance(documents, Texts):
            return documents
        file, sizes = _nameless_file(), array("q")
        for document in documents:
            file.write(_BOS)
            file.write(document)
            sizes.append(len(document) + 1)
        file.flush()
        counts = np.array(sizes, np.int64)
        return cls(_Buffer(file, int(counts.sum())), np.cumsum(counts) - counts, counts)

    def __len__(self) -> int:
        return len(self.sizes)

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> Texts: ...
    def __getitem__(self, index: int | slice) -> bytes | Texts:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        return self.with_bos(index)[1:].tobytes()

    def with_bos(self, number: int) -> UInt8[np.ndarray, " size"]:
        """BOS and the bytes of a document, not copied."""
        start = self._starts[number]
        return self._buffer.bytes[start : start + self.sizes[number]]

    def take(self, numbers: Int64[np.ndarray, " chosen"]) -> Texts:
        """The documents of these numbers, in this order, in the same buffer."""
        return Texts(self._buffer, self._starts[numbers], self.sizes[numbers])


class _Buffer:
    """A file without a name, mapped into memory."""

    def __init__(self, file: IO[bytes], size: int):
        self._file, self._size = file, size
        weakref.finalize(self, file.close)
        # An empty file cannot be mapped.
        mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) if size else b""
        self.bytes: UInt8[np.ndarray, " size"] = np.frombuffer(mapped, np.uint8)

    def __reduce__(self):
        # A worker process of this one opens the same file, as long as this process is there.
        path = f"/proc/{os.getpid()}/fd/{self._file.fileno()}"
        if os.path.exists(path):
            return _opened, (path, self._size)
        return _copied, (self.bytes.tobytes(),)


def _nameless_file() -> IO[bytes]:
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("texts"), "w+b")
    return tempfile.TemporaryFile()


def _opened(path: str, size: int) -> _Buffer:
    return _Buffer(open(path, "rb"), size)


def _copied(content: bytes) -> _Buffer:
    file = _nameless_file()
    file.write(content)
    file.flush()
    return _Buffer(file, len(content))
