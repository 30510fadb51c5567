"""The byte-level autoregressive U-Net and the operations it is made of."""

from unet import ops, utf8
from unet.chunkers import MeanPool, Projection, SelectDeviate, SelectDistribute, SelectSmooth
from unet.config import UNetConfig
from unet.generate import Generated, Writer, Written, generate
from unet.likelihood import next_byte_log_lik
from unet.model import LossOutput, Prediction, UNet
from unet.reading import Scored, score
from unet.sampling import Sampling
from unet.saving import Loaded, LoadError, load, save
from unet.stage import AbstractStage, Flat, Hierarchy, Level

__all__ = [
    "AbstractStage",
    "Flat",
    "Generated",
    "Hierarchy",
    "Level",
    "LoadError",
    "Loaded",
    "LossOutput",
    "MeanPool",
    "Prediction",
    "Projection",
    "Sampling",
    "Scored",
    "SelectDeviate",
    "SelectDistribute",
    "SelectSmooth",
    "UNet",
    "UNetConfig",
    "Writer",
    "Written",
    "generate",
    "load",
    "next_byte_log_lik",
    "ops",
    "save",
    "score",
    "utf8",
]
