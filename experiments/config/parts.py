"""From the names in a configuration to the parts they stand for, and from plain values to the settings of these parts."""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from estimators.bounds import shown
from estimators.constraints import CONSTRAINTS
from estimators.lookup import Kind, Part, PartError, Setting, default_of, field_help, find, settings_of
from estimators.registry import ESTIMATORS, configuration, sections_of
from estimators.sections import REDUCTIONS
from estimators.settings import EstimatorConfig
from experiments.config.errors import ConfigError, outside_errors, require
from experiments.config.structure import structured
from unet.chunkers.named import CHUNKERS, POOLS

KINDS: tuple[Kind, ...] = (ESTIMATORS, CHUNKERS, POOLS, REDUCTIONS, CONSTRAINTS)
"""Every kind of part that can be named."""

Values = Mapping[str, Mapping[str, object]]
"""Plain values of settings, by section and name."""


@dataclass(frozen=True)
class Section:
    """Settings under one name. `cls` is the dataclass that holds them; `owner` says in words what they belong to; `kinds` has
    the kind of part that a setting names, such as variance reductions."""

    name: str
    cls: type
    settings: tuple[Setting, ...]
    owner: str
    kinds: Mapping[str, Kind]

    def read(self, values: Values) -> object:
        """The settings, from plain values. Raises `ConfigError` for wrong ones."""
        read = self._read(values, self.cls)
        for one in self.settings:
            self._require_finite(one, getattr(read, one.name))
        return read

    def _require_finite(self, setting: Setting, value: object) -> None:
        """Raise `ConfigError` for NaN, an infinity, or a whole number that no 64 bits hold, unless it is the default."""
        for one in value if isinstance(value, tuple | list) else (value,):
            odd = isinstance(one, float) and not math.isfinite(one)
            odd |= isinstance(one, int) and not -(2**63) <= one < 2**63
            require(
                not odd or value == setting.default,
                f"--{self.name}.{setting.name}".replace("_", "-")
                + f" must be a finite number that 64 bits hold; got {shown(one)}",
            )

    def given(self, values: Values) -> dict[str, object]:
        """Those of the settings that `values` have. Raises `ConfigError` for wrong ones."""
        present = [(one.name, one.type) for one in self.settings if one.name in values.get(self.name, {})]
        return vars(self._read(values, dataclasses.make_dataclass(self.cls.__name__, present)))

    def _read(self, values: Values, cls: type) -> object:
        try:
            return structured(dict(values.get(self.name, {})), cls)
        except ValueError as error:
            raise ConfigError(f"--{self.name.replace('_', '-')}: {error}") from None


@dataclass(frozen=True)
class Names:
    """The parts that a run names: the estimator of each level, the outermost first, its chunker and its pool. None: what the
    estimator was published with. Constraints are those of the outermost level, and those of all levels inside."""

    estimators: tuple[str, ...]
    chunker: str | None
    pool: str | None
    constrain: tuple[str, ...] = ()
    inner_constrain: tuple[str, ...] = ()


@dataclass(frozen=True)
class Level:
    """The parts of one level of tokens."""

    estimator: Part
    chunker: Part
    pool: Part
    constraints: tuple[Part, ...] = ()

    @property
    def all(self) -> tuple[Part, ...]:
        """The parts in order."""
        return self.estimator, self.chunker, self.pool, *self.constraints


def levels_of(names: Names) -> tuple[Level, ...]:
    """The parts of each level. Raises `PartError` for names that stand for nothing."""
    levels = []
    for number, name in enumerate(names.estimators):
        estimator = find(ESTIMATORS, name)
        own = estimator.cls
        chunker = names.chunker or getattr(own, "default_chunker", EstimatorConfig.default_chunker)
        pool = names.pool or getattr(own, "default_pool", EstimatorConfig.default_pool)
        constraints = [find(CONSTRAINTS, one) for one in (names.inner_constrain if number else names.constrain)]
        levels.append(Level(estimator, find(CHUNKERS, chunker), find(POOLS, pool), tuple(constraints)))
    return tuple(levels)


def chosen(parts: Iterable[Part], values: Values) -> list[Part]:
    """These parts, and those that their settings name, such as variance reductions; `values` may say which these are."""
    waiting, found = list(parts), dict[type, Part]()
    while waiting:
        part = waiting.pop(0)
        if part.cls not in found:
            found[part.cls] = part
            waiting += [find(*named) for section in _sections_of(part) for named in named_in(section, values)]
    return list(found.values())


def sections_in(parts: Iterable[Part], values: Values) -> dict[str, Section]:
    """The sections of everything that is `chosen`, by name. Raises `ConfigError` for two different ones of one name."""
    sections: dict[str, Section] = {}
    pairs = [(part, section) for part in chosen(parts, values) for section in _sections_of(part)]
    for owner, section in pairs:
        _require_own_name(owner, section)
        there = sections.setdefault(section.name, section)
        if there.settings != section.settings:
            raise ConfigError(
                f"both {there.owner} and {section.owner} have settings called {section.name}: give one of the classes another "
                "`section`"
            )
    return sections


def _require_own_name(part: Part, section: Section) -> None:
    """Raise `PartError` where an outside class has other settings under a name of the library's, whose presets would set them."""
    house = house_sections().get(section.name)
    if part.name not in part.kind.house and house is not None and house.settings != section.settings:
        raise PartError(
            f"{part.kind.flag} {part.name}: the settings of {house.owner} are called {section.name} too: give the class another "
            "`section`"
        )


@functools.cache
def house_sections() -> dict[str, Section]:
    """The sections of all parts of the library, by name."""
    parts = [find(kind, name) for kind in KINDS for name in kind.house]
    return {section.name: section for part in parts for section in _sections_of(part)}


def named_in(section: Section, values: Values) -> Iterator[tuple[Kind, str]]:
    """The parts that the settings of a section name, with their kinds."""
    for setting in section.settings:
        if setting.name in section.kinds:
            names = values.get(section.name, {}).get(setting.name, setting.default)
            if isinstance(names, list | tuple):
                yield from ((section.kinds[setting.name], name) for name in names if isinstance(name, str))


def estimator_config(part: Part, typed: Mapping[str, object]) -> EstimatorConfig:
    """The configuration of an estimator from the settings of its sections. Raises `ConfigError` for impossible ones."""
    own = typed.get(part.section)
    values = {} if own is None else {setting.name: getattr(own, setting.name) for setting in settings_of(part)}
    with outside_errors([part]):
        try:
            return configuration(part, values, {name: typed[name] for name in sections_of(part)})
        except ValueError as error:
            raise ConfigError(f"--{part.section.replace('_', '-')}: {error}") from None


def plain_values(section: object) -> dict[str, object]:
    """The settings of a section as plain values."""
    assert dataclasses.is_dataclass(section)
    return {one.name: getattr(section, one.name) for one in dataclasses.fields(section)}


@functools.cache
def _sections_of(part: Part) -> tuple[Section, ...]:
    """The sections of one part. Cached: the classes made here are equal only to themselves, and slow to read values into."""
    return tuple(_own_section(part)) + tuple(_shared(*one) for one in shared_with(part).items())


def shared_with(part: Part) -> dict[str, type]:
    """The sections that a part has in common with others, by name."""
    return sections_of(part) if part.kind is ESTIMATORS else {}


def _own_section(part: Part) -> Iterator[Section]:
    owner = f"{part.kind.flag} {part.name}"
    if own := settings_of(part):
        needed = [(one.name, one.type) for one in own if one.default is dataclasses.MISSING]
        others = [(one.name, one.type, _default(one)) for one in own if one.default is not dataclasses.MISSING]
        made = dataclasses.make_dataclass(part.cls.__name__, [*needed, *others], frozen=True, kw_only=True)
        made.__doc__ = part.cls.__doc__
        yield Section(part.section, made, tuple(own), owner, {})


def _default(setting: Setting) -> object:
    return dataclasses.field(default=setting.default)


def _shared(name: str, cls: type) -> Section:
    hints, texts = typing.get_type_hints(cls), field_help(cls)
    fields = dataclasses.fields(cls)
    settings = [Setting(one.name, hints[one.name], default_of(one), texts.get(one.name, "")) for one in fields]
    kinds = {one.name: kind for one in fields if isinstance(kind := one.metadata.get("kind"), Kind)}
    return Section(name, cls, tuple(settings), f"--{name}", kinds)
