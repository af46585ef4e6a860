"""Answers that take a while: server-sent events and lines of JSON, and clients that leave in the middle.

What it is: a response that sends pieces as they come, says something now and then while none do, and ends with the
protocol's own word for an error where one comes in the middle; and the same watch over clients for whole answers.
What it is not: a protocol; the pieces are bytes already.
What is surprising: nothing is sent, not even the status, before the first piece is there or `KEEP_ALIVE_SECONDS` have
passed: what goes wrong until then is an ordinary error with its own status.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from puna.server.exchange import CURRENT
from puna.server.problems import problem_of

LOG = logging.getLogger("puna.server")

KEEP_ALIVE_SECONDS = 15.0
"""After so long without a piece something is sent, lest a proxy takes the connection for dead."""

T = TypeVar("T")


def sse(data: object, event: str = "") -> bytes:
    """One server-sent event of JSON."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return (f"event: {event}\ndata: {text}\n\n" if event else f"data: {text}\n\n").encode()


def line(data: object) -> bytes:
    """One line of JSON."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


class Streamed(Response):
    """A response made of pieces.

    `on_error` gives the last piece for an error that comes in the middle; `keep_alive` is what is sent while nothing
    comes (b"" for nothing). A client that leaves closes `pieces`.
    """

    def __init__(
        self,
        pieces: AsyncGenerator[bytes],
        on_error: Callable[[BaseException], bytes],
        *,
        media_type: str = "text/event-stream",
        keep_alive: bytes = b": still here\n\n",
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(media_type=media_type, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.headers.update(headers or {})
        self._pieces, self._on_error, self._still_here = pieces, on_error, keep_alive

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await until_gone(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        started = False
        last = time.monotonic()  # when something was sent, or is being sent
        sending = asyncio.Lock()

        async def put(piece: bytes, more: bool = True) -> None:
            nonlocal started, last
            async with sending:
                if not started:
                    await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                    started = True
                await send({"type": "http.response.body", "body": piece, "more_body": more})
                last = time.monotonic()

        async def beat() -> None:
            while True:
                await asyncio.sleep(last + KEEP_ALIVE_SECONDS - time.monotonic())
                if time.monotonic() >= last + KEEP_ALIVE_SECONDS:
                    await put(self._still_here)

        beating = asyncio.ensure_future(beat())
        try:
            async with aclosing(self._pieces) as pieces:
                try:
                    async for piece in pieces:
                        await put(piece)
                except Exception as error:
                    if not started:
                        raise
                    if problem_of(error).code == "server_error":  # a client is told no more than where to look
                        request = CURRENT.get()
                        LOG.error("request %s failed in the middle", request.id if request else "", exc_info=error)
                    await put(self._on_error(error))
                await _ended(beating)
                await put(b"", more=False)
        finally:
            await _ended(beating)


async def batches(*sources: AsyncGenerator[T]) -> AsyncGenerator[list[tuple[int, T]]]:
    """What the sources give, in lists of (number of the source, item): all that came since the last list was taken.

    Raises what a source raises once what came before it has been taken, and closes all sources at the end.
    """
    if len(sources) == 1:
        async with aclosing(sources[0]) as items:
            async for item in items:
                yield [(0, item)]
        return
    came: list[tuple[int, T]] = []
    left, news = len(sources), asyncio.Event()
    failed: list[Exception] = []

    async def pump(number: int, source: AsyncGenerator[T]) -> None:
        nonlocal left
        try:
            async with aclosing(source):
                async for item in source:
                    came.append((number, item))
                    news.set()
        except Exception as error:
            failed.append(error)
        finally:
            left -= 1
            news.set()

    tasks = [asyncio.ensure_future(pump(number, source)) for number, source in enumerate(sources)]
    try:
        while left or came or failed:
            await news.wait()
            news.clear()
            if came:
                taken, came = came, []
                yield taken
            if failed and not came:
                raise failed[0]
            if came or failed or not left:
                news.set()
    finally:
        for task in tasks:
            await _ended(task)


async def together(works: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """What all of these give, in order; where one raises, the others are ended first."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            await _ended(task)


async def _ended(task: asyncio.Future[Any]) -> None:
    """Cancel what is under way and wait until it has ended; whatever it ends with has been told already."""
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled():
        task.exception()


class ClientGone(Exception):  # noqa: N818 - no error: the client left
    """The client closed the connection before its answer was there."""


async def until_gone(receive: Receive, work: Awaitable[T]) -> T | None:
    """Do the work, or end it as soon as the client is gone; then None."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        await _ended(task)
        await _ended(gone)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def answered(request: Request, work: Awaitable[T]) -> T:
    """A whole answer of a request whose body has been read. Raises ClientGone where the client left before."""
    made = await until_gone(request.receive, _boxed(work))
    if made is None:
        raise ClientGone
    return made[0]


async def _boxed(work: Awaitable[T]) -> tuple[T]:
    return (await work,)
