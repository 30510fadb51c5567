"""Reading and writing PyTorch's zip files of weights, without PyTorch and without executing anything that a file names.

Such a file has a pickle of names and shapes, and one zip member with the data of each storage. What is read here are tensors and
plain values; everything else is refused by name. Data is read when a tensor is accessed, one tensor at a time.
"""

from __future__ import annotations

import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from unet.files.errors import LoadError, shown
from unet.files.pickles import PickleError
from unet.files.torch_tensors import STORAGE_TYPES, TensorPlace, read_tensors

MAX_PICKLE_BYTES = 1 << 22
"""Maximum size in bytes of the pickle of names and shapes. A tensor takes about 250; to read them all takes seconds."""

MAX_USES = 2
"""All tensors together are at most so many times as large as the file. Tied ones share their data."""

PIECE = 1 << 20
"""Bytes read at a time."""


class TorchFileError(LoadError):
    """What is wrong with a file of weights, in one sentence."""


@dataclass(frozen=True, slots=True)
class _Data:
    """The data of one zip member: its first byte in the file, its size in bytes and its CRC-32."""

    start: int
    size: int
    crc: int


class TorchFile(Mapping[str, np.ndarray]):
    """The tensors of a file by name, each read on access.

    Raises `TorchFileError` for a file of another format, a damaged one, and one that names anything but tensors and plain
    containers.
    """

    def __init__(self, path: Path):
        self._path = path
        self._checked: set[str] = set()
        with path.open("rb") as stream:
            self._bytes = stream.seek(0, os.SEEK_END)
            try:
                with zipfile.ZipFile(stream) as archive:
                    self._places = self._read_description(archive)
                    self._data = self._find_data(archive, stream)
            except PickleError as error:
                raise TorchFileError(f"{path} is refused: {error}") from None
            except zipfile.BadZipFile as error:
                raise TorchFileError(
                    f"{path} is not a whole zip file, which PyTorch has used since 1.6: it is damaged, or of an older format "
                    f"({shown(error)})"
                ) from None
            # What zipfile raises for fields of a directory that make no sense.
            except (ValueError, NotImplementedError, RuntimeError, EOFError, struct.error, OverflowError) as error:
                raise TorchFileError(f"{path} is damaged: its zip directory makes no sense ({shown(error)})") from None

    def _read_description(self, archive: zipfile.ZipFile) -> Mapping[str, TensorPlace]:
        """The tensors that the pickle names. No member is compressed, so the size of the file bounds what is read."""
        members = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(members) != 1:
            raise TorchFileError(f"{self._path} is not a file of PyTorch weights: it has no data.pkl")
        self._folder = members[0].removesuffix("data.pkl")
        member = self._stored(archive, members[0], "its data.pkl")
        if member.file_size > MAX_PICKLE_BYTES:
            raise TorchFileError(
                f"{self._path} has a data.pkl of over {MAX_PICKLE_BYTES} bytes, more than any weights need"
            )
        order = f"{self._folder}byteorder"
        if order in archive.namelist() and not self._says_little(archive, order):
            raise TorchFileError(f"{self._path} is big-endian, which is not supported")
        return read_tensors(archive.read(member))

    def _says_little(self, archive: zipfile.ZipFile, order: str) -> bool:
        member = self._stored(archive, order, "its byteorder")
        return member.file_size == len("little") and archive.read(member) == b"little"

    def _stored(self, archive: zipfile.ZipFile, name: str, what: str) -> zipfile.ZipInfo:
        """A member that lies in the file as it is."""
        member = archive.getinfo(name)
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise TorchFileError(f"{self._path} is refused: {what} is compressed or encrypted")
        if member.file_size != member.compress_size or not 0 <= member.header_offset <= self._bytes - member.file_size:
            raise TorchFileError(f"{self._path} is damaged: {what} is larger than the file says, or than the file")
        return member

    def _find_data(self, archive: zipfile.ZipFile, stream: IO[bytes]) -> dict[str, _Data]:
        """Where the data of the storages lies. It must be uncompressed, and as large as its storage says."""
        found: dict[str, _Data] = {}
        total = 0
        for name, place in self._places.items():
            storage, what = place.storage, f"the data of {shown(name)}"
            try:
                member = self._stored(archive, f"{self._folder}data/{storage.member}", what)
            except KeyError:
                raise TorchFileError(f"{self._path} is damaged: it lacks {what}") from None
            size = storage.size * storage.kind.dtype.itemsize
            if member.file_size != size:
                raise TorchFileError(
                    f"{self._path} is damaged: {shown(name)} needs {size} bytes of data and has {member.file_size}"
                )
            if storage.member not in found:
                found[storage.member] = _Data(_data_start(archive, member, stream), size, member.CRC)
            total += place.size * place.dtype.itemsize
        if total > MAX_USES * self._bytes:
            raise TorchFileError(
                f"{self._path} is refused: its tensors together are {total} bytes, much more than the file"
            )
        return found

    def places(self) -> Mapping[str, TensorPlace]:
        """Shapes and dtypes of the tensors, without reading their data."""
        return self._places

    def __getitem__(self, name: str) -> np.ndarray:
        place = self._places[name]
        data = self._data[place.storage.member]
        with self._path.open("rb") as stream:
            self._check(place.storage.member, data, stream, name)
            stream.seek(data.start + place.offset * place.dtype.itemsize)
            span = place.last - place.offset + 1 if place.size else 0
            elements = np.fromfile(stream, place.dtype, span)
        if len(elements) != span:
            raise TorchFileError(f"{self._path} is damaged: the data of {shown(name)} ends early")
        if place.strides == _contiguous_strides(place.shape) or not place.size:
            return elements.reshape(place.shape)
        strides = tuple(step * place.dtype.itemsize for step in place.strides)
        return np.lib.stride_tricks.as_strided(elements, place.shape, strides).copy()

    def _check(self, member: str, data: _Data, stream: IO[bytes], name: str) -> None:
        """Compare the data of a storage with its checksum, when the first of its tensors is read."""
        if member in self._checked:
            return
        stream.seek(data.start)
        crc = 0
        for start in range(0, data.size, PIECE):
            crc = zlib.crc32(stream.read(min(PIECE, data.size - start)), crc)
        if crc != data.crc:
            raise TorchFileError(f"{self._path} is damaged: the data of {shown(name)} does not have its checksum")
        self._checked.add(member)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _data_start(archive: zipfile.ZipFile, member: zipfile.ZipInfo, stream: IO[bytes]) -> int:
    """The first byte of a member's data: behind its own header, whose name and extra fields have lengths of their own."""
    with archive.open(member):  # compares this header with the directory
        pass
    stream.seek(member.header_offset + 26)
    name, extra = struct.unpack("<HH", stream.read(4))
    return member.header_offset + 30 + name + extra


def _contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def write_torch_file(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write tensors so that PyTorch can load them (`torch.load` with `weights_only`), with one in memory at a time.

    Raises `ValueError` for a dtype that PyTorch has no storage for.
    """
    # Members have no time (ZipInfo), so that the same tensors give the same bytes.
    kinds = {kind.dtype: kind.name for kind in STORAGE_TYPES.values()}
    description = bytearray(b"\x80\x02ccollections\nOrderedDict\n)R(")
    temporary = path.with_name(f".{path.name}.tmp")
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for number, name in enumerate(tensors):
            tensor = np.asarray(tensors[name])
            if tensor.dtype not in kinds:
                raise ValueError(f"{name} is {tensor.dtype}, which PyTorch has no storage for")
            archive.writestr(zipfile.ZipInfo(f"weights/data/{number}"), tensor.tobytes())
            description += _text(name) + _tensor(kinds[tensor.dtype], str(number), tensor.shape)
        archive.writestr(zipfile.ZipInfo("weights/data.pkl"), bytes(description + b"u."))
        archive.writestr(zipfile.ZipInfo("weights/byteorder"), b"little")
        archive.writestr(zipfile.ZipInfo("weights/version"), b"3\n")
    temporary.replace(path)


def _text(text: str) -> bytes:
    """The opcode BINUNICODE."""
    content = text.encode()
    return b"X" + struct.pack("<I", len(content)) + content


def _long(number: int) -> bytes:
    """The opcode LONG1 with eight bytes."""
    content = number.to_bytes(8, "little")
    return b"\x8a\x08" + content


def _tensor(kind: str, member: str, shape: tuple[int, ...]) -> bytes:
    """The opcodes of `_rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())`."""
    storage = b"(" + _text("storage") + f"ctorch\n{kind}\n".encode() + _text(member) + _text("cpu")
    storage += _long(math.prod(shape)) + b"tQ"
    sizes = b"(" + b"".join(_long(size) for size in shape) + b"t"
    strides = b"(" + b"".join(_long(step) for step in _contiguous_strides(shape)) + b"t"
    arguments = b"(" + storage + _long(0) + sizes + strides + b"\x89ccollections\nOrderedDict\n)Rt"
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"
