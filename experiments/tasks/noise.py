"""HellaSwag with its characters disturbed: the noises of BLT (Pagnoni et al. 2024) that H-Net's Table 3 takes over.

Each noise is applied to the context, to the endings, and to both, as three examples, so that the accuracy over all of them is the
mean of the three that BLT reports. What is drawn depends on the noise and on the text alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

SEED = 0
"""Of all noises."""


def antspeak(text: str, rng: random.Random) -> str:
    """All characters in upper case with a space between any two."""
    return " ".join(text.upper())


def drop(text: str, rng: random.Random) -> str:
    """Without 10 % of the characters (rounded), drawn uniformly."""
    gone = set(rng.sample(range(len(text)), round(0.1 * len(text))))
    return "".join(character for place, character in enumerate(text) if place not in gone)


def random_case(text: str, rng: random.Random) -> str:
    """Half of the characters (rounded), drawn uniformly, in upper case, the others in lower case."""
    upper = set(rng.sample(range(len(text)), round(0.5 * len(text))))
    return "".join(one.upper() if place in upper else one.lower() for place, one in enumerate(text))


def repeat(text: str, rng: random.Random) -> str:
    """20 % of the characters (rounded), drawn uniformly, become 2, 3 or 4 of themselves, drawn uniformly as well."""
    chosen = rng.sample(range(len(text)), round(0.2 * len(text)))
    counts = {place: rng.randint(2, 4) for place in sorted(chosen)}
    return "".join(one * counts.get(place, 1) for place, one in enumerate(text))


def upper_case(text: str, rng: random.Random) -> str:
    """All characters in upper case."""
    return text.upper()


NOISES: Mapping[str, Callable[[str, random.Random], str]] = {
    "antspeak": antspeak,
    "drop": drop,
    "randomcase": random_case,
    "repeat": repeat,
    "uppercase": upper_case,
}


def disturbed(noise: str, text: str) -> str:
    """A text with that noise."""
    return NOISES[noise](text, random.Random(f"{noise} {SEED} {text}"))


def variants(noise: str, query: str, choices: Sequence[str]) -> list[tuple[str, str, list[str]]]:
    """The places of the noise, each with the query and the choices that it makes of these."""
    noisy_query, noisy_choices = disturbed(noise, query), [disturbed(noise, choice) for choice in choices]
    return [
        ("context", noisy_query, list(choices)),
        ("endings", query, noisy_choices),
        ("both", noisy_query, noisy_choices),
    ]


def robustness(perturbed: float, unperturbed: float, chance: float = 0.25) -> float:
    r"""$100\,\frac{a' - c}{\max(a - c, 0)}$ with the accuracies a' and a with and without noise and that of chance, c.

    H-Net, appendix D.1. NaN where the model is no better than chance without noise, for which the paper's formula has no value.
    """
    return 100 * (perturbed - chance) / (unperturbed - chance) if unperturbed > chance else float("nan")
