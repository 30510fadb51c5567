"""Files of text, compressed or not, opened so that a file that was cut short is never taken for a whole one."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from data.documents import DataError

if TYPE_CHECKING:
    import zstandard
    from typing_extensions import Buffer

COMPRESSED = (".gz", ".zst")
UTF8_MARK = b"\xef\xbb\xbf"

_MAGIC, _SKIPPABLE = 0xFD2FB528, 0x184D2A50
_BUFFER = 1 << 17
_OTHER_MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def read_errors() -> tuple[type[Exception], ...]:
    """The exceptions that damaged files and the operating system raise while a file is read."""
    try:
        import zstandard
    except ImportError:
        return (OSError, EOFError, zlib.error)
    return (OSError, EOFError, zlib.error, zstandard.ZstdError)


def open_text(path: Path) -> io.BufferedReader:
    """The text of a file, decompressed if its name ends with .gz or .zst in any case.

    Raises `DataError` for UTF-16 and UTF-32, `EOFError` for compressed files that end too early, and whatever else
    `read_errors` has.
    """
    stream = open_bytes(path)
    try:
        _check_encoding(stream.peek(512)[:512], path)
    except BaseException:
        stream.close()
        raise
    return stream


def open_bytes(path: Path) -> io.BufferedReader:
    """The bytes of a file, decompressed if its name says so."""
    suffix = path.suffix.lower()
    if suffix not in COMPRESSED:
        return path.open("rb")
    if path.stat().st_size == 0:
        raise EOFError("it is empty, which no compressed file is")
    if suffix == ".gz":
        return io.BufferedReader(gzip.open(path), _BUFFER)
    try:
        import zstandard
    except ImportError:
        raise DataError(f"{path} needs the package zstandard: pip install 'caesura-lm[zstd]'") from None
    # The largest window that the format's own tool writes (zstd --long=31). Memory is taken as far as a file fills its window.
    return io.BufferedReader(_ZstdStream(path, zstandard.ZstdDecompressor(max_window_size=2**31)), _BUFFER)


def skip_mark(stream: io.BufferedReader) -> int:
    """Skips a UTF-8 byte-order mark, which is not text, at the start of a stream. Returns the number of bytes skipped."""
    return len(stream.read(len(UTF8_MARK))) if stream.peek(len(UTF8_MARK)).startswith(UTF8_MARK) else 0


def text_size(path: Path, at_most: int) -> int:
    """The number of bytes of a file after decompression, or a number above `at_most` if it has more."""
    if path.suffix.lower() not in COMPRESSED:
        return path.stat().st_size
    size = 0
    with open_bytes(path) as stream:
        while size <= at_most and (part := stream.read(_BUFFER)):
            size += len(part)
    return size


def _check_encoding(start: bytes, path: Path) -> None:
    """Raises `DataError` if a file that starts so is UTF-16 or UTF-32, with or without a byte-order mark."""
    encoding = next((name for mark, name in _OTHER_MARKS.items() if start.startswith(mark)), None)
    if encoding is None and len(start) >= 16:
        # Every second byte of Western text in UTF-16 is 0.
        zeros, half = sorted(start[first::2].count(0) for first in (0, 1)), len(start) // 2
        encoding = "UTF-16" if zeros[1] > 0.9 * half and zeros[0] < 0.1 * half else None
    if encoding is not None:
        raise DataError(f"{path} is {encoding} text; convert it to UTF-8: iconv -f {encoding} -t UTF-8")


class _ZstdStream(io.RawIOBase):
    """The decompressed content of a Zstandard file, which may have several frames (RFC 8878, section 3.1).

    The package's own streams end quietly where a file breaks off inside a frame. This one follows the frames and raises
    `EOFError`. It decompresses one block, of at most 128 KiB, at a time.
    """

    def __init__(self, path: Path, decompressor: zstandard.ZstdDecompressor):
        super().__init__()
        self._file = path.open("rb")
        self._blocks = self._decompressed(decompressor)
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()

    def readinto(self, buffer: Buffer) -> int:
        target, filled = memoryview(buffer).cast("B"), 0
        while filled < len(target):
            if not self._ready:
                block = next(self._blocks, None)
                if block is None:
                    break
                self._ready = memoryview(block)
            size = min(len(target) - filled, len(self._ready))
            target[filled : filled + size] = self._ready[:size]
            self._ready, filled = self._ready[size:], filled + size
        return filled

    def _decompressed(self, decompressor: zstandard.ZstdDecompressor) -> Iterator[bytes]:
        while start := self._file.read(4):
            magic = int.from_bytes(start, "little")
            if len(start) == 4 and magic & ~0xF == _SKIPPABLE:
                self._skip(int.from_bytes(self._exactly(4), "little"))
            elif len(start) == 4 and magic == _MAGIC:
                yield from self._frame(start, decompressor)
            else:
                raise OSError("it has bytes that are no Zstandard frame")

    def _frame(self, start: bytes, decompressor: zstandard.ZstdDecompressor) -> Iterator[bytes]:
        frame = decompressor.decompressobj()
        descriptor = self._exactly(1)
        flags = descriptor[0]
        single_segment, checksum = flags >> 5 & 1, flags >> 2 & 1
        content_size = (single_segment, 2, 4, 8)[flags >> 6]
        header = self._exactly((1 - single_segment) + (0, 1, 2, 4)[flags & 3] + content_size)
        yield frame.decompress(start + descriptor + header)
        last = False
        while not last:
            block = self._exactly(3)
            number = int.from_bytes(block, "little")
            last, run = bool(number & 1), number >> 1 & 3 == 1
            block += self._exactly(1 if run else number >> 3)
            yield frame.decompress(block + (self._exactly(4) if last and checksum else b""))
        if not frame.eof:
            raise EOFError("its last Zstandard frame is incomplete")

    def _exactly(self, size: int) -> bytes:
        content = self._file.read(size)
        if len(content) < size:
            raise EOFError("it ends within a Zstandard frame: it is damaged, or was cut short")
        return content

    def _skip(self, size: int) -> None:
        while size:
            size -= len(self._exactly(min(size, _BUFFER)))
