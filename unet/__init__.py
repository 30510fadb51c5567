"""The byte-level autoregressive U-Net and the operations it is made of."""

from unet import ops
from unet.blt import BLTConfig, from_blt_ids, to_blt_ids
from unet.chunkers import (
    AbstractDownsampler,
    AbstractUpsampler,
    AttentionPool,
    AveragePool,
    Chunker,
    Deviation,
    Distribute,
    Insert,
    LeaveToDecoder,
    MaxPool,
    MeanPool,
    Projection,
    Select,
    Smooth,
    WithBoundary,
)
from unet.config import UNetConfig
from unet.decoders import GPT2Config, LlamaConfig
from unet.decoding import utf8
from unet.decoding.boundaries import TextBoundaries, boundaries
from unet.decoding.generate import Generated, Generation, TextStream, generate
from unet.decoding.sampling import Sampling
from unet.decoding.score import Scored, score
from unet.files.layouts import from_reference, reference_config, to_reference
from unet.files.pretrained import load_hnet, load_pretrained, save_blt, save_hnet, save_tokens
from unet.files.saving import Loaded, LoadError, load, save
from unet.hierarchy import AbstractStage, Flat, Hierarchy, Level
from unet.hnet import HNetConfig
from unet.language_model import AbstractLanguageModel
from unet.likelihood import next_logprobs
from unet.local_devices import on_all_devices
from unet.losses import LossOutput, Prediction
from unet.model import UNet
from unet.tokens.model import TokenModel
from unet.tokens.tokenizer import Tokenizer, train_tokenizer
from unet.transformer import TransformerConfig
from unet.widened import Widened
from unet.wrapped import Adapted, Adapter, Positioned

__all__ = [
    "AbstractDownsampler",
    "AbstractLanguageModel",
    "AbstractStage",
    "AbstractUpsampler",
    "Adapted",
    "Adapter",
    "AttentionPool",
    "AveragePool",
    "BLTConfig",
    "Chunker",
    "Deviation",
    "Distribute",
    "Flat",
    "GPT2Config",
    "Generated",
    "Generation",
    "HNetConfig",
    "Hierarchy",
    "Insert",
    "LeaveToDecoder",
    "Level",
    "LlamaConfig",
    "LoadError",
    "Loaded",
    "LossOutput",
    "MaxPool",
    "MeanPool",
    "Positioned",
    "Prediction",
    "Projection",
    "Sampling",
    "Scored",
    "Select",
    "Smooth",
    "TextBoundaries",
    "TextStream",
    "TokenModel",
    "Tokenizer",
    "TransformerConfig",
    "UNet",
    "UNetConfig",
    "Widened",
    "WithBoundary",
    "boundaries",
    "from_blt_ids",
    "from_reference",
    "generate",
    "load",
    "load_hnet",
    "load_pretrained",
    "next_logprobs",
    "on_all_devices",
    "ops",
    "reference_config",
    "save",
    "save_blt",
    "save_hnet",
    "save_tokens",
    "score",
    "to_blt_ids",
    "to_reference",
    "train_tokenizer",
    "utf8",
]
