"""`/v1/chat/completions`: a conversation, answered whole or piece by piece.

What it is: OpenAI's body to a `types.Request`, and events to OpenAI's answer, after
https://platform.openai.com/docs/api-reference/chat. Temperature and top_p are 1 where they are left out, as there.
What it is not: the chat format, or the parsing of tool calls: both are the backend's.
What is surprising: chunks of text are put together from bytes that are made once a stream, and what several steps made
while the client was busy goes out as one: a model object a token costs more than a small model's token.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse
from pydantic import ConfigDict, Field
from starlette.responses import Response

from puna.server.bodies import Body, RequestBody
from puna.server.caller import Caller, needs
from puna.server.fields import shape, told_refused
from puna.server.limits import MAX_MODEL_NAME
from puna.server.openai_parts import (
    FINISHES,
    Function,
    ResponseFormat,
    StreamOptions,
    Tools,
    UsageInStream,
    check_stream_options,
    completion,
    fingerprint,
    logprobs_json,
    merged,
    metadata_checked,
    refuse,
    request_of,
    stream_error,
    unsupported,
    usage_json,
)
from puna.server.pictures import picture_at
from puna.server.problems import RequestError
from puna.server.sampling import SamplingFields, to_sampling
from puna.server.service import Call, Service, Whole, collect, new_id, request_id, service_of
from puna.server.streams import Streamed, answered, batches
from puna.types import Backend, Event, Message, Picture, Request, ToolCall, ToolCallPiece

router = APIRouter()

_REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "audio": ((), "no model here speaks"),
    "functions": (([],), "it is deprecated, and tools has taken its place"),
    "function_call": ((), "it is deprecated, and tool_choice has taken its place"),
    "modalities": ((["text"],), "answers are text"),
    "moderation": ((), "a server judges every request alike, as `puna serve --guard` has it, or none"),
    "prediction": ((), "guesses come from the prompt or a draft model, as the server was started"),
    "prompt_cache_options": ((), "prompts are remembered for each key as long as there is room"),
    "prompt_cache_retention": (("in_memory",), "prompts are remembered for each key as long as there is room"),
    "reasoning_effort": (("none",), "the model has no such setting"),
    "service_tier": (("auto", "default"), "there is one tier"),
    "store": ((False,), "chat completions are not stored; /v1/responses stores"),
    "verbosity": (("medium",), "the model has no such setting"),
    "web_search_options": ((), "nothing is looked up on the web"),
}
"""Fields that are not honoured: the values that ask for nothing, and why others are refused."""


class TextPart(Body):
    """A piece of a message's text."""

    type: Literal["text"]
    text: str


class RefusalPart(Body):
    """A piece in which the assistant declined."""

    type: Literal["refusal"]
    refusal: str


class ImageUrl(Body):
    """Where a picture is: a `data:` URL has it, one of https is fetched where the operator allows its host. Every
    picture is looked at as closely as the model can: `detail` "low" is refused."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(Body):
    """A picture."""

    type: Literal["image_url"]
    image_url: ImageUrl


class OtherPart(Body):
    """A piece that is neither text nor a picture: refused, by what it is."""

    type: Literal["input_audio", "file"]
    input_audio: Any = None
    file: Any = None


Part = Annotated[TextPart | RefusalPart | ImagePart | OtherPart, Field(discriminator="type")]


class CalledFunction(Body):
    """What was called, and with what, as JSON text."""

    name: str
    arguments: str


class Called(Body):
    """A call that the assistant made."""

    id: str
    type: Literal["function"]
    function: CalledFunction


_NOT_IN_A_MESSAGE: dict[str, tuple[tuple[object, ...], str]] = {
    "audio": ((), "no model here speaks"),
    "function_call": ((), "it is deprecated, and tool_calls has taken its place"),
    "annotations": (([],), "texts are not cited here"),
}


class ChatMessage(Body):
    """A message. `developer` is what `system` was called before; a `tool` answers the call `tool_call_id`."""

    model_config = ConfigDict(json_schema_extra=told_refused(_NOT_IN_A_MESSAGE))

    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[Called] | None = None
    tool_call_id: str | None = None
    annotations: list[Any] | None = None
    audio: Any = None
    function_call: Any = None


class ChatTool(Body):
    """A tool: functions only."""

    type: Literal["function"]
    function: Function


class Named(Body):
    """A tool by its name."""

    name: str


class NamedChoice(Body):
    """One tool, which must be called."""

    type: Literal["function"]
    function: Named


class Allowed(Body):
    """Those tools that may be called."""

    mode: Literal["auto", "required"]
    tools: list[NamedChoice]


class AllowedChoice(Body):
    """Some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: Allowed


Choice = Annotated[NamedChoice | AllowedChoice, Field(discriminator="type")]


class ChatBody(RequestBody, SamplingFields):
    """A request. Fields of Any are refused by name (`_REFUSED`); user, safety_identifier, prompt_cache_key and metadata
    only label it. `timeout` (seconds until the answer ends with what is there) and `adapter` are Puna's own, beside
    the names of `SamplingFields`."""

    model_config = ConfigDict(json_schema_extra=told_refused(_REFUSED))

    messages: list[ChatMessage] = Field(min_length=1)
    model: str = Field(default="", max_length=MAX_MODEL_NAME)
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    logprobs: bool | None = None
    max_completion_tokens: int | None = None
    max_tokens: int | None = None
    metadata: dict[str, str] | None = None
    n: int | None = None
    parallel_tool_calls: bool | None = None
    presence_penalty: float | None = None
    prompt_cache_key: str | None = None
    response_format: ResponseFormat | None = None
    safety_identifier: str | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    tool_choice: Literal["none", "auto", "required"] | Choice | None = None
    tools: list[ChatTool] | None = None
    top_logprobs: int | None = None
    top_p: float | None = None
    user: str | None = None
    timeout: float | None = None
    adapter: str | None = None
    audio: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    moderation: Any = None
    prediction: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    reasoning_effort: Any = None
    service_tier: Any = None
    store: Any = None
    verbosity: Any = None
    web_search_options: Any = None


_MESSAGE = shape(role={"const": "assistant"}, content={"type": ["string", "null"]})


@router.post(
    "/v1/chat/completions",
    responses=completion("chat.completion", "stop", "length", "tool_calls", "content_filter", message=_MESSAGE),
    response_class=JSONResponse,
    tags=["OpenAI"],
)
async def chat_completions(
    body: ChatBody,
    http: HttpRequest,
    caller: Annotated[Caller, Depends(needs("infer"))],
    service: Annotated[Service, Depends(service_of)],
) -> Response:
    """Answer a conversation."""
    if not body.stream:
        return JSONResponse(await answered(http, complete(service, caller, body)))
    number = request_id(http)
    return Streamed(_streamed(service, caller, body, asked(body)), lambda error: stream_error(error, number))


async def complete(service: Service, caller: Caller, body: ChatBody, priority: int = 0) -> dict[str, Any]:
    """The whole answer, as OpenAI's object. `stream` is not looked at."""
    made, tools = asked(body, priority)
    async with service.use(caller, body.model) as backend:
        request = tools.put_into(made, backend)
        call = Call(new_id("chatcmpl-"), caller, "chat", backend.card.name)
        wholes, usage = await collect(service.answer(call, backend, request), request.sampling.n)
        return {
            "id": call.id,
            "object": "chat.completion",
            "created": int(time.time()),
            "model": body.model or backend.card.name,
            "choices": [_choice(backend, i, whole, body) for i, whole in enumerate(wholes)],
            "usage": usage_json(usage),
            "service_tier": "default",
            "system_fingerprint": await fingerprint(backend),
        }


def asked(body: ChatBody, priority: int = 0) -> tuple[Request, Tools]:
    """What a body asks for, before it is known of which model. Raises RequestError naming what is not honoured."""
    refuse(body, _REFUSED)
    metadata_checked(body.metadata)
    check_stream_options(body.stream, body.stream_options)
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs.", code="invalid_value", param="top_logprobs")
    most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if body.max_tokens is not None and body.max_tokens != most:
        raise RequestError(
            "max_tokens and max_completion_tokens differ.",
            remedy="Leave max_tokens out.",
            code="invalid_value",
            param="max_tokens",
        )
    own = body.own()
    sampling = to_sampling(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        max_tokens=most,
        seed=body.seed,
        stop=body.stop,
        n=body.n,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=body.logit_bias,
        **own,
    )
    grammar = None if body.response_format is None else body.response_format.grammar()
    request = request_of(
        messages_of(body.messages), sampling, grammar=grammar, priority=priority, timeout=body.timeout,
        adapter=body.adapter,
    )  # fmt: skip
    return request, _tools(body)


def _tools(body: ChatBody) -> Tools:
    tools = [tool.function.tool(f"tools.{i}.function.parameters") for i, tool in enumerate(body.tools or ())]
    choice = body.tool_choice
    if isinstance(choice, NamedChoice):
        return Tools(tools, "required", (choice.function.name,), False)
    if isinstance(choice, AllowedChoice):
        names = tuple(dict.fromkeys(tool.function.name for tool in choice.allowed_tools.tools))
        if not names:
            raise RequestError("tool_choice allows no tool.", code="invalid_value", param="tool_choice")
        return Tools(tools, choice.allowed_tools.mode, names, body.parallel_tool_calls)
    return Tools(tools, choice, (), body.parallel_tool_calls)


def messages_of(messages: list[ChatMessage]) -> tuple[Message, ...]:
    """The conversation. Raises RequestError naming the message at fault."""
    made: list[Message] = []
    names: dict[str, str] = {}
    for i, message in enumerate(messages):
        where = f"messages.{i}"
        calls = tuple(ToolCall(c.function.name, c.function.arguments, c.id) for c in message.tool_calls or ())
        names.update((call.id, call.name) for call in calls)
        for name, (harmless, why) in _NOT_IN_A_MESSAGE.items():
            value = getattr(message, name)
            if value is not None and value not in harmless:
                raise unsupported(f"{where}.{name}", why)
        if message.role == "function":
            raise unsupported(f"{where}.role", 'A function\'s answer has the role "tool"')
        # Chat formats have no place for it; of a tool it says again what was called.
        if message.name is not None and not (message.role == "tool" and names.get(message.tool_call_id or "") in (
            None, message.name,
        )):  # fmt: skip
            raise unsupported(f"{where}.name", "Chat formats have no names of speakers")
        if message.role != "assistant" and (calls or message.refusal is not None):
            raise unsupported(f"{where}.{'tool_calls' if calls else 'refusal'}", "Only an assistant has that")
        if message.role != "tool" and message.tool_call_id is not None:
            raise unsupported(f"{where}.tool_call_id", "Only a tool has that")
        if message.role == "tool" and not message.tool_call_id:
            raise RequestError(
                f"{where}.tool_call_id is missing.",
                remedy="A tool's message says which call it answers.",
                code="invalid_value",
                param=f"{where}.tool_call_id",
            )
        text, pictures = _content(message, where)
        if text and message.refusal:
            raise unsupported(f"{where}.refusal", "A message that has content does not decline too")
        if text is None and message.refusal is None and not calls:
            raise RequestError(f"{where} has no content.", code="invalid_value", param=f"{where}.content")
        role = "system" if message.role == "developer" else message.role
        made.append(Message(role, text or message.refusal or "", calls, message.tool_call_id or "", pictures))
    return tuple(made)


def _content(message: ChatMessage, where: str) -> tuple[str | None, tuple[tuple[int, Picture], ...]]:
    """The text of a message, and its pictures at their places in it."""
    if message.content is None or isinstance(message.content, str):
        return message.content, ()
    texts: list[str] = []
    pictures: list[tuple[int, Picture]] = []
    for k, part in enumerate(message.content):
        if isinstance(part, TextPart):
            texts.append(part.text)
        elif isinstance(part, RefusalPart) and message.role == "assistant":
            texts.append(part.refusal)
        elif isinstance(part, ImagePart) and message.role == "user":
            name = f"{where}.content.{k}.image_url"
            if part.image_url.detail == "low":
                raise unsupported(f"{name}.detail", "Pictures are always looked at closely")
            pictures.append((sum(map(len, texts)), picture_at(part.image_url.url, f"{name}.url")))
        else:
            raise unsupported(f"{where}.content.{k}.type", f"{part.type}: not in a message of the role {message.role}")
    return "".join(texts), tuple(pictures)


def _finish(reason: str, called: bool) -> str:
    told = FINISHES[reason]  # type: ignore[index]
    return "tool_calls" if called and told == "stop" else told


def _choice(backend: Backend, index: int, whole: Whole, body: ChatBody) -> dict[str, Any]:
    message: dict[str, Any] = {
        "role": "assistant",
        "content": None if whole.tool_calls and not whole.text else whole.text,
        "refusal": whole.refusal or None,
    }
    if whole.tool_calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in whole.tool_calls
        ]
    told = {"content": logprobs_json(backend, whole.logprobs), "refusal": None} if body.logprobs else None
    return {
        "index": index,
        "message": message,
        "logprobs": told,
        "finish_reason": _finish(whole.finish, bool(whole.tool_calls)),
    }


async def _streamed(
    service: Service, caller: Caller, body: ChatBody, made: tuple[Request, Tools]
) -> AsyncGenerator[bytes]:
    asks, tools = made
    async with service.use(caller, body.model) as backend:
        request = tools.put_into(asks, backend)
        call = Call(new_id("chatcmpl-"), caller, "chat", backend.card.name, stream=True)
        chunks = Chunks(
            backend,
            call.id,
            body.model or backend.card.name,
            await fingerprint(backend),
            with_logprobs=bool(body.logprobs),
            usage=UsageInStream(body.stream_options),
        )
        async with aclosing(batches(service.answer(call, backend, request))) as several:
            async for events in several:
                if piece := chunks.of(events):
                    yield piece
        yield chunks.last()


class Chunks:
    """The chunks of one stream: events in, bytes out."""

    def __init__(
        self, backend: Backend, number: str, model: str, system: str, *, with_logprobs: bool, usage: UsageInStream
    ) -> None:
        self._backend, self._with_logprobs, self._usage = backend, with_logprobs, usage
        head = {
            "id": number,
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": model,
            "service_tier": "default",
            "system_fingerprint": system,
        }
        self._head = f"data: {json.dumps(head)[:-1]}"
        self._begun: set[int] = set()
        self._called: set[int] = set()

    def of(self, events: list[tuple[int, Event]]) -> bytes:
        """What these events say; texts of a choice that follow one another are one chunk."""
        made: list[str] = []
        self._usage.see(events)
        for _, event in merged(events):
            choice = event.choice
            if not event.text or event.finish or event.tool_calls or self._with_logprobs:
                self._slowly(event, made)
                continue
            if choice not in self._begun:
                made.append(self._begin(choice))
            made.append(
                f'{self._head},"choices":[{{"index":{choice},"delta":{{"content":{json.dumps(event.text)}}},'
                f'"logprobs":null,"finish_reason":null}}]{self._usage.tail}'
            )
        return "".join(made).encode()

    def last(self) -> bytes:
        """What stands after the last choice's end."""
        return self._usage.last(self._head)

    def _begin(self, choice: int) -> str:
        self._begun.add(choice)
        return self._chunk(choice, {"role": "assistant", "content": "", "refusal": None})

    def _slowly(self, event: Event, made: list[str]) -> None:
        """A piece that is not only text, or none: reading the prompt, log probabilities, calls, an end."""
        choice, told = event.choice, None
        if self._with_logprobs and event.logprobs:
            told = {"content": logprobs_json(self._backend, event.logprobs), "refusal": None}
        if not (event.text or told or event.tool_calls or event.finish):
            return
        if choice not in self._begun:
            made.append(self._begin(choice))
        if event.text or told:
            made.append(self._chunk(choice, {"content": event.text}, told))
        if event.tool_calls:
            self._called.add(choice)
            made.append(self._chunk(choice, {"tool_calls": [_piece(piece) for piece in event.tool_calls]}))
        if event.refusal:
            made.append(self._chunk(choice, {"refusal": event.refusal}))
        if event.finish is not None:
            made.append(self._chunk(choice, {}, None, _finish(event.finish, choice in self._called)))

    def _chunk(self, choice: int, delta: dict[str, Any], told: Any = None, finish: str | None = None) -> str:
        one = {"index": choice, "delta": delta, "logprobs": told, "finish_reason": finish}
        return f'{self._head},"choices":[{json.dumps(one)}]{self._usage.tail}'


def _piece(piece: ToolCallPiece) -> dict[str, Any]:
    function: dict[str, str] = {"arguments": piece.arguments}
    made: dict[str, Any] = {"index": piece.index, "function": function}
    if piece.name:
        made |= {"id": piece.id, "type": "function", "function": {"name": piece.name, **function}}
    return made
