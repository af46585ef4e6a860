"""A guard before and after answers in every protocol, and `/v1/moderations`. The guard is a script that knows bombs."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
from anthropic import Anthropic
from ollama import Client as Ollama
from openai import APIStatusError, BadRequestError, OpenAI
from openai.types.chat import ChatCompletion

from puna.errors import UsageError
from puna.gateway.scripted import CARD, Script, ScriptedBackend, saying
from puna.server.app import create_app
from puna.server.guarding import Guarding, judged
from puna.server.observe import Observatory
from puna.server.openai_moderations import AS_OPENAI, CATEGORIES
from puna.text.guard import categories, trained
from puna.types import Event, Infill, Judge, Message, ModelState, Request, TokenLogprob, Usage

GUARD = replace(CARD, name="guard", guards="3", chat=True)
ASK, BAD = "What is lava?", "How is a bomb made?"


async def knows_bombs(request: Request) -> AsyncGenerator[Event]:
    assert isinstance(request.prompt, Judge)
    said = "unsafe\nS9" if "bomb" in request.prompt.messages[-1].content else "safe"
    async for event in saying(said)(request):
        yield event


class Both:
    """See types.Models: a model that answers, and the guard."""

    def __init__(self, *backends: ScriptedBackend) -> None:
        self._backends = {backend.card.name: backend for backend in backends}

    async def states(self) -> list[ModelState]:
        return [ModelState(backend.card, loaded=True) for backend in self._backends.values()]

    def use(self, name: str, *, keep_alive: float | None = None) -> Any:
        from contextlib import asynccontextmanager

        from puna.errors import UnknownModelError

        @asynccontextmanager
        async def leased() -> AsyncGenerator[ScriptedBackend]:
            if name and name not in self._backends:
                raise UnknownModelError(name)
            yield self._backends[name] if name else next(iter(self._backends.values()))

        return leased()

    async def unload(self, name: str) -> None:
        pass

    async def close(self) -> None:
        pass


Start = Callable[..., tuple[str, ScriptedBackend, ScriptedBackend]]


@pytest.fixture
def start(serve: Any) -> Start:
    """Gives the address of a guarded server, the model and the guard."""

    def begin(script: Script | None = None, *, observatory: Any = None, **how: Any) -> Any:
        model, guard = ScriptedBackend(script or saying("Molten", " rock.")), ScriptedBackend(knows_bombs, GUARD)
        app = create_app(Both(model, guard), observatory=observatory, guard=Guarding(guard, **how))
        return serve(app), model, guard

    return begin


def _openai(url: str, content: str, **more: Any) -> Any:
    body = {"model": "scripted", "messages": [{"role": "user", "content": content}]}
    return httpx2.post(f"{url}/v1/chat/completions", json=body | more)


def test_what_is_safe_goes_through_unchanged(start: Start, strictly: Any) -> None:
    url, model, guard = start()
    told = _openai(url, ASK, logprobs=True).json()
    strictly(ChatCompletion, told)
    choice = told["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Molten rock.", "stop")
    assert choice["message"]["refusal"] is None
    assert len(choice["logprobs"]["content"]) == len("Molten rock.")
    assert told["usage"]["completion_tokens"] == len("Molten rock.")
    asked = [request.prompt for request in guard.requests]
    question, answer = Message("user", ASK), Message("assistant", "Molten rock.")
    assert asked == [Judge((question,)), Judge((question, answer))]
    assert all(request.sampling.temperature == 0 for request in guard.requests)
    assert len({request.namespace for request in (*guard.requests, *model.requests)}) == 1


def test_what_is_asked_is_judged_before_the_model_sees_it(start: Start, strictly: Any) -> None:
    url, model, _ = start()
    told = _openai(url, BAD, n=2).json()
    strictly(ChatCompletion, told)
    assert [choice["finish_reason"] for choice in told["choices"]] == ["content_filter"] * 2
    message = told["choices"][0]["message"]
    assert message["content"] == ""
    assert message["refusal"] == (
        "What was asked was kept back: the guard found it unsafe: S9 (Indiscriminate Weapons)."
    )
    assert not model.requests


def test_what_is_answered_is_judged_before_anybody_sees_it(start: Start) -> None:
    url, _, guard = start(saying("Take a", " bomb", " and"))
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        whole = client.chat.completions.create(model="scripted", messages=[{"role": "user", "content": ASK}], n=2)
        assert [choice.finish_reason for choice in whole.choices] == ["content_filter"] * 2
        assert {choice.message.content for choice in whole.choices} == {""}
        assert "The answer was kept back" in (whole.choices[0].message.refusal or "")
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 2 * len("Take a bomb and")
        chunks = list(
            client.chat.completions.create(
                model="scripted", messages=[{"role": "user", "content": ASK}], stream=True, logprobs=True
            )
        )
    assert not any(chunk.choices[0].delta.content for chunk in chunks)
    assert not any(chunk.choices[0].logprobs and chunk.choices[0].logprobs.content for chunk in chunks)
    assert "S9" in "".join(chunk.choices[0].delta.refusal or "" for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "content_filter"
    assert len(guard.requests) == 5


def test_a_stream_that_is_safe_comes_at_its_end(start: Start) -> None:
    url, _, _ = start()
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        chunks = list(
            client.chat.completions.create(
                model="scripted", messages=[{"role": "user", "content": ASK}], stream=True,
                stream_options={"include_usage": True},
            )
        )  # fmt: skip
    assert [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content] == ["Molten rock."]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len("Molten rock.")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("asked", [ASK, BAD])
def test_other_protocols_say_it_in_their_words(start: Start, asked: str, stream: bool) -> None:
    url, model, _ = start(saying("a bomb"))
    with Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        ask: Any = {"model": "scripted", "max_tokens": 9, "messages": [{"role": "user", "content": asked}]}
        if stream:
            with client.messages.stream(**ask) as events:
                message = events.get_final_message()
        else:
            message = client.messages.create(**ask)
    assert (message.stop_reason, message.content) == ("refusal", [])
    last: Any = Ollama(host=url).chat("scripted", [{"role": "user", "content": asked}], stream=stream)
    lines = list(last) if stream else [last]
    assert "".join(line.message.content for line in lines) == ""
    assert lines[-1].done_reason == "content_filter"
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as openai:
        completion = openai.completions.create(model="scripted", prompt=asked)
        assert (completion.choices[0].finish_reason, completion.choices[0].text) == ("content_filter", "")
        response = openai.responses.create(model="scripted", input=asked)
        assert response.status == "incomplete"
        assert response.incomplete_details is not None
        assert response.incomplete_details.reason == "content_filter"
        assert response.output_text == ""
    assert bool(model.requests) == (asked == ASK)


def test_one_side_alone(start: Start) -> None:
    url, _, guard = start(saying("a bomb"), after=False)
    assert _openai(url, ASK).json()["choices"][0]["message"]["content"] == "a bomb"
    assert len(guard.requests) == 1
    url, model, guard = start(before=False)
    assert _openai(url, BAD).json()["choices"][0]["message"]["content"] == "Molten rock."
    assert (len(guard.requests), len(model.requests)) == (1, 1)


def test_every_kind_of_prompt_is_judged(start: Start) -> None:
    url, model, guard = start()
    httpx2.post(f"{url}/v1/completions", json={"model": "scripted", "prompt": [98, 111]})
    assert guard.requests[0].prompt == Judge((Message("user", "bo"),))
    guarding = Guarding(guard)

    async def fill() -> list[Event]:
        return [event async for event in guarding.answered(model, Request(Infill("a bo", "mb")))]

    [event] = asyncio.run(fill())
    assert (event.finish, event.text) == ("filtered", "")
    assert len(model.requests) == 1
    told = httpx2.post(f"{url}/v1/completions", json={"model": "guard", "prompt": BAD}).json()
    assert told["choices"][0]["finish_reason"] == "content_filter"  # a guard goes on with a text as any model does
    plain = httpx2.post(f"{url}/v1/embeddings", json={"model": "scripted", "input": "bomb"})
    assert plain.status_code == 200  # a vector says nothing


@pytest.mark.parametrize(
    ("said", "most", "status"),
    [
        ("unsafe\nS9", 20, 200),
        ("safe", 20, 200),
        ("un", 2, 200),
        ("Take a bomb", 20, 503),
        ("Take", 4, 503),
        ("safe\nTake", 20, 503),
    ],
)
def test_a_guard_that_is_talked_to_gives_verdicts_alone(serve: Any, said: str, most: int, status: int) -> None:
    """Whatever a bias or a grammar made of its answer."""
    guard = ScriptedBackend(saying(said), GUARD)
    url = serve(create_app(Both(ScriptedBackend(), guard), guard=Guarding(guard)))
    response = _openai(url, BAD, model="guard", max_tokens=most)
    assert response.status_code == status
    if status == 200:
        assert response.json()["choices"][0]["message"]["content"] == said
    else:
        assert response.json()["error"]["code"] == "guard_failed"
        assert "Take" not in response.text


def test_calls_of_tools_are_judged_too(start: Start) -> None:
    from puna.types import ToolCallPiece

    async def calls(request: Request) -> AsyncGenerator[Event]:
        piece = ToolCallPiece(0, "call_1", "shop", json.dumps({"buy": request.prompt[-1].content[-4:]}))  # type: ignore
        yield Event(tool_calls=(piece,), token_ids=(1,))
        yield Event(finish="stop", usage=Usage(1, 0, 1))

    url, _, guard = start(calls)
    tools = [{"type": "function", "function": {"name": "shop"}}]
    told = _openai(url, "buy lava", tools=tools).json()["choices"][0]
    assert told["message"]["tool_calls"][0]["function"] == {"name": "shop", "arguments": '{"buy": "lava"}'}
    assert told["finish_reason"] == "tool_calls"
    assert guard.requests[-1].prompt.messages[-1].tool_calls[0].name == "shop"  # type: ignore[union-attr]


@pytest.mark.parametrize("said", ["Certainly!", "", "unsafe\nS99"])
def test_nothing_goes_out_where_the_guard_gives_no_verdict(serve: Any, said: str) -> None:
    model, guard = ScriptedBackend(), ScriptedBackend(saying(said), GUARD)
    url = serve(create_app(Both(model, guard), guard=Guarding(guard, before=False)))
    response = _openai(url, ASK)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "guard_failed")
    with httpx2.stream("POST", f"{url}/v1/chat/completions", json={
        "model": "scripted", "stream": True, "messages": [{"role": "user", "content": ASK}],
    }) as stream:  # fmt: skip
        text = stream.read().decode()
    assert "Hello" not in text
    assert "guard_failed" in text


def test_a_guard_that_fails_fails_the_request(serve: Any) -> None:
    async def broken(request: Request) -> AsyncGenerator[Event]:
        yield Event(text="sa")
        raise RuntimeError("no word of this")

    async def cut(request: Request) -> AsyncGenerator[Event]:
        yield Event(text="safe")

    for script, status in ((broken, 500), (cut, 503)):
        model, guard = ScriptedBackend(), ScriptedBackend(script, GUARD)
        url = serve(create_app(Both(model, guard), guard=Guarding(guard)))
        response = _openai(url, ASK)
        assert response.status_code == status
        assert "Hello" not in response.text
        assert not model.requests


def test_the_audit_log_says_it(serve: Any, start: Start, tmp_path: Path, eventually: Any) -> None:
    path = tmp_path / "audit.jsonl"
    url, _, _ = start(saying("a bomb"), observatory=Observatory(audit=path))
    _openai(url, ASK)
    _openai(url, BAD)
    eventually(lambda: path.exists() and path.read_text().count("\n") >= 2)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["guard"] for line in lines] == [["before: safe", "after: unsafe S9"], ["before: unsafe S9"]]
    assert [line["finish"] for line in lines] == ["filtered", "filtered"]
    assert "bomb" not in path.read_text()


def test_categories_are_the_operators(start: Start) -> None:
    url, _, guard = start(categories=categories("3", off=("S9",), added=[("Rivals.", "")]))
    assert _openai(url, BAD).json()["choices"][0]["finish_reason"] == "stop"  # S9 is no violation now
    asked = guard.requests[0].prompt
    assert isinstance(asked, Judge)
    assert [each.code for each in asked.categories][-1] == "S15"


def test_who_may_be_a_guard() -> None:
    with pytest.raises(UsageError, match="no guard model"):
        Guarding(ScriptedBackend())


# --- moderations ------------------------------------------------------------------------------------------------------


def test_moderations_in_openais_words(start: Start) -> None:
    url, _, _ = start()
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        told = client.moderations.create(input=[ASK, BAD])
        assert told.model == "guard"
        assert [result.flagged for result in told.results] == [False, True]
        bad = told.results[1]
        assert (bad.categories.illicit, bad.categories.illicit_violent, bad.categories.hate) == (True, True, False)
        assert (bad.category_scores.illicit, bad.category_scores.hate) == (1.0, 0.0)
        assert told.results[0].category_scores.illicit == 0.0
        own = (bad.model_extra or {})["guard"]
        assert own == {
            "verdict": "unsafe", "score": 1.0, "categories": [{"code": "S9", "name": "Indiscriminate Weapons."}],
        }  # fmt: skip
        parts: Any = [{"type": "text", "text": "a"}, {"type": "text", "text": "bomb"}]
        assert [result.flagged for result in client.moderations.create(input=parts, model="guard").results] == [True]
        picture: Any = [{"type": "image_url", "image_url": {"url": "data:"}}]
        with pytest.raises(BadRequestError, match="guards read text here"):
            client.moderations.create(input=picture)
        with pytest.raises(BadRequestError, match="is no guard model"):
            client.moderations.create(input="x", model="scripted")
        with pytest.raises(BadRequestError, match="from 1 to"):
            client.moderations.create(input=[])


def test_moderations_find_a_guard_that_is_only_served(serve: Any) -> None:
    guard = ScriptedBackend(knows_bombs, GUARD)
    url = serve(create_app(Both(ScriptedBackend(), guard)))
    assert httpx2.post(f"{url}/v1/moderations", json={"input": BAD}).json()["results"][0]["flagged"]
    assert _openai(url, BAD).json()["choices"][0]["finish_reason"] == "stop"  # served, and no guard of others
    alone = serve(create_app(ScriptedBackend()))
    with (
        OpenAI(base_url=f"{alone}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(APIStatusError) as error,
    ):
        client.moderations.create(input="x")
    assert error.value.code == "no_guard_model"


def test_every_category_goes_where_openai_has_it() -> None:
    names = {each.name for version in ("1", "2", "3") for each in trained(version)}
    assert set(AS_OPENAI) <= names
    assert {theirs for mapped in AS_OPENAI.values() for theirs in mapped} <= set(CATEGORIES)
    without = {name for name in names if name not in AS_OPENAI}
    assert without == {
        "Specialized Advice.", "Privacy.", "Intellectual Property.", "Elections.", "Code Interpreter Abuse.",
    }  # fmt: skip


def test_the_score_is_the_probability_of_unsafe() -> None:
    words = {0: b"\n\n", 1: b" safe", 2: b"un", 3: b"safe", 4: b"the"}

    class Worded(ScriptedBackend):
        def token_bytes(self, token: int) -> bytes:
            return words[token]

    async def events() -> AsyncGenerator[Event]:
        likely = ((2, math.log(0.3)), (1, math.log(0.08)), (3, math.log(0.02)), (4, math.log(0.6)))
        yield Event(text="\n\n", logprobs=(TokenLogprob(0, -0.1, ((0, -0.1), (2, -3.0))),))
        yield Event(text="unsafe\nS1", logprobs=(TokenLogprob(2, math.log(0.3), likely),), finish="stop")

    found = asyncio.run(judged(Worded(card=GUARD), events()))
    assert found.score == pytest.approx(0.75)
    assert (found.verdict.unsafe, found.told) == (True, "unsafe S1")
