"""Peak rates of NVIDIA's cards in matrix products."""

from __future__ import annotations

import re

BFLOAT16 = {
    "A100": 312e12,
    "A800": 312e12,
    "A10G": 70e12,
    "A10": 125e12,
    "A30": 165e12,
    "A40": 149.7e12,
    "RTX A6000": 154.8e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 6000 Ada": 364.2e12,
    "RTX 3090": 71e12,
    "RTX 4090": 165.2e12,
    "RTX 5090": 209.5e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GB200": 2500e12,
    "B200": 2250e12,
    "B100": 1750e12,
}
"""FLOP/s of the tensor cores in bfloat16, dense, with sums in float32, from the data sheets. The longest
name that the name of a card contains counts."""


def peak_of(card: str) -> float | None:
    """FLOP/s in bfloat16 of a card by the name that its driver gives it; None for one that is not in the table."""
    named = sorted(BFLOAT16, key=len, reverse=True)
    return next((BFLOAT16[name] for name in named if re.search(rf"\b{name}\b", card)), None)
