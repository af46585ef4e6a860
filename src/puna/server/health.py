"""How the server does: alive, ready, its version, its metrics, and the live view of its engines.

What it is: routes that only look.
What it is not: a way to see what anybody asked or was told; streams are shown by their id, their key and their counts.
What is surprising: /health says that the process answers and nothing more: who restarts a server because of it should
not do so while a model loads. That is what /ready is for.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Annotated, Any, Protocol, runtime_checkable

from fastapi import APIRouter, Depends
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.requests import Request
from starlette.responses import Response

from puna import __version__
from puna.errors import PunaError
from puna.server.caller import Caller, needs
from puna.server.metrics import Sight
from puna.server.observe import Observatory, Watcher
from puna.server.service import Service, service_of
from puna.types import Activity, Backend, ModelCard, Models, ModelState
from puna.weights.limits import available, read_text

PATIENCE = 2.0
"""Seconds that an engine may take to say what it does; one that takes longer is stuck."""

router = APIRouter()


@runtime_checkable
class Looked(Protocol):
    """Models that can be looked at without being used, so that looking keeps none of them loaded."""

    def loaded(self) -> list[Backend]:
        """The backends that are loaded now."""


@router.get("/health", summary="Whether the process answers")
async def health() -> dict[str, str]:
    """Always 200."""
    return {"status": "ok"}


@router.get("/ready", summary="Whether requests should be sent here", responses={503: {"description": "Not now."}})
async def ready(request: Request) -> Response:
    """200, or 503 with the reason: draining, loading, or an engine that is stuck or has failed."""
    state = request.app.state
    reason = "draining" if state.draining else "loading" if getattr(state, "loading", False) else ""
    if not reason:
        try:
            await activities(state.service.models)
        except TimeoutError:
            reason = "an engine does not answer"
        except PunaError:
            reason = "an engine has failed"
    if not reason:
        return JSONResponse({"ready": True})
    return JSONResponse({"ready": False, "reason": reason}, 503, headers={"Retry-After": "1"})


@router.get("/version", summary="The server's version")
async def version(caller: Annotated[Caller, Depends(needs("infer"))]) -> dict[str, str]:
    """Puna's version."""
    return {"version": __version__}


@router.get("/metrics", summary="Prometheus metrics", response_class=PlainTextResponse)
async def metrics(
    request: Request,
    caller: Annotated[Caller, Depends(needs("observe"))],
    service: Annotated[Service, Depends(service_of)],
) -> Response:
    """In Prometheus's text format 0.0.4. An engine that does not answer is left out; the rest still shows."""
    observatory: Observatory = request.app.state.observatory
    try:
        every = await activities(service.models)
    except (PunaError, TimeoutError):
        every = []
    sight = Sight(
        tuple(await service.models.states()),
        tuple((card.name, activity) for card, activity in every),
        resident(),
        available() or 0,
        time.monotonic() - observatory.began,
        len(observatory.open),
        request.app.state.draining,
    )
    return Response(observatory.metrics.text(sight), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/puna/engine", summary="What every engine and stream is doing")
async def engine(
    request: Request,
    caller: Annotated[Caller, Depends(needs("observe"))],
    service: Annotated[Service, Depends(service_of)],
) -> dict[str, Any]:
    """The live view: models with their engine's counts, streams that are open, memory in bytes, seconds since the
    start."""
    observatory: Observatory = request.app.state.observatory
    try:
        every = await activities(service.models)
    except (PunaError, TimeoutError):
        every = []
    return {
        "models": [_engine(card, activity) for card, activity in every],
        "streams": [_stream(watcher) for watcher in list(observatory.open.values())],
        "memory": {"resident": resident(), "available": available()},
        "uptime": round(time.monotonic() - observatory.began, 3),
    }


async def activities(models: Models) -> list[tuple[ModelCard, Activity]]:
    """What each loaded model's engine is doing. Raises StoppedError for one that failed, TimeoutError for one that does
    not answer."""
    if isinstance(models, Looked):
        return [(backend.card, await _activity(backend)) for backend in models.loaded()]
    states: list[ModelState] = await models.states()
    found = []
    for state in states:
        if state.loaded:
            async with models.use(state.card.name) as backend:
                found.append((backend.card, await _activity(backend)))
    return found


def resident() -> int:
    """Bytes of this process that are in memory, 0 where the system does not say."""
    pages = read_text(Path("/proc/self/statm")).split()
    return int(pages[1]) * os.sysconf("SC_PAGE_SIZE") if len(pages) > 1 else 0


async def _activity(backend: Backend) -> Activity:
    async with asyncio.timeout(PATIENCE):
        return await backend.activity()


_SHOWN = (
    "kernels", "kv_type", "running", "waiting", "pages_total", "pages_used", "pages_cached", "pages_free",
    "page_tokens", "computed_tokens", "reused_tokens", "made_tokens", "guessed_tokens", "right_guesses", "preemptions",
)  # fmt: skip


def _engine(card: ModelCard, activity: Activity) -> dict[str, Any]:
    shown = {name: getattr(activity, name) for name in _SHOWN}
    return {"id": card.name, **shown, "context_length": card.context_length}


def _stream(watcher: Watcher) -> dict[str, Any]:
    return {
        "id": watcher.call.id,
        "model": watcher.model,
        "key": watcher.call.caller.name,
        "seconds": round(time.monotonic() - watcher.call.began, 3),
        "prompt_tokens": watcher.prefilled,
        "made_tokens": watcher.made,
        "state": watcher.state,
    }
