"""Saving and loading models: one safetensors file holds the arrays and describes the model that they belong to.

The file's metadata describes the tree of modules (`unet.files.described`) and has the dtype, the shape and the SHA-256 of each
array, and a SHA-256 of all that. So any composition of routers, chunkers, objectives and stages can be saved, loaded without the
code that configured it, and found damaged if a single bit has changed. The same model gives the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from unet.files.arrays import ArrayFile, as_numpy, file_content
from unet.files.described import PACKAGES, Builder, Names, describe
from unet.files.errors import LoadError, shown
from unet.files.hub import Repository
from unet.files.json_files import parse_json, read_json
from unet.language_model import AbstractLanguageModel

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
FORMAT = "caesura"
VERSION = "4"
UNCHECKED = "3"
"""The version of files without checksums, which can still be read."""

Read = Callable[[Array | np.ndarray], np.ndarray]
"""Brings an array to the host, its numbers in the order of its axes."""


@dataclass(frozen=True)
class Loaded:
    """A `model`, and the `config` of the run that trained it, for information (empty if there was no such file). The model does
    not depend on it."""

    model: AbstractLanguageModel
    config: Mapping[str, object]


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write. A crash leaves either the old or the new one, never a partial one; an error leaves nothing else."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        # It takes room on what may be a full disk. The error that matters is the first one.
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_atomically(path: Path, *parts: str | bytes | memoryview) -> None:
    """Write a file as `atomic_file` does."""
    with atomic_file(path) as stream:
        for part in parts:
            stream.write(part.encode() if isinstance(part, str) else part)


def save(model: AbstractLanguageModel, folder: str | Path, *, read: Read = as_numpy) -> Path:
    """Write `model.safetensors` to `folder`, which is created if it is missing, and return its path. A crash leaves no partial
    file. `read` brings one array after another to the host, twice; no more than one of them is there at a time.

    Raises `ValueError` if a model contains anything but modules, arrays, plain values and named functions.
    """
    return save_module(model, Path(folder) / WEIGHTS, read=read)


def save_module(module: eqx.Module, path: Path, *, read: Read = as_numpy) -> Path:
    """Write any module to a file of its own, as `save` writes a model."""
    content = module_content(module, read)
    # What cannot be saved is found before anything is written.
    header = next(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as stream:
        for part in itertools.chain([header], content):
            stream.write(part)
    return path


def module_content(module: eqx.Module, read: Read = as_numpy) -> Iterator[bytes | memoryview]:
    """The file that `save_module` writes, in parts. Of the same module arrays are `read` in the same order everywhere: where they
    lie in parts with several processes, all of those have to go through it."""
    arrays: dict[str, Array] = {}
    structure = json.dumps(describe(module, "model", arrays), separators=(",", ":"))
    yield from file_content(arrays, metadata_of(structure, arrays, read), read)


def metadata_of(structure: str, arrays: Mapping[str, Array | np.ndarray], read: Read = as_numpy) -> dict[str, str]:
    """The metadata of a file with a module's description `structure`: it has the checksums of that and of the arrays."""
    leaves = json.dumps({name: _leaf(read(array)) for name, array in arrays.items()}, separators=(",", ":"))
    digest = _digest(structure, leaves)
    return {"format": FORMAT, "version": VERSION, "structure": structure, "leaves": leaves, "sha256": digest}


def _leaf(array: np.ndarray) -> list[object]:
    """What is said of an array so that it is found damaged: dtype, shape, and the SHA-256 of its bytes."""
    content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return [str(array.dtype), list(array.shape), hashlib.sha256(content.data).hexdigest()]


def _digest(structure: str, leaves: str) -> str:
    return hashlib.sha256(f"{structure}\n{leaves}".encode(errors="surrogatepass")).hexdigest()


def require_saveable(module: eqx.Module) -> None:
    """Raise `ValueError` where `save` would, without writing anything."""
    small = jax.tree.map(lambda leaf: jnp.zeros(()) if eqx.is_array(leaf) else leaf, module)
    describe(small, "model", {})


def load(where: str | Path, *, known: Names = ()) -> Loaded:
    """The model in the folder of a run or an export, in a `.safetensors` file, or in a repository of the hub (`hub:owner/name`,
    or `hub:owner/name@revision`).

    `known`: classes, functions and modules it uses beside those of this library; nothing is imported because a file names it.
    Raises `LoadError` if there is no model, if it is damaged, and if it names an unknown class.
    """
    folder = _downloaded(str(where)[4:]) if str(where).startswith("hub:") else Path(where)
    path = folder if folder.suffix == ".safetensors" else folder / WEIGHTS
    if not path.is_file():
        lacks = f"{folder} holds no {path.name}" if folder.is_dir() else f"there is no file or folder {folder}"
        raise LoadError(f"{lacks}: it is neither a finished run nor an exported model")
    config = path.with_name(CONFIG)
    model = load_module(path, known)
    if not isinstance(model, AbstractLanguageModel):
        raise LoadError(f"{path} describes a {type(model).__name__}, not a model")
    return Loaded(model, read_json(config) if config.is_file() else {})


def _downloaded(repository: str) -> Path:
    """The folder of a model of the hub, with its configuration if there is one."""
    on_hub = Repository(repository)
    folder = on_hub.first([WEIGHTS]).parent
    on_hub.optional(CONFIG)
    return folder


def describes_itself(path: Path) -> bool:
    """Whether a file describes the model that its arrays belong to, as those of `save` do."""
    try:
        with ArrayFile(path) as file:
            return file.metadata.get("format") == FORMAT
    except (LoadError, OSError):
        return False


def load_module(path: Path, known: Names = ()) -> object:  # of whatever class the file describes
    """What `save_module` wrote. Raises `LoadError` as `load` does."""
    with ArrayFile(path) as file:
        structure, leaves = _described_in(file.metadata, path)
        left = set(file)

        def array(name: str) -> np.ndarray:
            if name not in left:
                raise LoadError(f"{path} is damaged: the array {shown(name)} is missing, or named twice")
            left.discard(name)
            found = file[name]
            if leaves is not None and _leaf(found) != leaves.get(name):
                raise LoadError(f"{path} is damaged: the array {shown(name)} is not the one that was saved")
            return found

        module = Builder(array, known, path).build(structure)
    if left:
        raise LoadError(f"{path} is damaged: its array {shown(min(left))} belongs to nothing in the model")
    return module


def _described_in(metadata: Mapping[str, str], path: Path) -> tuple[object, Mapping[str, object] | None]:
    """The description of the module in a file, and those of its arrays (None for a file without checksums)."""
    if metadata.get("format") != FORMAT or "structure" not in metadata:
        raise LoadError(f"{path} does not describe the model of its arrays: it was not written by this library")
    version, structure, leaves = metadata.get("version"), metadata["structure"], metadata.get("leaves")
    if version not in (VERSION, UNCHECKED):
        raise LoadError(
            f"{path} has format version {shown(version)}; this version of the library reads {VERSION} and {UNCHECKED}"
        )
    if version == UNCHECKED and leaves is None:
        return parse_json(structure, path), None
    if leaves is None or metadata.get("sha256") != _digest(structure, leaves):
        raise LoadError(f"{path} is damaged: its description of the model is not the one that was saved")
    return parse_json(structure, path), parse_json(leaves, path)


def outside_classes(path: Path) -> list[str]:
    """The names of the classes in a file that are not part of this library; none for a file that is not of `save`."""
    if not describes_itself(path):
        return []
    with ArrayFile(path) as file:
        text = file.metadata.get("structure", "")
    return sorted({name for name in _CLASS.findall(text) if name.split(".")[0] not in PACKAGES})


_CLASS = re.compile(r'"class":"([\w.]+)"')
