"""/health, /ready, /version, /metrics and the live view."""

from __future__ import annotations

import asyncio
import mmap
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager

import httpx2
import pytest
from fastapi import FastAPI

from puna import __version__
from puna.errors import StoppedError
from puna.gateway.scripted import CARD, ScriptedBackend
from puna.server import health
from puna.server.app import create_app
from puna.server.caller import Caller
from puna.server.service import Call
from puna.types import Activity, Backend, Event, ModelState, Request, Usage


async def get(app: FastAPI, path: str) -> httpx2.Response:
    """One answer of the application."""
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://localhost") as client:
        return await client.get(path)


def test_a_server_that_is_well() -> None:
    app = create_app(ScriptedBackend())

    async def work() -> None:
        assert (await get(app, "/health")).json() == {"status": "ok"}
        assert (await get(app, "/ready")).json() == {"ready": True}
        assert (await get(app, "/version")).json() == {"version": __version__}

    asyncio.run(work())


class Failing(ScriptedBackend):
    """Its engine has failed."""

    async def activity(self) -> Activity:
        raise StoppedError("The engine failed: a secret of the house.")


class Stuck(ScriptedBackend):
    """Its engine does not answer."""

    async def activity(self) -> Activity:
        await asyncio.Event().wait()
        raise AssertionError


@pytest.mark.parametrize(
    ("backend", "reason"), [(Failing(), "an engine has failed"), (Stuck(), "an engine does not answer")]
)
def test_an_engine_that_is_not_well(backend: ScriptedBackend, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "PATIENCE", 0.05)
    app = create_app(backend)

    async def work() -> None:
        ready = await get(app, "/ready")
        assert (ready.status_code, ready.json()) == (503, {"ready": False, "reason": reason})
        assert ready.headers["retry-after"] == "1"
        assert (await get(app, "/health")).status_code == 200
        assert (await get(app, "/metrics")).status_code == 200  # the rest still shows
        assert (await get(app, "/puna/engine")).json()["models"] == []

    asyncio.run(work())


def test_a_server_that_is_not_ready_yet_or_no_more() -> None:
    app = create_app(ScriptedBackend())

    async def reasons() -> list[str]:
        app.state.loading = True
        found = [await get(app, "/ready")]
        app.state.draining = True
        found.append(await get(app, "/ready"))
        assert [ready.status_code for ready in found] == [503, 503]
        return [ready.json()["reason"] for ready in found]

    assert asyncio.run(reasons()) == ["loading", "draining"]


def test_the_live_view() -> None:
    going = asyncio.Event()

    async def script(_: Request) -> AsyncGenerator[Event]:
        yield Event(prefilled=3)
        await going.wait()
        yield Event(text="ab", token_ids=(1, 2))
        yield Event(finish="stop", usage=Usage(5, 0, 2))

    backend = ScriptedBackend(script)
    app = create_app(backend)

    async def work() -> None:
        call = Call("chatcmpl-1", Caller("0123456789ab", "alice"), "chat", "scripted", stream=True)
        async with aclosing(app.state.service.answer(call, backend, Request("abcde"))) as events:
            await anext(events)
            seen = (await get(app, "/puna/engine")).json()
            [stream] = seen["streams"]
            assert stream.pop("seconds") >= 0
            assert stream == {
                "id": "chatcmpl-1", "model": "scripted", "key": "alice", "prompt_tokens": 3, "made_tokens": 0,
                "state": "reading",
            }  # fmt: skip
            going.set()
            await anext(events)
            [stream] = (await get(app, "/puna/engine")).json()["streams"]
            assert (stream["made_tokens"], stream["state"]) == (2, "answering")
            assert "puna_streams_open 1.0" in (await get(app, "/metrics")).text
            async for _ in events:
                pass
        seen = (await get(app, "/puna/engine")).json()
        assert seen["streams"] == []
        assert set(seen) == {"models", "streams", "memory", "uptime"}
        assert seen["models"] == [
            {
                "id": "scripted", "kernels": "script", "kv_type": "none", "running": 0, "waiting": 0, "pages_total": 0,
                "pages_used": 0, "pages_cached": 0, "pages_free": 0, "page_tokens": 0, "computed_tokens": 0,
                "reused_tokens": 0, "made_tokens": 0, "guessed_tokens": 0, "right_guesses": 0, "preemptions": 0,
                "context_length": 4096,
            }
        ]  # fmt: skip

    asyncio.run(work())


def test_memory_is_that_of_the_process() -> None:
    before = health.resident()
    with mmap.mmap(-1, 64 << 20) as block:  # not the heap, where memory that was freed may be in use again
        block.write(b"x" * len(block))
        gone = before + len(block) - health.resident()
    assert abs(gone) < 16 << 20 or before == 0


class Fleet:
    """Models of which one is loaded, and which count their uses."""

    def __init__(self) -> None:
        self.backend, self.uses = ScriptedBackend(), 0

    async def states(self) -> list[ModelState]:
        """See types.Models."""
        return [ModelState(CARD, loaded=True), ModelState(CARD)]

    @asynccontextmanager
    async def use(self, name: str, *, keep_alive: float | None = None) -> AsyncIterator[Backend]:
        """See types.Models."""
        self.uses += 1
        yield self.backend

    async def unload(self, name: str) -> None:
        """See types.Models."""

    async def close(self) -> None:
        """See types.Models."""


class Looking(Fleet):
    """One that can be looked at."""

    def loaded(self) -> list[Backend]:
        """See health.Looked."""
        return [self.backend]


def test_looking_is_no_use_where_models_can_be_looked_at() -> None:
    for models, uses in ((Fleet(), 1), (Looking(), 0)):
        assert len(asyncio.run(health.activities(models))) == 1
        assert models.uses == uses
