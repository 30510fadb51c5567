"""Reading and writing PyTorch's zip files of weights, without PyTorch and without executing anything that a file names.

Such a file has a pickle of names and shapes, and one zip member with the data of each storage. The unpickler here knows tensors
and plain containers and refuses everything else by name. Data is read when a tensor is accessed, one tensor at a time.
"""

from __future__ import annotations

import math
import pickle
import struct
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, ClassVar, cast

import jax.numpy as jnp
import numpy as np

MAX_PICKLE_BYTES = 1 << 26
"""Maximum size in bytes of the pickle of names and shapes."""

MAX_DIMENSIONS = 16
"""Maximum number of dimensions of a tensor."""

PIECE = 1 << 20
"""Bytes read at a time."""


class TorchFileError(Exception):
    """What is wrong with a file of weights, in one sentence."""


@dataclass(frozen=True, slots=True)
class _StorageType:
    """A class of storages in a pickle, and its dtype."""

    name: str
    dtype: np.dtype


_STORAGE_TYPES = {
    f"{name}Storage": _StorageType(f"{name}Storage", np.dtype(dtype))
    for name, dtype in {
        "Float": np.float32,
        "BFloat16": jnp.bfloat16,
        "Half": np.float16,
        "Double": np.float64,
        "Long": np.int64,
        "Int": np.int32,
        "Short": np.int16,
        "Char": np.int8,
        "Byte": np.uint8,
        "Bool": np.bool_,
    }.items()
}


@dataclass(frozen=True, slots=True)
class _Storage:
    """One storage: the zip member with its data, and its number of elements."""

    kind: _StorageType
    member: str
    size: int


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where the data of a tensor lies."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        return self.storage.kind.dtype


class _Ignored:
    """Replaces objects that the authors' training saved beside the parameters: accepts any arguments and stores nothing."""

    def __init__(self, *arguments: object, **named: object):
        pass


def _rebuild_tensor(storage: object, offset: object, shape: object, strides: object, *rest: object) -> TensorPlace:
    whole = (offset, *_numbers(shape), *_numbers(strides))
    if not isinstance(storage, _Storage) or any(type(number) is not int or number < 0 for number in whole):
        raise pickle.UnpicklingError("a tensor has no sensible shape")
    place = TensorPlace(storage, cast(int, offset), _numbers(shape), _numbers(strides))
    if len(place.shape) != len(place.strides) or len(place.shape) > MAX_DIMENSIONS:
        raise pickle.UnpicklingError("a tensor has no sensible shape")
    # No element may be used twice, so that what is read is never larger than the file.
    if math.prod(size for size in place.shape if size) > storage.size:
        raise pickle.UnpicklingError("a tensor has more elements than its storage")
    last = place.offset + sum((size - 1) * step for size, step in zip(place.shape, place.strides, strict=True))
    if math.prod(place.shape) and last >= storage.size:
        raise pickle.UnpicklingError("a tensor reaches beyond its storage")
    return place


def _numbers(value: object) -> tuple[int, ...]:
    if not isinstance(value, tuple):
        raise pickle.UnpicklingError("a tensor has no sensible shape")
    return value


def _parameter(data: object, *rest: object) -> object:
    return data


_ALLOWED: Mapping[tuple[str, str], Callable[..., object]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): defaultdict,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    **{("builtins", kind.__name__): kind for kind in (dict, list, set, tuple)},
    # Classes of saved settings: the published checkpoints may have learning-rate multipliers in such lists.
    **dict.fromkeys(
        [
            ("typing", "Any"),
            ("omegaconf.listconfig", "ListConfig"),
            ("omegaconf.dictconfig", "DictConfig"),
            ("omegaconf.base", "ContainerMetadata"),
            ("omegaconf.base", "Metadata"),
            ("omegaconf.nodes", "AnyNode"),
            *(("builtins", kind) for kind in ("int", "float", "str", "bool")),
        ],
        _Ignored,
    ),
}


class _Unpickler(pickle._Unpickler):
    """Builds tensors and plain containers and nothing else.

    Based on the pure-Python unpickler: its memo is a dictionary, so large memo indices cost nothing, and its opcodes can be
    replaced.
    """

    # Without extensions, and without buffers of a size that the file chooses. BUILD would set attributes of any object on the
    # stack, including tensors that were checked already; here it only drops its argument.
    dispatch: ClassVar = {
        code: pickle._Unpickler.dispatch[pickle.POP[0]] if code == pickle.BUILD[0] else load
        for code, load in pickle._Unpickler.dispatch.items()
        if code not in (*pickle.EXT1, *pickle.EXT2, *pickle.EXT4, *pickle.BYTEARRAY8, *pickle.NEXT_BUFFER)
    }

    def find_class(self, module: str, name: str) -> object:  # what a pickle calls or marks a storage with
        if module == "torch" and name in _STORAGE_TYPES:
            return _STORAGE_TYPES[name]
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is neither a tensor nor a plain container")

    def persistent_load(self, pid: object) -> _Storage:
        match pid:
            case ("storage", _StorageType() as kind, str(member), str(), int(size)):
                return _Storage(kind, member, size)
        raise pickle.UnpicklingError("it refers to something that is not a storage")


class TorchFile(Mapping[str, np.ndarray]):
    """The tensors of a file by name, each read on access.

    Raises `TorchFileError` for a file of another format, a damaged one, and one that names anything but tensors and plain
    containers.
    """

    def __init__(self, path: Path):
        self._path = path
        try:
            self._zip = zipfile.ZipFile(path)
            members = [name for name in self._zip.namelist() if name.endswith("/data.pkl")]
            if len(members) != 1:
                raise TorchFileError(f"{path} is not a file of PyTorch weights: it has no data.pkl")
            self._folder = members[0].removesuffix("data.pkl")
            if self._zip.getinfo(members[0]).file_size > MAX_PICKLE_BYTES:
                raise TorchFileError(
                    f"{path} has a data.pkl of over {MAX_PICKLE_BYTES} bytes, more than any weights need"
                )
            with self._zip.open(members[0]) as stream:
                content: object = _Unpickler(stream).load()
            self._places = _tensors(content, path)
            self._check_members()
        except zipfile.BadZipFile:
            raise TorchFileError(
                f"{path} is not a zip file, which PyTorch has used since 1.6: it is damaged, or of an older format"
            ) from None
        except pickle.UnpicklingError as error:
            raise TorchFileError(f"{path} is refused: {error}") from None
        except TorchFileError:
            raise
        # A damaged pickle can raise any exception.
        except Exception as error:
            raise TorchFileError(f"{path} is damaged: its data.pkl cannot be read ({error!r})") from None

    def _check_members(self) -> None:
        """Data must be uncompressed, as large as the storage says, and little-endian."""
        order = f"{self._folder}byteorder"
        if order in self._zip.namelist() and self._zip.read(order) != b"little":
            raise TorchFileError(f"{self._path} is big-endian, which is not supported")
        for name, place in self._places.items():
            storage = place.storage
            try:
                member = self._zip.getinfo(f"{self._folder}data/{storage.member}")
            except KeyError:
                raise TorchFileError(f"{self._path} is damaged: it lacks the data of {name}") from None
            if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
                raise TorchFileError(f"{self._path} is refused: the data of {name} is compressed or encrypted")
            size = storage.size * storage.kind.dtype.itemsize
            if member.file_size != size or size > self._path.stat().st_size:
                raise TorchFileError(
                    f"{self._path} is damaged: {name} needs {size} bytes of data and has {member.file_size}"
                )

    def places(self) -> Mapping[str, TensorPlace]:
        """Shapes and dtypes of the tensors, without reading their data."""
        return self._places

    def __getitem__(self, name: str) -> np.ndarray:
        place = self._places[name]
        storage, dtype = place.storage, place.dtype
        try:
            with self._zip.open(f"{self._folder}data/{storage.member}") as stream:
                if place.strides == _contiguous_strides(place.shape):
                    stream.seek(place.offset * dtype.itemsize)
                    return self._read(stream, dtype, math.prod(place.shape), name).reshape(place.shape)
                block = self._read(stream, dtype, storage.size, name)
        except (zipfile.BadZipFile, OSError, RuntimeError, EOFError) as error:
            raise TorchFileError(f"{self._path} is damaged: the data of {name} cannot be read ({error})") from None
        strides = tuple(step * dtype.itemsize for step in place.strides)
        return np.lib.stride_tricks.as_strided(block[place.offset :], place.shape, strides).copy()

    def _read(self, stream: zipfile.ZipExtFile | IO[bytes], dtype: np.dtype, count: int, name: str) -> np.ndarray:
        """`count` elements, read piece by piece so that they are in memory only once."""
        elements = np.empty(count, dtype)
        buffer = elements.view(np.uint8).data
        done = 0
        while done < len(buffer):
            piece = stream.read(min(PIECE, len(buffer) - done))
            if not piece:
                raise TorchFileError(f"{self._path} is damaged: {name} has fewer elements than its shape says")
            buffer[done : done + len(piece)] = piece
            done += len(piece)
        return elements

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _tensors(content: object, path: Path) -> dict[str, TensorPlace]:
    """The tensors of a state dict, or of the one inside a checkpoint."""
    if isinstance(content, dict) and not any(isinstance(value, TensorPlace) for value in content.values()):
        inside = [value for key, value in content.items() if key in ("state_dict", "model") and isinstance(value, dict)]
        content = inside[0] if len(inside) == 1 else content
    if isinstance(content, dict):
        tensors = {name: value for name, value in content.items() if isinstance(value, TensorPlace)}
        if tensors and all(isinstance(name, str) for name in tensors):
            return tensors
    raise TorchFileError(f"{path} holds no dictionary of tensors")


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
    kinds = {kind.dtype: kind.name for kind in _STORAGE_TYPES.values()}
    description = bytearray(b"\x80\x02ccollections\nOrderedDict\n)R(")
    temporary = path.with_name(f".{path.name}.tmp")
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for number, name in enumerate(tensors):
            tensor = np.asarray(tensors[name])
            if tensor.dtype not in kinds:
                raise ValueError(f"{name} is {tensor.dtype}, which PyTorch has no storage for")
            archive.writestr(f"weights/data/{number}", tensor.tobytes())
            description += _text(name) + _tensor(kinds[tensor.dtype], str(number), tensor.shape)
        archive.writestr("weights/data.pkl", bytes(description + b"u."))
        archive.writestr("weights/byteorder", b"little")
        archive.writestr("weights/version", b"3\n")
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
