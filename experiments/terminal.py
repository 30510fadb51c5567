"""What may be sent to a terminal, and how: text without control characters, to streams that may be gone."""

from __future__ import annotations

import sys

from experiments.launch import Stream

LONGEST = 600
"""Characters of a message in one line, at most."""

_PLAIN = {
    "±": "+-",
    "–": "-",
    "−": "-",
    "…": "...",
    "×": "x",
    "≈": "~",
    "†": "+",
    "⏎": "",
    "•": "*",
    "π": "pi",
    "·": "*",
}
"""How messages have signs that an encoding lacks."""


def escaped(text: str, keep: str = "") -> str:
    """A message: what cannot be printed, the bytes of odd file names included, as Python writes it (`\\x1b`), but for `keep`."""
    return "".join(one if one.isprintable() or one in keep else _code(one) for one in text)


def _code(character: str) -> str:
    # How Python has the byte 128 + n of a file name.
    byte = ord(character) - 0xDC00
    return f"\\x{byte:02x}" if 0x80 <= byte < 0x100 else character.encode("unicode_escape", "surrogatepass").decode()


def message(text: str, longest: int = LONGEST) -> str:
    """A message in one line, escaped, and without its middle where it would be longer than `longest` characters."""
    end = longest // 3
    if len(text) > 2 * longest:  # escaping millions of characters takes a while
        text = f"{text[:longest]} {text[-longest:]}"
    plain = escaped(" ".join(text.split()))
    return plain if len(plain) <= longest else f"{plain[: longest - end - 3]} … {plain[-end:]}"


class Lenient:
    """Writes to a stream for as long as that is there; from its first failure on, as where a terminal or the reader of a pipe is
    gone, to nothing. For messages only: they are not worth the work that they are about."""

    def __init__(self, stream: Stream | None):
        self._stream = stream

    @property
    def encoding(self) -> str:
        name = getattr(self._stream, "encoding", None)
        return name if isinstance(name, str) else "utf-8"

    def write(self, text: str) -> int:
        if self._stream is not None:
            try:
                self._write(self._stream, in_encoding(text, self.encoding))
            except (OSError, ValueError):
                self._stream = None
        return len(text)

    def _write(self, stream: Stream, text: str) -> None:
        try:
            stream.write(text)
        except UnicodeEncodeError:
            stream.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))

    def flush(self) -> None:
        try:
            if self._stream is not None:
                self._stream.flush()
        except (OSError, ValueError):
            self._stream = None

    def isatty(self) -> bool:
        return self._stream is not None and self._stream.isatty()

    def fileno(self) -> int:
        if self._stream is None:
            raise OSError("there is no such stream")
        return self._stream.fileno()


def in_encoding(text: str, encoding: str) -> str:
    """Text with the signs that messages use in plain letters where the encoding has no such signs."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return "".join(_PLAIN.get(one, one) if _lacks(encoding, one) else one for one in text)
    except LookupError:
        return text
    return text


def _lacks(encoding: str, character: str) -> bool:
    try:
        character.encode(encoding)
    except UnicodeEncodeError:
        return True
    return False


class OutputClosed(Exception):
    """Nobody reads standard output any more."""


def write_output(content: str | bytes) -> None:
    """Write results to standard output at once, with what is waiting there; bytes as they are.

    Raises `OutputClosed` where nobody reads it, `OSError` where it cannot be written.
    """
    stream = sys.stdout
    if stream is None:
        if content:
            raise OutputClosed
        return
    try:
        binary = getattr(stream, "buffer", None)
        if isinstance(content, str):
            stream.write(content)
        elif binary is None:
            stream.write(content.decode("utf-8", errors="replace"))
        else:
            stream.flush()
            binary.write(content)
        stream.flush()
    except BrokenPipeError:
        raise OutputClosed from None
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard output") from None
