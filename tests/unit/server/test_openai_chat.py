"""Chat completions and models through OpenAI's own client, over a socket, against a model that plays from a script."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import httpx2
import pytest
from openai import APIError, AsyncOpenAI, BadRequestError, NotFoundError
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

from puna.errors import ChatFormatError, ContextError, QueueFullError
from puna.gateway.scripted import CARD, ScriptedBackend, saying
from puna.server.openai_chat import ChatBody, Chunks, asked
from puna.server.openai_parts import UsageInStream
from puna.server.streams import batches, together
from puna.types import Event, Grammar, Message, Request, TokenLogprob, Tool, ToolCall, ToolCallPiece, Usage

HELLO = [{"role": "user", "content": "Hi"}]


def events(*given: Event) -> Any:
    async def script(request: Request) -> AsyncGenerator[Event]:
        for event in given:
            yield event

    return script


def test_a_whole_answer(talk: Any, strictly: Any) -> None:
    client, backend = talk()
    raw = client.chat.completions.with_raw_response.create(model="scripted", messages=HELLO)
    strictly(ChatCompletion, json.loads(raw.content))
    answer = raw.parse()
    assert answer.choices[0].message.content == "Hello there."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == "scripted"
    assert answer.id.startswith("chatcmpl-")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (9, 12, 21)
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert backend.requests[0].prompt == (Message("user", "Hi"),)
    sampling = backend.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (1.0, 1.0, None)
    again = client.chat.completions.create(model="scripted", messages=HELLO)
    assert again.system_fingerprint == answer.system_fingerprint
    assert again.id != answer.id


def test_every_field_that_is_honoured_arrives(talk: Any) -> None:
    client, backend = talk()
    client.chat.completions.create(
        model="scripted",
        messages=HELLO,
        temperature=0.5,
        top_p=0.9,
        n=2,
        max_completion_tokens=7,
        seed=-1,
        stop=["x", "yz"],
        presence_penalty=0.1,
        frequency_penalty=-0.2,
        logit_bias={"5": -100, "7": 3},
        logprobs=True,
        top_logprobs=4,
        user="me",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        timeout=10,
        extra_body={"top_k": 3, "min_p": 0.05, "ignore_eos": True, "min_tokens": 2, "banned_tokens": [9], "timeout": 5},
    )
    request = backend.requests[0]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.n, sampling.max_tokens) == (0.5, 0.9, 2, 7)
    assert (sampling.seed, sampling.stop, sampling.logprobs) == ((1 << 64) - 1, ("x", "yz"), 4)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.1, -0.2)
    assert sampling.logit_bias == ((5, -100.0), (7, 3.0))
    assert (sampling.top_k, sampling.min_p, sampling.ignore_eos, sampling.min_tokens) == (3, 0.05, True, 2)
    assert sampling.banned_tokens == (9,)
    assert request.timeout == 5


def test_several_choices_and_lengths(talk: Any) -> None:
    client, _ = talk()
    answer = client.chat.completions.create(model="scripted", messages=HELLO, n=2, max_tokens=7)
    assert [(one.index, one.message.content, one.finish_reason) for one in answer.choices] == [
        (0, "Hello t", "length"),
        (1, "Hello t", "length"),
    ]


def test_log_probabilities_with_bytes(talk: Any, strictly: Any) -> None:
    token = TokenLogprob(0xC3, -0.25, ((0xC3, -0.25), (65, -float("inf"))))
    client, _ = talk(events(Event(text="é", logprobs=(token,)), Event(finish="stop", usage=Usage(1, 0, 1))))
    raw = client.chat.completions.with_raw_response.create(
        model="scripted", messages=HELLO, logprobs=True, top_logprobs=2
    )
    strictly(ChatCompletion, json.loads(raw.content))
    told = raw.parse().choices[0].logprobs.content[0]
    assert (told.token, told.bytes, told.logprob) == ("\ufffd", [0xC3], -0.25)
    assert [(top.token, top.bytes, top.logprob) for top in told.top_logprobs] == [
        ("\ufffd", [0xC3], -0.25),
        ("A", [65], -9999.0),
    ]


def test_a_stream(talk: Any, strictly: Any) -> None:
    client, _ = talk()
    stream = client.chat.completions.create(
        model="scripted", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    for chunk in chunks:
        strictly(ChatCompletionChunk, chunk.model_dump(exclude_unset=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "Hello there."
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == 21
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_stream_ends_with_done_and_has_no_usage_unless_asked(talk: Any) -> None:
    client, _ = talk()
    with httpx2.stream(
        "POST", f"{client.base_url}chat/completions", json={"messages": HELLO, "stream": True}
    ) as response:
        lines = [line for line in response.iter_lines() if line]
    assert response.headers["content-type"].startswith("text/event-stream")
    assert lines[-1] == "data: [DONE]"
    assert all("usage" not in json.loads(line[6:]) for line in lines[:-1])


def test_streams_of_several_choices_with_log_probabilities(talk: Any) -> None:
    client, _ = talk()
    texts, counts, ends = ["", ""], [0, 0], []
    for chunk in client.chat.completions.create(
        model="scripted", messages=HELLO, n=2, stream=True, logprobs=True, max_tokens=6
    ):
        one = chunk.choices[0]
        texts[one.index] += one.delta.content or ""
        counts[one.index] += len(one.logprobs.content) if one.logprobs else 0
        ends += [one.finish_reason] if one.finish_reason else []
    assert (texts, counts, ends) == (["Hello ", "Hello "], [6, 6], ["length", "length"])


def test_the_streaming_helper_and_parse(talk: Any) -> None:
    class Animal(BaseModel):
        name: str
        legs: int

    client, backend = talk(saying('{"name": "c', 'at", "legs', '": 4}'))
    parsed = client.chat.completions.parse(model="scripted", messages=HELLO, response_format=Animal)
    assert parsed.choices[0].message.parsed == Animal(name="cat", legs=4)
    grammar = backend.requests[0].grammar
    assert isinstance(grammar, Grammar)
    assert grammar.kind == "json_schema"
    assert json.loads(grammar.text)["required"] == ["name", "legs"]
    with client.chat.completions.stream(model="scripted", messages=HELLO, response_format=Animal) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == Animal(name="cat", legs=4)
    assert {"chunk", "content.delta", "content.done"} <= set(kinds)
    client.chat.completions.create(model="scripted", messages=HELLO, response_format={"type": "json_object"})
    client.chat.completions.create(model="scripted", messages=HELLO, response_format={"type": "text"})
    assert [request.grammar for request in backend.requests[-2:]] == [Grammar("json_object"), None]


def test_the_async_client(talk: Any) -> None:
    sync, _ = talk()

    async def run() -> tuple[str, str]:
        async with AsyncOpenAI(base_url=sync.base_url, api_key="none", max_retries=0) as client:
            whole = await client.chat.completions.create(model="scripted", messages=HELLO)
            stream = await client.chat.completions.create(model="scripted", messages=HELLO, stream=True)
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            return whole.choices[0].message.content or "", text

    assert asyncio.run(run()) == ("Hello there.", "Hello there.")


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a place",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
        "strict": True,
    },
}
TIME = {"type": "function", "function": {"name": "time"}}


def calling() -> Any:
    pieces = [
        (ToolCallPiece(0, "call_a", "weather"),),
        (ToolCallPiece(0, arguments='{"place":'),),
        (ToolCallPiece(0, arguments='"Puna"}'), ToolCallPiece(1, "call_b", "time", "{}")),
    ]
    return events(
        *(Event(tool_calls=piece, token_ids=(1,)) for piece in pieces), Event(finish="stop", usage=Usage(5, 2, 3))
    )


def test_tools_are_called_whole_and_in_pieces(talk: Any, strictly: Any) -> None:
    client, backend = talk(calling())
    raw = client.chat.completions.with_raw_response.create(model="scripted", messages=HELLO, tools=[WEATHER, TIME])
    strictly(ChatCompletion, json.loads(raw.content))
    choice = raw.parse().choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    calls = [(call.id, call.function.name, call.function.arguments) for call in choice.message.tool_calls]
    assert calls == [("call_a", "weather", '{"place":"Puna"}'), ("call_b", "time", "{}")]
    request = backend.requests[0]
    schema = '{"type": "object", "properties": {"place": {"type": "string"}}}'
    assert request.tools == (Tool("weather", "of a place", schema, True), Tool("time"))
    assert (request.tool_choice, request.callable_tools, request.parallel_tool_calls) == ("auto", (), True)
    with client.chat.completions.stream(model="scripted", messages=HELLO, tools=[WEATHER, TIME]) as stream:
        final = stream.until_done().get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    assert [(c.id, c.function.name, c.function.arguments) for c in final.message.tool_calls] == calls


def test_which_tools_may_or_must_be_called(talk: Any) -> None:
    client, backend = talk(calling())
    named = {"type": "function", "function": {"name": "time"}}
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [named]}}
    for choice in ("none", "auto", "required", named, allowed):
        client.chat.completions.create(
            model="scripted", messages=HELLO, tools=[WEATHER, TIME], tool_choice=choice, parallel_tool_calls=False
        )
    assert [(one.tool_choice, one.callable_tools) for one in backend.requests] == [
        ("none", ()),
        ("auto", ()),
        ("required", ()),
        ("required", ("time",)),
        ("auto", ("time",)),
    ]
    assert not any(one.parallel_tool_calls for one in backend.requests)


def test_a_conversation_with_every_kind_of_message(talk: Any) -> None:
    client, backend = talk()
    call = {"id": "c1", "type": "function", "function": {"name": "time", "arguments": "{}"}}
    client.chat.completions.create(
        model="scripted",
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "What "}, {"type": "text", "text": "time?"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "noon"},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
            {"role": "user", "content": "Please"},
        ],
    )
    assert backend.requests[0].prompt == (
        Message("system", "Be brief."),
        Message("user", "What time?"),
        Message("assistant", "", (ToolCall("time", "{}", "c1"),)),
        Message("tool", "noon", (), "c1"),
        Message("assistant", "No."),
        Message("user", "Please"),
    )


IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a/b.png"}}]}

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"audio": {"voice": "a", "format": "wav"}}, "audio"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"function_call": "auto"}, "function_call"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"moderation": {"model": "x"}}, "moderation"),
    ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
    ({"prompt_cache_options": {"mode": "explicit"}}, "prompt_cache_options"),
    ({"prompt_cache_retention": "24h"}, "prompt_cache_retention"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"store": True}, "store"),
    ({"verbosity": "high"}, "verbosity"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"nonsense": 1}, "nonsense"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "logprobs"),
    ({"n": 17}, "n"),
    ({"n": 0}, "n"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"seed": 1 << 64}, "seed"),
    ({"seed": -(1 << 64)}, "seed"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stop": "x" * 1001}, "stop"),
    ({"stop": ""}, "stop"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    ({"messages": []}, "messages"),
    ({"messages": [IMAGE]}, "messages.0.content.0.image_url.url"),
    ({"messages": [{"role": "user", "content": "x", "name": "Ann"}]}, "messages.0.name"),
    ({"messages": [{"role": "function", "content": "x", "name": "f"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.tool_call_id"),
    ({"messages": [{"role": "assistant", "content": "x", "annotations": [{"type": "url_citation"}]}]},
     "messages.0.annotations"),
    ({"messages": [{"role": "assistant", "content": "x", "refusal": "y"}]}, "messages.0.refusal"),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [TIME], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
    ({"tools": [TIME] * 129}, "tools"),
    ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools.0.custom"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_object", "json_schema": {"name": "x", "schema": {}}}},
     "response_format.json_schema"),
    ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"a": "b" * 300_000}}}},
     "response_format.json_schema"),
    ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
    ({"timeout": -1}, "timeout"),
]  # fmt: skip


def test_what_is_not_honoured_is_refused_by_its_name(talk: Any) -> None:
    client, backend = talk()
    with httpx2.Client(base_url=str(client.base_url)) as http:
        for fields, name in REFUSED:
            response = http.post("chat/completions", json={"model": "scripted", "messages": HELLO, **fields})
            assert response.status_code == 400, (fields, response.text)
            error = response.json()["error"]
            assert (error["param"] or "").startswith(name), (fields, error)
            assert name.split(".")[-1] in error["message"]
            assert error["type"] == "invalid_request_error"
    assert backend.requests == []


def test_what_asks_for_nothing_is_accepted() -> None:
    asked(
        ChatBody.model_validate(
            {
                "messages": HELLO, "audio": None, "functions": [], "modalities": ["text"], "store": False,
                "reasoning_effort": "none", "service_tier": "default", "verbosity": "medium", "n": 1,
                "prompt_cache_key": "x", "safety_identifier": "y", "stream_options": None, "tools": [],
            }
        )
    )  # fmt: skip


def test_tools_for_a_model_that_has_no_form_for_them(talk: Any) -> None:
    client, _ = talk(None, replace(CARD, tools=False))
    with pytest.raises(BadRequestError, match="has no form for tools") as caught:
        client.chat.completions.create(model="scripted", messages=HELLO, tools=[TIME])
    assert caught.value.param == "tools"


def test_an_unknown_model(talk: Any) -> None:
    client, _ = talk()
    with pytest.raises(NotFoundError) as caught:
        client.chat.completions.create(model="other", messages=HELLO)
    assert caught.value.code == "model_not_found"
    with pytest.raises(NotFoundError):
        list(client.chat.completions.create(model="other", messages=HELLO, stream=True))


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_backend_refuses_before_it_begins(talk: Any, stream: bool) -> None:
    async def script(request: Request) -> AsyncGenerator[Event]:
        raise errors.pop(0)
        yield Event()

    client, _ = talk(script)
    errors: list[Exception] = []
    for error, status, code in (
        (ChatFormatError("base has no chat format."), 400, "invalid_messages"),
        (ContextError("Too long."), 400, "context_length_exceeded"),
        (QueueFullError("Full."), 429, "queue_full"),
        (RuntimeError("secret"), 500, "server_error"),
    ):
        errors.append(error)
        with pytest.raises(APIError) as caught:
            list(client.chat.completions.create(model="scripted", messages=HELLO, stream=stream))
        assert caught.value.status_code == status  # type: ignore[attr-defined]
        assert caught.value.code == code
        assert "secret" not in str(caught.value)


def test_a_backend_that_fails_in_the_middle_of_a_stream(talk: Any) -> None:
    async def script(request: Request) -> AsyncGenerator[Event]:
        yield Event(text="Hel")
        raise RuntimeError("secret")

    client, backend = talk(script)
    body = {"messages": HELLO, "stream": True}
    with httpx2.stream("POST", f"{client.base_url}chat/completions", json=body) as response:
        lines = [line for line in response.iter_lines() if line]
    assert "Hel" in lines[-2]
    error = json.loads(lines[-1].removeprefix("data: "))["error"]
    assert error["code"] == "server_error"
    assert "secret" not in error["message"]
    assert backend.running == 0
    with pytest.raises(APIError, match="The server failed"):
        list(client.chat.completions.create(model="scripted", messages=HELLO, stream=True))


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_answer(talk: Any, eventually: Any, stream: bool) -> None:
    async def script(request: Request) -> AsyncGenerator[Event]:
        yield Event(text="Hel")
        await asyncio.Event().wait()

    client, backend = talk(script)
    body = {"messages": HELLO, "stream": stream}
    if stream:
        with httpx2.stream("POST", f"{client.base_url}chat/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            assert backend.running == 1
    else:
        with pytest.raises(httpx2.ReadTimeout):
            httpx2.post(f"{client.base_url}chat/completions", json=body, timeout=0.3)
    eventually(lambda: len(backend.requests) == 1 and backend.running == 0)


def test_models(talk: Any) -> None:
    card = replace(CARD, nbytes=12, modified=3.5, quantization="Q8_0", parameters=99, aliases=("small",))
    client, _ = talk(None, card)
    (model,) = client.models.list().data
    assert (model.id, model.object, model.created, model.owned_by) == ("scripted", "model", 3, "puna")
    assert model.model_extra == {
        "puna": {
            "context_length": 4096, "nbytes": 12, "loaded": True, "fits": True, "why": "", "chat": True, "tools": True,
            "sees": False, "infills": False, "quantization": "Q8_0", "parameters": 99, "aliases": ["small"],
        }
    }  # fmt: skip
    assert client.models.retrieve("small").id == "scripted"
    with pytest.raises(NotFoundError):
        client.models.retrieve("a/b")


def test_waiting_pieces_become_one_chunk() -> None:
    async def run() -> list[list[tuple[int, int]]]:
        async def source() -> AsyncGenerator[int]:
            for i in range(5):
                yield i
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            yield 5

        return [taken async for taken in batches(source(), source())]

    taken = asyncio.run(run())
    assert taken[0] == [(0, i) for i in range(5)] + [(1, i) for i in range(5)]
    assert sorted(pair for pairs in taken for pair in pairs) == [(k, i) for k in (0, 1) for i in range(6)]
    chunks = Chunks(ScriptedBackend(), "id", "m", "fp", with_logprobs=False, usage=UsageInStream(None))
    given = [Event(0, "a"), Event(0, "b"), Event(1, "c"), Event(0, "d"), Event(0, "", finish="stop")]
    said = chunks.of([(0, event) for event in given])
    told = [json.loads(line[6:])["choices"][0] for line in said.decode().split("\n\n") if line]
    assert [(one["index"], one["delta"].get("content"), one["finish_reason"]) for one in told] == [
        (0, "", None), (0, "ab", None), (1, "", None), (1, "c", None), (0, "d", None), (0, None, "stop"),
    ]  # fmt: skip


def test_a_source_that_fails_does_so_after_what_it_said_and_ends_the_others() -> None:
    ended: list[int] = []

    async def fails() -> AsyncGenerator[int]:
        yield 1
        raise ValueError("no")

    async def waits() -> AsyncGenerator[int]:
        try:
            await asyncio.Event().wait()
            yield 0
        finally:
            ended.append(1)

    async def run() -> list[Any]:
        with pytest.raises(ValueError, match="no"):
            await take()
        return taken

    async def take() -> None:
        async for some in batches(fails(), waits()):
            taken.extend(some)

    taken: list[Any] = []
    assert asyncio.run(run()) == [(0, 1)]
    assert ended == [1]

    async def raises() -> None:
        raise ValueError("no")

    async def sleeps() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(2)

    async def run_together() -> None:
        await together([sleeps(), raises()])

    with pytest.raises(ValueError, match="no"):
        asyncio.run(run_together())
    assert ended == [1, 2]


SURROGATE = r'"\ud800"'


def test_what_json_cannot_say_is_refused_wherever_it_is(talk: Any) -> None:
    client, backend = talk()
    tool = '"tools": [{"type": "function", "name": "f", "parameters": {"x": %s}}]'
    for path, fields in (
        ("chat/completions", '"messages": [{"role": "user", "content": "\\ud800"}]'),
        ("chat/completions", '"messages": [{"role": "user", "content": "x"}], "temperature": NaN'),
        ("completions", '"prompt": ["\\udfff"]'),
        ("responses", '"input": "x", "metadata": {"\\ud800": ""}'),
        ("responses", f'"input": "x", {tool % "Infinity"}'),
        ("responses", f'"input": "x", "stream": true, {tool % SURROGATE}'),
    ):
        body = f"{{{fields}}}"
        response = httpx2.post(f"{client.base_url}{path}", content=body, headers={"Content-Type": "application/json"})
        assert response.status_code == 400, (fields, response.text)
        assert response.json()["error"]["code"] == "invalid_json"
    assert backend.requests == []


def test_usage_may_stand_in_every_chunk(talk: Any) -> None:
    client, _ = talk(saying("ab", "c"))
    options = {"include_usage": True, "continuous_usage_stats": True}
    pieces = list(client.chat.completions.create(model="", messages=HELLO, stream=True, stream_options=options))
    made = [piece.usage.completion_tokens for piece in pieces]
    assert made == sorted(made)
    assert made[-1] == 3
    assert len({piece.usage.prompt_tokens for piece in pieces}) == 1
