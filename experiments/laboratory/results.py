"""What the laboratory finds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """An estimator against the exact gradient g of the loss it is meant to descend, at one set of logits.

    `bias`: |E[ĝ] - g| / |g|; `scale`: the factor c that makes c·g nearest to E[ĝ]; `cosine` between the two; `variance` of one
    sample, trace over texts and decisions, relative to that of the paper's estimator; `snr`: |E[ĝ]|² / variance; `cost`:
    forward passes of the token level and what follows it per encoder pass; `snr_per_cost` the ratio of the last two.
    """

    name: str
    model: str
    bias: float
    scale: float
    cosine: float
    variance: float
    snr: float
    cost: float
    snr_per_cost: float


@dataclass(frozen=True)
class Flow:
    """Where one estimator went: the expected loss over time in nats per byte, price included, averaged over texts.

    `start` and `end` are its first and last values, `best` the loss of the best string of each text, found by trying all,
    `likelier` that of the string of likelier actions at the end; `rate` the expected rate there. `closed` is the share of
    the way from the start to the best that the likelier string has gone: 1 for the best policy, below 0 for one worse than
    the start.
    """

    name: str
    model: str
    times: tuple[float, ...]
    losses: tuple[float, ...]
    start: float
    end: float
    likelier: float
    best: float
    rate: float
    closed: float


@dataclass(frozen=True)
class Noise:
    """Of one set of variance reductions: the variance of the gradient of the policy's weights for one batch (trace),
    relative to the paper's; the signal-to-noise ratio |mean|² / variance of a step; and the same per unit of training
    FLOPs, relative to the paper's."""

    name: str
    variance: float
    snr: float
    snr_per_flop: float
