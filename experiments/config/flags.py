"""The command line of a run: the flags of everything that it chooses, and of nothing else."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import re
import textwrap
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from estimators.constraints import CONSTRAINTS
from estimators.lookup import Kind, Part, PartError, Setting, default_of, field_help, find, installed
from estimators.registry import ESTIMATORS
from experiments.config.arguments import PATHS, expanded, usage
from experiments.config.build import require_fit
from experiments.config.errors import ConfigError, refused
from experiments.config.parts import KINDS, Names, Section, Values, levels_of, sections_in
from experiments.config.settings import RunConfig, require_free_names
from unet.chunkers.named import CHUNKERS, POOLS

FIELDS: Mapping[str, Kind] = {
    "estimator": ESTIMATORS,
    "inner_estimators": ESTIMATORS,
    "chunker": CHUNKERS,
    "pool": POOLS,
    "constrain": CONSTRAINTS,
    "inner_constrain": CONSTRAINTS,
}
"""The fields of a run that name parts."""

EVERYTHING = "--help-all"


def parse_run(arguments: Sequence[str], default: RunConfig, *, program: str) -> RunConfig:
    """The run that a command line asks for; what it does not say is as in `default`.

    Prints help or a usage error and raises `SystemExit` (2 for an error). Raises `ConfigError` for values that cannot be run, and
    for settings of parts that were not chosen.
    """
    everything = EVERYTHING in arguments
    given = ["--help" if one == EVERYTHING else one for one in arguments]
    try:
        parts = _parts(given, default)
        if everything:
            parts += _everything()
        values = _with_named_parts(given, parts, default.settings)
        sections = sections_in(parts, values)
        require_free_names(sections)
        if not {"-h", "--help"} & set(given):
            _require_chosen(given, sections)
        parsed = _parsed(given, default, sections, values, program, short=not everything)
        config = _built(parsed, default, sections)
    except PartError as error:
        raise refused(error) from error.__cause__
    return fitting(config)


def fitting(config: RunConfig) -> RunConfig:
    """The run with all settings of what it chose. Raises `ConfigError` if its parts cannot be built."""
    require_fit(config)
    return config.resolved


def _everything() -> Iterator[Part]:
    """Every part by name; one of an installed package that fails is left out."""
    for kind in KINDS:
        for name in _names(kind):
            with contextlib.suppress(PartError):
                yield find(kind, name)


def shared_out(arguments: Sequence[str], runs: Mapping[str, tuple[RunConfig, Sequence[str]]]) -> dict[str, list[str]]:
    """Of the arguments of a comparison those for each run, which is given as what it is before them and the flags that make it:
    without the settings of parts that it does not have and another has. Raises `ConfigError` for names that stand for nothing."""
    try:
        own = {name: _section_names([*arguments, *flags], default) for name, (default, flags) in runs.items()}
    except PartError as error:
        raise refused(error) from error.__cause__
    everything = set().union(*own.values())
    given: dict[str, list[str]] = {name: [] for name in runs}
    for group in _groups(arguments):
        section, dot, _ = plain_flag(group[0].partition("=")[0]).partition(".")
        for name, words in given.items():
            if not dot or section in own[name] or section not in everything:
                words += group
    return given


def _section_names(arguments: Sequence[str], default: RunConfig) -> set[str]:
    """The sections of what a command line chooses."""
    parts = _parts(arguments, default)
    return set(sections_in(parts, _with_named_parts(arguments, parts, default.settings)))


def with_flag_length(default: RunConfig, arguments: Sequence[str]) -> RunConfig:
    """`default`, without its number of steps where the command line says instead how many bytes a run has."""
    flags = {plain_flag(word.partition("=")[0]) for word in arguments if word.startswith("--")}
    return dataclasses.replace(default, steps=None) if "bytes" in flags and "steps" not in flags else default


def _groups(arguments: Sequence[str]) -> Iterator[list[str]]:
    """Each flag with its values."""
    group: list[str] = []
    for word in arguments:
        if word.startswith("--") and group:
            yield group
            group = []
        group.append(word)
    if group:
        yield group


def _parts(given: Sequence[str], default: RunConfig) -> list[Part]:
    """The parts that the command line or else `default` names, before anything else of it is read."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("estimator", "chunker", "pool"):
        early.add_argument(f"--{name}", default=getattr(default, name))
    for name in ("inner-estimators", "constrain", "inner-constrain"):
        own = name.replace("-", "_")
        early.add_argument(*dict.fromkeys((f"--{name}", f"--{own}")), nargs="*", default=getattr(default, own))
    known, _ = early.parse_known_args(given)
    chunker, pool = (None if name in (None, "None") else name for name in (known.chunker, known.pool))
    levels = levels_of(
        # Levels inside that have no name have the first one's parts.
        Names((known.estimator, *known.inner_estimators), chunker, pool, tuple(known.constrain))
    )
    inner = [find(CONSTRAINTS, name) for name in known.inner_constrain]
    return [*(part for level in levels for part in level.all), *inner]


def _names(kind: Kind) -> list[str]:
    """The names of a kind, the library's own first."""
    return [*kind.house, *(name for name in installed(kind) if name not in kind.house)]


def _with_named_parts(given: Sequence[str], parts: Sequence[Part], values: Values) -> Values:
    """`values` with the names of parts that the command line gives as settings, such as variance reductions."""
    changed = {name: dict(section) for name, section in values.items()}
    for section in sections_in(parts, values).values():
        for name in section.kinds:
            if (listed := _values_of(given, f"{section.name}.{name}")) is not None:
                changed.setdefault(section.name, {})[name] = listed
    return changed


def _values_of(given: Sequence[str], name: str) -> list[str] | None:
    """The values behind a flag that takes several; None where it is not given."""
    found = None
    for number, word in enumerate(given):
        flag, _, value = word.partition("=")
        if flag.startswith("--") and plain_flag(flag) == name:
            rest = itertools.takewhile(lambda one: not one.startswith("--"), given[number + 1 :])
            found = [value] if value else list(rest)
    return found


def plain_flag(flag: str) -> str:
    """The name of a flag as a setting."""
    return flag.removeprefix("--").replace("-", "_")


def _require_chosen(given: Sequence[str], sections: Mapping[str, Section]) -> None:
    """Raise `ConfigError` for a flag of a part of the library that was not chosen."""
    mine = {*sections, *(one.name for one in dataclasses.fields(RunConfig))}
    for word in given:
        section, dot, _ = plain_flag(word.partition("=")[0]).partition(".")
        if not (word.startswith("--") and dot) or section in mine:
            continue
        owners = [
            f"{kind.flag} {name}"
            for kind in KINDS
            for name in kind.house
            if section in sections_in([find(kind, name)], {})
        ]
        if owners:
            raise ConfigError(
                f"{word.partition('=')[0]} is a setting of {' or '.join(owners)}, which was not chosen: leave it out or choose it"
            )


def _parsed(
    given: Sequence[str],
    default: RunConfig,
    sections: Mapping[str, Section],
    values: Values,
    program: str,
    *,
    short: bool,
) -> object:  # an instance of a class made here
    """What tyro makes of the command line: an object with a field for each of a run's, and for each section."""
    shown = [
        *_run_flags(default, short, folded=short and bool({"-h", "--help"} & set(given))),
        *(_section_flags(section, values, short) for section in sections.values()),
    ]
    flags = dataclasses.make_dataclass(
        "Run", [(one.name, one.kind) for one in shown if one.kind], frozen=True, kw_only=True
    )
    flags.__doc__ = RunConfig.__doc__
    if further := [one.folded for one in shown if one.folded]:
        what = f"{EVERYTHING} shows the flags of every estimator, and explains these:"
        flags.__doc__ = "\n".join([f"{RunConfig.__doc__}\n\n{what}", *further])
    defaults = {one.name: one.default for one in shown if one.kind}
    with usage(given):
        return tyro.cli(flags, prog=program, args=list(given), default=flags(**defaults), registry=PATHS)


@dataclass(frozen=True)
class _Flag:
    """A field for tyro: its name, annotated type and default; or, without a type, the line that names its flags in short help."""

    name: str
    kind: object = None
    default: object = None
    folded: str = ""


def _run_flags(default: RunConfig, short: bool, folded: bool) -> Iterator[_Flag]:
    """The flags of a run itself; `folded`: its parts, such as the optimizer, are only named."""
    texts = {**field_help(RunConfig), **{name: _choices(name, kind) for name, kind in FIELDS.items()}}
    hints = typing.get_type_hints(RunConfig, include_extras=True)
    for one in dataclasses.fields(RunConfig):
        value = getattr(default, one.name)
        if one.name == "settings":
            continue
        if not dataclasses.is_dataclass(value):
            yield _Flag(one.name, _annotated(hints[one.name], texts.get(one.name, ""), short), value)
        elif folded:
            names = ", ".join(_names_of(type(value))).replace("_", "-")
            yield _Flag(one.name, folded=textwrap.fill(f"--{one.name}.… {names}", 78, subsequent_indent="  "))
        else:
            cls = type(value)
            made = _flags(cls.__name__, cls.__doc__, _settings_of(cls), short)
            yield _Flag(one.name, made, made(**{name: getattr(value, name) for name in _names_of(cls)}))


def _section_flags(section: Section, values: Values, short: bool) -> _Flag:
    """The flags of a section; what `values` do not say has its default, or must be given."""
    made = _flags(section.name, section.cls.__doc__, section.settings, short)
    defaults = {
        one.name: tyro.MISSING if one.default is dataclasses.MISSING else one.default for one in section.settings
    }
    return _Flag(section.name, made, made(**{**defaults, **section.given(values)}))


def _built(parsed: object, default: RunConfig, sections: Mapping[str, Section]) -> RunConfig:
    """The run, from what was parsed. Raises `ConfigError` where a class of settings refuses its values."""
    values = {}
    for one in dataclasses.fields(RunConfig):
        if one.name == "settings":
            continue
        value, cls = getattr(parsed, one.name), type(getattr(default, one.name))
        if dataclasses.is_dataclass(cls):
            try:
                value = cls(**{name: getattr(value, name) for name in _names_of(cls)})
            except ValueError as error:
                raise ConfigError(f"--{one.name}: {error}") from None
        values[one.name] = expanded(value) if one.name == "init" and isinstance(value, str) else value
    settings = {name: vars(getattr(parsed, name)) for name in sections}
    return RunConfig(**values, settings=settings)  # type: ignore[bad-argument-type]  # from the same class's own fields


def _flags(name: str, doc: str | None, settings: Sequence[Setting], short: bool) -> type:
    """A dataclass of these settings with their help texts, which checks nothing."""
    fields = [(one.name, _annotated(one.type, one.help, short)) for one in settings]
    made = dataclasses.make_dataclass(f"{name}Flags", fields, frozen=True, kw_only=True)
    made.__doc__ = _first_sentence(doc or "")
    return made


def _settings_of(cls: type) -> list[Setting]:
    texts, hints = field_help(cls), typing.get_type_hints(cls, include_extras=True)
    return [
        Setting(one.name, hints[one.name], default_of(one), texts.get(one.name, "")) for one in dataclasses.fields(cls)
    ]


def _names_of(cls: type) -> list[str]:
    return [one.name for one in dataclasses.fields(cls)]


def _annotated(kind: object, text: str, short: bool) -> object:
    """A type with its help text."""
    argument = tyro.conf.arg(help=_first_sentence(text) if short else text)
    return Annotated[kind, argument]  # type: ignore[not-a-type]  # a type that is known only at run time


def _first_sentence(text: str) -> str:
    """Up to the full stop that ends the first sentence, or its first semicolon, on one line."""
    return re.split(r"\.(?=\s+[A-Z$`]|$)|;(?=\s)", " ".join(text.split()), maxsplit=1)[0]


def _choices(field: str, kind: Kind) -> str:
    text = field_help(RunConfig)[field].rstrip(".")
    return f"{text}: {', '.join(_names(kind))}, or package.module:Class."
