"""Trees of modules as JSON, and back: their classes, the values of their fields, and the names of their arrays.

Nothing is executed: a description can name only classes and functions of this library, and those that the caller allows. What
the fields of this library's classes hold is compared with their annotations.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from unet.files.errors import LoadError, shown

PACKAGES = ("estimators", "unet")

MAX_DEPTH = 64
"""Maximum depth of a tree of modules."""

_PLAIN = (bool, int, float, str, type(None))
_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")

Known = type | Callable[..., object] | types.ModuleType
"""What a file may name beside this library's own: a class, a function, or a module with all classes of its package that are
imported already."""
Names = Sequence[Known] | Mapping[str, Known]
"""The same, or by the names that files have for them, such as `{"__main__.Mine": Mine}` for a class that has moved."""


def describe(value: object, name: str, arrays: dict[str, Array]) -> object:
    """`value` as JSON; its arrays are added to `arrays`, named by the path of their fields, which begins with `name`."""
    if isinstance(value, jax.Array):
        arrays[name] = value
        return {"array": name}
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, tuple):
        return {"tuple": [describe(part, f"{name}.{place}", arrays) for place, part in enumerate(value)]}
    if isinstance(value, types.FunctionType) and "<" not in value.__qualname__:
        return {"function": f"{value.__module__}.{value.__qualname__}"}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind, fields = type(value), [field.name for field in dataclasses.fields(value)]
        inside = {field: describe(getattr(value, field), f"{name}.{field}", arrays) for field in fields}
        return {"class": f"{kind.__module__}.{kind.__qualname__}", "fields": inside}
    raise ValueError(f"{name} is a {type(value).__name__}, which cannot be saved")


class Builder:
    """Makes the value that `describe` described, with the arrays that `array` gives by name. `path` is for messages.

    Raises `LoadError` for a description that is invalid, of another version, or names what is not `known`.
    """

    def __init__(self, array: Callable[[str], np.ndarray], known: Names, path: Path):
        self._array = array
        self._known = _by_name(known)
        self._path = path

    def build(self, described: object, depth: int = 0) -> object:  # whatever was described
        """The value of a description."""
        if isinstance(described, _PLAIN):
            return described
        if isinstance(described, dict) and depth < MAX_DEPTH:
            kind = next(iter(described), None)
            content, inside = described.get(kind) if kind else None, described.get("fields")
            if kind == "array" and isinstance(content, str):
                return jnp.asarray(self._array(content))
            if kind == "tuple" and isinstance(content, list):
                return tuple(self.build(part, depth + 1) for part in content)
            if kind == "function" and isinstance(content, str):
                return self._named(content, function=True)
            if kind == "class" and isinstance(content, str) and isinstance(inside, dict):
                fields = {name: self.build(part, depth + 1) for name, part in inside.items()}
                return self._instance(self._named(content, function=False), fields)
        raise LoadError(
            f"{self._path} is damaged: its description of the model is invalid, or too deep, where it has a "
            f"{type(described).__name__}"
        )

    def _instance(self, kind: Known, values: Mapping[str, object]) -> object:  # of whatever class `kind` is
        assert isinstance(kind, type)
        fields = {field.name: field for field in dataclasses.fields(kind)}
        lacking = [
            name for name, field in fields.items() if name not in values and field.default is dataclasses.MISSING
        ]
        if lacking or not values.keys() <= fields.keys():
            differing = sorted({*lacking, *(values.keys() - fields.keys())})
            raise LoadError(
                f"{self._path} was written by another version: its {kind.__name__} differs in {shown(', '.join(differing))}"
            )
        if kind.__module__.split(".")[0] in PACKAGES:
            for name, value in values.items():
                if not admits(_annotations(kind).get(name, object), value):
                    raise LoadError(
                        f"{self._path} is damaged, or was written by another version: the {name} of its {kind.__name__} is "
                        f"{_kind(value)}"
                    )
        # Not by calling the class, which would draw new weights.
        made = object.__new__(kind)
        for name, field in fields.items():
            object.__setattr__(made, name, values.get(name, field.default))
        return made

    def _named(self, name: str, *, function: bool) -> Known:
        """The class of modules or the function of that name, which must be of this library or known."""
        known = self._known
        found: object = known.get(name)
        module, _, attribute = name.rpartition(".")
        packages = {one.__name__.split(".")[0] for one in known.values() if isinstance(one, types.ModuleType)}
        if found is None and module.split(".")[0] in packages and module in sys.modules:
            found = getattr(sys.modules[module], attribute, None)
            found = found if getattr(found, "__module__", None) == module else None
        if found is None and module.split(".")[0] in PACKAGES and _NAME.fullmatch(name):
            try:
                found = getattr(importlib.import_module(module), attribute, None)
            except ImportError:
                found = None
            # Not what a module only imports.
            found = found if getattr(found, "__module__", None) == module else None
        trusted = name in known or module.startswith("estimators") or module.split(".")[0] in packages
        if function and isinstance(found, types.FunctionType) and trusted:
            return found
        if not function and isinstance(found, type) and dataclasses.is_dataclass(found):
            return found
        raise LoadError(
            f"{self._path} was made with {shown(name)}, which is not part of this library: name its module with --plugin "
            f"{shown(module)}, or pass the {'function' if function else 'class'} to load(…, known=[…])"
        )


def _by_name(known: Names) -> dict[str, Known]:
    """What is known by the names that files use; modules by theirs."""
    if isinstance(known, Mapping):
        return dict(known)
    return {
        one.__name__ if isinstance(one, types.ModuleType) else f"{one.__module__}.{one.__qualname__}": one
        for one in known
    }


@functools.cache
def _annotations(kind: type) -> Mapping[str, object]:
    """The annotations of a class's fields; none where they name what only type checkers import."""
    try:
        return typing.get_type_hints(kind)
    except NameError:
        return {}


def admits(annotation: object, value: object) -> bool:
    """Whether an annotation admits a value that a description can hold. What is not known about an annotation is admitted."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(admits(one, value) for one in arguments)
    if origin is typing.Literal:
        return any(type(value) is type(one) and value == one for one in arguments)
    if origin is tuple and isinstance(value, tuple):
        parts = [arguments[0]] * len(value) if arguments[1:] == (...,) else list(arguments)
        return len(parts) == len(value) and all(map(admits, parts, value))
    if annotation is float:
        return type(value) in (int, float)
    if annotation in (int, bool, str):
        return type(value) is annotation
    if annotation is None:
        return value is None
    kind = annotation if origin is None else origin
    return isinstance(value, kind) if isinstance(kind, type) else True


def _kind(value: object) -> str:
    if isinstance(value, jax.Array):
        return f"an array of {value.dtype}, shape {list(value.shape)}"
    return shown(repr(value)) if isinstance(value, _PLAIN) else f"a {type(value).__name__}"
