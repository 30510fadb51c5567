"""The error of a setting that cannot be."""

from __future__ import annotations

from estimators.lookup import PartError


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


def require(holds: bool, otherwise: str) -> None:
    """Raise `ConfigError` with the sentence `otherwise` unless the condition holds."""
    if not holds:
        raise ConfigError(otherwise)
