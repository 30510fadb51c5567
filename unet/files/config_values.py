"""Values in published configurations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from estimators.bounds import LARGEST
from unet.files.errors import LayoutError, shown


@dataclass(frozen=True)
class Settings:
    """The settings of one object of a configuration; `where` names it in messages."""

    where: str
    values: Mapping[str, object]

    def fail(self, name: str, wanted: str) -> LayoutError:
        return LayoutError(f"{self.where}{name} must be {wanted}; got {shown(repr(self.values[name]))}")

    def whole(self, name: str, low: int = 1, high: int = 2**31 - 1) -> int:
        value = self.values[name]
        if type(value) is not int or not low <= value <= high:
            raise self.fail(name, f"a whole number from {low} to {high}")
        return value

    def number(self, name: str, low: float = -LARGEST) -> float:
        value = self.values[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= LARGEST:
            raise self.fail(name, f"a number of at least {low:g}")
        return float(value)

    def truth(self, name: str) -> bool:
        value = self.values[name]
        if not isinstance(value, bool):
            raise self.fail(name, "true or false")
        return value

    def optional(self, name: str, high: int = 2**24) -> int | None:
        """A whole number, or None for none."""
        return None if self.values[name] is None else self.whole(name, 1, high)

    def require_usual(self, only: Mapping[str, tuple[object, str]]) -> None:
        """Raise `LayoutError` for parts that no published model has: `only` names the one value that some settings may have, and
        why."""
        for name, (usual, why) in only.items():
            value = self.values.get(name, usual)
            if (value or 0) != (usual or 0):
                raise LayoutError(f"{self.where}{name} is {shown(repr(value))}, not {usual!r}: {why}")
