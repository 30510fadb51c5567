"""What the processes of a run do together, and how they learn of each other's end."""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import final

from experiments.config.errors import ConfigError

RUNNING = 0
"""The code of a process that goes on."""


class AbstractProcesses(abc.ABC):
    """The processes that train one model together, of which this is the one at `index`.

    What one of them calls, all have to call, in the same order.
    """

    index: int
    count: int

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes files, reports and the terminal."""
        return self.index == 0

    @property
    def prefix(self) -> str:
        """What errors of this process begin with."""
        return f"process {self.index}: " if self.count > 1 else ""

    @abc.abstractmethod
    def codes(self, own: int) -> Sequence[int]:
        """The code of every process, by its index."""

    @abc.abstractmethod
    def said(self, own: str) -> Sequence[str]:
        """What every process says, by its index."""

    @abc.abstractmethod
    def once(self, made: Callable[[], bytes]) -> bytes:
        """What `made` returns in process 0, which alone calls it."""

    @abc.abstractmethod
    def together(self, *, files: bool = False) -> AbstractContextManager[object]:
        """A block in which this one waits for the others, such as one that computes or writes what all have parts of. One that
        does not come to it is found to hang, and so is the block, once all are in it, but for those of `files`, which may be
        slow."""

    @abc.abstractmethod
    def leave(self) -> None:
        """Return once all are done."""

    @abc.abstractmethod
    def fail(self, sentence: str) -> bool:
        """Tell the others why this one ends. Whether process 0 says the same."""

    @abc.abstractmethod
    def await_verdict(self) -> None:
        """After a failure that the end of another process may have caused: does not return where it has."""

    def wait(self) -> None:
        """Return once all have come here."""
        self.said("")

    def require_same(self, what: str, content: bytes) -> None:
        """Raise `ConfigError` that names a process whose `content` is another than that of process 0."""
        digests = self.said(hashlib.sha256(content).hexdigest())
        others = [str(index) for index, digest in enumerate(digests) if digest != digests[0]]
        if others:
            raise ConfigError(
                f"process {', '.join(others)} has other {what} than process 0: all need the same command, data and versions"
            )


@final
class Alone(AbstractProcesses):
    """One process, which has nobody to wait for."""

    index = 0
    count = 1

    def codes(self, own: int) -> Sequence[int]:
        return [own]

    def said(self, own: str) -> Sequence[str]:
        return [own]

    def once(self, made: Callable[[], bytes]) -> bytes:
        return made()

    def together(self, *, files: bool = False) -> AbstractContextManager[object]:
        return nullcontext()

    def leave(self) -> None:
        pass

    def fail(self, sentence: str) -> bool:
        return False

    def await_verdict(self) -> None:
        pass


ALONE = Alone()
"""The usual case."""
