"""One thread for each model: it does one job after the other, and none that nobody waits for any more."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from queue import SimpleQueue

from experiments.config.errors import ConfigError, failure
from unet.files.saving import LoadError

Message = Mapping[str, object]

MOST_WAITING = 64
"""Jobs of a model that may wait."""


PREFIX = "explore: "
"""What the names of the threads begin with."""


def at_work() -> bool:
    """Whether a worker that was stopped is not done, since something cannot be interrupted."""
    return any(thread.name.startswith(PREFIX) for thread in threading.enumerate())


class Superseded(Exception):
    """Raised inside a job that nobody waits for any more."""


@dataclass(frozen=True)
class Job:
    """Something to be done for the `owner`: what asks, and for what. `work` does it, and sends what it finds with `send`; after
    its last message comes None."""

    owner: tuple[str, str]
    work: Callable[[Job], None]
    send: Callable[[Message | None], None]
    cancelled: threading.Event = field(default_factory=threading.Event)

    def check(self) -> None:
        """Raise `Superseded` where nobody waits for this job any more."""
        if self.cancelled.is_set():
            raise Superseded


class Worker:
    """A thread that does jobs in the order in which they come. A newer job of the same owner cancels the older one."""

    def __init__(self, name: str):
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._latest: dict[tuple[str, str], Job] = {}
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=PREFIX + name, daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Have a job done; where too many wait already it says so and ends."""
        with self._lock:
            if (older := self._latest.pop(job.owner, None)) is not None:
                older.cancelled.set()
            if len(self._latest) >= MOST_WAITING:
                job.send({"state": "error", "error": f"{MOST_WAITING} others wait for this model: try again later"})
                job.send(None)
                return
            self._latest[job.owner] = job
        self._jobs.put(job)

    def stop(self) -> None:
        """Cancel everything."""
        with self._lock:
            for job in self._latest.values():
                job.cancelled.set()
        self._jobs.put(None)

    def join(self, seconds: float) -> None:
        """Wait so long, after `stop`, for what cannot be interrupted, such as a compilation."""
        self._thread.join(seconds)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job.check()
                job.work(job)
            except Superseded:
                job.send({"state": "superseded"})
            except (ConfigError, LoadError, ValueError) as error:
                job.send({"state": "error", "error": str(error)})
            except Exception as error:
                # The page goes on; whoever started it sees the whole story.
                traceback.print_exception(error)
                job.send({"state": "error", "error": f"this failed ({type(error).__name__}: {failure(error)})"})
            finally:
                with self._lock:
                    if self._latest.get(job.owner) is job:
                        del self._latest[job.owner]
                job.send(None)
