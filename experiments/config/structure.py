"""JSON to plain values and settings, with every type checked."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeVar, get_args, get_origin

import cattrs
from cattrs.errors import ForbiddenExtraKeysError

from experiments.config.errors import one_line
from unet.blt import BLTConfig
from unet.config import UNetConfig
from unet.hnet import HNetConfig
from unet.transformer import TransformerConfig

Settings = TypeVar("Settings")

Flat = dict[str, float | int | str | None]
"""A JSON object without anything nested."""
Shape = UNetConfig | HNetConfig | BLTConfig | TransformerConfig
"""The shape of a model."""
LARGEST = 2**63
"""The largest whole number of a flat object, in size: larger ones are no numbers of steps or bytes."""


def parsed(content: str | bytes) -> object:
    """The value of a JSON text. Raises `ValueError` in one sentence for anything else, NaN and infinity included."""
    try:
        # Not by the encoding that JSON would guess from zeros.
        text = content.decode() if isinstance(content, bytes) else content
        return json.loads(text, parse_constant=_refused_constant)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 from byte {error.start} on") from None
    except ValueError as error:
        raise ValueError(one_line(str(error))) from None


def _refused_constant(name: str) -> object:
    raise ValueError(f"JSON has no {name}")


def flat(value: object) -> Flat:
    """`value`, if it is an object of numbers, texts and nulls. Raises `ValueError` in one sentence for anything else."""
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    for name, part in value.items():
        if isinstance(part, float) and not math.isfinite(part):
            raise ValueError(f"{one_line(name, 60)} is too large a number")
        if isinstance(part, int) and not -LARGEST <= part < LARGEST:
            raise ValueError(f"{one_line(name, 60)} is too large a number")
        if part is not None and not isinstance(part, float | int | str):
            raise ValueError(f"{one_line(name, 60)} is neither a number nor a text")
    return value


def structured(values: object, kind: type[Settings], where: str = "") -> Settings:
    """`values` as an instance of the dataclass `kind`; a setting that is missing has its default.

    Raises `ValueError` in one short sentence that names the setting, below `where`, for one that does not exist, a wrong type,
    and what the dataclass refuses itself.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where}: it is no JSON object" if where else "it is no JSON object")
    try:
        return _CONVERTER.structure(values, kind)
    except cattrs.BaseValidationError as error:
        sentence, *_ = cattrs.transform_error(error, format_exception=_sentence)
        what, _, place = sentence.rpartition(" @ $")
        name = ".".join(part for part in (where, place.removeprefix(".")) if part)
        raise ValueError(one_line(f"{name}{': ' if name else ''}{what}")) from None


def _sentence(error: BaseException, kind: object) -> str:
    if isinstance(error, ForbiddenExtraKeysError):
        names = sorted(error.extra_fields)
        known = [one.name for one in dataclasses.fields(error.cl)] if dataclasses.is_dataclass(error.cl) else []
        close = difflib.get_close_matches(names[0], known, 1)
        return f"there is no setting {', '.join(names)}" + (f" (did you mean {close[0]}?)" if close else "")
    if isinstance(error, KeyError):
        return "it is missing"
    if isinstance(error, TypeError) and (dataclasses.is_dataclass(kind) or kind == Shape):
        return "it is no JSON object"
    return str(error)


def _quoted(value: object) -> str:
    """A value that a file has, in an error."""
    return one_line(repr(value), 80)


def _number(value: object, kind: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{_quoted(value)} is no number")
    return float(value)


def _whole_number(value: object, kind: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{_quoted(value)} is no whole number")
    return value


def _truth_value(value: object, kind: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{_quoted(value)} is neither true nor false")
    return value


def _string(value: object, kind: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{_quoted(value)} is no string")
    return value


def _path(value: object, kind: object) -> Path:
    return value if isinstance(value, Path) else Path(_string(value, kind))


def _choice(value: object, kind: object) -> object:
    for choice in get_args(kind):
        if value == choice and type(value) is type(choice):
            return choice
    raise TypeError(f"{_quoted(value)} is none of {', '.join(map(str, get_args(kind)))}")


def _truth_value_or_auto(value: object, kind: object) -> bool | str:
    if value != "auto" and not isinstance(value, bool):
        raise TypeError(f"{_quoted(value)} is neither true nor false nor auto")
    return value


def _shape(value: object, kind: object) -> Shape:
    names = value if isinstance(value, dict) else {}
    if "layout" in names:
        own = HNetConfig
    elif "layers" in names:
        own = TransformerConfig if "dim" in names else BLTConfig
    else:
        own = UNetConfig
    return _CONVERTER.structure(value, own)


def _sections(value: object, kind: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise TypeError("it is no JSON object")
    for name, inside in value.items():
        if not isinstance(inside, dict):
            raise TypeError(f"{one_line(name, 60)} is no JSON object")
    return value


def _converter() -> cattrs.Converter:
    """Refuses what cattrs would convert, such as the string "16" to a number, and settings that there are not."""
    converter = cattrs.Converter(forbid_extra_keys=True)
    converter.register_structure_hook(float, _number)
    converter.register_structure_hook(int, _whole_number)
    converter.register_structure_hook(bool, _truth_value)
    converter.register_structure_hook(str, _string)
    converter.register_structure_hook_func(lambda kind: get_origin(kind) is Literal, _choice)
    converter.register_structure_hook(Path, _path)
    # What may be anything.
    converter.register_structure_hook_func(lambda kind: kind is object, lambda value, kind: value)
    # Plain values, whose types are checked against those of the parts that they belong to.
    converter.register_structure_hook_func(lambda kind: kind == Mapping[str, Mapping[str, object]], _sections)
    converter.register_structure_hook(Shape, _shape)
    converter.register_structure_hook(bool | Literal["auto"], _truth_value_or_auto)
    return converter


_CONVERTER = _converter()
