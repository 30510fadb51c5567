"""The byte-level autoregressive U-Net and the operations it is made of."""

from unet import ops
from unet.chunkers import MeanPool, Projection, SelectDeviate, SelectDistribute, SelectSmooth
from unet.likelihood import next_byte_log_lik
from unet.model import LossOutput, Prediction, UNet, UNetConfig
from unet.stage import AbstractStage, Flat, Hierarchy, Level

__all__ = [
    "AbstractStage",
    "Flat",
    "Hierarchy",
    "Level",
    "LossOutput",
    "MeanPool",
    "Prediction",
    "Projection",
    "SelectDeviate",
    "SelectDistribute",
    "SelectSmooth",
    "UNet",
    "UNetConfig",
    "next_byte_log_lik",
    "ops",
]
