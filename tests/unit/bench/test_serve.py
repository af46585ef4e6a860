"""The load on a server: what is sent, what is counted, and the arithmetic of it, on a server that is a script."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any
from xml.etree import ElementTree

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from puna.bench.load import arrivals_of, spread
from puna.bench.serve import Asked, ServerLoad, checked, figures, picture, put
from puna.errors import PunaError, UsageError
from puna.server.process import listen, url_of

LOAD = ServerLoad(requests=6, warmup=2, clients=2, rate=0.0, prompt=10, shared=4, new=3)
SECONDS = 30.0

Answer = Callable[[int, dict[str, Any]], list[str] | Response]


class Scripted:
    """A server whose answers are lines of a stream, or a response; it remembers what was asked."""

    def __init__(self, answer: Answer, models: tuple[str, ...] = ("first", "second")) -> None:
        self.answer, self.models = answer, models
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.keys: set[str | None] = set()
        self.open = self.most = 0

    async def ask(self, request: Request) -> Response:
        """An answer."""
        self.bodies.append(json.loads(await request.body()))
        self.paths.append(request.url.path)
        self.keys.add(request.headers.get("authorization"))
        lines = self.answer(len(self.bodies), self.bodies[-1])
        if isinstance(lines, Response):
            return lines

        async def stream() -> AsyncIterator[str]:
            self.open += 1
            self.most = max(self.most, self.open)
            for line in lines:
                yield f"data: {line}\n\n"
                await asyncio.sleep(0)
            self.open -= 1

        return StreamingResponse(stream(), media_type="text/event-stream")

    async def list(self, request: Request) -> Response:
        """The models."""
        return JSONResponse({"object": "list", "data": [{"id": name} for name in self.models]})


@pytest.fixture
def serve() -> Iterator[Callable[[Scripted], str]]:
    """Run a scripted server; its address."""
    running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(one: Scripted) -> str:
        routes = [
            Route("/v1/models", one.list),
            Route("/v1/chat/completions", one.ask, methods=["POST"]),
            Route("/v1/completions", one.ask, methods=["POST"]),
        ]
        bound = listen("127.0.0.1", 0)
        server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), log_config=None, lifespan="off"))
        thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
        running.append((server, thread))
        url = url_of(bound)
        thread.start()
        end = time.monotonic() + SECONDS
        while not server.started:
            assert time.monotonic() < end
            time.sleep(0.005)
        return url

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join(SECONDS)


def chat(number: int, body: dict[str, Any]) -> list[str]:
    """An answer of two pieces, as OpenAI's servers stream it."""
    return [
        json.dumps({"choices": [{"delta": {"role": "assistant", "content": ""}}]}),
        json.dumps({"choices": [{"delta": {"content": "a"}}]}),
        json.dumps({"choices": [{"delta": {"content": "bc"}, "finish_reason": "length"}]}),
        json.dumps({"choices": [], "usage": {"prompt_tokens": 12, "completion_tokens": 3}}),
        "[DONE]",
    ]


def test_what_is_sent_and_counted(serve: Callable[[Scripted], str]) -> None:
    server = Scripted(chat)
    model, asked = asyncio.run(put(serve(server) + "/v1/", LOAD, api_key="secret"))
    assert model == "first"
    assert len(server.bodies) == 8  # two did not count
    assert len(asked) == 6
    assert server.keys == {"Bearer secret"}
    assert set(server.paths) == {"/v1/chat/completions"}
    assert server.most <= 2
    texts = [body["messages"][0]["content"].split() for body in server.bodies]
    assert {len(text) for text in texts} == {10}
    assert len({tuple(text[:4]) for text in texts}) == 1
    assert len({tuple(text[4:]) for text in texts}) == 8
    first = server.bodies[0]
    assert (first["model"], first["max_tokens"], first["temperature"], first["stream"]) == ("first", 3, 0, True)
    assert first["stream_options"] == {"include_usage": True}
    assert "ignore_eos" not in first
    found = figures(asked, LOAD)
    assert (found["answered"], found["errors"], found["good"]) == (6, {}, 6)
    assert (found["prompt_tokens"], found["completion_tokens"]) == (72, 18)
    assert all(len(one.times) == 2 for one in asked)


def test_completions_and_a_rate(serve: Callable[[Scripted], str]) -> None:
    def text(number: int, body: dict[str, Any]) -> list[str]:
        return [
            json.dumps({"choices": [{"text": "a"}]}),
            json.dumps({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}),
            "[DONE]",
        ]

    server = Scripted(text)
    load = ServerLoad(requests=3, warmup=0, clients=1, rate=1e6, prompt=2, shared=0, new=1, ignore_eos=True, chat=False)
    model, asked = asyncio.run(put(serve(server), load, model="mine"))
    assert model == "mine"
    assert {body["prompt"].count(" ") for body in server.bodies} == {1}
    assert all(body["ignore_eos"] is True and body["model"] == "mine" for body in server.bodies)
    assert set(server.paths) == {"/v1/completions"}
    assert server.keys == {None}
    assert [one.error for one in asked] == [""] * 3
    assert [one.due for one in asked] == sorted(one.due for one in asked)


def test_errors_are_counted_by_kind(serve: Callable[[Scripted], str]) -> None:
    def answer(number: int, body: dict[str, Any]) -> list[str] | Response:
        whole = chat(number, body)
        return [
            whole,
            JSONResponse({"error": {"message": "no", "code": "queue_full"}}, 429),
            Response("oops", 500),
            [*whole[:2], json.dumps({"error": {"message": "no", "code": "engine_stopped"}})],
            whole[:-1],
            [whole[0], "[DONE]"],
            [whole[0], "{not json", "[DONE]"],
            ['{"choices": 3}', "[DONE]"],
        ][number - 1]

    load = ServerLoad(requests=8, warmup=0, clients=1, rate=0.0, prompt=1, shared=0, new=1)
    _, asked = asyncio.run(put(serve(Scripted(answer)), load))
    assert [one.error for one in asked] == [
        "", "429 queue_full", "500", "in the stream engine_stopped", "cut", "empty", "malformed", "malformed",
    ]  # fmt: skip
    found = figures(asked, load)
    assert (found["requests"], found["answered"]) == (8, 1)
    assert found["errors"]["malformed"] == 2


def test_a_server_that_is_not_there_or_lists_nothing(serve: Callable[[Scripted], str]) -> None:
    with listen("127.0.0.1", 0) as bound, pytest.raises(PunaError, match="cannot be reached"):
        asyncio.run(put(url_of(bound), LOAD))
    with pytest.raises(PunaError, match="gives no model"):
        asyncio.run(put(serve(Scripted(chat, models=())), LOAD))


def done(due: float, *times: float) -> Asked:
    """An answer whose pieces came at these times."""
    return Asked(due, list(times), times[-1] + 1, prompt_tokens=10, completion_tokens=len(times))


def test_the_arithmetic() -> None:
    asked = [done(0, 1, 2, 3), done(1, 4, 8), done(2, 3), Asked(0, [], 2, error="429")]
    load = ServerLoad(4, 0, 1, 0.0, 1, 0, 1, first_within=2.0, between_within=1.5)
    found = figures(asked, load)
    assert found["seconds"] == 9
    assert found["requests_per_second"] == pytest.approx(3 / 9)
    assert found["good"] == 2  # the second was late, and slow
    assert found["completion_tokens_per_second"] == pytest.approx(6 / 9)
    assert found["tokens_per_second"] == pytest.approx(36 / 9)
    assert found["first"] == spread([1, 3, 1])
    assert found["between"] == spread([1, 1, 4])
    assert found["whole"] == spread([4, 8, 2])
    assert found["first"]["max"] == 3
    assert found["first"]["p50"] == 1
    assert found["between"]["mean"] == 2
    assert figures([], load)["seconds"] == 0
    assert figures([], load)["whole"]["max"] == 0


def test_arrivals_are_a_poisson_process() -> None:
    arrivals = arrivals_of(20_000, 50.0, random.Random(1))
    gaps = [b - a for a, b in itertools.pairwise(arrivals)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / 50, rel=0.03)
    assert sum((gap - mean) ** 2 for gap in gaps) / len(gaps) == pytest.approx(mean**2, rel=0.06)
    assert arrivals_of(3, 0.0, random.Random(1)) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("asked", [[], [done(0, 1, 2, 3)], [done(0, i + 1, i + 2) for i in range(2000)]])
def test_the_picture(asked: list[Asked]) -> None:
    picture_of = ElementTree.fromstring(picture(asked, "a < b & c"))
    lines = picture_of.findall(".//{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == 3
    for line in lines:
        points = [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
        assert len(points) <= 501
        assert points == sorted(points, key=lambda point: (point[0], -point[1]))
        if asked and len(points) > 1:
            assert points[-1] == (260.0, 0.0)


@pytest.mark.parametrize("name", ["requests", "clients", "prompt", "new"])
def test_loads_that_are_none(name: str) -> None:
    with pytest.raises(UsageError, match=f"--{name}"):
        checked(ServerLoad(**{**vars(LOAD), name: 0}))
    with pytest.raises(UsageError, match="--shared is longer"):
        checked(ServerLoad(**{**vars(LOAD), "shared": 11}))
    with pytest.raises(UsageError, match="--rate"):
        checked(ServerLoad(**{**vars(LOAD), "rate": float("nan")}))
