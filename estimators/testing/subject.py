"""What is checked: an estimator inside a small model, on a few rows of text; and how a difference is put into words."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, PyTree, Shaped

from estimators.base import BOS, AbstractChunker, AbstractEstimator, Layout, trainable
from estimators.constraints import constrained
from estimators.lookup import Part, find, settings_of
from estimators.registry import ESTIMATORS, configuration, sections_of
from estimators.routers.constrained import AbstractConstraint
from estimators.settings import Context, EstimatorConfig
from unet.chunkers.named import CHUNKERS, POOLS, ChunkerNames
from unet.config import UNetConfig
from unet.likelihood import plain_layout
from unet.model import UNet

Given = ParamSpec("Given")
Result = TypeVar("Result")
Tree = TypeVar("Tree", bound=PyTree)

LENGTH = 24
"""Bytes of each row."""
SECOND = 11
"""Where the second document of row 1 begins."""
ROWS = 3
SAMPLE = "So, on 3 May, Ann said: über 漢字 is a naïve idea!\nI am not; he is (at 10 to 1) the one in it. "


class ContractError(AssertionError):
    """A clause of the contract that does not hold: what the contract is, and what was seen."""


@dataclass(frozen=True)
class Setup:
    """How something is tried.

    `dim`: the width of hidden states; None is the width that an estimator's router was built for, or else 32. `chunker` and
    `rate` go to what is still to be built. `text` is what rows are cut from: give one in which a rule finds boundaries. `samples`
    is the number of draws for each sequence, if an objective compares several. `constraints` hold on the estimator's boundaries.
    `seed` is that of everything random.
    """

    dim: int | None = None
    chunker: AbstractChunker | None = None
    rate: float = 0.3
    text: str = SAMPLE
    samples: int = 1
    constraints: tuple[AbstractConstraint, ...] = ()
    seed: int = 0

    def key(self, number: int) -> PRNGKeyArray:
        """One of several keys."""
        return jax.random.fold_in(jax.random.key(self.seed), number)

    @property
    def keys(self) -> Key[Array, " batch"]:
        """One key for each row."""
        return jax.random.split(self.key(0), ROWS)


DEFAULT = Setup()


Subject = AbstractEstimator | EstimatorConfig | type | str | Callable[[int, PRNGKeyArray], AbstractEstimator] | UNet
"""What can be checked: an estimator; its configuration; a class that `--estimator` takes, or its name; a function of the width
and a key that returns an estimator; or a whole model, whose outermost estimator is checked."""


def built(subject: Subject, setup: Setup) -> AbstractEstimator:
    """The estimator of a subject. Raises `TypeError` for anything else, `PartError` for a class or name that cannot be used."""
    if isinstance(subject, AbstractEstimator):
        return subject
    dim, key = setup.dim or 32, setup.key(1)
    if isinstance(subject, str | type):
        subject = _configured(subject)
    if isinstance(subject, EstimatorConfig):
        chunker = setup.chunker or _own_chunker(subject, dim, key)
        made = subject.build(Context(dim, setup.rate, chunker, key))
    else:
        made = subject(dim, key) if callable(subject) and not isinstance(subject, UNet) else subject
    if not isinstance(made, AbstractEstimator):
        raise TypeError(f"what is checked must be or build an AbstractEstimator; got a {type(made).__name__}")
    return made


def _configured(subject: str | type) -> EstimatorConfig:
    """A class or a name, with the default of every setting."""
    part = find(ESTIMATORS, subject) if isinstance(subject, str) else Part(ESTIMATORS, subject.__name__, subject)
    if not issubclass(part.cls, ESTIMATORS.bases):
        raise TypeError(f"what is checked must be an {ESTIMATORS.what}; got {part.cls.__name__}")
    defaults = {one.name: one.default for one in settings_of(part)}
    return configuration(part, defaults, {name: kind() for name, kind in sections_of(part).items()})


def _own_chunker(config: EstimatorConfig, dim: int, key: PRNGKeyArray) -> AbstractChunker:
    """The chunker that an estimator declares."""
    names = ChunkerNames(find(CHUNKERS, config.default_chunker), find(POOLS, config.default_pool), {})
    return names.build(dim, key, None, trains_router=config.learns_through is not None)


def model_of(subject: Subject, setup: Setup) -> UNet:
    """A small model with the estimator, one block in each stack; a model is returned as it is.

    Parameters that are zero are moved a little: what they multiply would have no effect, and its faults would not show. Raises
    `TypeError` for what is no estimator, and for a model without a token level.
    """
    if isinstance(subject, UNet):
        if not subject.stage.estimators:
            raise TypeError("this model has no token level, so that there is no estimator to check")
        return subject
    estimator = constrained(built(subject, setup), setup.constraints)
    dim = setup.dim or estimator.router.dim or 32
    shape = UNetConfig(dim, 1 if dim % 4 else 2, 1, 1, 1, window=4)
    return UNet(shape, moved(estimator, setup.key(2)), key=setup.key(3))


def moved(tree: Tree, key: PRNGKeyArray) -> Tree:
    """The tree with every trainable array that is zero everywhere drawn from a normal of standard deviation 0.3."""
    trains, fixed = eqx.partition(tree, trainable(tree))
    leaves, structure = jax.tree.flatten(trains)
    keys = jax.random.split(key, max(1, len(leaves)))
    lively = [
        leaf if np.any(np.asarray(leaf)) else 0.3 * jax.random.normal(one, leaf.shape, leaf.dtype)
        for leaf, one in zip(leaves, keys, strict=False)
    ]
    return eqx.combine(jax.tree.unflatten(structure, lively), fixed)


class Text(eqx.Module):
    """Three rows: one document, two documents (the second from `SECOND` on), one document and padding."""

    bytes: Int[Array, "batch length"]
    segments: Int[Array, "batch length"]
    mask: Bool[Array, "batch length"]

    @classmethod
    def cut(cls, setup: Setup, number: int = 0) -> Text:
        """Rows cut from the text of the setup. Raises `ValueError` for less than a row of it."""
        found, dice = np.frombuffer(setup.text.encode(), np.uint8), np.random.default_rng([setup.seed, number])
        if len(found) < LENGTH:
            raise ValueError(f"a text to cut rows from must have at least {LENGTH} bytes; got {len(found)}")
        begin = dice.choice(len(found) - LENGTH + 1, ROWS, replace=len(found) < LENGTH + ROWS)
        rows = np.stack([found[first : first + LENGTH] for first in begin]).astype(np.int32)
        rows[:, 0], rows[1, SECOND] = BOS, BOS
        segments, mask = np.zeros((ROWS, LENGTH), np.int32), np.ones((ROWS, LENGTH), bool)
        segments[1, SECOND:], mask[2, 15:] = 1, False
        return cls(jnp.asarray(rows), jnp.asarray(segments), jnp.asarray(mask))

    @property
    def plain(self) -> Text:
        """The same rows as one document each, without padding."""
        bytes = self.bytes.at[1, SECOND].set(self.bytes[1, SECOND - 1])
        return Text(bytes, jnp.zeros_like(self.segments), jnp.ones_like(self.mask))

    @property
    def second_alone(self) -> Text:
        """With the second document of row 1 alone in row 0."""
        size = LENGTH - SECOND
        bytes = self.bytes.at[0, :size].set(self.bytes[1, SECOND:])
        return Text(bytes, self.segments, self.mask.at[0, size:].set(False))

    @property
    def some_actions(self) -> Bool[Array, "batch length"]:
        """Actions to give: every fourth position, and what is forced."""
        return ((jnp.arange(LENGTH) % 4 == 0) | self.layout.starts) & self.mask

    @property
    def layout(self) -> Layout:
        return plain_layout(self.bytes, self.segments, self.mask)


def program(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """The function compiled, once for all checks; float32 products are float32 products on any device."""

    @functools.wraps(function)
    def run(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        with jax.default_matmul_precision("highest"), jax.numpy_rank_promotion("allow"):
            return function(*args, **kwargs)

    return eqx.filter_jit(run)


def require(holds: bool | Array | np.bool_, contract: str, seen: str = "") -> None:
    """Raises `ContractError` unless it holds."""
    if not bool(holds):
        raise ContractError(f"{contract} {seen}".strip())


def alike(
    contract: str,
    seen: str,
    expected: Shaped[Array | np.ndarray, "*shape"],
    got: Shaped[Array | np.ndarray, "*shape"],
    where: Shaped[Array | np.ndarray, "*leading"] | None = None,
    *,
    atol: float = 1e-5,
) -> None:
    """Raises `ContractError` where two arrays, rows x positions, differ; `seen` says what `got` is."""
    one, other = np.asarray(expected, np.float64), np.asarray(got, np.float64)
    differ = ~np.isclose(one, other, rtol=1e-4, atol=atol, equal_nan=True)
    if where is not None:
        differ = differ & np.asarray(where).reshape(*np.shape(where), *[1] * (differ.ndim - np.ndim(where)))
    if differ.any():
        place = tuple(int(index) for index in np.argwhere(differ)[0])
        raise ContractError(f"{contract} {seen} {at(place)}: {one[place]:.6g} against {other[place]:.6g}.")


def carries(gradient: Float[np.ndarray, "*shape"]) -> Bool[np.ndarray, "*shape"]:
    """Where a gradient is more than rounding: above a millionth of its largest value. What cancels does so up to rounding."""
    return np.abs(gradient) > 1e-6 * np.max(np.abs(gradient), initial=0.0)


def at(place: tuple[int, ...]) -> str:
    """A place among rows and positions, in words."""
    return f"in row {place[0]}" + (f" at position {place[1]}" if len(place) > 1 else "")


def first(wrong: Shaped[Array | np.ndarray, "*shape"]) -> str:
    """The first place at which an array is true, in words."""
    places = np.argwhere(np.asarray(wrong))
    return at(tuple(int(index) for index in places[0])) if len(places) else "nowhere"
