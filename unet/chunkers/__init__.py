"""Chunkers: downsamplers from positions to tokens, upsamplers back to positions, and any pair of them."""

from unet.chunkers.chunker import AbstractDownsampler, AbstractUpsampler, Chunker
from unet.chunkers.down import AttentionPool, AveragePool, MaxPool, MeanPool, Select, WithBoundary
from unet.chunkers.up import Deviation, Distribute, Insert, LeaveToDecoder, Projection, Smooth

__all__ = [
    "AbstractDownsampler",
    "AbstractUpsampler",
    "AttentionPool",
    "AveragePool",
    "Chunker",
    "Deviation",
    "Distribute",
    "Insert",
    "LeaveToDecoder",
    "MaxPool",
    "MeanPool",
    "Projection",
    "Select",
    "Smooth",
    "WithBoundary",
]
