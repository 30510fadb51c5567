"""A command that may be one of several processes: how it joins them, and how it ends with them."""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jax.errors import JaxRuntimeError

from experiments.config.errors import failure
from experiments.config.sections import DistributedConfig
from experiments.launch import drop_unwritten, to_nowhere
from experiments.processes.launchers import place_of
from experiments.processes.processes import ALONE, AbstractProcesses
from experiments.processes.stopping import AgreedStop
from experiments.reporting.display import Display

if TYPE_CHECKING:
    from experiments.processes.peers import Peers


@dataclass
class End:
    """How a command ends: its exit code."""

    code: int = 1


class Membership:
    """The part of a command in a group of processes, whose notes and errors go to `display`."""

    def __init__(self, display: Display):
        self._display = display
        self._peers: Peers | None = None
        self._left = False

    @contextmanager
    def joined(
        self,
        config: DistributedConfig,
        *,
        before: Callable[[int], None] = lambda count: None,
        resumable: Callable[[], bool] = lambda: False,
    ) -> Iterator[AbstractProcesses]:
        """The processes that this one belongs to: itself alone, or those that it has met. They end together: where the block
        fails in one, the others are told why. `before` is called with their number before they meet, which uses JAX;
        `resumable` says whether there is something to go on from.

        Raises `ConfigError` and `RunError` where they cannot meet.
        """
        place = place_of(config, os.environ)
        before(1 if place is None else place.processes)
        if place is None:
            yield ALONE
            return
        # It uses parts of JAX that a version may move, which is no concern of a process that is alone.
        from experiments.processes.peers import Peers

        display = self._display
        display.prefix = f"process {place.index}: "
        display.quiet = display.quiet or place.index > 0
        # Gloo's greetings; a run writes nothing there.
        to_nowhere(1)
        self._peers = Peers(place, config, self._tell_verdict, resumable)
        try:
            yield self._peers
        except AgreedStop:
            self._peers.leave()
            self._left = True
            raise
        except BaseException as error:
            if _may_come_from_another(error):
                self._peers.await_verdict()
            display.muted = self._peers.fail(failure(error) if isinstance(error, Exception) else "it was stopped")
            raise
        self._peers.leave()
        self._left = True

    def _tell_verdict(self, verdict: str) -> None:
        self._display.stop()
        self._display.error(verdict)
        self._let_go()

    @contextmanager
    def ending(self) -> Iterator[End]:
        """Ends the process where it has not left the others as it should: what waits for them at its exit would wait for ever."""
        end = End()
        try:
            yield end
        except Exception:
            if self._peers is None:
                raise
            for line in traceback.format_exc().splitlines():
                sys.stderr.write(f"{self._peers.prefix}{line}\n")
        if self._peers is not None and not self._left:
            self._let_go()
            self._peers.part()
            os._exit(end.code)

    def _let_go(self) -> None:
        for child in multiprocessing.active_children():
            child.kill()
        for stream in (sys.stdout, sys.stderr):
            drop_unwritten(stream)


def _may_come_from_another(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, is that of a device that works together with those of other processes."""
    while error is not None:
        out_of_memory = str(error).startswith("RESOURCE_EXHAUSTED")
        if (isinstance(error, JaxRuntimeError) or "Gloo" in str(error)) and not out_of_memory:
            return True
        error = error.__cause__ or error.__context__
    return False
