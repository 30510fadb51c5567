"""Whether the tokenizer beside a Byte Latent Transformer is the one that its ids are from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from estimators.base import BOS, EOS
from unet.blt import MARKS, to_blt_ids
from unet.files.errors import LayoutError, shown
from unet.files.json_files import read_json

TOKENIZER = "tokenizer.json"
"""The file of a tokenizer."""

MARKED = {"<s>": BOS, "</s>": EOS}
"""How tokenizers call the marks of a document's start and end."""


def require_tokenizer(path: Path) -> None:
    """Raise `LayoutError` unless all tokens in the file of a tokenizer have ids below 260, those that are single bytes or mark
    starts and ends the published ones, and no other token the id of a byte. Raises `LoadError` for a damaged file."""
    of_bytes = set(to_blt_ids(np.arange(BOS)).tolist())
    for token, number in _tokens(read_json(path), path.name):
        byte = MARKED.get(token, _BYTES.get(token))
        wanted = None if byte is None else int(to_blt_ids(np.asarray(byte)))
        if type(number) is not int or not 0 <= number < MARKS or number != (number if wanted is None else wanted):
            raise LayoutError(
                f"{path.name} does not fit: its token {shown(repr(token))} has the id {shown(repr(number))}"
                + (f", but the model's id is {wanted}" if wanted is not None else f", but the model has {MARKS} ids")
            )
        if byte is None and number in of_bytes:
            raise LayoutError(
                f"{path.name} does not fit: its token {shown(repr(token))} has {number}, the id of a byte"
            )


def _tokens(content: Mapping[str, object], name: str) -> Iterator[tuple[str, object]]:
    model = content.get("model")
    vocabulary = model.get("vocab", {}) if isinstance(model, Mapping) else {}
    if not isinstance(vocabulary, Mapping):
        raise LayoutError(f"{name} does not fit: its vocabulary is not one of tokens with ids")
    yield from ((str(token), number) for token, number in vocabulary.items())
    added = content.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, Mapping):
            yield str(token.get("content")), token.get("id")


def _byte_names() -> dict[str, int]:
    """What tokenizers call each byte: itself where it can be printed, or else the next character from U+0100 on; or its number in
    the form <0x41>."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    names = {chr(byte): byte for byte in printable}
    names |= {chr(256 + number): byte for number, byte in enumerate(others)}
    names |= {f"<0x{byte:02X}>": byte for byte in range(256)}
    # The ids of these two are BOS and EOS here.
    return {name: byte for name, byte in names.items() if byte < BOS}


_BYTES = _byte_names()
