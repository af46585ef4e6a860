"""Anthropic's own Python client."""

from __future__ import annotations

import anthropic
from checks import CHAT, KEY, URL, check, run

client = anthropic.Anthropic(base_url=URL, api_key=KEY, max_retries=0)
HELLO = [{"role": "user", "content": "Say hello."}]
TOOL = {
    "name": "weather",
    "description": "The weather of a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Lima", "Puno"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


@check("messages.create: system, usage, stop reason")
def create() -> None:
    answer = client.messages.create(model=CHAT, system="Be kind.", messages=HELLO, max_tokens=8)
    assert answer.stop_reason == "max_tokens"
    assert answer.usage.output_tokens == 8
    assert answer.content[0].type == "text"


@check("messages.stream: events and the final message")
def stream() -> None:
    with client.messages.stream(model=CHAT, messages=HELLO, max_tokens=8) as events:
        text = "".join(events.text_stream)
        final = events.get_final_message()
    assert final.content[0].text == text
    assert final.stop_reason == "max_tokens"


@check("tools: any, one by name, streamed; the result sent back")
def tools() -> None:
    for choice in ({"type": "any"}, {"type": "tool", "name": "weather"}):
        choice["disable_parallel_tool_use"] = True
        answer = client.messages.create(model=CHAT, messages=HELLO, max_tokens=200, tools=[TOOL], tool_choice=choice)
        assert answer.stop_reason == "tool_use"
        (call,) = [block for block in answer.content if block.type == "tool_use"]
        assert call.input["city"] in ("Lima", "Puno")
    with client.messages.stream(model=CHAT, messages=HELLO, max_tokens=200, tools=[TOOL], tool_choice=choice) as events:
        final = events.get_final_message()
    assert final.content[-1].input["city"] in ("Lima", "Puno")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "clear"}
    talk = [
        *HELLO,
        {"role": "assistant", "content": [call.model_dump(include={"type", "id", "name", "input"})]},
        {"role": "user", "content": [result]},
    ]
    assert client.messages.create(model=CHAT, messages=talk, max_tokens=4, tools=[TOOL]).content is not None


@check("messages.count_tokens agrees with the usage of an answer")
def count() -> None:
    counted = client.messages.count_tokens(model=CHAT, messages=HELLO).input_tokens
    usage = client.messages.create(model=CHAT, messages=HELLO, max_tokens=1).usage
    assert counted == usage.input_tokens + (usage.cache_read_input_tokens or 0)


@check("errors have the client's own types")
def errors() -> None:
    try:
        client.messages.create(model="nobody", messages=HELLO, max_tokens=1)
    except anthropic.NotFoundError:
        return
    raise AssertionError("no NotFoundError")


@check("the asynchronous client")
async def later() -> None:
    async with anthropic.AsyncAnthropic(base_url=URL, api_key=KEY, max_retries=0) as other:
        answer = await other.messages.create(model=CHAT, messages=HELLO, max_tokens=4)
    assert answer.usage.output_tokens == 4


run()
