"""Several processes over JAX's coordination service."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Protocol, final, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.config.errors import RunError, one_line
from experiments.config.sections import DistributedConfig
from experiments.processes.aborting import AbortMessage
from experiments.processes.launchers import Place
from experiments.processes.processes import AbstractProcesses
from experiments.processes.watch import Sign, Waiting, Watch

_SIGNS, _FAILED, _GONE, _VERDICT = "caesura/signs/", "caesura/failed/", "caesura/gone/", "caesura/verdict/"


@final
class Peers(AbstractProcesses):
    """Processes that have found each other.

    A thread of each gives signs of life and reads those of the others. Once one has died, hangs or has failed, `ended` is called
    with a sentence that names it, in that thread, and the process ends with exit code 1.
    """

    def __init__(
        self,
        place: Place,
        config: DistributedConfig,
        ended: Callable[[str], None],
        resumable: Callable[[], bool] = lambda: False,
    ):
        """Meets the others. `resumable` says whether there is something to go on from. Raises `RunError` where process 0 cannot
        be reached, or its port is taken."""
        self.index, self.count = place.index, place.processes
        self._place, self._config, self._ended, self._resumable = place, config, ended, resumable
        self._interval = max(min(1.0, config.timeout / 8), self.count / 200)
        self._ending = threading.Lock()
        self._done = threading.Event()
        self._verdict: str | None = None
        self._meetings = 0
        self._waiting: Waiting | None = None
        _require_reachable(place, config.wait)
        self._abort = AbortMessage(self._at_abort)
        self._met, self._captured = False, lambda: ""
        self._initialize()
        self._client = _client()
        self._answer: tuple[float, dict[str, dict[int, str]]] = (time.monotonic(), {})
        self._names = [f"process {index}" for index in range(self.count)]
        hosts = self.said(f"{socket.gethostname()}, process id {os.getpid()}")
        self._names = [f"process {index} ({host})" for index, host in enumerate(hosts)]
        self._met = True
        now = time.monotonic()
        self._watch = Watch(self.index, self._names, timeout=config.timeout, patience=config.patience, now=now)
        for target in (self._give_signs, self._judge):
            threading.Thread(target=target, daemon=True).start()
        devices = jax.devices()
        self._owners = [device.process_index for device in devices]
        mesh = Mesh(np.asarray(devices), ("all",))
        self._by_device = NamedSharding(mesh, PartitionSpec("all"))
        everywhere = NamedSharding(mesh, PartitionSpec())
        self._gather = jax.jit(lambda codes: codes, out_shardings=everywhere)
        self._add = jax.jit(lambda parts: jnp.sum(parts, axis=0, dtype=parts.dtype), out_shardings=everywhere)

    def _initialize(self) -> None:
        # It would take SIGTERM for itself; a run agrees with the others about when it stops (`codes`).
        jax.config.update("jax_enable_preemption_service", False)
        with self._abort.captured() as self._captured:
            jax.distributed.initialize(
                self._place.coordinator,
                self.count,
                self.index,
                local_device_ids=self._place.local_devices,
                cluster_detection_method="deactivate",
                coordinator_bind_address=listening_at(self._place.coordinator),
                initialization_timeout=round(self._config.wait),
                # Only where the watch below is at its end too.
                heartbeat_timeout_seconds=round(3 * self._config.timeout + 30),
            )

    def codes(self, own: int) -> Sequence[int]:
        with self._meeting():
            local = [jax.device_put(np.array([own], np.int32), device) for device in jax.local_devices()]
            given = jax.make_array_from_single_device_arrays((len(self._owners),), self._by_device, local)
            found = dict(zip(self._owners, np.asarray(self._gather(given)).tolist(), strict=True))
        return [found[index] for index in range(self.count)]

    def said(self, own: str) -> Sequence[str]:
        with self._meeting() as number:
            place, milliseconds = f"caesura/said/{number}/", round(1000 * self._config.patience)
            self._client.key_value_set(f"{place}{self.index}", own)
            self._client.wait_at_barrier(f"caesura-{number}", milliseconds)
            found = _by_index(self._client.key_value_dir_get(place))
        return [found[index] for index in range(self.count)]

    def once(self, made: Callable[[], bytes]) -> bytes:
        content = made() if self.leads else b""
        size = int(self.said(str(len(content)))[0])
        if not size:
            return b""
        # Of all devices one has the content, to which the others add nothing.
        own = [np.zeros((1, size), np.uint8)] * len(jax.local_devices())
        if self.leads:
            own[0] = np.frombuffer(content, np.uint8)[None]
        with self._meeting():
            local = [jax.device_put(part, device) for part, device in zip(own, jax.local_devices(), strict=True)]
            given = jax.make_array_from_single_device_arrays((len(self._owners), size), self._by_device, local)
            return np.asarray(self._add(given)).tobytes()

    @contextmanager
    def _meeting(self, *, files: bool = False) -> Iterator[int]:
        """The number of a meeting, which begins once all have come. There may be others within it."""
        self._meetings += 1
        before, self._waiting = self._waiting, Waiting(self._meetings, time.monotonic(), files)
        try:
            yield self._meetings
        finally:
            self._waiting = before and Waiting(self._meetings, time.monotonic(), before.files)

    def together(self, *, files: bool = False) -> AbstractContextManager[object]:
        return self._meeting(files=files)

    def leave(self) -> None:
        self.wait()
        self._done.set()
        jax.distributed.shutdown()
        self._abort.close()

    def fail(self, sentence: str) -> bool:
        if not self._ending.acquire(blocking=False):
            # The other thread ends the process.
            threading.Event().wait()
        self._verdict = said = one_line(sentence, 500)
        self._tell(_FAILED, said)
        if self.leads:
            return False
        with suppress(Exception):
            return self._client.blocking_key_value_get(f"{_FAILED}0", round(2000 * self._interval)) == said
        return False

    def await_verdict(self) -> None:
        self._done.wait(self._config.timeout + 4 * self._interval)

    def _give_signs(self) -> None:
        number = 0
        while not self._done.is_set():
            number += 1
            with suppress(Exception):  # of a service that is gone, which `_judge` notices
                self._client.key_value_set(
                    f"{_SIGNS}{self.index}", Sign(number, self._meetings).written(), allow_overwrite=True
                )
                found = {kind: _by_index(self._client.key_value_dir_get(kind)) for kind in (_SIGNS, _FAILED, _VERDICT)}
                self._answer = time.monotonic(), found
            self._done.wait(self._interval)

    def _judge(self) -> None:
        while not self._done.wait(self._interval):
            now, (answered, found) = time.monotonic(), self._answer
            verdicts = list(found.get(_VERDICT, {}).values())
            if verdicts:
                self._end(verdicts[0])
            if now - answered > self._config.timeout:
                self._end(f"{self._names[0]} has died or hangs: it did not answer for {self._config.timeout:g} s")
            signs = {index: Sign.read(text) for index, text in found.get(_SIGNS, {}).items()}
            # As of the answer: where process 0 is silent, nothing is heard of the others either.
            verdict = self._watch.verdict(answered, signs, found.get(_FAILED, {}), waiting=self._waiting)
            if verdict is not None:
                self._end(verdict)

    def _end(self, verdict: str) -> None:
        if not self._ending.acquire(blocking=False):
            return
        self._verdict = verdict
        if self.leads:
            self._tell(_VERDICT, verdict)
        self._ended(self._with_advice(verdict))
        self.part()
        os._exit(1)

    def _with_advice(self, sentence: str) -> str:
        return f"{sentence}; go on with --resume" if self._resumable() else sentence

    def _tell(self, kind: str, text: str) -> None:
        """Leave a text for the others, who read it within an interval."""
        sender = threading.Thread(
            target=lambda: self._client.key_value_set(f"{kind}{self.index}", one_line(text, 500), allow_overwrite=True),
            daemon=True,
        )
        sender.start()
        sender.join(2.0)

    def part(self) -> None:
        """The last thing before a process ends that has not left. Process 0 has the service from which the others learn why, so
        it waits for them, a few intervals at most."""
        if not self.leads:
            with suppress(Exception):
                self._tell(_GONE, "")
            return
        ends = time.monotonic() + 3 * self._interval + 1.0
        while time.monotonic() < ends:
            time.sleep(self._interval / 4)
            with suppress(Exception):
                if len(self._client.key_value_dir_get(_GONE)) >= self.count - 1:
                    return

    def _at_abort(self) -> str:
        """What is said where JAX aborts the process."""
        if self._verdict is not None:
            why = self._verdict
        elif self._met:
            why = self._with_advice(f"{self._names[0]} has died or cannot be reached any more")
        else:
            reason = re.search(r"absl::Status: (.*)", self._captured())
            why = (
                f"not all of the {self.count} processes came to {self._place.coordinator} within {self._config.wait:g} s "
                f"({one_line(reason[1], 200) if reason else 'JAX says no more'}): see that every --distributed.index from 0 to "
                f"{self.count - 1} was started, each once"
            )
        return f"{self.prefix}error: {why}"


@runtime_checkable
class Client(Protocol):
    """What is used of the client of JAX's coordination service: texts by their keys, and barriers."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None: ...

    def key_value_dir_get(self, key: str, /) -> list[tuple[str, str]]: ...

    def blocking_key_value_get(self, key: str, timeout_in_ms: int, /) -> str: ...

    def wait_at_barrier(self, barrier_id: str, timeout_in_ms: int, /) -> None: ...


def listening_at(coordinator: str) -> str | None:
    """Where process 0 listens for the others: at the address of `coordinator` (HOST:PORT) where no other machine can be meant;
    None for all of its addresses."""
    host = coordinator.rpartition(":")[0]
    if host == "localhost":
        return coordinator
    with suppress(ValueError):
        return coordinator if ipaddress.ip_address(host.strip("[]")).is_loopback else None
    return None


def _client() -> Client:
    client = distributed.global_state.client
    assert client is not None
    return client


def _by_index(entries: Sequence[tuple[str, str]]) -> dict[int, str]:
    """The values of keys that end with the index of a process."""
    return {int(key.rpartition("/")[2]): value for key, value in entries}


def _require_reachable(place: Place, seconds: float) -> None:
    """Raise `RunError` where process 0 cannot be reached within so many seconds, or, in process 0, where its port is taken."""
    host, _, port = place.coordinator.rpartition(":")
    flag = f"--distributed.coordinator {place.coordinator}"
    if place.index == 0:
        try:
            with socket.socket() as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                trial.bind(("", int(port)))
        except OSError as error:
            raise RunError(f"{flag}: process 0 cannot listen there ({error.strerror}); name another port") from None
        return
    ends, reason = time.monotonic() + seconds, ""
    while time.monotonic() < ends:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=max(0.1, ends - time.monotonic())).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
        time.sleep(0.1)
    raise RunError(
        f"{flag} was not reached within {seconds:g} s ({reason}): see that process 0 runs there, that its name is known here, "
        "and that the port is open"
    )
