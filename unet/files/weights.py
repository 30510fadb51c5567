"""Published weights as they are found: one file of either format, or shards with an index, with names as training left them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from unet.files.arrays import AbstractArrays, ArrayFile, rows_of, shape_in
from unet.files.errors import LoadError, shown
from unet.files.hub import is_plain_name
from unet.files.json_files import read_json
from unet.files.torch_files import TorchFile

INDEX = ".safetensors.index.json"
"""How the names of indices of shards end."""

TORCH = (".pt", ".pth", ".bin")
"""Suffixes of PyTorch's files of weights."""

COMPILED = "_orig_mod."
"""What compiling a module with PyTorch puts before the names inside it."""

PREFIXES = ("module.", "model.")
"""What wrappers for training put before all names. Not all names of a released layout begin so, but for those of a Byte Latent
Transformer without its head."""


def is_shard(name: str) -> bool:
    """Whether a file is called like a shard or an index of shards."""
    return name == f"model{INDEX}" or re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", name) is not None


def open_weights(path: Path) -> Mapping[str, np.ndarray]:
    """The arrays of a `.safetensors` file, of the shards of an index, or of PyTorch's file, each read on access, by their names
    without what compilers and wrappers put before them. Raises `LoadError` and `TorchFileError`."""
    if path.name.endswith(INDEX):
        return _Renamed(_Shards(path))
    return _Renamed(ArrayFile(path) if path.suffix == ".safetensors" else TorchFile(path))


def only_weights(folder: Path) -> Path:
    """The one file of weights in a folder, or the index of those that are there. Raises `LoadError` where it is not clear."""
    inside = sorted(path for path in folder.iterdir() if path.is_file())
    indices = [path for path in inside if path.name.endswith(INDEX)]
    files = [path for path in inside if path.suffix in (".safetensors", *TORCH)]
    shards = set().union(*(read_index(path).values() for path in indices))
    found = [*indices, *(path for path in files if path.name not in shards)]
    if len(found) != 1:
        names = shown(", ".join(path.name for path in found) or "none", 200)
        raise LoadError(
            f"{folder} must hold one file of weights (.safetensors, {', '.join(TORCH)}), or shards and their index "
            f"({INDEX[1:]}); it holds {names}"
        )
    return found[0]


def read_index(path: Path) -> dict[str, str]:
    """The names of arrays in an index, and the file of each, which lies beside the index. Raises `LoadError` for others."""
    found = read_json(path).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise LoadError(f"{path} is no index of shards: it has no weight_map")
    for name, file in found.items():
        if not isinstance(file, str) or not is_plain_name(file) or not file.endswith(".safetensors"):
            raise LoadError(
                f"{path} is refused: {shown(name)} is in {shown(file)}, which is no safetensors file beside it"
            )
    return {str(name): str(file) for name, file in found.items()}


class _Shards(AbstractArrays):
    """The arrays of several safetensors files, as their index says."""

    def __init__(self, index: Path):
        self._places = read_index(index)
        self._files: dict[str, ArrayFile] = {}
        for file in sorted(set(self._places.values())):
            path = index.with_name(file)
            if not path.is_file():
                raise LoadError(f"{index} names {shown(file)}, which is not there: the download is not complete")
            self._files[file] = ArrayFile(path)
            named = {name for name, place in self._places.items() if place == file}
            for name in sorted(named ^ set(self._files[file]))[:1]:
                what = "does not have" if name in named else "has, but the index does not"
                raise LoadError(f"{index} and {shown(file)} do not belong together: {shown(name)} is what it {what}")

    def __getitem__(self, name: str) -> np.ndarray:
        return self._files[self._places[name]][name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._files[self._places[name]].shape(name)

    def rows(self, name: str, rows: slice) -> np.ndarray:
        return self._files[self._places[name]].rows(name, rows)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class _Renamed(AbstractArrays):
    """Arrays without `COMPILED` anywhere in their names, and without those of `PREFIXES` that all of them have."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self._arrays = arrays
        short = {name: name.replace(COMPILED, "") for name in arrays}
        while prefix := next(
            (one for one in PREFIXES if short and all(x.startswith(one) for x in short.values())), None
        ):
            short = {name: one.removeprefix(prefix) for name, one in short.items()}
        # Names that would become one are left as they are, and do not fit any configuration.
        self._names = {one: name for name, one in short.items()}
        if len(self._names) < len(short):
            self._names = {name: name for name in arrays}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[self._names[name]]

    def shape(self, name: str) -> tuple[int, ...]:
        return shape_in(self._arrays, self._names[name])

    def rows(self, name: str, rows: slice) -> np.ndarray:
        return rows_of(self._arrays, self._names[name], rows)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
