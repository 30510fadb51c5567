"""The shape of an autoregressive U-Net."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unet.ops import Implementation


@dataclass(frozen=True)
class UNetConfig:
    """Shape of an autoregressive U-Net.

    Raises `ValueError` where the numbers cannot make a model.
    """

    dim: int
    """Width of every hidden state."""
    heads: int
    """Attention heads; divides `dim`."""
    encoder_layers: int
    """Byte-level blocks before the boundaries."""
    main_layers: int
    """Token-level blocks."""
    decoder_layers: int
    """Byte-level blocks after the tokens are brought back."""
    window: int = 64
    """Bytes that byte-level attention sees, the current one included."""
    token_positions: Literal["byte", "chunk"] = "byte"
    """Rotary positions of a token: the byte position of its boundary, or its own number."""
    compute: Literal["float32", "bfloat16"] = "float32"
    """Dtype of hidden states and matrix products; parameters, losses and the insides of norms and softmax stay float32."""
    early_share: float = 1.0
    """Share of the rows, drawn anew every step, at which the early head predicts in training; at the others its mean over these
    stands for it."""
    remat: bool = False
    """Recompute each block in the backward pass, to save memory."""
    implementation: Implementation | None = None
    """How ragged operations run: as kernels on CUDA and in XLA elsewhere (None), always in `xla`, always as `pallas` kernels, or
    `interpret` those on the host, slowly."""

    def __post_init__(self):
        for name in ("dim", "heads", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        for name in ("encoder_layers", "main_layers", "decoder_layers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} cannot be negative; got {getattr(self, name)}")
        if not 0 < self.early_share <= 1:
            raise ValueError(f"early_share is a share of rows above 0, at most 1; got {self.early_share}")
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            raise ValueError(
                f"heads must divide dim into heads of even width; got dim {self.dim} and heads {self.heads}"
            )
