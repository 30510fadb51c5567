"""What a model makes of each byte of a text: what the byte costs, and where tokens end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Key, UInt8
from rich.text import Text

from estimators.base import Keys
from unet.decoding.alphabet import at_last_bytes
from unet.decoding.score import (
    Likelihoods,
    depth_of_bytes,
    drawing_keys,
    encoded,
    in_batches,
    keys_of,
    likelihoods,
    sizes_of,
    texts_as_bytes,
)
from unet.hierarchy import boundary_probs
from unet.language_model import AbstractLanguageModel
from unet.likelihood import plain_layout
from unet.local_devices import by_row
from unet.losses import early_log_prob
from unet.model import UNet
from unet.numerics import with_rank_promotion
from unet.shading import html
from unet.shading.characters import Character, characters, colour_of, token_numbers, visible

if TYPE_CHECKING:
    import pyarrow


class BytePass(eqx.Module):
    """The likelihoods at each position, the log-probability of the next byte by the early head (None without one), the
    probability of a boundary of the outermost level (0 without a token level), and that of each level inside it (NaN where a
    level outside closed no token)."""

    likelihoods: Likelihoods
    early_log_prob: Float[Array, "batch length"] | None
    prob: Float[Array, "batch length"]
    inner_prob: Float[Array, "batch length inner"]

    @property
    def overflow(self) -> Int[Array, " batch"] | None:
        return self.likelihoods.overflow


@by_row
@with_rank_promotion
def byte_pass(
    model: UNet,
    bytes: Int[Array, "batch length"],
    mask: Bool[Array, "batch length"],
    keys: Key[Array, " batch"] | None,
    capacity: int,
) -> BytePass:
    """A pass over texts with boundaries drawn by `keys` (None: greedy), with room for `capacity` tokens. `mask`: False at
    padding."""
    prediction = model(bytes, key=keys, mask=mask, capacities=(capacity,))
    levels = prediction.levels
    prob = levels[0].boundaries.probs if levels else jnp.zeros(bytes.shape, jnp.float32)
    inner_prob = boundary_probs(levels, mask)[..., 1:].astype(jnp.float32)
    early = early_log_prob(prediction, plain_layout(bytes, None, mask))
    return BytePass(likelihoods(prediction, bytes, mask), early, prob, inner_prob)


@dataclass(frozen=True)
class TextBoundaries:
    """What a model makes of each byte of a `text`.

    `log_prob`, `early_log_prob`: log-probability in nats of the byte after those before it, from the model and from its early
    head (NaN without one). `prob`: probability of a boundary of the outermost level after the byte, given the boundaries before
    it. `inner_prob`: the same of each level inside it, the next one first; NaN where a level outside it closed no token. `depth`:
    how many levels, counted from the outermost, closed a token there. `levels`: token levels of the model; without any, `prob` is
    NaN.

    A terminal prints it in colours (rich), a notebook shows it shaded.
    """

    text: bytes
    log_prob: Float32[np.ndarray, " bytes"]
    early_log_prob: Float32[np.ndarray, " bytes"]
    prob: Float32[np.ndarray, " bytes"]
    depth: UInt8[np.ndarray, " bytes"]
    levels: int
    inner_prob: Float32[np.ndarray, "bytes inner"]

    @property
    def boundaries(self) -> Bool[np.ndarray, " bytes"]:
        """Whether the outermost level closed a token after the byte."""
        return self.closed(0)

    @property
    def bits(self) -> Float32[np.ndarray, " bytes"]:
        """What each byte costs, in bits."""
        return -self.log_prob / np.float32(math.log(2.0))

    @property
    def bits_per_byte(self) -> float:
        """The mean of `bits`; NaN for an empty text."""
        return float(self.bits.mean(dtype=np.float64)) if self.text else math.nan

    @property
    def bytes_per_token(self) -> tuple[float, ...]:
        """For each level, the outermost first, bytes divided by closed tokens; NaN where none was closed."""
        counts = (int(self.closed(level).sum()) for level in range(self.levels))
        return tuple(len(self.text) / count if count else math.nan for count in counts)

    def closed(self, level: int) -> Bool[np.ndarray, " bytes"]:
        """Whether a token of level `level` (0: the outermost) was closed after the byte."""
        return self.depth > level

    def prob_of(self, level: int) -> Float32[np.ndarray, " bytes"]:
        """The probability of a boundary of that level after the byte; NaN where a level outside it closed no token."""
        return self.inner_prob[:, level - 1] if level else self.prob

    def token(self, level: int = 0) -> Int[np.ndarray, " bytes"]:
        """The number of the token of that level that the byte is in, from 0."""
        return token_numbers(self.closed(level))

    def tokens(self, level: int = 0) -> list[bytes]:
        """The tokens of that level in order. The last one may not have been closed."""
        stops = [int(place) + 1 for place in np.flatnonzero(self.closed(level))]
        if not stops or stops[-1] < len(self.text):
            stops.append(len(self.text))
        starts = [0, *stops[:-1]]
        return [self.text[start:stop] for start, stop in zip(starts, stops, strict=True) if stop > start]

    @cached_property
    def characters(self) -> list[Character]:
        """The characters of the text. Invalid bytes become U+FFFD."""
        return characters(np.frombuffer(self.text, np.uint8), self.prob, self.depth, self.bits)

    def columns(self) -> dict[str, np.ndarray]:
        """A table with a row for each byte: `offset`, `byte`, `log_prob` and `early_log_prob` in nats, and with a token level
        `boundary_prob`, `boundary_depth`, for each level from 1 on `boundary_1` and `token_1`, from 2 on `boundary_prob_2`."""
        table = {
            "offset": np.arange(len(self.text)),
            "byte": np.frombuffer(self.text, np.uint8),
            "log_prob": self.log_prob,
            "early_log_prob": self.early_log_prob,
        }
        if self.levels:
            table |= {"boundary_prob": self.prob, "boundary_depth": self.depth}
        for level in range(self.levels):
            table |= {f"boundary_{level + 1}": self.closed(level), f"token_{level + 1}": self.token(level)}
            table |= {f"boundary_prob_{level + 1}": self.prob_of(level)} if level else {}
        return table

    def to_parquet(self, path: str | Path) -> None:
        """Write `columns` as a Parquet file; NaN becomes null. Raises `ImportError` without pyarrow
        (`pip install 'caesura-lm[parquet]'`) and `OSError`."""
        import pyarrow.parquet

        pyarrow.parquet.write_table(self.to_arrow(), path)

    def to_arrow(self) -> pyarrow.Table:
        """The same as a table of pyarrow."""
        import pyarrow

        columns = self.columns().items()
        return pyarrow.table(
            {name: pyarrow.array(values, from_pandas=values.dtype.kind == "f") for name, values in columns}
        )

    def summary(self) -> str:
        """Bytes, bits per byte, and bytes per token of each level, in one line."""
        parts = [f"{len(self.text):,} bytes", f"{self.bits_per_byte:.3f} bits per byte"]
        if self.levels:
            parts.append(f"{' / '.join(f'{size:.2f}' for size in self.bytes_per_token)} bytes per token")
        return ", ".join(parts)

    def to_html(self, title: str = "Boundaries") -> str:
        """A page of its own, with nothing from elsewhere."""
        return html.page(title, self._repr_html_())

    def _repr_html_(self) -> str:
        return html.fragment([self.characters], [self.summary()])

    def __rich__(self) -> Text:
        """Characters on backgrounds from blue (p = 0) to red (p = 1), with marks where tokens end."""
        return coloured(self.characters)


def coloured(shown: Sequence[Character], *, marks: bool = True) -> Text:
    """Characters for a terminal. Control characters are shown as pictures of them."""
    text = Text()
    for one in shown:
        red, green, blue = colour_of(one.prob)
        sign = "⏎" if one.text == "\n" else visible(one.text)
        text.append(sign, style="" if math.isnan(one.prob) else f"black on #{red:02x}{green:02x}{blue:02x}")
        if marks:
            text.append(one.mark, style="dim cyan")
        if one.text == "\n":
            text.append("\n")
    return text


def boundaries(
    model: AbstractLanguageModel,
    texts: Sequence[str | bytes] | str | bytes,
    *,
    key: Keys | None,
    batch: int = 16,
) -> tuple[TextBoundaries, ...]:
    """What a model makes of each byte of some texts (or of a single one), in the order given.

    Each text is read whole, after a BOS. Its boundaries are drawn with its own key (`key`: one for all, or one each; None:
    greedy): those of `score` and `generate` with the same key. No boundary is dropped. Texts of similar lengths are batched,
    `batch` at a time. A model of tokens has the boundaries of its tokenizer, with a probability of 1; the log-probability of a
    token stands at its last byte, 0 at the others.

    Raises `ValueError` if the number of keys differs from that of texts, for a batch outside 1 … 65536, and if a text contains
    the byte BOS or EOS.
    """
    contents = texts_as_bytes(texts)
    keys = None if key is None else drawing_keys(keys_of(key, len(contents)))
    symbols = encoded(model, contents)
    model.unet.require_positions(1 + max((len(one) for one in symbols), default=0))
    found = {}
    for number, result in in_batches(symbols, keys, batch, model, byte_pass):
        # Position 0 is BOS, and the prediction at a position is of the next one.
        own, size = symbols[number], len(symbols[number])
        sizes = sizes_of(model, own)
        log_prob, early = at_last_bytes(np.asarray(result.likelihoods.log_prob[:size]), sizes), result.early_log_prob
        depth = depth_of_bytes(model, own, np.asarray(result.likelihoods.depth[1:])).astype(np.uint8)
        every = np.column_stack([result.prob, result.inner_prob])[1 : 1 + size, : len(model.estimators)]
        probs = np.full((len(contents[number]), every.shape[1]), np.nan, np.float32)
        probs[np.cumsum(sizes) - 1] = every
        if model.levels > len(model.estimators):
            # Where a tokenizer ends its tokens is certain.
            prob, inner = (depth > 0).astype(np.float32), probs
        else:
            prob, inner = probs[:, 0] if model.levels else np.full_like(log_prob, np.nan), probs[:, 1:]
        found[number] = TextBoundaries(
            contents[number],
            log_prob,
            np.full_like(log_prob, np.nan) if early is None else at_last_bytes(np.asarray(early[:size]), sizes),
            prob,
            depth,
            model.levels,
            inner,
        )
    return tuple(found[number] for number in range(len(contents)))
