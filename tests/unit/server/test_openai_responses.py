"""Responses through OpenAI's own client, over a socket: whole, in pieces, kept, and gone on from."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import httpx2
import pytest
from openai import APIStatusError, AsyncOpenAI, BadRequestError, NotFoundError, OpenAI
from openai.types.responses import Response, ResponseItem, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from puna.gateway.scripted import ScriptedBackend, saying
from puna.server.app import create_app
from puna.server.caller import Caller
from puna.server.store import Store
from puna.types import Event, Message, Request, TokenLogprob, Tool, ToolCall, ToolCallPiece, Usage

WEATHER = {"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": True}


def called(request: Request) -> AsyncGenerator[Event]:
    """Says something, then calls two functions; once it has been told what came of them, it says so."""

    async def script() -> AsyncGenerator[Event]:
        if any(isinstance(one, Message) and one.role == "tool" for one in request.prompt):
            yield Event(text="Rain.", finish="stop", usage=Usage(9, 4, 1))
            return
        yield Event(text="Let me see.", token_ids=(1,))
        yield Event(tool_calls=(ToolCallPiece(0, "c1", "weather"),), token_ids=(2,))
        yield Event(tool_calls=(ToolCallPiece(0, arguments='{"at":'),))
        yield Event(tool_calls=(ToolCallPiece(0, arguments="1}"), ToolCallPiece(1, "c2", "weather", "{}")))
        yield Event(finish="stop", usage=Usage(5, 0, 3))

    return script()


def test_a_whole_response(talk: Any, strictly: Any) -> None:
    client, backend = talk()
    raw = client.responses.with_raw_response.create(model="scripted", input="Hi", instructions="Be brief.")
    strictly(Response, json.loads(raw.content))
    answer = raw.parse()
    assert (answer.output_text, answer.status, answer.model) == ("Hello there.", "completed", "scripted")
    assert answer.usage is not None
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (27, 12)
    assert backend.requests[0].prompt == (Message("system", "Be brief."), Message("user", "Hi"))
    sampling = backend.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (1.0, 1.0, None)


def test_an_answer_that_is_cut(talk: Any, strictly: Any) -> None:
    client, _ = talk()
    raw = client.responses.with_raw_response.create(model="scripted", input="Hi", max_output_tokens=5)
    strictly(Response, json.loads(raw.content))
    answer = raw.parse()
    assert (answer.output_text, answer.status) == ("Hello", "incomplete")
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.output[0].status == "incomplete"


def test_going_on_from_a_response(talk: Any) -> None:
    client, backend = talk()
    first = client.responses.create(model="scripted", input="One", instructions="Only now.")
    second = client.responses.create(model="scripted", input="Two", previous_response_id=first.id)
    client.responses.create(
        model="scripted", input=[{"role": "developer", "content": "Three"}], previous_response_id=second.id, store=False
    )
    said = Message("assistant", "Hello there.")
    want = (Message("user", "One"), said, Message("user", "Two"), said, Message("system", "Three"))
    assert backend.requests[-1].prompt == want
    assert client.responses.retrieve(second.id).output_text == "Hello there."
    items = client.responses.input_items.list(second.id)
    assert [item.content[0].text for item in items.data] == ["Two"]
    TypeAdapter(list[ResponseItem]).validate_python([item.model_dump() for item in items.data])
    client.responses.delete(first.id)
    for gone in (lambda: client.responses.retrieve(first.id), lambda: client.responses.delete(first.id)):
        with pytest.raises(NotFoundError):
            gone()
    with pytest.raises(BadRequestError) as caught:
        client.responses.create(model="scripted", input="x", previous_response_id=second.id)
    assert caught.value.code == "previous_response_not_found"


def test_what_is_not_stored_is_not_found(talk: Any) -> None:
    client, _ = talk()
    answer = client.responses.create(model="scripted", input="x", store=False)
    with pytest.raises(NotFoundError):
        client.responses.retrieve(answer.id)


def test_functions_are_called_and_answered(talk: Any, strictly: Any) -> None:
    client, backend = talk(called)
    raw = client.responses.with_raw_response.create(model="scripted", input="Weather?", tools=[WEATHER])
    strictly(Response, json.loads(raw.content))
    first = raw.parse()
    assert [item.type for item in first.output] == ["message", "function_call", "function_call"]
    assert [(c.call_id, c.name, c.arguments, c.status) for c in first.output[1:]] == [
        ("c1", "weather", '{"at":1}', "completed"),
        ("c2", "weather", "{}", "completed"),
    ]
    assert backend.requests[0].tools == (Tool("weather", "", '{"type": "object"}', True),)
    results = [{"type": "function_call_output", "call_id": number, "output": "wet"} for number in ("c1", "c2")]
    calls = (ToolCall("weather", '{"at":1}', "c1"), ToolCall("weather", "{}", "c2"))
    want = (
        Message("user", "Weather?"),
        Message("assistant", "Let me see.", calls),
        Message("tool", "wet", (), "c1"),
        Message("tool", "wet", (), "c2"),
    )
    second = client.responses.create(model="scripted", input=results, previous_response_id=first.id, tools=[WEATHER])
    assert second.output_text == "Rain."
    assert second.usage.input_tokens_details.cached_tokens == 4
    assert backend.requests[-1].prompt == want
    whole = [{"role": "user", "content": "Weather?"}, *first.output, *results]  # as clients without a memory here do
    client.responses.create(model="scripted", input=whole, tools=[WEATHER], store=False)
    assert backend.requests[-1].prompt == want
    choice = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "weather"}]}
    client.responses.create(model="scripted", input="x", tools=[WEATHER], tool_choice=choice)
    assert (backend.requests[-1].tool_choice, backend.requests[-1].callable_tools) == ("required", ("weather",))


MESSAGE_EVENTS = [
    "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    "response.output_text.delta", "response.output_text.done", "response.content_part.done",
    "response.output_item.done",
]  # fmt: skip


def test_the_events_of_a_stream(talk: Any, strictly: Any) -> None:
    client, _ = talk(called)
    with httpx2.stream(
        "POST", f"{client.base_url}responses", json={"input": "x", "stream": True, "tools": [WEATHER]}
    ) as response:
        blocks = "".join(response.iter_text()).split("\n\n")[:-1]
    events = [json.loads(block.split("\ndata: ")[1]) for block in blocks]
    assert [block.split("\n")[0] for block in blocks] == [f"event: {event['type']}" for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"] for event in events]
    once = [kind for i, kind in enumerate(kinds) if kinds[i - 1 : i] != [kind]]
    call = [
        "response.output_item.added", "response.function_call_arguments.delta",
        "response.function_call_arguments.done", "response.output_item.done",
    ]  # fmt: skip
    assert once == [*MESSAGE_EVENTS, *call, *call, "response.completed"]
    for event in events:
        parsed = TypeAdapter(ResponseStreamEvent).validate_python(event)
        assert isinstance(parsed, BaseModel)
        assert parsed.type == event["type"]
        assert not parsed.model_extra, parsed
    strictly(Response, events[-1]["response"])
    kept = client.responses.retrieve(events[-1]["response"]["id"])
    assert kept.to_dict(mode="json") == events[-1]["response"]


def test_the_streaming_helper_and_parse(talk: Any) -> None:
    class Animal(BaseModel):
        name: str
        legs: int

    client, backend = talk(saying('{"name": "c', 'at", "legs', '": 4}'))
    made = client.responses.parse(model="scripted", input="x", text_format=Animal)
    assert made.output_parsed == Animal(name="cat", legs=4)
    grammar = backend.requests[0].grammar
    assert json.loads(grammar.text)["required"] == ["name", "legs"]
    with client.responses.stream(model="scripted", input="x", text_format=Animal) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert text == '{"name": "cat", "legs": 4}'
    assert final.output_parsed == Animal(name="cat", legs=4)

    async def run() -> str:
        async with AsyncOpenAI(base_url=client.base_url, api_key="none", max_retries=0) as other:
            stream = await other.responses.create(model="scripted", input="x", stream=True)
            return "".join([event.delta async for event in stream if event.type == "response.output_text.delta"])

    assert asyncio.run(run()) == text


def test_log_probabilities(talk: Any, strictly: Any) -> None:
    async def script(request: Request) -> AsyncGenerator[Event]:
        yield Event(text="A", logprobs=(TokenLogprob(65, -0.5, ((65, -0.5), (66, -1.5))),))
        yield Event(finish="stop", usage=Usage(1, 0, 1))

    client, backend = talk(script)
    raw = client.responses.with_raw_response.create(
        model="scripted", input="x", include=["message.output_text.logprobs"], top_logprobs=2
    )
    strictly(Response, json.loads(raw.content))
    (told,) = raw.parse().output[0].content[0].logprobs
    assert (told.token, told.bytes, told.logprob) == ("A", [65], -0.5)
    assert [top.token for top in told.top_logprobs] == ["A", "B"]
    assert backend.requests[0].sampling.logprobs == 2


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"access_programs": {"cyber": "standard"}}, "access_programs"),
    ({"background": True}, "background"),
    ({"background_options": {"completion_window": "2h"}}, "background_options"),
    ({"context_management": [{"type": "compaction"}]}, "context_management"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"image": {"context_compression": "auto"}}, "image"),
    ({"include": ["reasoning.encrypted_content"]}, "include"),
    ({"max_tool_calls": 2}, "max_tool_calls"),
    ({"moderation": {"model": "x"}}, "moderation"),
    ({"prompt": {"id": "x"}}, "prompt"),
    ({"prompt_cache_options": {"prewarm": True}}, "prompt_cache_options"),
    ({"prompt_cache_retention": "24h"}, "prompt_cache_retention"),
    ({"reasoning": {"effort": "high"}}, "reasoning"),
    ({"service_tier": "priority"}, "service_tier"),
    ({"stream_options": {}}, "stream_options"),
    ({"text": {"verbosity": "low"}}, "text.verbosity"),
    ({"truncation": "auto"}, "truncation"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"nonsense": 2}, "nonsense"),
    ({"stop": "x"}, "stop"),
    ({"tools": [{"type": "web_search"}]}, "tools.0"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    ({"text": {"format": {"type": "text", "schema": {"type": "object"}}}}, "text.format.schema"),
    (
        {"input": [{"role": "assistant", "content": [{"type": "output_text", "text": "x", "annotations": [{}]}]}]},
        "input.0.content.0.annotations",
    ),
    ({"input": []}, "input"),
    ({"input": [{"type": "reasoning", "id": "x"}]}, "input.0.type"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type"),
    ({"input": [{"role": "user"}]}, "input.0.content"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input.0.content"),
    ({"input": [{"role": "user", "content": "x", "call_id": "y"}]}, "input.0.call_id"),
    ({"input": [{"type": "function_call", "name": "x", "arguments": ""}]}, "input.0.call_id"),
]


def test_what_is_not_honoured_is_refused_by_its_name(talk: Any) -> None:
    client, backend = talk()
    with httpx2.Client(base_url=str(client.base_url)) as http:
        for fields, name in REFUSED:
            response = http.post("responses", json={"input": "x", **fields})
            assert response.status_code == 400, (fields, response.text)
            assert response.json()["error"]["param"].startswith(name), (fields, response.text)
    assert backend.requests == []


def test_cancelling_is_refused_by_name(talk: Any) -> None:
    client, _ = talk()
    with pytest.raises(BadRequestError, match="background"):
        client.responses.cancel(client.responses.create(model="scripted", input="x").id)
    with pytest.raises(NotFoundError):
        client.responses.cancel("resp_none")


def test_a_backend_that_fails_in_the_middle(talk: Any) -> None:
    async def script(request: Request) -> AsyncGenerator[Event]:
        yield Event(text="Hel")
        raise RuntimeError("secret")

    client, backend = talk(script)
    events = list(client.responses.create(model="scripted", input="x", stream=True))
    assert events[-1].type == "response.failed"
    assert events[-1].response.error.code == "server_error"
    assert "secret" not in events[-1].response.error.message
    assert backend.running == 0
    with pytest.raises(NotFoundError):
        client.responses.retrieve(events[-1].response.id)
    with pytest.raises(APIStatusError) as caught:
        client.responses.create(model="scripted", input="x")
    assert caught.value.status_code == 500


def test_a_client_that_leaves_ends_its_answer(talk: Any, eventually: Any) -> None:
    async def script(request: Request) -> AsyncGenerator[Event]:
        yield Event(text="Hel")
        await asyncio.Event().wait()

    client, backend = talk(script)
    with client.responses.create(model="scripted", input="x", stream=True) as stream:
        next(iter(stream))
        assert backend.running == 1
    eventually(lambda: backend.running == 0)


def test_nobody_sees_anothers(serve: Any) -> None:
    app = create_app(ScriptedBackend())
    callers = iter([Caller("a"), Caller("b"), Caller("b"), Caller("a")])

    def enter(inner: Any) -> Any:
        async def entered(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "http":
                scope["state"]["caller"] = next(callers)
            await inner(scope, receive, send)

        return entered

    app.user_middleware.append(type(app.user_middleware[0])(enter))
    with OpenAI(base_url=f"{serve(app)}/v1", api_key="none", max_retries=0) as client:
        number = client.responses.create(model="scripted", input="x").id
        with pytest.raises(NotFoundError):
            client.responses.retrieve(number)
        with pytest.raises(BadRequestError):
            client.responses.create(model="scripted", input="x", previous_response_id=number)
        assert client.responses.retrieve(number).id == number


def test_the_store_keeps_over_a_restart(tmp_path: Any) -> None:
    store = Store(tmp_path / "state")
    store.add_response("a", "resp_1", 1, {"x": 1})
    store.close()
    again = Store(tmp_path / "state")
    assert again.response("a", "resp_1") == {"x": 1}
    assert again.response("b", "resp_1") is None
    assert not again.delete_response("b", "resp_1")
    again.close()
