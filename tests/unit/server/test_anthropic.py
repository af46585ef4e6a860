"""Anthropic's protocol, spoken by the `anthropic` package over a real socket; its own models parse strictly."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace
from typing import Any

import anthropic
import httpx2
import pytest
from pydantic import BaseModel

from puna.errors import StoppedError
from puna.gateway.scripted import CARD, Script, ScriptedBackend, saying
from puna.server.anthropic import Blocks
from puna.server.app import create_app
from puna.types import Event, Grammar, Message, Request, Tool, ToolCall, ToolCallPiece, Usage

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL: Any = {"name": "weather", "description": "Of a city", "input_schema": SCHEMA}
HI: Any = [{"role": "user", "content": "Hi"}]


class Stage:
    """A server on a backend whose script a test sets."""

    def __init__(self, backend: ScriptedBackend, url: str) -> None:
        self.backend, self.url = backend, url
        self.client = anthropic.Anthropic(
            base_url=url, api_key="any", max_retries=0, timeout=30, _strict_response_validation=True
        )

    def play(self, script: Script) -> None:
        self.backend._script = script

    @property
    def asked(self) -> Request:
        return self.backend.requests[-1]

    def post(self, path: str = "/v1/messages", **fields: Any) -> httpx2.Response:
        body = {"model": "scripted", "max_tokens": 50, "messages": HI, **fields}
        return httpx2.post(self.url + path, json={name: value for name, value in body.items() if value is not ...})


@pytest.fixture(scope="module")
def one(serve_module: Any) -> Stage:
    backend = ScriptedBackend()
    return Stage(backend, serve_module(create_app(backend)))


@pytest.fixture
def stage(one: Stage) -> Iterator[Stage]:
    one.play(saying("Hello", " there", "."))
    yield one
    one.backend._card = CARD


def events_of(*events: Event) -> Script:
    async def script(request: Request) -> AsyncGenerator[Event]:
        for event in events:
            yield event

    return script


def calling(*cuts: str) -> list[Event]:
    """Some text, a call whose arguments come in these pieces, and a second call without any."""
    return [
        Event(text="Let me "),
        Event(text="look.", tool_calls=(ToolCallPiece(0, "call_a", "weather"),)),
        *(Event(tool_calls=(ToolCallPiece(0, arguments=cut),)) for cut in cuts),
        Event(tool_calls=(ToolCallPiece(1, "call_b", "clock"),)),
        Event(finish="stop", usage=Usage(30, 20, 9)),
    ]


def test_a_whole_message(stage: Stage) -> None:
    made = stage.client.messages.create(
        model="scripted", max_tokens=50, system="Be brief.", messages=HI, metadata={"user_id": "u"}
    )
    assert [block.model_dump() for block in made.content] == [
        {"type": "text", "text": "Hello there.", "citations": None}
    ]
    assert (made.role, made.model, made.stop_reason, made.stop_sequence) == ("assistant", "scripted", "end_turn", None)
    assert made.id.startswith("msg_")
    prompt = len("system: Be brief.\nuser: Hi\n")
    assert (made.usage.input_tokens, made.usage.output_tokens, made.usage.cache_read_input_tokens) == (prompt, 12, 0)
    assert made._request_id
    assert stage.asked.prompt == (Message("system", "Be brief."), Message("user", "Hi"))
    sampling = stage.asked.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_tokens) == (1, 1, 0, 50)


def test_the_events_of_a_stream_are_the_protocols(stage: Stage) -> None:
    with httpx2.stream(
        "POST",
        f"{stage.url}/v1/messages",
        json={"model": "scripted", "max_tokens": 50, "messages": HI, "stream": True},
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        chunks = response.read().decode().split("\n\n")
    assert chunks.pop() == ""
    events = []
    for chunk in chunks:
        name, data = chunk.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    start, *middle, delta, stop = events
    assert start["message"]["content"] == []
    assert start["message"]["stop_reason"] is None
    assert start["message"]["usage"]["input_tokens"] == len("user: Hi\n")
    assert middle == [
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        *(
            {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}}
            for text in ("Hello", " there", ".")
        ),
        {"type": "content_block_stop", "index": 0},
    ]
    assert delta["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert delta["usage"]["output_tokens"] == 12
    assert stop == {"type": "message_stop"}


def test_the_streaming_helpers_and_async_clients(stage: Stage) -> None:
    with stage.client.messages.stream(model="scripted", max_tokens=50, messages=HI) as stream:
        assert list(stream.text_stream) == ["Hello", " there", "."]
        assert stream.get_final_message().usage.output_tokens == 12

    async def run() -> tuple[str, str]:
        async with anthropic.AsyncAnthropic(base_url=stage.url, api_key="any", max_retries=0) as client:
            whole = await client.messages.create(model="scripted", max_tokens=5, messages=HI)
            async with client.messages.stream(model="scripted", max_tokens=50, messages=HI) as stream:
                final = await stream.get_final_text()
        assert whole.stop_reason == "max_tokens"
        return getattr(whole.content[0], "text", ""), final

    assert asyncio.run(run()) == ("Hello", "Hello there.")


def test_calls_of_tools_whole_and_streamed(stage: Stage) -> None:
    stage.play(events_of(*calling('{"ci', 'ty": "Par', 'is"}')))
    made = stage.client.messages.create(
        model="scripted",
        max_tokens=50,
        messages=HI,
        tools=[TOOL, {"name": "clock", "input_schema": {"type": "object"}}],
    )
    with stage.client.messages.stream(model="scripted", max_tokens=50, messages=HI, tools=[TOOL]) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        streamed = stream.get_final_message()
    assert pieces == ['{"ci', 'ty": "Par', 'is"}']
    for message in (made, streamed):
        assert message.stop_reason == "tool_use"
        text, first, second = message.content
        assert text.text == "Let me look."  # type: ignore[union-attr]
        assert (first.type, first.id, first.name, first.input) == ("tool_use", "call_a", "weather", {"city": "Paris"})  # type: ignore[union-attr]
        assert (second.id, second.name, second.input) == ("call_b", "clock", {})  # type: ignore[union-attr]
        usage = message.usage
        assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (10, 20, 9)


def test_how_tools_are_asked_for(stage: Stage) -> None:
    def asked(choice: Any) -> tuple[Any, ...]:
        stage.client.messages.create(
            model="scripted", max_tokens=5, messages=HI, tools=[{**TOOL, "strict": True}], tool_choice=choice
        )
        request = stage.asked
        return request.tool_choice, request.callable_tools, request.parallel_tool_calls

    assert asked({"type": "auto"}) == ("auto", (), True)
    assert asked({"type": "auto", "disable_parallel_tool_use": True}) == ("auto", (), False)
    assert asked({"type": "any"}) == ("required", (), True)
    assert asked({"type": "tool", "name": "weather", "disable_parallel_tool_use": True}) == (
        "required",
        ("weather",),
        False,
    )
    assert asked({"type": "none"}) == ("none", (), True)
    assert stage.asked.tools == (Tool("weather", "Of a city", json.dumps(SCHEMA), True),)
    assert stage.post(tools=[TOOL], tool_choice={"type": "tool", "name": "nothing"}).status_code == 400
    assert stage.post(tools=[TOOL], tool_choice={"type": "tool"}).status_code == 400


def test_results_of_tools_become_messages(stage: Stage) -> None:
    use = {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Köln"}}
    stage.client.messages.create(
        model="scripted",
        max_tokens=5,
        tools=[TOOL],
        system=[
            {"type": "text", "text": "One."},
            {"type": "text", "text": "Two.", "cache_control": {"type": "ephemeral"}},
        ],
        messages=[
            {"role": "user", "content": "Weather?"},
            {"role": "user", "content": [{"type": "text", "text": "In Köln?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "I look."}, use]},  # type: ignore[typeddict-item,list-item]
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "Rain"}]},
                    {"type": "tool_result", "tool_use_id": "c1", "content": "no", "is_error": True},
                    {"type": "text", "text": "And"},
                    {"type": "text", "text": "now?"},
                ],
            },
        ],
    )
    assert stage.asked.prompt == (
        Message("system", "One.\nTwo."),
        Message("user", "Weather?\nIn Köln?"),
        Message("assistant", "I look.", (ToolCall("weather", '{"city": "Köln"}', "c1"),)),
        Message("tool", "Rain", (), "c1"),
        Message("tool", "Error: no", (), "c1"),
        Message("user", "And\nnow?"),
    )


def test_our_own_answer_can_be_sent_back(stage: Stage) -> None:
    stage.play(events_of(*calling("{}")))
    made = stage.client.messages.create(model="scripted", max_tokens=50, messages=HI, tools=[TOOL])
    results: Any = [
        {"type": "tool_result", "tool_use_id": block.id} for block in made.content if block.type == "tool_use"
    ]
    stage.client.messages.create(
        model="scripted",
        max_tokens=9,
        messages=[*HI, made.to_param(), {"role": "user", "content": results}],
        tools=[TOOL],
    )
    assert [message.role for message in stage.asked.prompt] == ["user", "assistant", "tool", "tool"]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("last", "reason"),
    [
        (Event(finish="stop"), "end_turn"),
        (Event(finish="stop", stopped_by="END"), "stop_sequence"),
        (Event(finish="length"), "max_tokens"),
        (Event(finish="context"), "model_context_window_exceeded"),
    ],
)
def test_why_it_ended(stage: Stage, last: Event, reason: str) -> None:
    stage.play(events_of(Event(text="a"), replace(last, usage=Usage(1, 0, 1))))
    made = stage.client.messages.create(model="scripted", max_tokens=5, messages=HI, stop_sequences=["END", "."])
    assert (made.stop_reason, made.stop_sequence) == (reason, last.stopped_by or None)
    assert stage.asked.sampling.stop == ("END", ".")


def test_max_tokens_beyond_the_context_ends_with_it(stage: Stage) -> None:
    stage.backend._card = replace(CARD, context_length=100)
    prompt = len("user: Hi\n")
    for most, want in ((100 - prompt, 100 - prompt), (101 - prompt, None)):
        stage.post(max_tokens=most)
        assert stage.asked.sampling.max_tokens == want


def test_an_answer_that_was_begun_goes_on(stage: Stage) -> None:
    begun: Any = [*HI, {"role": "assistant", "content": "Sure: <|eot|>"}]
    made = stage.client.messages.create(model="scripted", max_tokens=50, messages=begun)
    assert made.usage.input_tokens == len("user: Hi\nSure: <|eot|>")
    assert stage.asked.prompt == tuple(b"user: Hi\nSure: <|eot|>")
    refused = stage.post(messages=begun, tools=[TOOL])
    assert refused.status_code == 400
    assert "begun" in refused.json()["error"]["message"]
    assert stage.post(messages=begun, tools=[TOOL], tool_choice={"type": "none"}).status_code == 200
    use = {"type": "tool_use", "id": "c", "name": "weather", "input": {}}
    assert "no result" in stage.post(messages=[*HI, {"role": "assistant", "content": [use]}]).text


def test_counting_tokens(stage: Stage) -> None:
    counted = stage.client.messages.count_tokens(model="scripted", system="S", messages=HI, tools=[TOOL])
    assert counted.input_tokens == len("system: S\nuser: Hi\n")


def test_an_answer_in_a_form(stage: Stage) -> None:
    class City(BaseModel):
        name: str

    stage.play(saying('{"name": "Oslo"}'))
    made = stage.client.messages.parse(model="scripted", max_tokens=50, messages=HI, output_format=City)
    assert made.parsed_output == City(name="Oslo")
    grammar = stage.asked.grammar
    assert isinstance(grammar, Grammar)
    assert json.loads(grammar.text)["properties"]["name"]["type"] == "string"


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, "thinking"),
        ({"container": "c_1"}, "container"),
        ({"mcp_servers": [{"type": "url", "url": "http://x"}]}, "mcp_servers"),
        ({"context_management": {"edits": [1]}}, "context_management"),
        ({"inference_geo": "eu"}, "inference_geo"),
        ({"diagnostics": {"previous_message_id": "m"}}, "diagnostics"),
        ({"workspace_id": "w"}, "workspace_id"),
        ({"user_profile_id": "w"}, "user_profile_id"),
        ({"speed": "fast"}, "speed"),
        ({"output_config": {"effort": "low"}}, "output_config.effort"),
        ({"unheard_of": 1}, "unheard_of"),
        ({"service_tier": "turbo"}, "service_tier"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search", "max_uses": 3}]}, "tools.0.type"),
        ({"tools": [{**TOOL, "defer_loading": True}]}, "tools.0.defer_loading"),
        ({"tools": [{**TOOL, "input_examples": [{"city": "x"}]}]}, "tools.0.input_examples"),
        ({"tools": [{**TOOL, "allowed_callers": ["code_execution_20250825"]}]}, "tools.0.allowed_callers"),
        ({"tools": [{**TOOL, "unheard_of": 1}]}, "unheard_of"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {"url": "x"}}]}]}, "image"),
        ({"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]}, "document"),
        ({"messages": [*HI, {"role": "assistant", "content": [{"type": "thinking", "thinking": ""}]}]}, "thinking"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "b", "input": {}}]}]},
         "tool_use"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a"}]}]}, "no message"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "citations": [1]}]}]}, "citations"),
        ({"messages": []}, "messages"),
        ({"max_tokens": ...}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"stop_sequences": [""]}, "stop_sequences"),
    ],
)  # fmt: skip
def test_refusals_name_their_field(stage: Stage, fields: dict[str, Any], name: str) -> None:
    before = len(stage.backend.requests)
    response = stage.post(**fields)
    assert response.status_code == 400
    error = response.json()
    assert error["type"] == "error"
    assert error["error"]["type"] == "invalid_request_error"
    assert name in error["error"]["message"]
    assert len(stage.backend.requests) == before


def test_what_asks_for_nothing_is_taken(stage: Stage) -> None:
    response = stage.post(
        thinking={"type": "disabled"}, container=None, mcp_servers=[], context_management=None, service_tier="auto",
        speed="standard", output_config={}, cache_control={"type": "ephemeral", "ttl": "1h"}, tools=[], stream=False,
    )  # fmt: skip
    assert response.status_code == 200, response.text


def test_an_unknown_model_and_errors_of_the_client(stage: Stage) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        stage.client.messages.create(model="nothing", max_tokens=5, messages=HI)
    assert missing.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]

    async def failing(request: Request) -> AsyncGenerator[Event]:
        raise StoppedError("The engine stopped.")
        yield Event()

    stage.play(failing)
    for stream in (False, True):
        with pytest.raises(anthropic.InternalServerError) as stopped:
            stage.client.messages.create(model="scripted", max_tokens=5, messages=HI, stream=stream)
        assert stopped.value.status_code == 503


def test_an_error_in_the_middle_is_an_event(stage: Stage) -> None:
    def failing(error: Exception | None) -> Script:
        async def script(request: Request) -> AsyncGenerator[Event]:
            yield Event(text="a")
            if error is not None:
                raise error

        return script

    for error, kind in (
        (StoppedError("Gone."), "overloaded_error"),
        (ValueError("secret"), "api_error"),
        (None, "over"),
    ):
        stage.play(failing(error))
        text = stage.post(stream=True).text
        last = text.rstrip("\n").rsplit("\n\n", 1)[-1]
        assert last.startswith("event: error\ndata: ")
        assert kind in last
        assert "secret" not in text
        with (
            pytest.raises(anthropic.APIStatusError),
            stage.client.messages.stream(model="scripted", max_tokens=5, messages=HI) as stream,
        ):
            stream.until_done()


def test_a_client_that_leaves_cancels(stage: Stage) -> None:
    began, go = threading.Event(), asyncio.Event()

    async def endless(request: Request) -> AsyncGenerator[Event]:
        yield Event(text="a")
        began.set()
        await go.wait()

    stage.play(endless)
    with httpx2.stream(
        "POST", f"{stage.url}/v1/messages", json={"model": "scripted", "max_tokens": 5, "messages": HI, "stream": True}
    ) as response:
        pieces = response.iter_raw()  # dropped, it would close the connection
        next(pieces)
        assert began.wait(30)
        assert stage.backend.running == 1
    until = time.monotonic() + 30
    while stage.backend.running:
        assert time.monotonic() < until
        time.sleep(0.002)


def test_every_cut_of_a_text_gives_the_same_blocks() -> None:
    def shape(events: list[Event]) -> list[tuple[str, str, str]]:
        """Kind, name and content of each block; fails where blocks overlap or indices jump."""
        blocks, made, is_open = Blocks(), [], False
        for piece in [*itertools.chain(*(blocks.push(event) for event in events)), *blocks.close()]:
            if piece["type"] == "content_block_start":
                assert not is_open
                is_open = True
                made.append([piece["content_block"]["type"], piece["content_block"].get("name", ""), ""])
            elif piece["type"] == "content_block_stop":
                is_open = False
            else:
                assert is_open
                delta = piece["delta"]
                made[-1][2] += delta.get("text", "") + delta.get("partial_json", "")
            assert piece["index"] == len(made) - 1
        assert not is_open
        return [tuple(block) for block in made]

    text, arguments = "Héllo, wörld", '{"city": "Zürich"}'
    want = [("text", "", text), ("tool_use", "weather", arguments), ("tool_use", "clock", "{}"), ("text", "", "end")]
    for size in range(1, len(arguments) + 1):
        cuts = [Event(text=text[i : i + size]) for i in range(0, len(text), size)]
        cuts.append(Event(tool_calls=(ToolCallPiece(0, "a", "weather"),)))
        pieces = [ToolCallPiece(0, arguments=arguments[i : i + size]) for i in range(0, len(arguments), size)]
        cuts += [Event(tool_calls=(piece,)) for piece in pieces[:-1]]
        cuts.append(Event(tool_calls=(pieces[-1], ToolCallPiece(1, "b", "clock", "{}"))))
        cuts += [Event(), Event(text="end"), Event(finish="stop")]
        assert shape(cuts) == want


def test_arguments_that_are_no_object_are_kept(stage: Stage) -> None:
    pieces = (Event(tool_calls=(ToolCallPiece(0, "", "weather", '{"city": "Pa'),)), Event(finish="length"))
    stage.play(events_of(*pieces))
    made = stage.client.messages.create(model="scripted", max_tokens=5, messages=HI, tools=[TOOL])
    assert made.stop_reason == "max_tokens"
    assert made.content[0].input == {"INVALID_JSON": '{"city": "Pa'}  # type: ignore[union-attr]
    assert made.content[0].id.startswith("toolu_")  # type: ignore[union-attr]
