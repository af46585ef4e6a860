"""`/v1/responses`: an answer that may be kept, and gone on from.

What it is: OpenAI's newer body to a `types.Request`, and events to its response and to the events of its streams, after
https://platform.openai.com/docs/api-reference/responses. Temperature and top_p are 1 where they are left out.
What it is not: an agent: the only tools are the client's own functions, and nothing runs in the background.
What is surprising: a whole answer and a stream are made by the same `Speech`; a stream sends what it says. A response
is stored (unless `store` is false) as what was new in it, a picture as it was sent: one elsewhere by its URL, which is
fetched again at each turn. What came before is found through `previous_response_id`, so nobody can go on from those
that followed one that was deleted. Instructions are not carried over, as there.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse
from pydantic import ConfigDict, Field
from starlette.responses import Response

from puna.server.bodies import Body, RequestBody
from puna.server.caller import Caller, needs
from puna.server.fields import COUNT, TEXT, answer, several, shape, told_refused
from puna.server.limits import MAX_MODEL_NAME, MAX_PICTURES
from puna.server.openai_files import listed, unknown
from puna.server.openai_parts import (
    RESPONSES,
    Function,
    Tools,
    form,
    logprobs_json,
    merged,
    metadata_checked,
    refuse,
    request_of,
    unsupported,
)
from puna.server.pictures import picture_at
from puna.server.problems import RequestError, problem_of
from puna.server.sampling import SamplingFields, to_sampling
from puna.server.service import Call, Service, new_id, request_id, service_of
from puna.server.store import Store, store_of
from puna.server.streams import Streamed, answered, batches, sse
from puna.types import Backend, Event, Message, Picture, Request, TokenLogprob, ToolCall, ToolCallPiece, Usage

router = APIRouter()

_REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "access_programs": ((), "there are none"),
    "background": ((False,), "an answer ends with its request; /v1/batches answers in the background"),
    "background_options": ((), "an answer ends with its request; /v1/batches answers in the background"),
    "context_management": (([],), "nothing of a context is ever cut or rewritten"),
    "conversation": ((), "previous_response_id goes on from an earlier response"),
    "image": ((), "the model reads text"),
    "max_tool_calls": ((), "it bounds built-in tools, and there are none"),
    "moderation": ((), "a server judges every request alike, as `puna serve --guard` has it, or none"),
    "prompt": ((), "templates are not kept here"),
    "prompt_cache_options": ((), "prompts are remembered for each key as long as there is room"),
    "prompt_cache_retention": (("in_memory",), "prompts are remembered for each key as long as there is room"),
    "reasoning": (({}, {"effort": None}, {"effort": "none"}), "the model has no such setting"),
    "service_tier": (("auto", "default"), "there is one tier"),
    "truncation": (("disabled",), "nothing of a context is ever cut"),
}
"""Fields that are not honoured: the values that ask for nothing, and why others are refused."""

LOGPROBS = "message.output_text.logprobs"
"""What `include` may name."""


ItemId = Annotated[str, Field(max_length=256)]
"""An item's id. No prompt has it, so no context bounds it; and it is kept, and read again at each turn that follows."""


class ItemPart(Body):
    """A piece of an item's text, or (`input_image`) a picture in it."""

    type: str
    text: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None
    image_url: str | None = None
    detail: Literal["low", "high", "auto", "original"] | None = None
    file_id: Any = None


class Item(Body):
    """A message, a call of a function (`function_call`), or what came of it (`function_call_output`)."""

    type: str | None = None
    id: ItemId | None = None
    status: str | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    phase: Literal["commentary", "final_answer"] | None = None
    content: str | list[ItemPart] | None = None
    call_id: ItemId | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[ItemPart] | None = None


class FunctionTool(Function):
    """A function that may be called."""

    type: Literal["function"]


class NamedFunction(Body):
    """One function."""

    type: Literal["function"]
    name: str


class AllowedFunctions(Body):
    """Those functions that may be called."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[NamedFunction]


class Format(Body):
    """The form that an answer must have."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class Text(Body):
    """About the text of an answer."""

    format: Format | None = None
    verbosity: Any = None


class ResponseStreamOptions(Body):
    """`stream_options`. Nothing is obfuscated."""

    include_obfuscation: Literal[False] | None = None


class ResponseBody(RequestBody, SamplingFields):
    """A request. Fields of Any are refused by name (`_REFUSED`); user, safety_identifier, prompt_cache_key and metadata
    only label it. `seed`, `timeout` and `adapter` are Puna's own, beside the names of `SamplingFields`."""

    model_config = ConfigDict(json_schema_extra=told_refused(_REFUSED))

    input: str | list[Item]
    model: str = Field(default="", max_length=MAX_MODEL_NAME)
    include: list[str] | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, str] | None = None
    parallel_tool_calls: bool | None = None
    previous_response_id: str | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    temperature: float | None = None
    text: Text | None = None
    tool_choice: (
        Literal["none", "auto", "required"]
        | Annotated[NamedFunction | AllowedFunctions, Field(discriminator="type")]
        | None
    ) = None
    tools: list[FunctionTool] | None = None
    top_logprobs: int | None = None
    top_p: float | None = None
    user: str | None = None
    seed: int | None = None
    timeout: float | None = None
    adapter: str | None = None
    access_programs: Any = None
    background: Any = None
    background_options: Any = None
    context_management: Any = None
    conversation: Any = None
    image: Any = None
    max_tool_calls: Any = None
    moderation: Any = None
    prompt: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    reasoning: Any = None
    service_tier: Any = None
    truncation: Any = None


_RESPONSE = shape(
    id=TEXT,
    object={"const": "response"},
    created_at=COUNT,
    status={"enum": ["completed", "incomplete", "failed", "in_progress"]},
    model=TEXT,
    output=several(shape(id=TEXT, type={"enum": ["message", "function_call"]}, status=TEXT)),
)


@router.post(
    "/v1/responses",
    responses={**RESPONSES, **answer(_RESPONSE, "text/event-stream")},
    response_class=JSONResponse,
    tags=["OpenAI"],
)
async def responses(
    body: ResponseBody,
    http: HttpRequest,
    caller: Annotated[Caller, Depends(needs("infer"))],
    service: Annotated[Service, Depends(service_of)],
    store: Annotated[Store, Depends(store_of)],
) -> Response:
    """Answer."""
    if not body.stream:
        return JSONResponse(await answered(http, complete(service, store, caller, body)))
    speech = Speech(body, *await asked(store, caller, body))
    number = request_id(http)
    return Streamed(_streamed(service, store, caller, speech), lambda error: speech.fail(error, number))


async def complete(
    service: Service, store: Store, caller: Caller, body: ResponseBody, priority: int = 0
) -> dict[str, Any]:
    """The whole response. `stream` is not looked at."""
    speech = Speech(body, *await asked(store, caller, body, priority))
    async with aclosing(_streamed(service, store, caller, speech)) as pieces:
        async for _ in pieces:
            pass
    return speech.response


async def asked(
    store: Store, caller: Caller, body: ResponseBody, priority: int = 0
) -> tuple[Request, Tools, list[dict[str, Any]]]:
    """What a body asks for, before it is known of which model, and its own items as they are stored.

    Raises RequestError naming what is not honoured.
    """
    refuse(body, _REFUSED)
    metadata_checked(body.metadata)
    if body.text is not None and body.text.verbosity not in (None, "medium"):
        raise unsupported("text.verbosity", "The model has no such setting")
    if body.stream_options is not None and not body.stream:
        raise RequestError(
            "stream_options is only honoured with stream.", code="unsupported_parameter", param="stream_options"
        )
    for name in body.include or ():
        if name != LOGPROBS:
            raise unsupported("include", f"{name[:80]}: there is only {LOGPROBS}")
    with_logprobs = LOGPROBS in (body.include or ())
    if body.top_logprobs and not with_logprobs:
        raise RequestError(f"top_logprobs needs {LOGPROBS} in include.", code="invalid_value", param="top_logprobs")
    sampling = to_sampling(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        max_tokens=body.max_output_tokens,
        seed=body.seed,
        logprobs=(body.top_logprobs or 0) if with_logprobs else None,
        **body.own(),
    )
    wanted = body.text.format if body.text is not None else None
    if wanted is not None and wanted.type != "json_schema" and wanted.schema_ is not None:
        raise unsupported("text.format.schema", f"A form of the type {wanted.type} has no schema")
    grammar = None if wanted is None else form(wanted.type, wanted.schema_, "text.format.schema")
    own = [_kept(item, i) for i, item in enumerate(_items(body.input))]
    items = own
    if body.previous_response_id is not None:
        items = [*await asyncio.to_thread(_before, store, caller, body.previous_response_id), *own]
    messages = messages_of(items, len(items) - len(own))
    if body.instructions is not None:
        messages = (Message("system", body.instructions), *messages)
    if not messages:
        raise RequestError("input has nothing to answer.", code="invalid_value", param="input")
    request = request_of(
        messages, sampling, grammar=grammar, priority=priority, timeout=body.timeout, adapter=body.adapter
    )
    return request, _tools(body), own


def _tools(body: ResponseBody) -> Tools:
    tools = [tool.tool(f"tools.{i}.parameters") for i, tool in enumerate(body.tools or ())]
    choice = body.tool_choice
    if isinstance(choice, NamedFunction):
        return Tools(tools, "required", (choice.name,), False)
    if isinstance(choice, AllowedFunctions):
        names = tuple(dict.fromkeys(tool.name for tool in choice.tools))
        if not names:
            raise RequestError("tool_choice allows no tool.", code="invalid_value", param="tool_choice")
        return Tools(tools, choice.mode, names, body.parallel_tool_calls)
    return Tools(tools, choice, (), body.parallel_tool_calls)


def _items(given: str | list[Item]) -> list[Item]:
    return [Item(role="user", content=given)] if isinstance(given, str) else given


def _kept(item: Item, i: int) -> dict[str, Any]:
    """An item as it is stored and told again."""
    where = f"input.{i}"
    kind = item.type or "message"
    fields = {
        "message": {"role", "content", "phase"},
        "function_call": {"call_id", "name", "arguments"},
        "function_call_output": {"call_id", "output"},
    }
    if kind not in fields:
        raise unsupported(f"{where}.type", f"{kind[:80]}: items are {', '.join(fields)}")
    for name in ("role", "content", "phase", "call_id", "name", "arguments", "output"):
        needed, given = name in fields[kind] and name != "phase", getattr(item, name) is not None
        if needed and not given:
            raise RequestError(f"{where}.{name} is missing.", code="invalid_value", param=f"{where}.{name}")
        if given and name not in fields[kind]:
            raise unsupported(f"{where}.{name}", f"A {kind} has none")
    if kind == "function_call":
        return _call_item(item.id or new_id("fc_"), item.call_id or "", item.name or "", item.arguments or "")
    if kind == "function_call_output":
        text = _joined(item.output, f"{where}.output", ("input_text",))
        number = item.id or new_id("fco_")
        return {"id": number, "type": kind, "call_id": item.call_id, "output": text, "status": "completed"}
    own = "output_text" if item.role == "assistant" else "input_text"
    number = item.id or new_id("msg_")
    content = _parts(item, own, f"{where}.content")
    return {"id": number, "type": kind, "role": item.role, "status": "completed", "content": content}


def _parts(item: Item, own: str, where: str) -> list[dict[str, Any]]:
    """The content of a message as it is stored: texts that follow one another are one, and a user's pictures stand
    where they do."""
    kinds = (own, "refusal") if own == "output_text" else (own,)
    made: list[dict[str, Any]] = []
    texts: list[str] = []

    def end() -> None:
        made.append({"type": own, "text": "".join(texts), **({"annotations": []} if own == "output_text" else {})})
        texts.clear()

    content = item.content if isinstance(item.content, list) else [ItemPart(type=own, text=item.content)]
    for k, part in enumerate(content):
        if part.type == "input_image" and item.role == "user":
            if texts:
                end()
            made.append(_image(part, f"{where}.{k}"))
        else:
            texts.append(_said(part, f"{where}.{k}", kinds))
    if texts or not made:
        end()
    return made


def _image(part: ItemPart, where: str) -> dict[str, Any]:
    if part.file_id is not None:
        raise unsupported(f"{where}.file_id", "Pictures are not taken from files; send it as a data URL")
    if part.image_url is None:
        raise RequestError(f"{where}.image_url is missing.", code="invalid_value", param=f"{where}.image_url")
    if part.detail == "low":
        raise unsupported(f"{where}.detail", "Pictures are always looked at closely")
    for name in ("text", "refusal", "annotations", "logprobs"):
        if getattr(part, name) is not None:
            raise unsupported(f"{where}.{name}", "An input_image has none")
    return {"type": "input_image", "image_url": part.image_url, "detail": part.detail or "auto", "file_id": None}


def _joined(content: str | list[ItemPart] | None, where: str, kinds: tuple[str, ...]) -> str:
    if not isinstance(content, list):
        return content or ""
    return "".join(_said(part, f"{where}.{k}", kinds) for k, part in enumerate(content))


def _said(part: ItemPart, where: str, kinds: tuple[str, ...]) -> str:
    if part.type not in kinds:
        raise unsupported(f"{where}.type", f"{part.type[:80]}: here is {' or '.join(kinds)}")
    for name in ("image_url", "detail", "file_id"):
        if getattr(part, name) is not None:
            raise unsupported(f"{where}.{name}", f"An {part.type} has none")
    text = part.refusal if part.type == "refusal" else part.text
    if text is None:
        raise RequestError(f"{where} has no text.", code="invalid_value", param=f"{where}.text")
    if part.annotations:
        raise unsupported(f"{where}.annotations", "Texts are not cited here")
    return text


def _call_item(number: str, call: str, name: str, arguments: str) -> dict[str, Any]:
    return {
        "id": number,
        "type": "function_call",
        "call_id": call,
        "name": name,
        "arguments": arguments,
        "status": "completed",
    }


MAX_CHAIN = 2000
"""Responses that one may go on from, one through the other."""


def _before(store: Store, caller: Caller, number: str) -> list[dict[str, Any]]:
    """The items of a response and of all before it."""
    links: list[list[dict[str, Any]]] = []
    pictures = 0
    previous: str | None = number
    while previous is not None:
        kept = store.response(caller.key, previous)
        if kept is None or len(links) == MAX_CHAIN:
            raise RequestError(
                f"There is no response {previous!r:.100} to go on from.",
                remedy="Send the whole conversation as input.",
                code="previous_response_not_found",
                param="previous_response_id",
            )
        links.append([*kept["input"], *kept["response"]["output"]])
        pictures += sum(part["type"] == "input_image" for item in kept["input"] for part in item.get("content", ()))
        if pictures > MAX_PICTURES:  # before more of them are read
            raise RequestError(
                f"The responses before hold more than {MAX_PICTURES} pictures, which are all that are taken.",
                code="invalid_value",
                param="previous_response_id",
            )
        previous = kept["response"]["previous_response_id"]
    return [item for link in reversed(links) for item in link]


def messages_of(items: list[dict[str, Any]], before: int = 0) -> tuple[Message, ...]:
    """The conversation, of which so many items stood before this input; calls that follow one another, or an
    assistant's text, are one message's. Raises RequestError for a picture that is none."""
    made: list[Message] = []
    for i, item in enumerate(items):
        if item["type"] == "function_call":
            call = ToolCall(item["name"], item["arguments"], item["call_id"])
            if made and made[-1].role == "assistant":
                last = made.pop()
                made.append(Message("assistant", last.content, (*last.tool_calls, call)))
            else:
                made.append(Message("assistant", "", (call,)))
        elif item["type"] == "function_call_output":
            made.append(Message("tool", item["output"], (), item["call_id"]))
        else:
            role = "system" if item["role"] == "developer" else item["role"]
            text, pictures = "", list[tuple[int, Picture]]()
            for k, part in enumerate(item["content"]):
                if part["type"] == "input_image":
                    where = f"input.{i - before}.content.{k}.image_url" if i >= before else "previous_response_id"
                    pictures.append((len(text), picture_at(part["image_url"], where)))
                else:
                    text += part["text"]
            made.append(Message(role, text, pictures=tuple(pictures)))
    return tuple(made)


async def _streamed(service: Service, store: Store, caller: Caller, speech: Speech) -> AsyncGenerator[bytes]:
    body = speech.body
    async with service.use(caller, body.model) as backend:
        request = speech.for_model(backend)
        call = Call(speech.response["id"], caller, "chat", backend.card.name, stream=bool(body.stream))
        async with aclosing(batches(service.answer(call, backend, request))) as several:
            async for events in several:
                yield speech.say(events)
    last = speech.end()
    if body.store is not False:
        about = {"response": speech.response, "input": speech.own}
        created = speech.response["created_at"]
        await asyncio.to_thread(store.add_response, caller.key, speech.response["id"], created, about)
    yield last


class Speech:
    """One response as it comes: events in, the response's own events out, and `response` as it is so far."""

    def __init__(self, body: ResponseBody, request: Request, tools: Tools, own: list[dict[str, Any]]) -> None:
        self.body, self.own = body, own
        self._request, self._tools = request, tools
        self._backend: Backend | None = None
        self._number, self._begun = 0, False
        self._open: dict[str, Any] | None = None
        self._calls: dict[int, dict[str, Any]] = {}
        self._finish = "stop"
        wanted = body.text.format if body.text is not None else None
        told_format: dict[str, Any] = {"type": "text"}
        if wanted is not None:
            told_format = wanted.model_dump(by_alias=True, exclude_none=True)
        sampling, choice = request.sampling, body.tool_choice
        self.response: dict[str, Any] = {
            "id": new_id("resp_"),
            "object": "response",
            "created_at": int(time.time()),
            "completed_at": None,
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": None,
            "metadata": body.metadata or {},
            "model": body.model,
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "prompt_cache_key": body.prompt_cache_key,
            "reasoning": {"effort": None, "summary": None},
            "safety_identifier": body.safety_identifier,
            "service_tier": "default",
            "temperature": sampling.temperature,
            "text": {"format": told_format},
            "tool_choice": (choice or "auto") if isinstance(choice, str | None) else choice.model_dump(),
            "tools": [
                {
                    "type": "function",
                    "name": tool.name,
                    "description": tool.description,
                    "parameters": tool.parameters,
                    "strict": bool(tool.strict),
                }
                for tool in body.tools or ()
            ],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
        }

    def for_model(self, backend: Backend) -> Request:
        """The request to this model."""
        self._backend = backend
        self.response["model"] = self.body.model or backend.card.name
        return self._tools.put_into(self._request, backend)

    def _sse(self, kind: str, **about: Any) -> bytes:
        made = sse({"type": kind, **about, "sequence_number": self._number}, kind)
        self._number += 1
        return made

    def _whole(self, kind: str) -> bytes:
        return self._sse(kind, response=self.response)

    def say(self, events: list[tuple[int, Event]]) -> bytes:
        """What these events say."""
        made: list[bytes] = []
        if not self._begun:
            self._begun = True
            made.extend((self._whole("response.created"), self._whole("response.in_progress")))
        for _, event in merged(events):
            if event.text or event.logprobs:
                self._text(event.text, event.logprobs, made)
            for piece in event.tool_calls:
                self._called(piece, made)
            if event.usage is not None:
                self._use(event.usage)
            self._finish = event.finish or self._finish
        return b"".join(made)

    def _use(self, usage: Usage) -> None:
        self.response["usage"] = {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.reused_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }

    def _begin(self, item: dict[str, Any], made: list[bytes]) -> None:
        self._close("completed", made)
        output = self.response["output"]
        output.append(item)
        self._open = item
        made.append(self._sse("response.output_item.added", output_index=len(output) - 1, item=item))

    @property
    def _place(self) -> dict[str, Any]:
        """Where the open item stands."""
        assert self._open is not None
        return {"item_id": self._open["id"], "output_index": len(self.response["output"]) - 1}

    def _text(self, text: str, logprobs: tuple[TokenLogprob, ...], made: list[bytes]) -> None:
        if self._open is None or self._open["type"] != "message":
            message: dict[str, Any] = {
                "id": new_id("msg_"),
                "type": "message",
                "role": "assistant",
                "status": "in_progress",
                "content": [],
            }
            self._begin(message, made)
            part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            made.append(self._sse("response.content_part.added", **self._place, content_index=0, part=part))
            message["content"] = [part]
        assert self._open is not None
        part = self._open["content"][0]
        part["text"] += text
        told: list[dict[str, Any]] = []
        if logprobs and self._backend is not None:
            told = logprobs_json(self._backend, logprobs)
            part["logprobs"] += told
        made.append(
            self._sse("response.output_text.delta", **self._place, content_index=0, delta=text, logprobs=_brief(told))
        )

    def _called(self, piece: ToolCallPiece, made: list[bytes]) -> None:
        item = self._calls.get(piece.index)
        if item is None:
            number = piece.id or new_id("call_")
            item = self._calls[piece.index] = {
                **_call_item(new_id("fc_"), number, piece.name, ""),
                "status": "in_progress",
            }
            self._begin(item, made)
        if piece.arguments:
            item["arguments"] += piece.arguments
            made.append(self._sse("response.function_call_arguments.delta", **self._place, delta=piece.arguments))

    def _close(self, status: str, made: list[bytes]) -> None:
        item = self._open
        if item is None:
            return
        place = self._place
        if item["type"] == "message":
            part = item["content"][0]
            told = {"content_index": 0, "text": part["text"], "logprobs": _brief(part["logprobs"])}
            made.append(self._sse("response.output_text.done", **place, **told))
            made.append(self._sse("response.content_part.done", **place, content_index=0, part=part))
        else:
            arguments = item["arguments"]
            made.append(self._sse("response.function_call_arguments.done", **place, arguments=arguments))
        item["status"] = status
        made.append(self._sse("response.output_item.done", output_index=place["output_index"], item=item))
        self._open = None

    def end(self) -> bytes:
        """The last events."""
        made: list[bytes] = []
        if not self.response["output"]:
            self._text("", (), made)
        whole = self._finish == "stop"
        self.response["status"] = "completed" if whole else "incomplete"
        if not whole:
            self.response["incomplete_details"] = {
                "reason": "content_filter" if self._finish == "filtered" else "max_output_tokens"
            }
        self._close(self.response["status"], made)
        self.response["completed_at"] = int(time.time()) if whole else None
        made.append(self._whole("response.completed" if whole else "response.incomplete"))
        return b"".join(made)

    def fail(self, error: BaseException, number: str) -> bytes:
        """The last event of a stream that ends in the middle."""
        problem = problem_of(error, number)
        code = "rate_limit_exceeded" if problem.status == 429 else "server_error"
        if self._open is not None:
            self._open["status"] = "incomplete"
        self.response |= {"status": "failed", "error": {"code": code, "message": problem.message}}
        return self._whole("response.failed")


def _brief(logprobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Log probabilities as the events of a stream have them: without the tokens' bytes."""
    return [
        {
            "token": one["token"],
            "logprob": one["logprob"],
            "top_logprobs": [{"token": top["token"], "logprob": top["logprob"]} for top in one["top_logprobs"]],
        }
        for one in logprobs
    ]


@router.get("/v1/responses/{response_id}", responses=RESPONSES, tags=["OpenAI"])
async def response(
    response_id: str,
    caller: Annotated[Caller, Depends(needs("infer"))],
    store: Annotated[Store, Depends(store_of)],
    stream: bool = False,
) -> dict[str, Any]:
    """A stored response."""
    if stream:
        raise unsupported("stream", "A stored response is given whole")
    told: dict[str, Any] = (await _stored(store, caller, response_id))["response"]
    return told


@router.get("/v1/responses/{response_id}/input_items", responses=RESPONSES, tags=["OpenAI"])
async def input_items(
    response_id: str,
    caller: Annotated[Caller, Depends(needs("infer"))],
    store: Annotated[Store, Depends(store_of)],
    after: Annotated[str | None, Query(max_length=80)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> dict[str, Any]:
    """What was new in the input of a stored response."""
    items = (await _stored(store, caller, response_id))["input"]
    if order == "desc":
        items = items[::-1]
    begin = 0 if after is None else next((i + 1 for i, item in enumerate(items) if item["id"] == after), None)
    if begin is None:
        raise RequestError(f"after is {after!r:.100}, no item of this input.", code="invalid_value", param="after")
    return listed(items[begin : begin + limit + 1], limit)


@router.delete("/v1/responses/{response_id}", responses=RESPONSES, tags=["OpenAI"])
async def delete(
    response_id: str, caller: Annotated[Caller, Depends(needs("infer"))], store: Annotated[Store, Depends(store_of)]
) -> dict[str, Any]:
    """Forget a stored response."""
    if not await asyncio.to_thread(store.delete_response, caller.key, response_id):
        raise unknown("response", response_id)
    return {"id": response_id, "object": "response", "deleted": True}


@router.post("/v1/responses/{response_id}/cancel", responses=RESPONSES, tags=["OpenAI"])
async def cancel(
    response_id: str, caller: Annotated[Caller, Depends(needs("infer"))], store: Annotated[Store, Depends(store_of)]
) -> dict[str, Any]:
    """Refused: only a response in the background could be cancelled, and there is none."""
    await _stored(store, caller, response_id)
    raise RequestError(
        "Only a response in the background can be cancelled, and background is not honoured here.",
        remedy="Close the connection to end an answer.",
        code="unsupported_parameter",
        param="background",
    )


async def _stored(store: Store, caller: Caller, response_id: str) -> dict[str, Any]:
    kept = await asyncio.to_thread(store.response, caller.key, response_id)
    if kept is None:
        raise unknown("response", response_id)
    return kept
