"""Which bytes can come next in valid UTF-8 (RFC 3629, section 4)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

COMPLETE = 0
"""The state after a complete character."""

_FIRST = {
    # First byte of a character: the state after it.
    **dict.fromkeys(range(0x80), 0),
    **dict.fromkeys(range(0xC2, 0xE0), 1),
    **dict.fromkeys(range(0xE0, 0xF0), 2),
    **dict.fromkeys(range(0xF0, 0xF5), 3),
    0xE0: 4,
    0xED: 5,
    0xF0: 6,
    0xF4: 7,
}
_FOLLOWING = {
    # State: the range of the next byte, and the state after it. States 1-3 lack that many bytes. States 4-7 follow a first
    # byte that would otherwise allow overlong forms (E0, F0), surrogates (ED) or code points beyond the last (F4).
    1: (0x80, 0xBF, 0),
    2: (0x80, 0xBF, 1),
    3: (0x80, 0xBF, 2),
    4: (0xA0, 0xBF, 1),
    5: (0x80, 0x9F, 1),
    6: (0x90, 0xBF, 2),
    7: (0x80, 0x8F, 2),
}
LACKING = np.array([0, 1, 2, 3, 2, 2, 3, 3], np.int32)
"""Bytes that complete the character, for each state."""


def _table() -> np.ndarray:
    after = np.full((8, 256), -1, np.int32)
    for byte, state in _FIRST.items():
        after[0, byte] = state
    for state, (low, high, to) in _FOLLOWING.items():
        after[state, low : high + 1] = to
    return after


AFTER = _table()
"""The next state for each state and byte; -1 if the byte is invalid there."""


def state_after(text: bytes, state: int = COMPLETE) -> int:
    """The state after `text`; an invalid byte counts as a complete character."""
    for byte in text:
        state = max(int(AFTER[state, byte]), COMPLETE)
    return state


def whole_characters(text: bytes) -> int:
    """Length of `text` without an incomplete character at its end."""
    state = state_after(text)
    if state == COMPLETE:
        return len(text)
    start = len(text) - 1
    while 0x80 <= text[start] <= 0xBF:
        start -= 1
    return start


def character_spans(content: bytes) -> Iterator[tuple[int, int]]:
    """Start and end of each UTF-8 character. An invalid byte is a span of its own."""
    start = 0
    while start < len(content):
        end, state = start + 1, int(AFTER[COMPLETE, content[start]])
        while state > 0 and end < len(content) and (after := int(AFTER[state, content[end]])) >= 0:
            end, state = end + 1, after
        # The first byte of an incomplete character is a span of its own.
        end = end if state == COMPLETE else start + 1
        yield start, end
        start = end
