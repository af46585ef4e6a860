"""OpenAI's own Python client."""

from __future__ import annotations

import io
import json
import time

import openai
from checks import BASE, CHAT, KEY, URL, check, run
from pydantic import BaseModel, Field

client = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0)
later = openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0)
HELLO = [{"role": "user", "content": "Say hello."}]


class Point(BaseModel):
    """What `parse` is asked for."""

    x: int = Field(ge=0, le=99)
    colour: str = Field(pattern="^(red|green)$")


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Lima", "Puno"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}


@check("models.list, models.retrieve")
def models() -> None:
    assert {BASE, CHAT} <= {model.id for model in client.models.list()}
    assert client.models.retrieve(BASE).owned_by == "puna"


@check("completions.create: the same text for the same seed, stop, logprobs, echo, several prompts")
def completions() -> None:
    asked = {"model": BASE, "prompt": "Once upon a time", "max_tokens": 20, "seed": 7}
    first = client.completions.create(**asked)
    assert first.choices[0].text == client.completions.create(**asked).choices[0].text != ""
    assert first.usage.completion_tokens == 20
    stop = first.choices[0].text[10:14]
    assert client.completions.create(**asked, stop=stop).choices[0].text == first.choices[0].text.split(stop)[0]
    told = client.completions.create(model=BASE, prompt="The dog", max_tokens=3, logprobs=2, echo=True, temperature=0)
    assert told.choices[0].text.startswith("The dog")
    assert len(told.choices[0].logprobs.tokens) == len(told.choices[0].logprobs.token_logprobs) > 3
    assert told.choices[0].logprobs.token_logprobs[0] is None
    several = client.completions.create(model=BASE, prompt=["The dog", "The cat"], max_tokens=5, n=2)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]


@check("completions.create, streamed")
def streamed() -> None:
    asked = {"model": BASE, "prompt": "Once", "max_tokens": 30, "temperature": 0}
    pieces = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(p.choices[0].text for p in pieces if p.choices) == client.completions.create(**asked).choices[0].text
    assert [p.choices[0].finish_reason for p in pieces if p.choices and p.choices[0].finish_reason] == ["length"]
    assert pieces[-1].usage.completion_tokens == 30


@check("chat.completions.create: usage, n, logprobs with bytes")
def chat() -> None:
    answer = client.chat.completions.create(
        model=CHAT, messages=HELLO, max_completion_tokens=8, n=2, logprobs=True, top_logprobs=3, seed=1
    )
    assert len(answer.choices) == 2
    content = answer.choices[0].logprobs.content
    assert len(content) == 8
    assert all(len(token.top_logprobs) == 3 for token in content)
    assert answer.usage.completion_tokens == 16
    assert answer.usage.prompt_tokens > 10


@check("chat.completions.create, streamed; a stream that is left early")
def chat_streamed() -> None:
    pieces = list(client.chat.completions.create(model=CHAT, messages=HELLO, max_tokens=8, stream=True))
    assert pieces[0].choices[0].delta.role == "assistant"
    assert pieces[-1].choices[0].finish_reason == "length"
    with client.chat.completions.create(model=CHAT, messages=HELLO, max_tokens=5000, stream=True) as stream:
        next(iter(stream))


@check("chat.completions.stream: the helper's events")
def helper() -> None:
    with client.chat.completions.stream(model=CHAT, messages=HELLO, max_tokens=200, response_format=Point) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion().choices[0]
    assert isinstance(final.message.parsed, Point)
    assert {"chunk", "content.delta", "content.done"} <= kinds


@check("chat.completions.parse: a pydantic model")
def parse() -> None:
    answer = client.chat.completions.parse(model=CHAT, messages=HELLO, response_format=Point, max_tokens=200)
    assert isinstance(answer.choices[0].message.parsed, Point)


@check("tools: required, named, streamed; an answer's call and its result sent back")
def tools() -> None:
    asked = {"model": CHAT, "messages": HELLO, "tools": [TOOL], "max_tokens": 200}
    named = {"type": "function", "function": {"name": "weather"}}
    for choice in ("required", named):
        answer = client.chat.completions.create(**asked, tool_choice=choice, parallel_tool_calls=False).choices[0]
        assert answer.finish_reason == "tool_calls"
        (call,) = answer.message.tool_calls
        assert json.loads(call.function.arguments)["city"] in ("Lima", "Puno")
    pieces = client.chat.completions.create(**asked, tool_choice="required", parallel_tool_calls=False, stream=True)
    deltas = [part for piece in pieces for part in piece.choices[0].delta.tool_calls or ()]
    assert deltas[0].function.name == "weather"
    assert json.loads("".join(delta.function.arguments or "" for delta in deltas))["days"] in range(1, 10)
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"sky": "clear"}'}
    talk = [*HELLO, answer.message.model_dump(exclude_none=True), result]
    again = client.chat.completions.create(model=CHAT, messages=talk, tools=[TOOL], max_tokens=4, tool_choice="none")
    assert again.choices[0].finish_reason == "length"


@check("responses.create, streamed, previous_response_id, parse, retrieve, delete")
def responses() -> None:
    first = client.responses.create(model=CHAT, input="Say hello.", max_output_tokens=16)
    assert first.status == "incomplete"
    assert first.output_text
    second = client.responses.create(
        model=CHAT, input="Again.", previous_response_id=first.id, max_output_tokens=16, stream=True
    )
    kinds = [event.type for event in second]
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.incomplete"
    assert "response.output_text.delta" in kinds
    parsed = client.responses.parse(model=CHAT, input="A point.", text_format=Point, max_output_tokens=200)
    assert isinstance(parsed.output_parsed, Point)
    assert client.responses.retrieve(first.id).id == first.id
    client.responses.delete(first.id)
    try:
        client.responses.retrieve(first.id)
    except openai.NotFoundError:
        return
    raise AssertionError("a deleted response is still there")


@check("embeddings.create: float and base64 agree")
def embeddings() -> None:
    plain = client.embeddings.create(model=BASE, input=["the dog", "a cat"], encoding_format="float")
    packed = client.embeddings.create(model=BASE, input=["the dog", "a cat"])  # base64 on the wire
    for one, other in zip(plain.data, packed.data, strict=True):
        assert max(abs(a - b) for a, b in zip(one.embedding, other.embedding, strict=True)) < 1e-6


@check("files and batches: made, polled, read")
def batches() -> None:
    lines = [
        {"custom_id": str(i), "method": "POST", "url": "/v1/completions",
         "body": {"model": BASE, "prompt": "The dog", "max_tokens": 4, "seed": i}}
        for i in range(3)
    ]  # fmt: skip
    data = "\n".join(json.dumps(line) for line in lines).encode()
    file = client.files.create(file=("asked.jsonl", io.BytesIO(data)), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    end = time.monotonic() + 60
    while batch.status not in ("completed", "failed", "expired", "cancelled"):
        assert time.monotonic() < end, batch
        time.sleep(0.1)
        batch = client.batches.retrieve(batch.id)
    assert batch.request_counts.completed == 3, batch
    answers = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
    assert {answer["custom_id"] for answer in answers} == {"0", "1", "2"}
    client.files.delete(file.id)


@check("errors have the client's own types: an unknown model, a field that is not honoured, a prompt too long")
def errors() -> None:
    def raised(call: object, kind: type[Exception]) -> Exception:
        try:
            call()  # type: ignore[operator]
        except kind as error:
            return error
        raise AssertionError(f"no {kind.__name__}")

    raised(lambda: client.completions.create(model="nobody", prompt="x"), openai.NotFoundError)
    error = raised(
        lambda: client.chat.completions.create(model=CHAT, messages=HELLO, extra_body={"wings": 2}),
        openai.BadRequestError,
    )
    assert "wings" in str(error)
    raised(lambda: client.completions.create(model=BASE, prompt="dog " * 5000), openai.BadRequestError)


@check("the asynchronous client: sixteen at once, and a stream")
async def at_once() -> None:
    import asyncio

    async def one(seed: int) -> str:
        made = await later.completions.create(model=BASE, prompt="The dog", max_tokens=16, seed=seed)
        return made.choices[0].text

    texts = await asyncio.gather(*(one(i // 2) for i in range(16)))
    assert all(texts[i] == texts[i + 1] for i in range(0, 16, 2))
    stream = await later.chat.completions.create(model=CHAT, messages=HELLO, max_tokens=4, stream=True)
    assert len([piece async for piece in stream]) >= 2
    await later.close()


run()
