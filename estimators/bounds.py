"""Bounds of numbers, written beside their fields: `batch: Annotated[int, Within(1, 2**20)] = 32`.

`violation` checks all fields of a dataclass or module at once. Floats are bounded so that float32 holds them and their
reciprocals: a number beyond that would turn into 0 or infinity where it is used.
"""

from __future__ import annotations

import dataclasses
import functools
import numbers
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated

LARGEST = 1e30
"""No weight, scale or learning rate is larger, or smaller than its reciprocal."""
MARGIN = 1e-6
"""Least distance of a rate from 0 and 1: nearer ones are 0 or 1 in float32, or have no finite log-odds."""
LARGEST_BYTES = 2**60
"""No amount of text is larger."""
LARGEST_INDEX = 2**31 - 1
"""Positions and steps are counted in 32 bits."""


@dataclass(frozen=True)
class Within:
    """The least and the greatest value of a number; `zero`: 0 is allowed as well."""

    low: int | float
    high: int | float
    zero: bool = False

    def refusal(self, name: str, value: object, *, whole: bool) -> str | None:
        """A sentence if `value` is not a number within the bounds. NaN never is, nor is a truth value."""
        if isinstance(value, numbers.Integral if whole else numbers.Real) and not isinstance(value, bool):
            number = int(value) if isinstance(value, numbers.Integral) else float(value)
            if self.low <= number <= self.high or (self.zero and number == 0):
                return None
        kind = "a whole number" if whole else "a number"
        zero = "0, or " if self.zero else ""
        return f"{name} must be {zero}{kind} from {self.low:{_format(whole)}} to {self.high:{_format(whole)}}; got {shown(value)}"


Count = Annotated[int, Within(1, LARGEST_INDEX)]
Share = Annotated[float, Within(0.0, 1.0)]
Rate = Annotated[float, Within(MARGIN, 1.0 - MARGIN)]
"""A share strictly between 0 and 1."""
Positive = Annotated[float, Within(1.0 / LARGEST, LARGEST)]
Weight = Annotated[float, Within(1.0 / LARGEST, LARGEST, zero=True)]
"""A number that is positive or 0."""
Finite = Annotated[float, Within(-LARGEST, LARGEST)]
Seed = Annotated[int, Within(0, 2**32 - 1)]
Length = Annotated[int, Within(2, 2**24)]
"""Bytes of a sequence: at least one to read and one to predict."""
Sequences = Annotated[int, Within(1, 2**20)]
"""Of a batch."""
Width = Annotated[int, Within(1, 2**16)]
"""Of hidden states and inner layers, and the number of heads."""
Layers = Annotated[int, Within(0, 4096)]
"""Of one network."""
Window = Annotated[int, Within(1, 2**24)]
"""Positions that attention sees; decoding keeps as many keys and values."""
ChunkLength = Annotated[int, Within(1, 2**24)]
"""Positions of a chunk."""
Vectors = Annotated[int, Within(1, 1024)]
"""Into which a token is unfolded."""
Lags = Annotated[int, Within(0, 1024)]
"""Past actions that a policy sees."""
VocabularySize = Annotated[int, Within(257, 2**24)]
"""Of a byte-pair encoding: 256 bytes and at least one merge."""
Samples = Annotated[int, Within(1, 4096)]
"""Draws that lie beside each other in a batch."""


def violation(settings: object, named: Callable[[str], str] = str) -> str | None:
    """A sentence on the first field of a dataclass whose value is not within its bounds; None if there is none.

    A field may also be None if its type says so, or a tuple, whose elements are checked one by one. `named`: from the name of a
    field to what the sentence calls it.
    """
    for field, bounded in _bounds_of(type(settings)).items():
        for value in _numbers_in(getattr(settings, field), bounded):
            if (sentence := bounded.within.refusal(named(field), value, whole=bounded.whole)) is not None:
                return sentence
    return None


def check_bounds(settings: object) -> None:
    """Raise `ValueError` if a field is not within its bounds."""
    if (sentence := violation(settings)) is not None:
        raise ValueError(sentence)


def require_within(name: str, value: object, kind: object) -> None:
    """Raise `ValueError` if `value`, called `name`, is not within the bounds of an annotated type, such as `Count`."""
    bounded = _bounded(kind)
    assert bounded is not None
    for one in _numbers_in(value, bounded):
        if (sentence := bounded.within.refusal(name, one, whole=bounded.whole)) is not None:
            raise ValueError(sentence)


def shown(value: object) -> str:
    """A value for a sentence, in at most 40 characters."""
    if isinstance(value, int) and abs(value) >= 10**24:
        return f"{'-' if value < 0 else ''}2^{abs(value).bit_length() - 1} or more"
    text = ascii(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _format(whole: bool) -> str:
    return "d" if whole else "g"


@dataclass(frozen=True)
class _Bounded:
    within: Within
    whole: bool
    optional: bool


@functools.cache
def _bounds_of(cls: type) -> dict[str, _Bounded]:
    """The fields with bounds."""
    hints = typing.get_type_hints(cls, include_extras=True)
    found = ((one.name, _bounded(hints[one.name])) for one in dataclasses.fields(cls))
    return {name: bounded for name, bounded in found if bounded is not None}


def _bounded(kind: object) -> _Bounded | None:
    """The bounds in a type: an annotated number, an optional one, or a tuple of them."""
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        within = next((one for one in inside[1:] if isinstance(one, Within)), None)
        return None if within is None else _Bounded(within, inside[0] is int, optional=False)
    if origin in (typing.Union, types.UnionType, tuple):
        found = next((one for one in map(_bounded, inside) if one is not None), None)
        return found and dataclasses.replace(found, optional=found.optional or type(None) in inside)
    return None


def _numbers_in(value: object, bounded: _Bounded) -> Iterator[object]:
    """The numbers of a field."""
    if isinstance(value, tuple | list):
        yield from value
    elif not (value is None and bounded.optional):
        yield value
