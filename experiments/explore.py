"""A page on which models end tokens in a text while it is typed: `python -m experiments.explore RUN [MODEL …]`."""

from __future__ import annotations

import errno
import ipaddress
import os
import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from estimators.bounds import Count, Length, Within
from experiments.command import command_line
from experiments.config.errors import ConfigError, require, require_bounds
from experiments.exploring.held import HeldModel
from experiments.launch import STOPPED, program
from experiments.reporting.display import Display
from experiments.scoring.plans import context_of
from experiments.terminal import write_output

Port = Annotated[int, Within(0, 65535)]


@dataclass(frozen=True)
class ExploreConfig:
    """Show where models end tokens in a text while it is typed, on a page of this machine."""

    models: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Folders of runs, finished or not, or of exported models; .safetensors or .pt files; hub:owner/name; or published H-Nets."""
    host: str = "127.0.0.1"
    """Name or address to listen at. Elsewhere than on this machine alone, the page's address has a token in it."""
    port: Port = 8765
    """Port to listen at; 0: any that is free."""
    step: Count | None = None
    """Begin with the checkpoint of this step of each run; by default the finished model or else the newest checkpoint."""
    context: Length | None = None
    """Bytes that a model reads at once, moved by half of that; by default the length of the runs' sequences, 4096 without one."""
    plugin: tuple[str, ...] = ()
    """Modules with classes of your own that the models hold, as package.module."""

    def __post_init__(self):
        require(bool(self.models), "name at least one model")
        require(len(set(self.models)) == len(self.models), "each model is named once")
        require(bool(self.host), "--host is empty: leave it out for this machine alone, or name an address")
        require_bounds(self)


def explore(config: ExploreConfig, display: Display) -> None:
    """Open the models and serve the page until Ctrl-C. Raises `ConfigError` and `LoadError`."""
    require_server()
    with listening(config.host, config.port) as place:
        models = [HeldModel(where, config.step, config.plugin) for where in config.models]
        without = [one.where for one in models if not one.first.levels]
        require(
            len(without) < len(models),
            f"{without[0] if without else ''} has no level of tokens and so no boundaries: name a model that has, beside it or "
            "instead",
        )
        serve(config, models, place, display)


def require_server() -> None:
    """Raise `ConfigError` where the packages of the server are not installed."""
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"this needs the package {error.name}: pip install 'caesura-lm[explore]'") from None


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises `ConfigError` where that cannot be."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise ConfigError(f"--host {host} is no address of this machine: leave it out, or name another") from None
    found = socket.socket(family, kind, protocol)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen()
    except OSError as error:
        found.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"--port {port} is taken: name another, or 0 for any that is free") from None
        raise ConfigError(f"--host {host} --port {port}: {error.strerror}; name another") from None
    return found


def addresses(host: str, listening: socket.socket, token: str | None) -> tuple[str, str | None]:
    """The address of the page, and the one from other machines where it listens at all addresses, which is none itself."""
    name, port = listening.getsockname()[:2]
    everywhere = ipaddress.ip_address(name.partition("%")[0]).is_unspecified
    path = "" if token is None else f"{token}/"

    def at(place: str) -> str:
        return f"http://{f'[{place}]' if ':' in place else place}:{port}/{path}"

    if not everywhere:
        return at(host), None
    return at("::1" if ":" in name else "127.0.0.1"), at(socket.gethostname())


def serve(config: ExploreConfig, models: Sequence[HeldModel], listening: socket.socket, display: Display) -> None:
    """Serve the page at a socket that listens, and print its address."""
    import uvicorn

    from experiments.exploring.app import make_app
    from experiments.exploring.guard import LOCAL, is_local
    from experiments.exploring.worker import at_work

    local = is_local(config.host)
    token = None if local else secrets.token_urlsafe(16)
    app = make_app(
        models,
        config.context or context_of(one.first.config for one in models),
        # With a token, a page that only knows the way here gets nowhere, whatever the name.
        LOCAL | {config.host.lower()} if local else None,
        token,
    )
    server = uvicorn.Server(
        uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=1, ws="none"
        )
    )
    address, elsewhere = addresses(config.host, listening, token)
    write_output(f"{address}\n")
    display.note("open this address in a browser; Ctrl-C ends it")
    if elsewhere is not None:
        display.note(f"from other machines, under a name of this one, such as {elsewhere}")
    try:
        server.run(sockets=[listening])
    finally:
        if at_work():
            # A compilation cannot be interrupted, and the end of Python in the middle of one is a crash.
            display.note("stopped")
            os._exit(STOPPED)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code."""
    return command_line(ExploreConfig, explore, "experiments.explore", arguments)


if __name__ == "__main__":
    program(main)
