"""Segmentations of a text that boundaries are compared with: white space, a byte-pair encoding, a file.

A segmentation is an array of cuts: True at a byte that is the last of a segment and not of its document.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from estimators.routers.rules import is_spacelike, is_whitespace
from experiments.config.errors import ConfigError, require
from experiments.evaluation.byte_scores import Text
from unet.tokens.tokenizer import BYTE_CHARACTERS, whole_characters

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SMALLEST_VOCABULARY = 257
"""The 256 bytes and one merge."""


def byte_targets(text: Text) -> dict[str, Bool[np.ndarray, " bytes"]]:
    """The bytes that are white space, and those that are spacelike, by the rules of the estimators of these names."""
    values = jnp.arange(256)
    return {
        "white space": np.asarray(is_whitespace(values))[text.values],
        "spacelike": np.asarray(is_spacelike(values))[text.values],
    }


def cut_targets(name: str, cuts: Bool[np.ndarray, " bytes"]) -> dict[str, Bool[np.ndarray, " bytes"]]:
    """The last bytes of the segments but the last of each document, and the first bytes of those but the first."""
    return {f"{name}: last bytes": cuts, f"{name}: first bytes": np.concatenate([[False], cuts[:-1]])}


def read_reference(path: Path, text: Text) -> Bool[np.ndarray, " bytes"]:
    """The cuts in a file with one JSON list for each document: the offsets in bytes at which its segments begin, ascending. 0 and
    the size of the document may be among them.

    Raises `ConfigError` where it cannot be read, or does not fit the text.
    """
    where = f"--reference {path}"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where} cannot be read: {error}") from None
    documents = len(text.documents)
    require(
        len(lines) == documents,
        f"{where} has {len(lines)} lines, but the text has {documents} documents: it needs one list of byte offsets for each",
    )
    cuts = np.zeros(text.bytes, bool)
    start = 0
    for number, (line, size) in enumerate(zip(lines, text.sizes.tolist(), strict=True), start=1):
        offsets = _offsets(line, f"{where}, line {number},")
        require(
            all(0 <= offset <= size for offset in offsets),
            f"{where}, line {number}, has an offset outside its document, which has {size} bytes",
        )
        cuts[[start + offset - 1 for offset in offsets if 0 < offset < size]] = True
        start += size
    return cuts


def _offsets(line: str, where: str) -> list[int]:
    try:
        offsets = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not JSON ({error})") from None
    require(
        isinstance(offsets, list) and all(type(offset) is int for offset in offsets),
        f"{where} is not a list of byte offsets",
    )
    require(offsets == sorted(set(offsets)), f"{where} has offsets that do not ascend")
    return offsets


Reading = Literal["latin-1", "byte-level", "text"]
"""How a tokenizer writes bytes: as characters of Latin-1, as those that are learned here do; as the 256 characters of GPT-2's
tokenizer; or as text, with ▁ for a space and <0x0A> for single bytes."""


@dataclass(frozen=True)
class Encoding:
    """A byte-pair encoding and how it writes bytes."""

    tokenizer: Tokenizer
    reading: Reading

    def tokens(self, document: bytes) -> list[bytes]:
        """The tokens of a document. Raises `ValueError` if they are not its bytes."""
        if self.reading == "latin-1":
            return [token.encode("latin-1") for token in self.tokenizer.encode(document.decode("latin-1")).tokens]
        tokens = []
        for part in whole_characters(document):
            if isinstance(part, bytes):
                tokens.append(part)
            else:
                tokens += self._of_text(part)
        if b"".join(tokens) != document:
            raise ValueError("its tokens do not make up the bytes of the text")
        return tokens

    def _of_text(self, text: str) -> list[bytes]:
        encoded = self.tokenizer.encode(text, add_special_tokens=False).tokens
        tokens = [_bytes_of(token, self.reading) for token in encoded]
        content = text.encode()
        if b"".join(tokens) == b" " + content:
            # Some tokenizers put a space before every text.
            tokens[0] = tokens[0][1:]
        return [token for token in tokens if token]


def learn_encoding(text: Text, size: int) -> Encoding:
    """A byte-pair encoding of at most `size` tokens, learned from the text. Raises `ConfigError` without the extra `bpe`."""
    from estimators.routers.prefixes import train_tokenizer

    try:
        return Encoding(train_tokenizer(text.documents, size), "latin-1")
    except ImportError as error:
        raise ConfigError(f"--bpe {size}: {error}") from None


def read_encoding(name: str) -> Encoding:
    """The tokenizer in a `tokenizer.json`. Raises `ConfigError` if it cannot be read, or without the extra `bpe`."""
    path = Path(name)
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ConfigError(
            f"--bpe {path} needs the tokenizers library ({error}): pip install 'caesura-lm[bpe]'"
        ) from None
    require(path.is_file(), f"--bpe {path} is neither a number of tokens to learn nor a tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exceptions
        raise ConfigError(f"--bpe {path} is not the tokenizer.json of a tokenizer ({error})") from None
    # Settings of a model that reads the tokens, which would cut or fill up documents.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return Encoding(tokenizer, "byte-level" if "ByteLevel" in tokenizer.to_str() else "text")


def encoding_cuts(encoding: Encoding, text: Text, name: str) -> Bool[np.ndarray, " bytes"]:
    """The cuts between the tokens of a text. Raises `ConfigError` for a tokenizer whose tokens are not the bytes of the text."""
    cuts = np.zeros(text.bytes, bool)
    start = 0
    for number, document in enumerate(text.documents):
        try:
            ends = np.cumsum([len(token) for token in encoding.tokens(document)])
        except Exception as error:  # the library raises bare Exceptions
            raise ConfigError(
                f"--bpe {name} does not cover the bytes of document {number} ({error}): name a byte-level tokenizer"
            ) from None
        cuts[start + ends[:-1] - 1] = True
        start += len(document)
    return cuts


def _bytes_of(token: str, reading: Reading) -> bytes:
    """The bytes of a token. Raises `KeyError` for a character that is not of the byte alphabet."""
    if reading == "byte-level":
        return bytes(BYTE_CHARACTERS[character] for character in token)
    if re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


def targets_of(
    text: Text, cuts: Sequence[tuple[str, Bool[np.ndarray, " bytes"]]]
) -> dict[str, Bool[np.ndarray, " bytes"]]:
    """All bytes that boundaries are compared with, by name: white space, spacelike bytes, and the segments of `cuts`."""
    targets = byte_targets(text)
    for name, one in cuts:
        targets |= cut_targets(name, one)
    return targets
