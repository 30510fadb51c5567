"""Published layouts of parameters and configurations: of H-Nets, Byte Latent Transformers, Llamas and GPT-2s."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from unet.files import blt_layout, blt_written, decoder_layout, hnet_layout
from unet.files.blt_config import is_blt
from unet.files.converted import WeightType
from unet.files.decoder_config import is_decoder
from unet.files.errors import LayoutError, shown
from unet.model import UNet


def from_reference(
    config: Mapping[str, object],
    params: Mapping[str, np.ndarray],
    *,
    dtype: WeightType = "float32",
    chunk_sizes: Sequence[float] | None = None,
) -> UNet:
    """The language model of a published configuration, which decides what it is, and its parameters by their published names.

    See `from_reference` of `unet.files.hnet_layout`, `blt_layout` and `decoder_layout`; `dtype` is that of weights and products,
    `chunk_sizes` are for H-Nets. Of a Llama or GPT-2 it is the model over tokens, without a tokenizer. Raises `LayoutError` for
    what does not fit.
    """
    if chunk_sizes is not None and (is_blt(config) or is_decoder(config)):
        raise LayoutError(
            "chunk_sizes are for H-Nets; the patches of a Byte Latent Transformer follow from its threshold, and a model of "
            "tokens has none"
        )
    if is_decoder(config):
        return decoder_layout.from_reference(config, params, dtype=dtype)
    if is_blt(config):
        return blt_layout.from_reference(config, params, dtype=dtype)
    if "arch_layout" not in config and (kind := config.get("model_type")) is not None:
        raise LayoutError(f"models of the model_type {shown(repr(kind))} are not read: llama, gpt2, blt and H-Nets are")
    return hnet_layout.from_reference(config, params, dtype=dtype, chunk_sizes=chunk_sizes)


def to_reference(model: UNet) -> Mapping[str, np.ndarray]:
    """The parameters of a model in its published layout, each converted when it is read: the inverse of `from_reference`. Raises
    `LayoutError` for a model with parts that its layout does not have."""
    return blt_layout.to_reference(model) if blt_layout.is_blt(model) else hnet_layout.to_reference(model)


def reference_config(model: UNet) -> dict[str, object]:
    """The published configuration of a model. Raises `LayoutError` as `to_reference`."""
    return blt_written.reference_config(model) if blt_layout.is_blt(model) else hnet_layout.reference_config(model)
