"""Requests to the Hugging Face hub: repeated after passing failures, and ended within a stated time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future
from typing import TypeVar

import httpx2
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

TRIES = 6
"""Maximum number of attempts at a request to the hub."""

PATIENCE = 600.0
"""Seconds without a new byte after which a request is given up, attempts and pauses together. A hub that limits the rate may
ask its client to wait for any time."""

Result = TypeVar("Result")

_ODD = (KeyError, TypeError, AttributeError, IndexError, RecursionError, ValueError, httpx2.InvalidURL)
"""What the client raises for answers that are not what they should be."""


class RequestError(Exception):
    """Why a request to the hub failed for good."""


def request(
    action: Callable[[], Result],
    wait: Callable[[float], None],
    *,
    patience: float = PATIENCE,
    arrived: Callable[[], int] = lambda: 0,
) -> Result:
    """The result of `action`, with exponential backoff after transient failures; `wait` sleeps.

    `arrived`: the number of bytes so far. Raises `RequestError` after `TRIES` attempts, after a permanent failure, and when
    nothing has arrived for `patience` seconds. The action then goes on in its thread until it ends by itself.
    """
    future: Future[Result] = Future()
    given_up = threading.Event()

    def run() -> None:
        try:
            future.set_result(_repeated(action, wait, given_up))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    size, since = arrived(), time.monotonic()
    while not futures.wait([future], timeout=min(1.0, patience)).done:
        if (now := arrived()) != size:
            size, since = now, time.monotonic()
        elif time.monotonic() - since >= patience:
            given_up.set()
            raise RequestError(
                f"nothing has arrived for {patience / 60:.3g} minutes; it may limit your rate, which HF_TOKEN raises"
            )
    return future.result()


def _repeated(action: Callable[[], Result], wait: Callable[[float], None], given_up: threading.Event) -> Result:
    for attempt in range(TRIES):
        try:
            return action()
        except (OSError, httpx2.HTTPError, RuntimeError, *_ODD) as error:
            reason = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
            if attempt + 1 == TRIES or given_up.is_set() or not _is_transient(reason):
                raise RequestError(_explain(reason)) from error
            wait(2.0**attempt)
    raise AssertionError("the last attempt returns or raises")


def _is_transient(error: BaseException) -> bool:
    """Whether a failure may be transient: a network or server error, but not a client error or an error of the disk."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500 or error.response.status_code in (408, 429)
    if isinstance(error, (OfflineModeIsEnabled, *_ODD)):
        return False
    # The client raises an OSError without errno for a download of the wrong size. The operating system sets errno.
    transient = httpx2.TransportError | ConnectionError | TimeoutError | RuntimeError
    return isinstance(error, transient) or (isinstance(error, OSError) and error.errno is None)


def _explain(error: BaseException) -> str:
    if isinstance(error, GatedRepoError):
        return "access is granted only to users who asked for it: accept its terms on the hub and set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository, or it is private and HF_TOKEN is not set"
    if isinstance(error, RevisionNotFoundError):
        return "it has no such revision"
    if isinstance(error, EntryNotFoundError):
        return "it has no such folder or file"
    if isinstance(error, HfHubHTTPError):
        return f"the hub answered {error.response.status_code}"
    message = str(error).splitlines()[0] if str(error) else "no message"
    if isinstance(error, _ODD) and not isinstance(error, HFValidationError | OSError):
        return f"the hub's answer is not what it should be ({type(error).__name__}: {message})"
    return f"{type(error).__name__}: {message}"
