"""Mixed load on models that take turns, in this process: no request is lost, and the books are right after it.

`bench/soak.py` does the same to `puna serve` for an hour and looks at its memory; here one can look inside.
What is surprising: nothing is measured in time; each client makes so many requests, drawn from a seed.
"""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn

from puna.gateway.fleet import Fleet
from puna.gateway.local import LocalBackend
from puna.gateway.shelf import LocalShelf
from puna.server.app import create_app
from puna.weights.embedded import embedded_folder

SCHEMA = {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"], "additionalProperties": False}


async def whole(client: httpx2.AsyncClient, model: str, draw: random.Random) -> None:
    """An answer at once."""
    body = {"model": model, "prompt": "One day", "max_tokens": draw.randint(1, 60), "n": draw.randint(1, 3)}
    answer = await client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert all(choice["finish_reason"] for choice in answer.json()["choices"])


async def streamed(client: httpx2.AsyncClient, model: str, draw: random.Random) -> None:
    """An answer piece by piece, to its end or left before."""
    body = {"model": model, "prompt": "One day", "max_tokens": draw.randint(1, 60), "stream": True}
    left = draw.random() < 0.5
    lines = []
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            lines.append(line)
            if left:
                return
    assert "data: [DONE]" in lines
    assert any('"finish_reason":"' in line.replace(" ", "") for line in lines)


async def left_at_once(client: httpx2.AsyncClient, model: str, draw: random.Random) -> None:
    """A client that leaves while it waits, or its model is loaded, or answers."""
    body = {"model": model, "prompt": "One day", "max_tokens": 100}
    try:
        async with asyncio.timeout(draw.expovariate(50)):
            await client.post("/v1/completions", json=body)
    except TimeoutError:
        return


async def bad(client: httpx2.AsyncClient, model: str, draw: random.Random) -> None:
    """What is refused."""
    body = {"model": model, "prompt": "One day"}
    wrong: dict[str, Any] = draw.choice(({"wings": 1}, {"max_tokens": -1}, {"model": "nobody"}, {"n": 10**9}))
    assert (await client.post("/v1/completions", json=body | wrong)).status_code in (400, 404, 422)


async def embedded(client: httpx2.AsyncClient, model: str, draw: random.Random) -> None:
    """Vectors."""
    answer = await client.post("/v1/embeddings", json={"model": model, "input": ["a dog", "a cat"]})
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["data"]) == 2


async def structured(client: httpx2.AsyncClient, model: str, draw: random.Random) -> None:
    """An answer of a given form, by another protocol."""
    body = {"model": model, "prompt": "One day", "raw": True, "stream": False, "format": SCHEMA}
    answer = await client.post("/api/generate", json=body | {"options": {"num_predict": 60}})
    assert answer.status_code == 200, answer.text
    assert json.loads(answer.json()["response"])["x"] in (1, 2)


KINDS: tuple[Callable[..., Any], ...] = (whole, streamed, left_at_once, bad, embedded, structured)


async def load(folder: Path, clients: int, requests: int) -> None:
    """Put the load on a server of two models of which one has room, and look at everything after it."""
    shelf = LocalShelf(["cria", str(folder)], on_demand=True)
    need = shelf.describe(shelf.served()[0]).need
    fleet = Fleet(shelf, memory=need.least * 3 // 2)
    server = uvicorn.Server(uvicorn.Config(create_app(fleet), log_level="warning", lifespan="on"))
    with socket.create_server(("127.0.0.1", 0)) as bound:
        serving = asyncio.create_task(server.serve([bound]))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"

        async def client_of(seed: int) -> None:
            draw = random.Random(seed)
            async with httpx2.AsyncClient(base_url=url, timeout=120) as client:
                for n in range(requests):
                    model = ("cria", "mine")[(n // 6 + (draw.random() < 0.05)) % 2]
                    await draw.choice(KINDS)(client, model, draw)
                    fleet.check()

        async with asyncio.timeout(240), asyncio.TaskGroup() as group:
            for seed in range(clients):
                group.create_task(client_of(seed))

        async def quiet() -> bool:
            """Nobody has a model any more, and no engine has anything to do."""
            if any(slot.leases or slot.loading or slot.leaving for slot in fleet._slots.values()):
                return False
            return not any([(now := await backend.activity()).running + now.waiting for backend in fleet.loaded()])

        async with asyncio.timeout(30):
            while not await quiet():
                await asyncio.sleep(0.01)
        fleet.check()
        assert len(fleet.loaded()) == 1
        for backend in fleet.loaded():
            assert isinstance(backend, LocalBackend)
            await asyncio.wrap_future(backend._thread.call(lambda engine: engine.check()))
            assert (await backend.activity()).pages_used == 0
            assert not backend._thread._listeners
        async with httpx2.AsyncClient(base_url=url) as client:
            assert (await client.get("/puna/engine")).json()["streams"] == []
        server.should_exit = True
        await serving
    await fleet.close()
    fleet.check()
    assert not fleet._tasks


@pytest.mark.parametrize(
    ("clients", "requests"), [(4, 12), pytest.param(8, 250, marks=pytest.mark.slow)], ids=["short", "long"]
)
def test_no_request_is_lost_and_nothing_is_left(tmp_path: Path, clients: int, requests: int) -> None:
    shutil.copytree(embedded_folder(), tmp_path / "mine")
    asyncio.run(load(tmp_path / "mine", clients, requests))
