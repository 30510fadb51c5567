"""Who may ask: only pages that this server sent, under names that are this machine's."""

from __future__ import annotations

import ipaddress
import secrets
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADERS = {
    # Nothing is fetched from elsewhere, and nothing runs that is not a file of ours.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}

LOCAL = frozenset({"127.0.0.1", "localhost", "::1"})


def is_local(host: str) -> bool:
    """Whether a server there can be reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """Lets a request through to `app` if it names a host of `hosts` (None: any), begins with the token, if there is one, and,
    where it asks for something to be done, comes from a page of this server.

    A foreign page cannot read what is here even if its name is made to lead here (DNS rebinding), since the browser says under
    which name it asks; nor have anything done, since browsers ask before they send JSON elsewhere.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None, token: str | None):
        self._app, self._hosts = app, hosts
        self._prefix = "" if token is None else f"/{token}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        if (refusal := self._refusal(scope)) is not None:
            await PlainTextResponse(refusal, status_code=403)(scope, receive, with_headers)
            return
        if self._prefix and scope["path"] == self._prefix and scope["method"] in ("GET", "HEAD"):
            # The addresses in the page are relative to a folder.
            await RedirectResponse(f"{self._prefix}/")(scope, receive, with_headers)
            return
        # The rest sees paths without the token.
        inner = {**scope, "path": scope["path"][len(self._prefix) :] or "/"}
        await self._app(inner, receive, with_headers)

    def _refusal(self, scope: Scope) -> str | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self._hosts is not None and _name_of(host) not in self._hosts:
            return "this server does not answer under this name: use the address that it printed"
        if self._prefix and not _begins_with(scope["path"], self._prefix):
            return "the address lacks its token: use the whole address that the server printed"
        if scope["method"] in ("GET", "HEAD"):
            return None
        if headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return "only JSON is taken here"
        origin = headers.get("origin")
        if origin is not None and _place_of(origin) != host:
            return "this was asked by a page of somebody else"
        return None


def _begins_with(path: str, prefix: str) -> bool:
    given = path[: len(prefix)].encode("utf-8", "surrogatepass")
    # In the same time whatever it is, so that nobody finds the token by measuring. A longer word is another one.
    same = secrets.compare_digest(given, prefix.encode())
    return same and path[len(prefix) : len(prefix) + 1] in ("", "/")


def _place_of(origin: str) -> str | None:
    """The name and port in an Origin header; None where it is no address."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def _name_of(host: str) -> str:
    """The name in a Host header, without its port, and an IPv6 address without its brackets."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""
