"""Finding parts by name: the library's own, those of installed packages, and `package.module:Class`.

A part is an estimator, a chunker, a pool or a variance reduction. It is named by a class: one with settings and a `build` method
(`EstimatorConfig`, `PartConfig`), or the class itself, whose typed arguments are then its settings.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import importlib
import importlib.metadata
import inspect
import itertools
import keyword
import re
import textwrap
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import equinox as eqx


class PartError(ValueError):
    """A part cannot be found or used. The message says which, why, and what to do; if the part's own code failed, its exception
    is the cause."""


@dataclass(frozen=True, eq=False)
class Kind:
    """A kind of part. `flag` asks for one, `group` is the group of entry points in which packages announce theirs, `house` holds
    the library's own by name, and a class must be a subclass of one of `bases`. Arguments of constructors with a name in `given`
    are no settings: whoever builds the part fills them in."""

    flag: str
    group: str
    house: Mapping[str, type]
    bases: tuple[type, ...]
    given: frozenset[str]

    @property
    def what(self) -> str:
        """The bases in words."""
        return " or ".join(base.__name__ for base in self.bases)


@dataclass(frozen=True)
class Part:
    """A part that was found: the `name` asked for, and its class."""

    kind: Kind
    name: str
    cls: type

    @property
    def section(self) -> str:
        """The section of its settings: a name of the library's own, otherwise the class's name in lower case with underscores,
        without a `Config` at the end."""
        own = self.cls.__dict__.get("section")
        if isinstance(own, str):
            return own
        words = re.sub(
            r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", self.cls.__name__.removesuffix("Config")
        )
        return words.lower()


def find(kind: Kind, name: str) -> Part:
    """The part of that name: of the library, of an installed package (an entry point), or `package.module:Class`.

    Raises `PartError` for a name that is nowhere or announced twice, and for a class of another kind.
    """
    if name in kind.house:
        return Part(kind, name, kind.house[name])
    announced = [point for point in importlib.metadata.entry_points(group=kind.group) if point.name == name]
    if len(announced) > 1:
        where = " and ".join(sorted(point.value for point in announced))
        raise PartError(
            f"{kind.flag} {name}: two installed packages announce it ({where}); name one as package.module:Class"
        )
    target = announced[0].value if announced else name
    module, _, attribute = target.partition(":")
    if not (module and attribute):
        names = sorted({*kind.house, *installed(kind)})
        near = difflib.get_close_matches(name, names, 1)
        guess = f"did you mean {near[0]}? There are" if near else "there are"
        raise PartError(f"{kind.flag} {name}: {guess} {', '.join(names)}, and package.module:Class for one of your own")
    cls = _imported(kind, name, target)
    if not (isinstance(cls, type) and issubclass(cls, kind.bases)):
        raise PartError(f"{kind.flag} {name}: {_described(cls)} is no {kind.what}")
    if inspect.isabstract(cls):
        lacking = ", ".join(sorted(cls.__abstractmethods__))
        raise PartError(f"{kind.flag} {name}: {_described(cls)} is abstract: it lacks {lacking}")
    part = Part(kind, name, cls)
    if is_configuration(cls) and (plain := undecorated(cls)):
        raise PartError(
            f"{kind.flag} {name}: {', '.join(plain)} of {_described(cls)} would be no setting: decorate the class with "
            "@dataclass(frozen=True)"
        )
    if part.name not in kind.house and keyword.iskeyword(part.section):
        raise PartError(f"{kind.flag} {name}: {part.section} is a keyword of Python: give the class another `section`")
    return part


def undecorated(cls: type) -> list[str]:
    """Annotated names of a configuration that are no fields, since `@dataclass` is missing."""
    known = {one.name for one in dataclasses.fields(cls)} | {"section"}
    own = inspect.get_annotations(cls)
    return [name for name, kind in own.items() if name not in known and "ClassVar" not in str(kind)]


def installed(kind: Kind) -> list[str]:
    """The names that installed packages announce."""
    return sorted({point.name for point in importlib.metadata.entry_points(group=kind.group)})


def imported(flag: str, name: str, module: str) -> types.ModuleType:
    """The module, which `flag` asks for by `name`. Raises `PartError` where it is not there or fails."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(error.name + ".")):
            raise PartError(
                f"{flag} {name}: there is no module {error.name}; is its folder on PYTHONPATH, or its package installed?"
            ) from None
        raise PartError(f"{flag} {name}: {module} needs {error.name}, which is not installed") from error
    except Exception as error:
        raise PartError(f"{flag} {name}: importing {module} failed ({type(error).__name__}: {error})") from error


def _imported(kind: Kind, name: str, target: str) -> object:
    """What `package.module:Class` names."""
    module_name, _, attribute = target.partition(":")
    module = imported(kind.flag, name, module_name)
    try:
        return getattr(module, attribute)
    except AttributeError:
        raise PartError(f"{kind.flag} {name}: {module_name} has no {attribute}") from None


def _described(value: object) -> str:
    return f"the class {value.__qualname__}" if isinstance(value, type) else f"a {type(value).__name__}"


def is_configuration(cls: type) -> bool:
    """Whether a class is a configuration, which builds a part, and not the part itself."""
    return callable(getattr(cls, "build", None)) and not issubclass(cls, eqx.Module)


@dataclass(frozen=True)
class Setting:
    """A setting: its name, type, default (`dataclasses.MISSING` for none) and help text."""

    name: str
    type: object
    default: object
    help: str


def settings_of(part: Part) -> list[Setting]:
    """The settings of a part's own section: the plain fields of a configuration, or the arguments of a constructor that are not
    given. Raises `PartError` for an argument without a type or of a type that no flag can have."""
    cls, texts = part.cls, field_help(part.cls)
    if is_configuration(cls):
        hints = hints_of(part)
        fields = [one for one in dataclasses.fields(cls) if one.init and one.name not in shared_sections(cls)]
        found = [Setting(one.name, hints[one.name], default_of(one), texts.get(one.name, "")) for one in fields]
    else:
        found = [
            _of_argument(part, one, texts.get(one.name) or argument_help(cls, one.name))
            for one in _arguments(part)
            if one.name not in part.kind.given
        ]
    for setting in found:
        if not _fits_a_flag(setting.type):
            raise PartError(
                f"{part.kind.flag} {part.name}: {setting.name} of {cls.__qualname__} can be no flag, since it is no bool, int, "
                "float, str, Path, Literal, or optional or tuple of these; write a configuration for the class"
            )
    return found


def hints_of(part: Part) -> dict[str, object]:
    """The types of the fields of a part's class and of the arguments of its constructor. Raises `PartError` where they cannot be
    read."""
    try:
        constructor = {} if is_configuration(part.cls) else typing.get_type_hints(part.cls.__init__)
        return {**typing.get_type_hints(part.cls), **constructor}
    except NameError as error:
        raise PartError(
            f"{part.kind.flag} {part.name}: the types of {part.cls.__qualname__} cannot be read ({error}): import them when the "
            "module runs, not for type checkers alone"
        ) from None


def shared_sections(cls: type) -> dict[str, type]:
    """The sections that a configuration has in common with others, by name: those of its fields that are dataclasses."""
    if not is_configuration(cls):
        return {}
    hints = typing.get_type_hints(cls)
    return {
        one.name: kind
        for one in dataclasses.fields(cls)
        if isinstance(kind := hints[one.name], type) and dataclasses.is_dataclass(kind)
    }


def construct(part: Part, settings: Mapping[str, object], given: Mapping[str, object]) -> object:
    """The part itself, made by its constructor from settings and from what it asks for of `given`. Raises `PartError` for
    settings that it refuses."""
    names = {argument.name for argument in _arguments(part)}
    try:
        return part.cls(**settings, **{name: value for name, value in given.items() if name in names})
    except PartError:
        raise
    except ValueError as error:
        raise PartError(f"--{part.section.replace('_', '-')}: {error}") from None


def default_of(field: dataclasses.Field) -> object:
    """The default of a field, made anew where a factory makes it; `dataclasses.MISSING` for none."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


@functools.cache
def field_help(cls: type) -> Mapping[str, str]:
    """The string below each field of a class and of its bases. Cached, since sources are slow to read."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        try:
            module = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):
            # Built-in, or typed into an interpreter.
            continue
        body = module.body[0].body if isinstance(module.body[0], ast.ClassDef) else []
        for field, text in itertools.pairwise(body):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
            ):
                texts[field.target.id] = " ".join(str(text.value.value).split())
    return texts


def argument_help(cls: type, name: str) -> str:
    """The first sentence of the docstring of a constructor, or else of its class, that has the argument's name in backticks."""
    for text in (cls.__init__.__doc__, cls.__doc__):
        for sentence in re.split(r"(?<=[.;]) +", " ".join((text or "").split())):
            if f"`{name}`" in sentence:
                return sentence
    return ""


def _arguments(part: Part) -> list[inspect.Parameter]:
    arguments = list(inspect.signature(part.cls).parameters.values())
    if any(one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD) for one in arguments):
        raise PartError(
            f"{part.kind.flag} {part.name}: the constructor of {part.cls.__qualname__} takes any arguments (* or **), which "
            "cannot be flags; name its arguments"
        )
    return arguments


def _of_argument(part: Part, argument: inspect.Parameter, text: str) -> Setting:
    hints = hints_of(part)
    if argument.name not in hints:
        raise PartError(
            f"{part.kind.flag} {part.name}: the argument {argument.name} of {part.cls.__qualname__} has no type, so that it "
            "cannot be a flag; annotate it"
        )
    default = dataclasses.MISSING if argument.default is inspect.Parameter.empty else argument.default
    return Setting(argument.name, hints[argument.name], default, text)


def _fits_a_flag(kind: object) -> bool:
    origin, inside = typing.get_origin(kind), [one for one in typing.get_args(kind) if one not in (..., type(None))]
    if origin is typing.Literal:
        return True
    if origin in (typing.Union, types.UnionType):
        return len(inside) == 1 and _fits_a_flag(inside[0])
    return all(map(_fits_a_flag, inside)) if origin is tuple else kind in (bool, int, float, str, Path)
