"""What the pickle in PyTorch's file of weights says: where the data of each tensor lies.

The pickle calls functions of PyTorch to rebuild tensors. Functions here stand for those; others that training loops need for
what they save beside the parameters are known by name and never called.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from unet.files.pickles import IGNORED, Arguments, Names, PickleError, read_pickle

MAX_DIMENSIONS = 16
"""Maximum number of dimensions of a tensor."""


@dataclass(frozen=True, slots=True)
class StorageType:
    """A class of storages in a pickle, and its dtype."""

    name: str
    dtype: np.dtype


STORAGE_TYPES = {
    f"{name}Storage": StorageType(f"{name}Storage", np.dtype(dtype))
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
class Storage:
    """One storage: the zip member with its data, and its number of elements."""

    kind: StorageType
    member: str
    size: int


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where the data of a tensor lies."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        return self.storage.kind.dtype

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def last(self) -> int:
        """The last element of the storage that is used, where there are any."""
        return self.offset + sum((size - 1) * step for size, step in zip(self.shape, self.strides, strict=True))


def _rebuild_tensor(arguments: Arguments) -> TensorPlace:
    """`_rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks)`."""
    storage, offset, shape, strides = arguments[:4] if len(arguments) >= 4 else (None,) * 4
    shape, strides = _numbers(shape), _numbers(strides)
    (offset,) = _numbers((offset,))
    if not isinstance(storage, Storage) or len(shape) != len(strides):
        raise PickleError("a tensor has no sensible shape")
    # No element may be used twice, so that what is read is never larger than the file.
    if math.prod(size for size in shape if size) > storage.size:
        raise PickleError("a tensor has more elements than its storage")
    place = TensorPlace(storage, offset, shape, strides)
    if place.size and place.last >= storage.size:
        raise PickleError("a tensor reaches beyond its storage")
    return place


def _numbers(value: object) -> tuple[int, ...]:
    """A tuple of a few non-negative integers of 63 bits."""
    if isinstance(value, tuple) and len(value) <= MAX_DIMENSIONS:
        numbers = tuple(number for number in value if type(number) is int and number >= 0)
        if len(numbers) == len(value):
            return numbers
    raise PickleError("a tensor has no sensible shape")


def _first(arguments: Arguments) -> object:
    """A parameter is its tensor; what else it has is not needed."""
    if not arguments or not isinstance(arguments[0], TensorPlace):
        raise PickleError("a parameter has no tensor")
    return arguments[0]


def _size(arguments: Arguments) -> object:
    return arguments[0] if len(arguments) == 1 and isinstance(arguments[0], tuple) else ()


def _ignore(arguments: Arguments) -> object:
    return IGNORED


def _new_dict(arguments: Arguments) -> object:
    """An empty dictionary; its entries follow. Pickles of Python 2 had them as a list."""
    if arguments and arguments[0] is IGNORED:
        raise PickleError("its dictionaries are those of Python 2")
    return {}


_IGNORED_NAMES = {
    "builtins": (
        "int",
        "float",
        "complex",
        "str",
        "bool",
        "bytes",
        "bytearray",
        "list",
        "set",
        "frozenset",
        "slice",
        "range",
    ),
    "_codecs": ("encode",),
    "argparse": ("Namespace",),
    "datetime": ("date", "datetime", "timedelta", "timezone"),
    "pathlib": ("Path", "PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"),
    "typing": ("Any",),
    "numpy": ("dtype", "ndarray", *(f"{kind}{bits}" for kind in ("int", "uint", "float") for bits in (16, 32, 64))),
    "numpy.core.multiarray": ("scalar", "_reconstruct"),
    "numpy._core.multiarray": ("scalar", "_reconstruct"),
    "torch": ("device", "float16", "bfloat16", "float32", "float64"),
    "omegaconf.listconfig": ("ListConfig",),
    "omegaconf.dictconfig": ("DictConfig",),
    "omegaconf.base": ("ContainerMetadata", "Metadata"),
    "omegaconf.nodes": ("AnyNode", "BooleanNode", "FloatNode", "IntegerNode", "StringNode"),
}
"""Classes and functions of numbers and settings that a training loop saves beside the parameters. They are never called."""

_NAMES: Names = {
    # What pickles of protocol 2, PyTorch's usual one, call `builtins`.
    **{("__builtin__", name): _ignore for name in (*_IGNORED_NAMES["builtins"], "unicode", "long", "xrange")},
    **{("torch", name): kind for name, kind in STORAGE_TYPES.items()},
    **{(module, name): _ignore for module, names in _IGNORED_NAMES.items() for name in names},
    ("collections", "Counter"): _new_dict,
    ("collections", "OrderedDict"): _new_dict,
    ("collections", "defaultdict"): _new_dict,
    **{(module, "dict"): _new_dict for module in ("builtins", "__builtin__")},
    **{(module, "tuple"): _size for module in ("builtins", "__builtin__")},
    ("torch", "Size"): _size,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
}


def _storage(identifier: object) -> Storage:
    match identifier:
        case ("storage", StorageType() as kind, str(member), str(), int(size)) if type(size) is int and size >= 0:
            return Storage(kind, member, size)
    raise PickleError("it refers to something that is not a storage")


_STATE_DICTS = ("state_dict", "model", "model_state_dict", "module")
"""Names under which training checkpoints have the parameters."""


def read_tensors(content: bytes) -> dict[str, TensorPlace]:
    """The tensors of a pickled state dict, or of the one inside a checkpoint. Raises `PickleError`."""
    found = read_pickle(content, _NAMES, _storage)
    tensors = _tensors_in(found)
    if isinstance(found, dict):
        inside = {name: one for name in _STATE_DICTS if (one := _tensors_in(found.get(name)))}
        if len(inside) > 1:
            raise PickleError(f"it holds several dictionaries of tensors ({', '.join(inside)}): save one alone")
        tensors = next(iter(inside.values()), tensors)
    if not tensors:
        raise PickleError(f"it holds no dictionary of tensors, neither itself nor as {', '.join(_STATE_DICTS)}")
    return tensors


def _tensors_in(content: object) -> dict[str, TensorPlace]:
    if not isinstance(content, dict):
        return {}
    return {name: one for name, one in content.items() if isinstance(one, TensorPlace) and isinstance(name, str)}
