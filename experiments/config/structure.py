"""Plain values to settings, with every type checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeVar, get_args, get_origin

import cattrs
from cattrs.errors import ForbiddenExtraKeysError

from estimators.bounds import shown
from unet.config import UNetConfig
from unet.hnet import HNetConfig

Settings = TypeVar("Settings")


def structured(values: object, kind: type[Settings], where: str = "") -> Settings:
    """`values` as an instance of the dataclass `kind`; a setting that is missing has its default.

    Raises `ValueError` in one sentence that names the setting, below `where`, for one that does not exist, a wrong type, and
    what the dataclass refuses itself.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where}: it is no JSON object" if where else "it is no JSON object")
    try:
        return _CONVERTER.structure(values, kind)
    except cattrs.BaseValidationError as error:
        sentence, *_ = cattrs.transform_error(error, format_exception=_sentence)
        what, _, place = sentence.rpartition(" @ $")
        name = ".".join(part for part in (where, place.removeprefix(".")) if part)
        raise ValueError(f"{name}{': ' if name else ''}{what}") from None


def _sentence(error: BaseException, kind: object) -> str:
    if isinstance(error, ForbiddenExtraKeysError):
        return f"there is no setting {', '.join(sorted(error.extra_fields))}; another version wrote it"
    if isinstance(error, KeyError):
        return "it is missing"
    if isinstance(error, TypeError) and (dataclasses.is_dataclass(kind) or kind == UNetConfig | HNetConfig):
        return "it is no JSON object"
    return str(error)


def _number(value: object, kind: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{shown(value)} is no number")
    return float(value)


def _whole_number(value: object, kind: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{shown(value)} is no whole number")
    return value


def _truth_value(value: object, kind: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{shown(value)} is neither true nor false")
    return value


def _string(value: object, kind: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{shown(value)} is no string")
    return value


def _path(value: object, kind: object) -> Path:
    return value if isinstance(value, Path) else Path(_string(value, kind))


def _choice(value: object, kind: object) -> object:
    for choice in get_args(kind):
        if value == choice and type(value) is type(choice):
            return choice
    raise TypeError(f"{shown(value)} is none of {', '.join(map(str, get_args(kind)))}")


def _shape(value: object, kind: object) -> UNetConfig | HNetConfig:
    own = HNetConfig if isinstance(value, dict) and "layout" in value else UNetConfig
    return _CONVERTER.structure(value, own)


def _sections(value: object, kind: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise TypeError("it is no JSON object")
    for name, inside in value.items():
        if not isinstance(inside, dict):
            raise TypeError(f"{name} is no JSON object")
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
    # Plain values, whose types are checked against those of the parts that they belong to.
    converter.register_structure_hook_func(lambda kind: kind == Mapping[str, Mapping[str, object]], _sections)
    converter.register_structure_hook(UNetConfig | HNetConfig, _shape)
    return converter


_CONVERTER = _converter()
