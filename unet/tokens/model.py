"""A language model of the tokens of a byte-pair encoding, judged by the bytes that they cover."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from estimators.sharding import batch_shards, batch_sum
from unet.decoding.alphabet import Alphabet
from unet.language_model import AbstractLanguageModel
from unet.likelihood import continues, plain_layout
from unet.losses import LossOutput, level_prefix
from unet.model import UNet
from unet.tokens.batch import TokenBatch, tokenised
from unet.tokens.tokenizer import Tokenizer


class TokenModel(AbstractLanguageModel):
    r"""A `UNet` over the tokens of a `tokenizer`: a transformer without token levels is the usual language model, one with levels
    chunks tokens instead of bytes (H-Net, figure 10).

    Its likelihood of a text is that of the one sequence of tokens that the tokenizer makes of it,
    $\log p(x) = \sum_t \log p(v_t \mid v_{<t})$, which is rescaled to bytes: divided by the number of bytes that the tokens
    cover. Other sequences of tokens spell the same text, so this is a lower bound of its probability, and the usual figure for
    such models (H-Net, section 5).
    """

    tokenizer: Tokenizer
    inner: UNet

    @property
    def unet(self) -> UNet:
        return self.inner

    @property
    def symbols(self) -> Sequence[bytes]:
        return self.tokenizer.tokens

    @property
    def alphabet(self) -> Alphabet:
        return _alphabet(self.tokenizer.tokens, self.tokenizer.marks)

    @property
    def levels(self) -> int:
        return 1 + len(self.estimators)

    def encode(self, text: bytes) -> Int[np.ndarray, " symbols"]:
        return self.tokenizer.encode(text)

    def inputs(self, batch: Mapping[str, np.ndarray], *, shortest: int = 0) -> dict[str, PyTree[np.ndarray]]:
        rows = {name: np.asarray(batch[name]) for name in ("bytes", "segments", "mask")}
        tokens = tokenised(self.tokenizer, **rows, shortest=shortest)
        self.inner.require_positions(int(np.max(np.sum(tokens.mask, axis=1), initial=0)))
        return {**rows, "tokens": tokens}

    def batch_loss(
        self,
        batch: Mapping[str, PyTree[Array]],
        *,
        key: PRNGKeyArray | None,
        target_rate: Float[Array, ""] | None = None,
        capacities: Sequence[int | Sequence[int]] = (),
        samples: int = 1,
    ) -> LossOutput:
        tokens: TokenBatch = batch["tokens"]
        output = self.inner.loss(
            jnp.asarray(tokens.ids),
            key=key,
            segments=jnp.asarray(tokens.segments),
            mask=jnp.asarray(tokens.mask),
            target_rate=target_rate,
            capacities=capacities,
            samples=samples,
        )
        return per_byte(output, tokens, batch, levels=len(self.estimators))


@functools.lru_cache(maxsize=4)
def _alphabet(tokens: tuple[bytes, ...], marks: tuple[int, int] | None) -> Alphabet:
    return Alphabet.of(tokens, marks)


def per_byte(output: LossOutput, tokens: TokenBatch, batch: Mapping[str, Array], *, levels: int) -> LossOutput:
    """A loss in nats per predicted token as one in nats per predicted byte.

    The tokenizer becomes the outermost level: `rate` is the number of tokens per byte, no boundary of it is dropped, and the
    `levels` of the model itself follow as inner ones. `padding` is that of the rows of tokens.
    """
    layout = plain_layout(batch["bytes"], batch["segments"], batch["mask"])
    of_tokens = plain_layout(jnp.asarray(tokens.ids), jnp.asarray(tokens.segments), jnp.asarray(tokens.mask))

    def counted(mask: Array) -> Float[Array, ""]:
        return batch_sum(jnp.sum(mask)).astype(jnp.float32)

    factor = counted(continues(of_tokens)) / jnp.maximum(counted(continues(layout)), 1.0)
    rate = counted(of_tokens.mask) / jnp.maximum(counted(layout.mask), 1.0)
    own = {"rate": output.rate, "overflow": output.overflow} if levels else {}
    named = {**own, **output.metrics}
    return LossOutput(
        loss=factor * output.loss,
        log_prob=factor * output.log_prob,
        early_log_prob=None if output.early_log_prob is None else factor * output.early_log_prob,
        rate=rate,
        overflow=jnp.zeros((), jnp.float32),
        padding=1.0 - counted(of_tokens.mask) / (of_tokens.mask.size * batch_shards()),
        metrics={_inward(name): value for name, value in named.items()},
        target_of=output.free_rate if levels else None,
    )


def _inward(name: str) -> str:
    """The name of a metric one level further in."""
    if not name.startswith("level"):
        return level_prefix(1) + name
    number, _, rest = name.removeprefix("level").partition("_")
    return level_prefix(int(number) + 1) + rest
