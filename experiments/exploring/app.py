"""The server of the page: it answers for a few models, and streams what takes a while."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TypeVar

from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from experiments.config.errors import ConfigError
from experiments.exploring.asking import Asking
from experiments.exploring.documents import MOST_BODY, MOST_BYTES, Request, json_text, model_list
from experiments.exploring.exported import export_of
from experiments.exploring.guard import Guard
from experiments.exploring.held import HeldModel
from experiments.exploring.worker import Job, Message, Worker
from unet import TextBoundaries
from unet.files.saving import LoadError
from unet.shading.html import STYLE

PAGE = Path(__file__).parent / "page"
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}

SECONDS = 3.0
"""That the end waits for what cannot be interrupted."""

Work = Callable[..., None]
"""A method of `Asking`."""
Made = TypeVar("Made")


class TooLarge(Exception):
    """A request with more in it than is taken."""


def make_app(models: Sequence[HeldModel], context: int, hosts: frozenset[str] | None, token: str | None) -> ASGIApp:
    """The application. `context`: bytes that a model reads at once. `hosts`, `token`: see `Guard`."""
    server = _Server(models, context)
    files = {path.name: path for path in PAGE.iterdir() if path.suffix in KINDS}
    routes = [
        Route("/", lambda request: _file(files["index.html"])),
        Route("/shades.css", lambda request: Response(STYLE, media_type="text/css")),
        *(Route(f"/{name}", _sender(path)) for name, path in files.items() if name != "index.html"),
        Route("/api/models", server.list),
        Route("/api/boundaries", server.boundaries, methods=["POST"]),
        Route("/api/continue", server.continuation, methods=["POST"]),
        Route("/api/export", server.export, methods=["POST"]),
    ]

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        server.stop()

    refusals = dict.fromkeys((ConfigError, LoadError, ValueError, TooLarge), _refusal)
    return Guard(Starlette(routes=routes, lifespan=lifespan, exception_handlers=refusals), hosts, token)


def _file(path: Path) -> Response:
    return Response(path.read_bytes(), media_type=KINDS[path.suffix])


def _sender(path: Path) -> Callable[[HttpRequest], Response]:
    return lambda request: _file(path)


class _Server:
    """The handlers, and a thread for each model."""

    def __init__(self, models: Sequence[HeldModel], context: int):
        self._models, self._context = models, context
        self._workers = [Worker(f"model {number}") for number in range(len(models))]
        self._asking = [Asking(held, context) for held in models]

    def stop(self) -> None:
        """Give up everything that is being done."""
        for worker in self._workers:
            worker.stop()
        for worker in self._workers:
            worker.join(SECONDS / len(self._workers))

    async def list(self, request: HttpRequest) -> Response:
        """The models that there are."""
        return JSONResponse(model_list(self._models, self._context))

    async def boundaries(self, request: HttpRequest) -> Response:
        """What each model makes of the text: a line of JSON whenever there is something new of one."""
        return await self._streamed(request, "boundaries", Asking.boundaries)

    async def continuation(self, request: HttpRequest) -> Response:
        """How each model goes on, in the same way."""
        return await self._streamed(request, "continue", Asking.continuation)

    async def _streamed(self, request: HttpRequest, kind: str, work: Work) -> Response:
        asked = Request.of(await _body(request), len(self._models))

        return StreamingResponse(self._messages(asked, kind, work, _line), media_type="application/x-ndjson")

    async def export(self, request: HttpRequest) -> Response:
        """A file that shows what the models make of the text."""
        asked = Request.of(await _body(request), len(self._models))
        export = export_of(asked)
        found: dict[int, tuple[str, TextBoundaries]] = {}
        async for message in self._messages(asked, "export", Asking.found, dict[str, object]):
            if message["state"] in ("error", "superseded"):
                raise ConfigError(str(message.get("error", "this was asked once more meanwhile")))
            one = message.get("found")
            if isinstance(one, TextBoundaries):
                found[int(str(message["model"]))] = str(message["name"]), one
        shown = [found[number] for number, _ in asked.models]
        return Response(await asyncio.to_thread(export.write, shown), media_type=export.media)

    async def _messages(
        self, asked: Request, kind: str, work: Work, made: Callable[[Message], Made]
    ) -> AsyncIterator[Made]:
        """What the models asked say, as it comes, each made into something in the thread of its model. Where nobody listens any
        more they give up."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Made | None]()

        def send(number: int, message: Message | None) -> None:
            tagged = None if message is None else made({"model": number, **message})
            # The loop may be gone already.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(queue.put_nowait, tagged)

        jobs: list[Job] = []
        try:
            for number, step in asked.models:
                own = functools.partial(work, self._asking[number], request=asked, step=step)
                jobs.append(Job((asked.client, kind), own, functools.partial(send, number)))
                self._workers[number].submit(jobs[-1])
            unfinished = len(jobs)
            while unfinished:
                message = await queue.get()
                if message is None:
                    unfinished -= 1
                else:
                    yield message
        finally:
            for job in jobs:
                job.cancelled.set()


def _line(message: Message) -> bytes:
    return json_text(message).encode() + b"\n"


async def _body(request: HttpRequest) -> bytes:
    """The body of a request. Raises `TooLarge`."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MOST_BODY:
            raise TooLarge(
                f"a request may have {MOST_BODY:,} bytes: this page takes up to {MOST_BYTES:,} bytes of text"
            )
    return bytes(body)


async def _refusal(request: HttpRequest, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, status_code=413 if isinstance(error, TooLarge) else 400)
