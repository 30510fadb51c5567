"""The byte-level autoregressive U-Net and the operations it is made of."""

from unet import ops, utf8
from unet.chunkers import MeanPool, Projection, SelectAttend, SelectDeviate, SelectDistribute, SelectSmooth
from unet.config import UNetConfig
from unet.generate import Generated, Writer, Written, generate
from unet.hnet import HNetConfig
from unet.likelihood import next_byte_log_lik
from unet.losses import LossOutput, Prediction
from unet.model import UNet
from unet.pooling import AbstractPool, Average, CrossAttention, Largest, Pooled, WithBoundary
from unet.pretrained import load_hnet, save_hnet
from unet.reading import Scored, score
from unet.reference import from_reference, to_reference
from unet.sampling import Sampling
from unet.saving import Loaded, LoadError, load, save
from unet.stage import AbstractStage, Flat, Hierarchy, Level
from unet.widened import Widened

__all__ = [
    "AbstractPool",
    "AbstractStage",
    "Average",
    "CrossAttention",
    "Flat",
    "Generated",
    "HNetConfig",
    "Hierarchy",
    "Largest",
    "Level",
    "LoadError",
    "Loaded",
    "LossOutput",
    "MeanPool",
    "Pooled",
    "Prediction",
    "Projection",
    "Sampling",
    "Scored",
    "SelectAttend",
    "SelectDeviate",
    "SelectDistribute",
    "SelectSmooth",
    "UNet",
    "UNetConfig",
    "Widened",
    "WithBoundary",
    "Writer",
    "Written",
    "from_reference",
    "generate",
    "load",
    "load_hnet",
    "next_byte_log_lik",
    "ops",
    "save",
    "save_hnet",
    "score",
    "to_reference",
    "utf8",
]
