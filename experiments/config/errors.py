"""The error of a setting that cannot be."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from estimators.bounds import violation
from estimators.lookup import Part, PartError


class ConfigError(Exception):
    """A value, or a combination of values, that cannot be run, said in one sentence."""


class PluginError(ConfigError):
    """The same where code of somebody else failed; its own exception is the cause, and shown."""


def refused(error: PartError) -> ConfigError:
    """The error of a command for a part that cannot be found or used."""
    if error.__cause__ is None:
        return ConfigError(str(error))
    failed = PluginError(str(error))
    failed.__cause__ = error.__cause__
    return failed


@contextmanager
def outside_errors(parts: Iterable[Part]) -> Iterator[None]:
    """Turns what the code of outside `parts` raises unexpectedly into a `PluginError`; everything else passes."""
    try:
        yield
    except (ConfigError, PartError, ValueError, ImportError, OSError):
        raise
    except Exception as error:
        outside = [f"{part.kind.flag} {part.name}" for part in parts if part.name not in part.kind.house]
        if not outside:
            raise
        raise PluginError(f"{' with '.join(outside)} failed ({type(error).__name__}: {error})") from error


def require(holds: bool, otherwise: str) -> None:
    """Raise `ConfigError` with the sentence `otherwise` unless the condition holds."""
    if not holds:
        raise ConfigError(otherwise)


def require_bounds(settings: object, prefix: str = "--") -> None:
    """Raise `ConfigError` if a field of a dataclass of flags is not within its bounds. `prefix`: what its flags begin with."""
    sentence = violation(settings, lambda field: f"{prefix}{field.replace('_', '-')}")
    require(sentence is None, str(sentence))
