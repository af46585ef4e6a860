"""A server over a real socket, for whoever tests a protocol with its own client.

`serve(app)` gives the address of a uvicorn in a thread of its own; all are ended with the test.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from openai import OpenAI
from pydantic import BaseModel

from puna.gateway.scripted import CARD, ScriptedBackend
from puna.server.app import create_app

Serve = Callable[[FastAPI], str]


class Running:
    """One server in a thread."""

    def __init__(self, app: FastAPI) -> None:
        config = uvicorn.Config(
            app, host="127.0.0.1", port=0, log_level="warning", lifespan="on", timeout_graceful_shutdown=2
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=lambda: asyncio.run(self.server.serve()), daemon=True)

    def start(self) -> str:
        """Start it; returns its address."""
        self.thread.start()
        until = time.monotonic() + 30
        while not self.server.started:
            assert self.thread.is_alive(), "the server did not start"
            assert time.monotonic() < until, "the server did not start in time"
            time.sleep(0.002)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}"

    def stop(self) -> None:
        """End it."""
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive(), "the server did not end"


def _starting() -> Iterator[Serve]:
    running: list[Running] = []

    def start(app: FastAPI) -> str:
        one = Running(app)
        running.append(one)
        return one.start()

    yield start
    for one in running:
        one.stop()


serve = pytest.fixture(_starting, name="serve")
serve_module = pytest.fixture(_starting, name="serve_module", scope="module")


@pytest.fixture
def eventually() -> Callable[[Callable[[], bool]], None]:
    """Waits until something becomes true; fails where it does not."""

    def wait(true: Callable[[], bool]) -> None:
        until = time.monotonic() + 30
        while not true():
            assert time.monotonic() < until, "it did not become true"
            time.sleep(0.002)

    return wait


@pytest.fixture
def talk(serve: Serve) -> Iterator[Callable[..., tuple[OpenAI, ScriptedBackend]]]:
    """Gives OpenAI's client and the scripted backend that it talks to."""
    clients: list[OpenAI] = []

    def start(script: Any = None, card: Any = CARD) -> tuple[OpenAI, ScriptedBackend]:
        backend = ScriptedBackend(script, card)
        clients.append(OpenAI(base_url=f"{serve(create_app(backend))}/v1", api_key="none", max_retries=0))
        return clients[-1], backend

    yield start
    for client in clients:
        client.close()


@pytest.fixture
def strictly() -> Callable[[type[BaseModel], dict[str, Any]], None]:
    """Checks that a client's own model takes an answer as it is, and knows every field."""

    def known(part: Any) -> None:
        if isinstance(part, BaseModel):
            assert not part.model_extra, part.model_extra
            for value in dict(part).values():
                known(value)
        elif isinstance(part, list):
            for value in part:
                known(value)

    def check(model: type[BaseModel], data: dict[str, Any]) -> None:
        known(model.model_validate(data, strict=True))

    return check
