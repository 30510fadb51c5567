"""Documents in JSON lines."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Iterator

from data.compression import UTF8_MARK
from data.documents import DOCUMENT_BYTES, DataError, checked_size, checked_utf8, shown
from data.left_out import Count, ignored

JSON_LINES = (".jsonl", ".json", ".ndjson")

MOST_VALUES = 4_000_000
"""Values that one line may have. Python's objects take many times the memory of short values in a file."""

_COUNTED_FROM = 1 << 20
"""Bytes of a line from which its values are counted."""

_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_ONE_A_LINE = "; one JSON object a line is wanted, which jq -c '.[]' makes of a list"


class _Record(dict[str, object]):
    """A JSON object that knows which of its fields it has twice."""

    repeated: frozenset[str] = frozenset()


def json_documents(stream: io.BufferedReader, where: str, text_field: str, count: Count = ignored) -> Iterator[bytes]:
    """The texts in the field `text_field` of JSON objects, one a line.

    Empty texts give no document; nor do rows whose text is null, or that lack the field although the first row has it: these
    are counted. Raises `DataError`, with `where` and the line, for everything else that is no string.
    """
    number, known = 0, False
    while line := stream.readline(DOCUMENT_BYTES + 1):
        number += 1
        place = f"{where}, line {number},"
        checked_size(len(line), place)
        if not line.strip():
            continue
        record = _parsed(line, place, breaks_off=not line.endswith(b"\n"), first=not known)
        if not isinstance(record, _Record) or not (known or text_field in record):
            raise DataError(_no_field(record, text_field, place))
        known = True
        if text_field in record.repeated:
            raise DataError(f"{place} has more than one field {text_field!r}; keep one of them")
        value = record.get(text_field)
        if value is None:
            count("rows", 1)
        elif not isinstance(value, str):
            raise DataError(f"the text field {text_field!r} of {place} is {_kind(value)}; texts must be strings")
        elif value:
            yield _encoded(value, place)


def _parsed(line: bytes, place: str, *, breaks_off: bool, first: bool) -> object:
    if len(line) > _COUNTED_FROM:
        _check_values(line, place)
    # Files that were concatenated may have byte-order marks anywhere.
    text = line.removeprefix(UTF8_MARK)
    try:
        # Integers of more digits than Python converts may be in fields that nobody asked for.
        return json.loads(text.decode(), parse_int=float, object_pairs_hook=_record)
    except UnicodeDecodeError:
        if not breaks_off:
            checked_utf8(line, place)
        reason = "it is not UTF-8"
    except RecursionError:
        raise DataError(f"{place} is nested too deeply; leave it out of the data set") from None
    except ValueError as error:
        reason = str(error)
    if breaks_off:
        raise DataError(f"{place} breaks off ({reason}): the file is damaged, or was cut short") from None
    advice = _ONE_A_LINE if first and text.strip() in (b"[", b"{") else ""
    raise DataError(f"{place} is not JSON ({reason}){advice}") from None


def _check_values(line: bytes, place: str) -> None:
    """Raises `DataError` for a line of more than `MOST_VALUES` values."""
    rest = _STRING.sub(b"", line)
    if rest.count(b",") + rest.count(b"[") + rest.count(b"{") > MOST_VALUES:
        raise DataError(
            f"{place} has more than {MOST_VALUES:,} values, the most that a line may have; leave fields out"
        )


def _record(pairs: list[tuple[str, object]]) -> _Record:
    record = _Record(pairs)
    if len(record) < len(pairs):
        record.repeated = frozenset(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
    return record


def _no_field(record: object, text_field: str, place: str) -> str:
    if isinstance(record, _Record):
        fields = shown(", ".join(sorted(record))) if record else "no fields"
        return f"{place} has no text field '{shown(text_field)}': it has {fields}; name one with --data.text-field"
    return f"{place} has no text field '{shown(text_field)}': it has {_kind(record)}{_ONE_A_LINE}"


def _kind(value: object) -> str:
    kinds = ((bool, "true or false"), (float, "a number"), (str, "a string"), (list, "a list"), (dict, "an object"))
    return next((name for kind, name in kinds if isinstance(value, kind)), "null")


def _encoded(text: str, place: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{place} has half of a surrogate pair, which UTF-8 cannot encode") from None
