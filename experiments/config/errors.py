"""What ends a command: a setting that cannot be, or a failure of what is around it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from estimators.bounds import violation
from estimators.lookup import Part, PartError
from experiments.terminal import escaped


class ConfigError(Exception):
    """A value, or a combination of values, that cannot be run, said in one sentence."""


class PluginError(ConfigError):
    """The same where code of somebody else failed; its own exception is the cause, and shown."""


class RunError(Exception):
    """What failed although the settings were right, such as a full disk, said in one sentence. Commands exit with 1."""


NOT_NUMBERS = "this model's probabilities are not numbers: its weights are too large to compute with"
"""What is said of weights that are numbers and give none."""


def one_line(text: str, longest: int = 300) -> str:
    """What somebody else wrote, to be quoted in an error: one line of at most `longest` characters, none of which a terminal acts
    on."""
    plain = escaped(text[: longest + 1])
    return plain if len(plain) <= longest else f"{plain[: longest - 1]}…"


def failure(error: Exception) -> str:
    """What failed, in one line: of an `OSError` the file and the reason, without the number of the error."""
    if isinstance(error, OSError) and error.strerror:
        where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        return one_line(f"{where}{error.strerror}")
    return one_line(str(error) or type(error).__name__)


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
