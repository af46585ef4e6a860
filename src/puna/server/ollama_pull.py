"""Ollama's `/api/pull`: fetch a model from the hub, and tell how far it is.

What it is: `weights.hub.pull` in a thread of its own, for a caller with the scope `manage`, under a name of the catalog
(`llama3.2:1b`) or the hub's (`org/name`, `org/name:Q4_K_M`).
What it is not: a client of Ollama's registry: names there are not known here, and `insecure` is refused.
What is surprising: the first line comes when the hub has answered, so an unknown name is an error with its own status.
A client that leaves ends the pull at its next chunk; asked for again, it continues there. Progress is that of all files
together, and `digest`, by which clients tell bars apart, is the model's name.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from puna.errors import StorageError, UnreachableError
from puna.server.caller import Caller, needs
from puna.server.fields import errors, refuse
from puna.server.ollama_models import NameBody
from puna.server.problems import RequestError, problem_of, shaped
from puna.server.service import request_id
from puna.server.streams import Streamed, answered, line
from puna.weights.embedded import EMBEDDED

if TYPE_CHECKING:
    from puna.weights.fetch import Progress

router = APIRouter()

TELL_SECONDS = 0.1
"""So often progress is told at most."""


class PullBody(NameBody):
    """The body of `/api/pull`."""

    stream: bool | None = None
    insecure: bool | None = None
    username: Any = None
    password: Any = None


@router.post(
    "/api/pull",
    responses={
        **errors("ollama", 502, 507),
        200: {
            "description": "The end, or lines that say how far it is.",
            "content": {"application/json": {}, "application/x-ndjson": {"schema": {"type": "string"}}},
        },
    },
    response_class=JSONResponse,
)
async def pull(body: PullBody, request: Request, caller: Annotated[Caller, Depends(needs("manage"))]) -> Response:
    """Fetch a model from the hub."""
    why = "keys of the hub are the server's, in its environment"
    refuse(body, {"insecure": "the hub's certificate is always checked", "username": why, "password": why})
    name, number = body.named, request_id(request)
    if body.stream is False:
        await answered(request, _to_end(name))
        return JSONResponse({"status": "success"})

    def error(problem: BaseException) -> bytes:
        return line(shaped(problem_of(problem, number), "ollama"))

    return Streamed(_pieces(name), error, media_type="application/x-ndjson", keep_alive=b"")


async def _to_end(name: str) -> bool:
    async with aclosing(_pulled(name)) as lines:
        async for _ in lines:
            pass
    return True


async def _pieces(name: str) -> AsyncGenerator[bytes]:
    async with aclosing(_pulled(name)) as lines:
        async for each in lines:
            yield line(each)


async def _pulled(name: str) -> AsyncGenerator[dict[str, Any]]:
    """The lines of a pull, and at their end the pull's. Raises RequestError where the hub or the disk fails, and
    HubError for a model that is not to be had."""
    if name != EMBEDDED:  # that one is inside the package
        job = _Pull(name)
        try:
            async for each in job.lines():
                yield each
        except UnreachableError as error:
            raise RequestError(error.message, remedy=error.remedy, status=502, code="hub_unreachable") from error
        except StorageError as error:
            raise RequestError(error.message, remedy=error.remedy, status=507, code="no_room") from error
        finally:
            job.end()
    yield {"status": "success"}


class _Pull:
    """A pull under way in its thread."""

    def __init__(self, name: str) -> None:
        self._name, self._told = name, 0.0
        self._loop = asyncio.get_running_loop()
        self._arrived: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._ended = threading.Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="puna-pull-asked")
        self._work = self._loop.run_in_executor(self._pool, self._run)
        self._work.add_done_callback(lambda _: self._arrived.put_nowait(None))

    async def lines(self) -> AsyncGenerator[dict[str, Any]]:
        """What is told until the pull ends. Raises what it raises."""
        begun = False
        while (each := await self._arrived.get()) is not None:
            if not begun:
                begun = True
                yield {"status": "pulling manifest"}
            yield each
        await self._work

    def end(self) -> None:
        """End it at its next chunk, where it has not ended; nobody waits for that."""
        self._ended.set()
        self._pool.shutdown(wait=False)
        self._work.add_done_callback(lambda work: None if work.cancelled() else work.exception())

    def _run(self) -> None:
        from puna.weights.hub import pull

        pull(self._name, progress=self._heard, say=lambda text: self._tell({"status": f"note: {text}"}))

    def _heard(self, now: Progress) -> None:
        from puna.weights.fetch import Stopped

        if self._ended.is_set():
            raise Stopped
        if now.bytes_done < now.bytes_total and time.monotonic() < self._told + TELL_SECONDS:
            return
        self._told = time.monotonic()
        doing = "verifying" if now.checking else "pulling"
        self._tell(
            {
                "status": f"{doing} {self._name} ({now.files_done}/{now.files_total} files)",
                "digest": self._name,
                "total": now.bytes_total,
                "completed": now.bytes_done,
            }
        )

    def _tell(self, each: dict[str, Any]) -> None:
        self._loop.call_soon_threadsafe(self._arrived.put_nowait, each)
