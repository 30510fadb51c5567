"""A chunker: the token level's output comes back through a learned gate.

python -m experiments.run --chunker my_tokens.chunker:Gated --gated.start 0.5
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from estimators import Boundaries, Tokens
from estimators.base import Upsampled
from unet import Distribute
from unet.chunkers import AbstractUpsampler


class Gated(AbstractUpsampler):
    r"""$Y_i = X_i + g \odot Y'_{\mathrm{token\_of}(i)}$ with one learned gate $g$ for each channel."""

    gate: Float[Array, " dim"]

    def __init__(self, dim: int, start: float = 1.0):
        self.gate = jnp.full((dim,), start, jnp.float32)

    def init_state(self, batch: int, dim: int) -> Float[Array, "batch 1 dim"]:
        return Distribute().init_state(batch, dim)

    def __call__(
        self,
        outputs: Float[Array, "batch tokens token_dim"],
        tokens: Tokens,
        hidden: Float[Array, "batch length dim"],
        boundaries: Boundaries,
        *,
        state: Float[Array, "batch 1 dim"] | None = None,
    ) -> Upsampled:
        gated = outputs * self.gate.astype(outputs.dtype)
        return Distribute()(gated, tokens, hidden, boundaries, state=state)
