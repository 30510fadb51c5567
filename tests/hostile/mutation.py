"""Seeded mutations of bytes and of JSON."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence

from tests.hostile.subject import Structure

INTERESTING = (0, 1, 9, 10, 13, 27, 34, 47, 92, 127, 128, 192, 239, 254, 255)

ODD_VALUES = (
    *("null", "true", "false", "0", "-1", "1", "2.5", "-0.0", "1e-320", "1e308", "1e999", "-1e999", "NaN", "Infinity"),
    *("2147483648", "4294967296", "18446744073709551616", "9" * 30, "9" * 5000),
    *(
        '""',
        '"\\u0000"',
        '"\\ud800"',
        '"../../x"',
        '"/etc/passwd"',
        '"a\\nb"',
        '"\\u001b[31m"',
        '"x' + "y" * 3000 + '"',
    ),
    *("[]", "{}", "[null]", '{"a": 1}', "[[[[]]]]", "[" * 20_000 + "]" * 20_000, '{"a":' * 20_000 + "1" + "}" * 20_000),
)
"""JSON texts that may stand where any other value stood."""

_PLACEHOLDER = "\0placeholder"


def mutations(seeds: Sequence[bytes], structure: Structure, count: int, seed: int) -> Iterator[bytes]:
    """`count` mutations of the contents `seeds`. The n-th is the same for any `count` above n."""
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        yield mutated(rng.choice(seeds), structure, rng)


def mutated(content: bytes, structure: Structure, rng: random.Random) -> bytes:
    """One mutation of `content`, which may be several changes."""
    if structure == "bytes" or rng.random() < 0.3:
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            content = rng.choice(CHANGES)(content, rng)
        return content
    if structure == "json":
        return changed_json(content, rng)
    lines = content.splitlines(keepends=True)
    chosen = rng.randrange(len(lines))
    lines[chosen] = changed_json(lines[chosen].strip(), rng) + b"\n"
    return b"".join(lines)


def changed_json(content: bytes, rng: random.Random) -> bytes:
    """JSON with one value replaced, removed, added, or found under another key."""
    document = json.loads(content)
    places = list(_places(document))
    if not places:
        return rng.choice(ODD_VALUES).encode()
    parent, key = rng.choice(places)
    action = rng.random()
    if action < 0.7:
        parent[key] = _PLACEHOLDER  # type: ignore[unsupported-operation]  # the key is one of this container
    elif action < 0.8:
        del parent[key]  # type: ignore[unsupported-operation]  # likewise
    elif isinstance(parent, dict):
        name = rng.choice(("", "x", "\0", "a.b", "__class__", "../x", str(key).upper(), f"{key}x"))
        parent[name] = parent.pop(key) if action < 0.9 else _PLACEHOLDER
    else:
        parent.insert(key, _PLACEHOLDER)  # type: ignore[bad-argument-type]  # likewise
    # Odd values are put in as text: some of them Python would not write.
    return json.dumps(document).replace(json.dumps(_PLACEHOLDER), rng.choice(ODD_VALUES)).encode()


def _places(document: object) -> Iterator[tuple[list | dict, int | str]]:
    """Every value inside `document`: the list or object that it is in, and its index or key there."""
    if not isinstance(document, list | dict):
        return
    for key, value in list(document.items() if isinstance(document, dict) else enumerate(document)):
        yield document, key
        yield from _places(value)


def _span(content: bytes, rng: random.Random) -> tuple[int, int]:
    """A short part of the content, or a long one."""
    start = rng.randrange(len(content) + 1)
    return start, min(len(content), start + rng.choice((1, 2, 4, 8, 64, 512, 4096)))


def _flip(content: bytes, rng: random.Random) -> bytes:
    if not content:
        return b"\0"
    at = rng.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]


def _replace(content: bytes, rng: random.Random) -> bytes:
    start, stop = _span(content, rng)
    return content[:start] + bytes(rng.choices(INTERESTING, k=stop - start)) + content[stop:]


def _cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def _zero_tail(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(content) + 1)
    return content[:start] + bytes(len(content) - start)


def _zero(content: bytes, rng: random.Random) -> bytes:
    start, stop = _span(content, rng)
    return content[:start] + bytes(stop - start) + content[stop:]


def _remove(content: bytes, rng: random.Random) -> bytes:
    start, stop = _span(content, rng)
    return content[:start] + content[stop:]


def _repeat(content: bytes, rng: random.Random) -> bytes:
    start, stop = _span(content, rng)
    return content[:stop] + content[start:stop] * rng.choice((1, 3)) + content[stop:]


def _insert(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content) + 1)
    return content[:at] + rng.randbytes(rng.choice((1, 2, 8, 100))) + content[at:]


def _number(content: bytes, rng: random.Random) -> bytes:
    """A field of four or eight bytes becomes a number of another size."""
    at, width = rng.randrange(len(content) + 1), rng.choice((4, 8))
    value = rng.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)) % 2 ** (8 * width)
    return content[:at] + value.to_bytes(width, rng.choice(("little", "big"))) + content[at + width :]


def _append(content: bytes, rng: random.Random) -> bytes:
    return content + rng.choice((b"\0" * 512, b"\n", content[:512], rng.randbytes(16)))


CHANGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    *(_flip, _flip, _replace, _cut, _cut, _zero_tail, _zero, _remove, _repeat, _insert, _number, _append),
)
