"""Reading and writing safetensors files."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import numpy as np
import safetensors.numpy
from jaxtyping import Array
from safetensors import SafetensorError, safe_open

from unet.files.errors import LoadError, shown

Read = TypeVar("Read")

ALIGNMENT = 8
"""The data in a safetensors file begins at a multiple of so many bytes."""


class AbstractArrays(Mapping[str, np.ndarray]):
    """Arrays by name that are read on access, some rows of one alone where the file allows it."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of an array."""

    @abstractmethod
    def rows(self, name: str, rows: slice) -> np.ndarray:
        """Some rows of an array, which may be a view of it."""


def shape_in(arrays: Mapping[str, np.ndarray], name: str) -> tuple[int, ...]:
    """The shape of an array, without reading it where that is possible."""
    return arrays.shape(name) if isinstance(arrays, AbstractArrays) else arrays[name].shape


def rows_of(arrays: Mapping[str, np.ndarray], name: str, rows: slice) -> np.ndarray:
    """Some rows of an array, without reading the others where that is possible."""
    return arrays.rows(name, rows) if isinstance(arrays, AbstractArrays) else arrays[name][rows]


class ArrayFile(AbstractArrays):
    """The arrays of a safetensors file, each read on access. Raises `LoadError` for a damaged file, and for arrays of types that
    NumPy does not have.

    The file is opened anew for each array: an open one is mapped, and all that was ever read of it would count as memory.
    """

    def __init__(self, path: Path):
        # The reader of the format reports folders and permissions in words of its own.
        with path.open("rb"):
            pass
        self._path = path
        try:
            with safe_open(path, framework="numpy") as file:
                self._names = frozenset(file.keys())
                self.metadata: Mapping[str, str] = file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise LoadError(f"{path} is damaged ({shown(error)})") from None

    def __getitem__(self, name: str) -> np.ndarray:
        return self._read(name, lambda file: file.get_tensor(name))

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._read(name, lambda file: file.get_slice(name).get_shape()))

    def rows(self, name: str, rows: slice) -> np.ndarray:
        return self._read(name, lambda file: file.get_slice(name)[rows])

    def _read(self, name: str, read: Callable[[safe_open], Read]) -> Read:
        if name not in self._names:
            raise KeyError(name)
        try:
            with safe_open(self._path, framework="numpy") as file:
                return read(file)
        except (SafetensorError, AttributeError, TypeError) as error:
            raise LoadError(f"{self._path}: the array {shown(name)} cannot be read ({shown(error)})") from None

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)

    def __enter__(self) -> ArrayFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        """Nothing stays open."""


def as_numpy(array: Array | np.ndarray) -> np.ndarray:
    """An array on the host, its numbers in the order of its axes."""
    # Not np.ascontiguousarray, which turns scalars into vectors.
    return np.asarray(array, order="C")


def file_content(
    arrays: Mapping[str, Array | np.ndarray],
    metadata: Mapping[str, str],
    read: Callable[[Array | np.ndarray], np.ndarray] = as_numpy,
) -> Iterator[bytes | memoryview]:
    """A safetensors file in parts: its header, then the data of each array, which is only `read` then. The same arrays and
    metadata give the same bytes.

    The library that writes the format wants all arrays at once, and orders metadata at random. So it is given empty ones, and
    only its order of them and its names of their types are kept.
    """
    content = safetensors.numpy.save({name: np.zeros(0, array.dtype) for name, array in arrays.items()})
    described = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    stop = 0
    for name, one in described.items():
        start, stop = stop, stop + arrays[name].size * arrays[name].dtype.itemsize
        header[name] = {"dtype": one["dtype"], "shape": list(arrays[name].shape), "data_offsets": [start, stop]}
    written = json.dumps(header, separators=(",", ":")).encode()
    written += b" " * (-len(written) % ALIGNMENT)
    yield len(written).to_bytes(8, "little") + written
    for name in described:
        yield read(arrays[name]).reshape(-1).view(np.uint8).data
