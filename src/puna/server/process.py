"""The server's process: a socket, uvicorn on it, and an end that loses no answer.

What it is: `listen` (a bound socket), `serve` (the application on it until a signal comes).
What it is not: several processes: one engine process serves all, and more of them would each load every model.
What is surprising: on SIGTERM or SIGINT nothing new is taken in, and answers under way go on for `drain_seconds`; then
the models are closed, so that each stream ends with its protocol's error event instead of a cut line. A second signal
ends the process at once.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import uvicorn
from fastapi import FastAPI

from puna.errors import UsageError
from puna.server import limits as request_limits
from puna.server import wire
from puna.types import Models

KEEP_ALIVE_SECONDS = 75
"""How long an idle connection is kept: longer than proxies keep theirs (60 s), which would else use a closed one."""

BACKLOG = 512
"""Connections that wait to be taken."""

LAST_WORDS = 5.0
"""Seconds that answers have to end once the models are closed; what is left then is cut."""


@dataclass(frozen=True)
class Limits:
    """`drain_seconds` as above; `connections` at most at once, a further one is told 503."""

    drain_seconds: float = 30.0
    connections: int = 2048


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to an address, not listening yet; port 0 takes a free one. Raises UsageError where it cannot be
    had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError) as error:
        raise UsageError(f"--host {host}: there is no such address ({error}).", remedy="Use 127.0.0.1.") from error
    except OverflowError as error:
        raise UsageError(f"--port {port}: a port is at most 65535.", remedy="0 takes a free one.") from error
    bound = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # elsewhere this would let two programs share a port
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise UsageError(
            f"{host} port {port} cannot be had: {error.strerror or error}.",
            remedy="Another server may have it: name another --port; 0 takes a free one.",
        ) from error
    return bound


def is_loopback(bound: socket.socket) -> bool:
    """Whether only this machine can reach it."""
    return ipaddress.ip_address(bound.getsockname()[0].partition("%")[0]).is_loopback


def url_of(bound: socket.socket) -> str:
    """The address as a client on this machine writes it."""
    host, port = bound.getsockname()[:2]
    address = ipaddress.ip_address(host.partition("%")[0])
    if address.is_unspecified:
        host = "127.0.0.1" if address.version == 4 else "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def serve(
    app: FastAPI,
    models: Models,
    bound: socket.socket,
    limits: Limits,
    *,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Answer on a bound socket until SIGTERM or SIGINT comes and all is ended. `ready` is called once it listens."""
    config = uvicorn.Config(
        app,
        http=wire.protocol(request_limits.Limits()),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=BACKLOG,
        limit_concurrency=limits.connections,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=int(limits.drain_seconds + LAST_WORDS) + 1,
    )
    server = _Server(config, ready)
    ending = asyncio.create_task(_end_of_patience(server, app, models, limits.drain_seconds))
    try:
        await server.serve([bound])
    finally:
        ending.cancel()
        await asyncio.wait([ending])


async def _end_of_patience(server: _Server, app: FastAPI, models: Models, seconds: float) -> None:
    """Once told to end: after `seconds` close the models, which ends every answer with an error."""
    await server.told.wait()
    app.state.draining = True  # `/ready` says so to who holds a connection still
    await asyncio.sleep(seconds)
    await models.close()


class _Server(uvicorn.Server):
    """uvicorn's, but that a signal ends it once, and the process then with 0."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready
        self.told = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        self._ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Have signals end it; in a thread that gets none, whoever started it sets `should_exit`."""
        loop = asyncio.get_running_loop()

        def end(number: int, frame: FrameType | None) -> None:
            if self.should_exit:
                os._exit(128 + number)
            self.should_exit = True
            loop.call_soon_threadsafe(self.told.set)

        try:
            before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
