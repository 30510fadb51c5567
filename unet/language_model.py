"""What every language model of text has, whether it reads bytes or tokens."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import equinox as eqx
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from estimators.base import AbstractEstimator
from unet.decoding.alphabet import Alphabet
from unet.losses import LossOutput

if TYPE_CHECKING:
    from unet.model import UNet


class AbstractLanguageModel(eqx.Module):
    """A `UNet` over symbols, and how text is made of them. `UNet` itself is one whose symbols are bytes."""

    @property
    @abstractmethod
    def unet(self) -> UNet:
        """The model over symbols."""

    @property
    @abstractmethod
    def symbols(self) -> Sequence[bytes]:
        """The bytes of each symbol."""

    @property
    @abstractmethod
    def alphabet(self) -> Alphabet:
        """The same as what decoding needs of them."""

    @property
    @abstractmethod
    def levels(self) -> int:
        """How many levels of tokens there are; those of a tokenizer are one."""

    @abstractmethod
    def encode(self, text: bytes) -> Int[np.ndarray, " symbols"]:
        """The symbols that make up a text."""

    @abstractmethod
    def inputs(self, batch: Mapping[str, np.ndarray], *, shortest: int = 0) -> dict[str, PyTree[np.ndarray]]:
        """What `batch_loss` reads of a batch of text: its `bytes`, `segments` and `mask`, and what follows from them. Rows of
        tokens are padded to `shortest` at least, so that batches share a compiled program. Runs on the host."""

    @abstractmethod
    def batch_loss(
        self,
        batch: Mapping[str, PyTree[Array]],
        *,
        key: PRNGKeyArray | None,
        target_rate: Float[Array, ""] | None = None,
        capacities: Sequence[int | Sequence[int]] = (),
        samples: int = 1,
    ) -> LossOutput:
        """The training loss of what `inputs` returned, in nats per byte; arguments as in `UNet.loss`."""

    @property
    def estimators(self) -> tuple[AbstractEstimator, ...]:
        """The estimators that draw boundaries, the outermost level first; a tokenizer is none."""
        return self.unet.stage.estimators
