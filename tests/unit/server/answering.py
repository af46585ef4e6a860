"""A program of the tests: a server whose one model says a word, and goes on when it is told to through stdin.

What it is not: a test. `python answering.py DRAIN_SECONDS` prints its port once it listens.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncGenerator
from typing import Annotated

from fastapi import Depends, Request
from starlette.responses import Response

from puna import types
from puna.errors import StoppedError
from puna.gateway.one import OneModel
from puna.gateway.scripted import ScriptedBackend
from puna.server import process
from puna.server.app import create_app
from puna.server.caller import Caller, needs
from puna.server.problems import problem_of, shaped
from puna.server.service import Call, Service, service_of
from puna.server.streams import Streamed, sse


class Slow(ScriptedBackend):
    """Says "one", waits until it may go on or is closed, and says "two"."""

    def __init__(self) -> None:
        super().__init__(self._say)
        self.go = asyncio.Event()

    async def _say(self, request: types.Request) -> AsyncGenerator[types.Event]:
        yield types.Event(text="one")
        await self.go.wait()
        if self.closed:
            raise StoppedError("The engine was closed.")
        yield types.Event(text="two", finish="stop", usage=types.Usage(1, 0, 2))

    async def close(self) -> None:
        """End the answer under way."""
        await super().close()
        self.go.set()


async def main(drain_seconds: float) -> None:
    """Serve until a signal comes."""
    backend = Slow()
    models = OneModel(backend)
    app = create_app(models)

    async def answer(
        request: Request,
        caller: Annotated[Caller, Depends(needs("infer"))],
        service: Annotated[Service, Depends(service_of)],
    ) -> Response:
        async def pieces() -> AsyncGenerator[bytes]:
            async with service.use(caller, "") as one:
                async for event in service.answer(Call("1", caller, "chat", ""), one, types.Request("")):
                    yield sse(event.text)
            yield sse("end")

        return Streamed(pieces(), lambda error: sse(shaped(problem_of(error), "openai")))

    app.add_api_route("/answer", answer, methods=["GET"], response_model=None)
    bound = process.listen("127.0.0.1", 0)
    loop = asyncio.get_running_loop()

    def told() -> None:
        if sys.stdin.readline():
            loop.call_soon_threadsafe(backend.go.set)

    threading.Thread(target=told, daemon=True).start()
    limits = process.Limits(drain_seconds=drain_seconds)
    await process.serve(
        app, models, bound, limits, ready=lambda: print(bound.getsockname()[1], file=sys.stdout, flush=True)
    )


if __name__ == "__main__":
    asyncio.run(main(float(sys.argv[1])))
