"""Configurations: what an estimator is built from, and what it declares about itself.

A configuration is a frozen dataclass in one file. Its plain fields are settings; each is a command-line flag with the string
below it as help text. A field that is a dataclass itself is a section that several estimators share. Class attributes declare
what the estimator needs. `build` composes the estimator; `prepare` finds out from text what must be known before training.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, is_dataclass
from typing import ClassVar, Literal, Protocol, runtime_checkable

from jaxtyping import PRNGKeyArray, PyTree

from estimators.base import AbstractChunker, AbstractEstimator, Layout
from estimators.lookup import Kind, construct, find, settings_of
from estimators.routers.entropy import ByteModel

Learns = Literal["probs", "relaxed"]
"""The field of `Boundaries` through which a chunker can pass a gradient to the router."""


@dataclass(frozen=True)
class Context:
    """What an estimator is built from.

    `dim` is the width of the hidden states it sees, `rate` its target rate, `prepared` what its `prepare` returned. `sections`
    holds the settings of parts that it names, such as variance reductions, by section.
    """

    dim: int
    rate: float
    chunker: AbstractChunker
    key: PRNGKeyArray
    prepared: PyTree = None
    sections: Mapping[str, object] = field(default_factory=dict)

    def part(self, kind: Kind, name: str, **given: object) -> object:
        """The part of that name, built with its settings, and with what is `given` beside what constructors may always ask for.
        Raises `PartError` if there is none."""
        part = find(kind, name)
        settings = self.sections.get(part.section)
        names = [] if settings is None else [setting.name for setting in settings_of(part)]
        return construct(part, {name: getattr(settings, name) for name in names}, {**self.given, **given})

    @property
    def given(self) -> dict[str, object]:
        """What constructors may ask for."""
        return {
            "dim": self.dim,
            "target_rate": self.rate,
            "chunker": self.chunker,
            "key": self.key,
        }


@runtime_checkable
class TextBatches(Protocol):
    """Batches of training text; `epochs` is how often the text has been read so far."""

    @property
    def epochs(self) -> float: ...

    def __iter__(self) -> Iterator[Layout]: ...

    def __next__(self) -> Layout: ...


@runtime_checkable
class TrainingText(Protocol):
    """What a configuration may ask for while it prepares: the text that a run trains on, and other models."""

    @property
    def rate(self) -> float:
        """The target rate of the outermost level."""
        ...

    def count(self, max_bytes: int) -> int:
        """The number of batches in `max_bytes` of the run's text, at least one."""
        ...

    def batches(self) -> AbstractContextManager[TextBatches]:
        """The batches of the run in order, without end."""
        ...

    def byte_model(self, where: str) -> ByteModel:
        """The model of a finished run, which must not learn its tokens; any other is refused with a sentence."""
        ...


@dataclass(frozen=True)
class Prerequisite:
    """A run that must be finished first: its `estimator` and the `settings` of its sections; `setting` names its folder."""

    setting: str
    estimator: str
    settings: Mapping[str, Mapping[str, object]]


@runtime_checkable
class Checked(Protocol):
    """A section that not every run suits."""

    def check(self, rate: float, sequences: int) -> None:
        """Raise `ValueError` for a target rate or a number of sequences in a batch that it cannot work with."""
        ...


@dataclass(frozen=True)
class EstimatorConfig(ABC):
    """The settings of an estimator and how it is composed. Impossible values raise `ValueError` in `__post_init__`."""

    default_chunker: ClassVar[str] = "distribute"
    """The chunker it was published with; `--chunker` names another."""
    default_pool: ClassVar[str] = "last"
    """How a token is made of its positions; `--pool` names another."""
    learns_through: ClassVar[Learns | None] = None
    """Set if the router learns through the chunker. A chunker that passes no gradient to this field is refused."""
    outermost_only: ClassVar[bool] = False
    """Whether it reads bytes, so that it cannot draw boundaries inside a hierarchy."""
    reads_bytes: ClassVar[bool] = False
    """Whether it looks at the byte of each position, so that it cannot chunk the tokens of a tokenizer, as none can that is
    `outermost_only`."""
    prerequisite: ClassVar[Prerequisite | None] = None
    """A run whose model it reads, if any."""

    @property
    def sections(self) -> list[object]:
        """The sections that it shares with others."""
        values = (getattr(self, one.name) for one in fields(self))
        return [value for value in values if is_dataclass(value)]

    @property
    def samples(self) -> int:
        """Samples of boundaries for each training sequence: the most that a section asks for."""
        return max((getattr(section, "samples", 1) for section in self.sections), default=1)

    @property
    def makes_tokens(self) -> bool:
        """False for a model without a token level."""
        return True

    @property
    def needs_text(self) -> bool:
        """Whether it cannot be built before `prepare` has read training text."""
        return type(self).prepare is not EstimatorConfig.prepare

    def check(self, rate: float, sequences: int) -> None:
        """Raise `ValueError` if it cannot be trained at this target rate, or on batches of so many sequences: what the sections
        say."""
        for section in self.sections:
            if isinstance(section, Checked):
                section.check(rate, sequences)

    def prepare(self, text: TrainingText) -> PyTree:
        """What must be known before training: an `equinox.Module`, saved with the run. Raises `ValueError` where impossible."""
        return None

    def notes(self, prepared: PyTree, rate: float) -> list[str]:
        """What a user should know of `prepared`, a sentence each."""
        return []

    def figures(self, prepared: PyTree) -> Mapping[str, float | int]:
        """What the summary of a run should say of `prepared`, by name."""
        return {}

    @abstractmethod
    def build(self, context: Context) -> AbstractEstimator:
        """The estimator."""
