"""A byte-level byte-pair encoding: text as tokens, which make up its bytes."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt8

from estimators.base import BOS, EOS
from estimators.bounds import Within, require_within

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

TokenizerSize = Annotated[int, Within(257, 2**20)]
"""256 bytes and at least one merge; every token has a row in the embedding and a column in the head."""

NEEDED = "a tokenizer needs the tokenizers library: pip install 'caesura-lm[bpe]'"

PROBE = (
    " The  naïve résumé,\r\n\tİstanbul ＷＩＤＥ ﬁ e\u0301 12345 1,000 it's IT'S def f(x):\n    return x\n\n中文 한국어 "
    "🙂 \u200b\u00a0\u2028 \x00\x7f end "
)
"""Text that a tokenizer which changes what it reads would change."""


class Tokenizer(eqx.Module):
    """A byte-pair encoding of the `tokenizers` library, as the text of its `tokenizer.json`, and its tokens: their joined bytes
    (`joined`) and the place where each `ends`. The tokens of a text make up its bytes, whatever they are: bytes outside UTF-8,
    BOS and EOS among them, are tokens of one byte. With `marks` BOS and EOS are these tokens, which may be one and the same.
    """

    json: UInt8[Array, " size"]
    joined: UInt8[Array, " bytes"]
    ends: Int[Array, " vocab"]
    learned_from: int = eqx.field(static=True, default=0)
    marks: tuple[int, int] | None = eqx.field(static=True, default=None)

    @classmethod
    def read(cls, content: bytes, learned_from: int = 0, marks: tuple[int, int] | None = None) -> Tokenizer:
        """The tokenizer in a `tokenizer.json`; `learned_from`: the bytes of text that it was learned from, if known; `marks`: the
        numbers of the tokens that mark the start and the end of a document, where they are tokens of their own.

        Raises `ImportError` without the extra `bpe`, and `ValueError` for anything but a byte-level byte-pair encoding that has a
        token for every byte and keeps text as it is.
        """
        opened = _opened(content, marks is not None)
        tokens = _tokens_of(content, opened.library)
        require_within("the size of a vocabulary", len(tokens), TokenizerSize)
        if marks is not None:
            if not 0 <= min(marks) <= max(marks) < len(tokens):
                raise ValueError(
                    f"the tokens {marks[0]} and {marks[1]} mark documents, but there are {len(tokens)} tokens"
                )
            # These bytes occur in no text.
            tokens = [b"" if token in (b"\xfe", b"\xff") else token for token in tokens]
            tokens[marks[0]], tokens[marks[1]] = bytes([BOS]), bytes([EOS])
        made = cls(
            jnp.asarray(np.frombuffer(content, np.uint8)),
            jnp.asarray(np.frombuffer(b"".join(tokens), np.uint8)),
            jnp.asarray(np.cumsum([len(token) for token in tokens]), jnp.int32),
            learned_from,
            marks,
        )
        made.encode_all([PROBE.encode(), b"one"])
        return made

    @property
    def size(self) -> int:
        """The number of tokens."""
        return self.ends.shape[0]

    def padded(self, size: int) -> Tokenizer:
        """The same with numbers that stand for no token behind, up to `size`. Raises `ValueError` for fewer than there are."""
        if size < self.size:
            raise ValueError(f"the tokenizer has {self.size} tokens, and the model embeddings of {size}")
        ends = jnp.pad(self.ends, (0, size - self.size), mode="edge")
        return dataclasses.replace(self, ends=ends)

    @property
    def tokens(self) -> tuple[bytes, ...]:
        """The bytes of each token; empty for a number that stands for none."""
        return _split(np.asarray(self.joined).tobytes(), np.asarray(self.ends).tobytes())

    @property
    def token_sizes(self) -> Int[np.ndarray, " vocab"]:
        """The number of bytes of each token."""
        return np.diff(np.asarray(self.ends), prepend=0)

    @property
    def written(self) -> tuple[bytes, ...]:
        """The bytes of each token that a text can have, and none for the others: special tokens, whose text is text, and what
        stands for the start of a document."""
        added = {one["id"] for one in json.loads(np.asarray(self.json).tobytes()).get("added_tokens", ())}
        start, end = self.marks or (None, None)
        hidden = (added | {start}) - {end}
        return tuple(b"" if number in hidden else token for number, token in enumerate(self.tokens))

    def encode(self, text: bytes) -> Int[np.ndarray, " tokens"]:
        """The tokens of a text."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[bytes]) -> list[Int[np.ndarray, " _"]]:
        """The tokens of each text. Raises `ValueError` where they are not its bytes, `ImportError` without the extra `bpe`."""
        opened = _opened(np.asarray(self.json).tobytes(), self.marks is not None)
        singles = list(opened.singles)
        if self.marks is not None:
            singles[BOS], singles[EOS] = [self.marks[0]], [self.marks[1]]
        pieces = [list(whole_characters(text)) for text in texts]
        strings = [part for parts in pieces for part in parts if isinstance(part, str)]
        encoded = iter(opened.library.encode_batch(strings, add_special_tokens=False) if strings else [])
        rows, tokens = [], self.tokens
        for text, parts in zip(texts, pieces, strict=True):
            ids = [singles[part[0]] if isinstance(part, bytes) else next(encoded).ids for part in parts]
            row = np.array(list(itertools.chain.from_iterable(ids)), np.int32)
            one_mark = self.marks is not None and self.marks[0] == self.marks[1]
            if b"".join([tokens[one] for one in row]) != (text.replace(b"\xfe", b"\xff") if one_mark else text):
                raise ValueError(
                    "the tokens of the tokenizer do not make up the bytes of a text: it changes what it reads"
                )
            rows.append(row)
        return rows


class _Opened:
    """A tokenizer of the library, and the token of each single byte as a list of one."""

    def __init__(self, content: bytes, plain: bool):
        self.library = _library_tokenizer(content)
        if plain:
            # What looks like a special token in a text is text.
            self.library.encode_special_tokens = True
        tokens = _tokens_of(content, self.library)
        found = {token: number for number, token in reversed(list(enumerate(tokens))) if len(token) == 1}
        missing = [value for value in range(256) if bytes([value]) not in found]
        if missing:
            raise ValueError(
                f"the tokenizer does not cover the bytes: it has no token for {len(missing)} of 256, such as 0x{missing[0]:02X}"
            )
        self.singles = [[found[bytes([value])]] for value in range(256)]


@functools.lru_cache(maxsize=4)
def _opened(content: bytes, plain: bool) -> _Opened:
    return _Opened(content, plain)


def _library_tokenizer(content: bytes) -> Library:
    """Raises as `Tokenizer.read` does."""
    try:
        from tokenizers import Tokenizer as Library
    except ImportError as error:
        raise ImportError(NEEDED) from error
    try:
        described = json.loads(content)
        library = Library.from_str(content.decode())
        model, reads = described["model"], json.dumps([described.get("pre_tokenizer"), described.get("decoder")])
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(f"this is not the tokenizer.json of a tokenizer ({str(error)[:100]})") from None
    if model.get("type") != "BPE" or '"ByteLevel"' not in reads:
        raise ValueError(
            f"the tokenizer is no byte-level byte-pair encoding (its model is {model.get('type')}): its tokens would not cover "
            "the bytes"
        )
    if model.get("dropout"):
        raise ValueError("the tokenizer draws its tokens at random (dropout): a text would have no fixed tokens")
    # Settings of a model that reads the tokens, which would cut or fill up texts.
    library.no_truncation()
    library.no_padding()
    return library


@functools.lru_cache(maxsize=4)
def _split(joined: bytes, ends: bytes) -> tuple[bytes, ...]:
    return tuple(joined[first:last] for first, last in itertools.pairwise([0, *np.frombuffer(ends, np.int32).tolist()]))


def _tokens_of(content: bytes, library: Library) -> list[bytes]:
    """The bytes of each token, by its number; special tokens are the bytes of their text. Numbers between that stand for no token
    are empty."""
    vocabulary = library.get_vocab(with_added_tokens=True)
    added = {one["content"] for one in json.loads(content).get("added_tokens", ())}
    if max(vocabulary.values(), default=0) >= 2**20:
        raise ValueError(f"a token has the number {max(vocabulary.values())}; at most {2**20} tokens can be predicted")
    tokens = [b""] * (1 + max(vocabulary.values(), default=0))
    for text, number in vocabulary.items():
        try:
            tokens[number] = text.encode() if text in added else bytes(BYTE_CHARACTERS[character] for character in text)
        except KeyError:
            raise ValueError(
                f"the tokenizer is not byte-level: its token {ascii(text)[:40]} stands for no bytes"
            ) from None
    return tokens


def train_tokenizer(texts: Iterable[bytes], size: int) -> Tokenizer:
    """A tokenizer of at most `size` tokens, learned from `texts` as GPT-2's was: words and merges inside them.

    Raises `ImportError` without the extra `bpe` and `ValueError` for a size outside 257 … 2^20.
    """
    require_within("the size of a vocabulary", size, TokenizerSize)
    try:
        from tokenizers import Tokenizer as Library
        from tokenizers import decoders, models, pre_tokenizers, trainers
    except ImportError as error:
        raise ImportError(NEEDED) from error
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=sorted(BYTE_CHARACTERS, key=BYTE_CHARACTERS.__getitem__), show_progress=False
    )
    read = 0

    def strings() -> Iterator[str]:
        nonlocal read
        for text in texts:
            read += len(text)
            yield from (part for part in whole_characters(text) if isinstance(part, str))

    library.train_from_iterator(strings(), trainer)
    return Tokenizer.read(library.to_str().encode(), read)


def whole_characters(text: bytes) -> Iterator[str | bytes]:
    """The text in bytes, and single bytes outside complete characters, in order."""
    try:
        if text:
            yield text.decode()
        return
    except UnicodeDecodeError:
        pass
    decoded, begin = text.decode("utf-8", "surrogateescape"), 0
    for place, character in enumerate(decoded):
        if "\udc80" <= character <= "\udcff":
            if begin < place:
                yield decoded[begin:place]
            yield bytes([ord(character) - 0xDC00])
            begin = place + 1
    if begin < len(decoded):
        yield decoded[begin:]


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level tokenizers write bytes as: printable ones of Latin-1 as themselves, the others from U+0100
    on in order (Radford et al., GPT-2)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in plain]
    return {chr(value): value for value in plain} | {chr(256 + rank): value for rank, value in enumerate(others)}


BYTE_CHARACTERS = _byte_alphabet()
"""The byte of each of these characters."""
