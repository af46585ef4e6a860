"""The application: routes, the door before them, and what a client is told when something goes wrong.

What it is: the place where all is put together; `create_app` takes one backend or many models.
What it is not: a process (`puna serve`), or a protocol.
What is surprising: middlewares are plain ASGI: Starlette's base class for them hides from a route that its client left.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response

from puna import __version__
from puna.errors import PunaError
from puna.gateway.one import OneModel
from puna.server import (
    anthropic,
    bodies,
    health,
    infill,
    ollama,
    ollama_models,
    ollama_pull,
    openai_batches,
    openai_chat,
    openai_completions,
    openai_embeddings,
    openai_files,
    openai_models,
    openai_moderations,
    openai_responses,
    rerank,
    tokens,
)
from puna.server.description import describe
from puna.server.door import Door, open_door
from puna.server.elsewhere import Fetcher
from puna.server.guarding import Guarding
from puna.server.observe import Observatory
from puna.server.openai_batches import Worker
from puna.server.page_routes import page_files, page_router
from puna.server.problems import RequestError, problem_of, protocol_of, shaped
from puna.server.service import Service, request_id
from puna.server.store import Store
from puna.server.streams import ClientGone
from puna.types import Backend, Models

LOG = logging.getLogger("puna.server")

ROUTERS: tuple[APIRouter, ...] = (
    openai_chat.router,
    openai_models.router,
    anthropic.router,
    health.router,
    openai_completions.router,
    openai_embeddings.router,
    openai_moderations.router,
    openai_batches.router,
    openai_files.router,
    openai_responses.router,
    ollama.router,
    ollama_models.router,
    ollama_pull.router,
    tokens.router,
    infill.router,
    rerank.router,
)
"""Every route there is."""


def create_app(
    models: Models | Backend,
    *,
    door: Door | None = None,
    observatory: Observatory | None = None,
    state: Path | None = None,
    guard: Guarding | None = None,
    pictures: Fetcher | None = None,
) -> FastAPI:
    """The server over these models. `door` says who may do what; without one everybody may do everything, as a test or
    a program that brings its own door wants it. `observatory` sees what is done. `state` is the folder where files,
    batches and stored responses live; without one they live in memory until the end. `guard` judges what is asked and
    answered, and is what `/v1/moderations` asks where no model is named. `pictures` fetches those that lie elsewhere;
    without it none is. The models, the door and the observatory are closed with the application."""
    every: Models = models if isinstance(models, Models) else OneModel(models)
    door = door or open_door()
    observatory = observatory or Observatory()
    service = Service(every, door, observatory, guard, pictures)

    store = Store(state)
    worker = Worker(service, store)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        working = asyncio.create_task(worker.run())
        yield
        working.cancel()
        await asyncio.wait([working])  # its lines must not find the models closed
        await every.close()
        await door.close()
        await observatory.close()
        store.close()

    # Telemetry is the observatory's: the framework would ask the environment for it at each request.
    app = FastAPI(
        title="Puna", version=__version__, docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan,
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )  # fmt: skip
    app.state.service, app.state.observatory, app.state.draining = service, observatory, False
    app.state.store, app.state.worker, app.state.guard = store, worker, guard
    for router in ROUTERS:
        app.include_router(router)
    app.include_router(page_router(page_files()))
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(ClientGone, _gone)
    app.add_exception_handler(PunaError, _failed)
    app.add_exception_handler(Exception, _failed)
    app.add_middleware(door.middleware)
    describe(app)
    return app


async def _failed(request: Request, error: Exception) -> Response:
    number = request_id(request)
    problem = problem_of(error, number)
    if problem.code == "server_error":
        LOG.error("request %s failed", number, exc_info=error)
    return JSONResponse(shaped(problem, protocol_of(request.url.path)), problem.status, headers=problem.headers)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return await _failed(request, bodies.refusal(error.errors()))


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, ValueError):  # of Python's JSON reader, which FastAPI tells nothing about
        why = "It must be UTF-8, and no number may have more digits than anybody can mean."
        refusal = RequestError("The body is not valid JSON.", remedy=why, code="invalid_json")
        return await _failed(request, refusal)
    known = {404: "not_found", 405: "method_not_allowed"}
    refusal = RequestError(f"{error.detail}.", status=error.status_code, code=known.get(error.status_code, ""))
    return await _failed(request, refusal)


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it
