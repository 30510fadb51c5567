"""The file that the settings of a run are kept in, read back with every type checked."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Literal, get_args, get_origin

import cattrs
from cattrs.errors import ForbiddenExtraKeysError

from experiments.config.errors import ConfigError
from experiments.config.settings import RunConfig
from unet.config import UNetConfig
from unet.hnet import HNetConfig


def to_json(config: RunConfig) -> str:
    """The configuration as JSON text, paths as strings."""
    return json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n"


def from_json(text: str, where: str) -> RunConfig:
    """The configuration that `to_json` wrote. A setting that is missing has its default.

    Raises `ConfigError`, naming `where` and the setting, for anything else.
    """
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{where} is not the configuration of a run ({error})") from None
    return from_values(values, where)


def from_values(values: object, where: str) -> RunConfig:
    """The same from JSON that is parsed already."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where} is not the configuration of a run: it is no JSON object")
    try:
        return _CONVERTER.structure(values, RunConfig)
    except cattrs.BaseValidationError as error:
        sentence, *_ = cattrs.transform_error(error, format_exception=_sentence)
        what, _, place = sentence.rpartition(" @ $")
        name = place.removeprefix(".")
        raise ConfigError(f"{where} is not the configuration of a run: {name}{': ' if name else ''}{what}") from None


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
        raise TypeError(f"{value!r} is no number")
    return float(value)


def _whole_number(value: object, kind: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{value!r} is no whole number")
    return value


def _truth_value(value: object, kind: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{value!r} is neither true nor false")
    return value


def _string(value: object, kind: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no string")
    return value


def _choice(value: object, kind: object) -> object:
    if not isinstance(value, str) or value not in get_args(kind):
        raise TypeError(f"{value!r} is none of {', '.join(get_args(kind))}")
    return value


def _shape(value: object, kind: object) -> UNetConfig | HNetConfig:
    own = HNetConfig if isinstance(value, dict) and "layout" in value else UNetConfig
    return _CONVERTER.structure(value, own)


def _converter() -> cattrs.Converter:
    """Refuses what cattrs would convert, such as the string "16" to a number, and settings that there are not."""
    converter = cattrs.Converter(forbid_extra_keys=True)
    converter.register_structure_hook(float, _number)
    converter.register_structure_hook(int, _whole_number)
    converter.register_structure_hook(bool, _truth_value)
    converter.register_structure_hook(str, _string)
    converter.register_structure_hook_func(lambda kind: get_origin(kind) is Literal, _choice)
    converter.register_structure_hook(Path, lambda value, kind: Path(_string(value, kind)))
    converter.register_structure_hook(UNetConfig | HNetConfig, _shape)
    return converter


_CONVERTER = _converter()
