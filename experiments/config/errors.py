"""The error of a setting that cannot be."""

from __future__ import annotations


class ConfigError(Exception):
    """A value, or a combination of values, that cannot be run, said in one sentence."""


def require(holds: bool, otherwise: str) -> None:
    """Raise `ConfigError` with the sentence `otherwise` unless the condition holds."""
    if not holds:
        raise ConfigError(otherwise)
