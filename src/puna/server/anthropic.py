"""Anthropic's protocol: `/v1/messages`, streamed or whole, and `/v1/messages/count_tokens`.

What it is: https://docs.anthropic.com/en/api/messages and https://docs.anthropic.com/en/docs/build-with-claude/streaming
for whatever model is served. Defaults are the protocol's: temperature 1, top_p 1, no top_k.
What it is not: the way from a body to messages (`anthropic_bodies.py`), or the check of `x-api-key` (the door).
What is surprising: a whole answer is put together from the events that a stream would send, so both are the same. As
in the newest models of the protocol's owner, `max_tokens` beyond the context's end is no error: an answer that reaches
that end says `model_context_window_exceeded`. The header `anthropic-version` is not looked at: there is one version.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from puna.errors import StoppedError
from puna.server import anthropic_bodies as bodies
from puna.server.anthropic_bodies import CountBody, MessagesBody
from puna.server.caller import Caller, needs
from puna.server.elsewhere import Fetcher, at_hand
from puna.server.fields import COUNT, TEXT, answer, check_tools, errors, several, shape
from puna.server.prefill import begun, check_begun
from puna.server.problems import problem_of, shaped
from puna.server.sampling import to_sampling
from puna.server.service import Call, Service, new_id, request_id, service_of
from puna.server.streams import Streamed, answered, sse
from puna.types import Backend, Event, Message, Usage
from puna.types import Request as Asked

router = APIRouter()

PING = sse({"type": "ping"}, "ping")
"""What is sent while nothing comes."""

_MESSAGE = shape(
    id=TEXT,
    type={"const": "message"},
    role={"const": "assistant"},
    model=TEXT,
    content=several(shape(type={"enum": ["text", "tool_use"]})),
    stop_reason={
        "enum": ["end_turn", "stop_sequence", "tool_use", "max_tokens", "model_context_window_exceeded", "refusal"]
    },
    stop_sequence={"type": ["string", "null"]},
    usage=shape(input_tokens=COUNT, output_tokens=COUNT),
)


@router.post(
    "/v1/messages",
    responses={**errors("anthropic"), **answer(_MESSAGE, "text/event-stream")},
    response_class=JSONResponse,
)
async def messages(
    body: MessagesBody,
    request: Request,
    caller: Annotated[Caller, Depends(needs("infer"))],
    service: Annotated[Service, Depends(service_of)],
) -> Response:
    """Answer a conversation."""
    asked = Conversation.of(body)
    call = Call(request_id(request), caller, "chat", body.model, bool(body.stream))
    events = _events(service, call, body, asked)
    headers = {"request-id": call.id}
    if not body.stream:
        return JSONResponse(await answered(request, _whole(events)), headers=headers)

    def pieces_error(error: BaseException) -> bytes:
        return sse(shaped(problem_of(error, call.id), "anthropic"), "error")

    return Streamed(_pieces(events), pieces_error, keep_alive=PING, headers=headers)


@router.post("/v1/messages/count_tokens", responses=errors("anthropic"))
async def count_tokens(
    body: CountBody,
    caller: Annotated[Caller, Depends(needs("infer"))],
    service: Annotated[Service, Depends(service_of)],
) -> dict[str, int]:
    """How many tokens a conversation has, with the system's message, the tools and the assistant's header."""
    asked = Conversation.of(body)
    async with service.use(caller, body.model) as backend:
        asked = await asked.seen(service.pictures, backend)
        return {"input_tokens": len(await asked.ids(backend))}


@dataclass(frozen=True)
class Conversation:
    """A body, checked, as the rooms below have it."""

    messages: tuple[Message, ...]
    options: dict[str, Any]
    """Fields of `types.Request` about tools and the answer's form."""

    @classmethod
    def of(cls, body: CountBody) -> Conversation:
        """Raises RequestError for what is not honoured, and for a begun answer that cannot go on."""
        bodies.check(body)
        said, tools, grammar = bodies.conversation(body), bodies.tools(body), bodies.grammar(body)
        how, which, several = bodies.choice(body)
        if said[-1].role == "assistant":
            param = f"messages.{len(body.messages) - 1}"
            check_begun(said[-1], calls=bool(tools) and how != "none", grammar=grammar, param=param)
        options = {
            "tools": tools,
            "tool_choice": how,
            "callable_tools": which,
            "parallel_tool_calls": several,
            "grammar": grammar,
        }
        return cls(said, options)

    @property
    def goes_on(self) -> bool:
        """Whether the assistant's answer was begun."""
        return self.messages[-1].role == "assistant"

    async def seen(self, fetcher: Fetcher, backend: Backend) -> Conversation:
        """The same with its pictures at hand. Raises RequestError where the model does not see."""
        return replace(self, messages=await at_hand(fetcher, backend, self.messages))

    async def ids(self, backend: Backend) -> tuple[int, ...]:
        """The token ids that the model starts from."""
        tools = self.options["tools"]
        check_tools(backend, tools)
        if self.goes_on:
            return await begun(backend, self.messages, tools)
        return await backend.encode(self.messages, tools=tools)

    def request(self, body: MessagesBody, ids: tuple[int, ...], context: int) -> Asked:
        """What is asked of a backend whose context has so many tokens (0: not known)."""
        reaches_end = 0 < context < len(ids) + body.max_tokens
        sampling = to_sampling(
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=body.top_k,
            stop=body.stop_sequences,
            max_tokens=None if reaches_end else body.max_tokens,
        )
        if self.goes_on:
            return Asked(ids, sampling)
        return Asked(self.messages, sampling, **self.options)


async def _events(
    service: Service, call: Call, body: MessagesBody, asked: Conversation
) -> AsyncGenerator[dict[str, Any]]:
    """The protocol's events, from `message_start` to `message_stop`."""
    async with service.use(call.caller, call.model) as backend:
        asked = await asked.seen(service.pictures, backend)
        ids = await asked.ids(backend)
        wanted = asked.request(body, ids, backend.card.context_length)
        blocks, started, last, usage = Blocks(), False, Event(), None
        async with aclosing(service.answer(call, backend, wanted)) as events:
            async for event in events:
                if not started:
                    if not (event.token_ids or event.text or event.tool_calls or event.finish):
                        continue  # the prompt is being read
                    started = True
                    # A prompt may have more tokens than its encoding: the tag before a call that must be made.
                    yield _start(body.model, max(len(ids), event.prefilled))
                for piece in blocks.push(event):
                    yield piece
                last = event if event.finish else last
                usage = event.usage or usage
        for piece in blocks.close():
            yield piece
        yield {
            "type": "message_delta",
            "delta": {"stop_reason": _reason(last, blocks.calls > 0), "stop_sequence": last.stopped_by or None},
            "usage": _usage(usage or Usage(len(ids), 0, 0)),
        }
        yield {"type": "message_stop"}


def _start(model: str, prompt: int) -> dict[str, Any]:
    message: dict[str, Any] = {
        "id": new_id("msg_"),
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": _usage(Usage(prompt, 0, 0)),
    }
    return {"type": "message_start", "message": message}


def _usage(usage: Usage) -> dict[str, int]:
    """Tokens that were remembered are not among `input_tokens`, as the protocol has it."""
    return {
        "input_tokens": usage.prompt_tokens - usage.reused_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.reused_tokens,
        "output_tokens": usage.completion_tokens,
    }


def _reason(last: Event, called: bool) -> str:
    """Raises StoppedError for an answer that ended without a reason, or was ended by the server."""
    if last.finish == "stop":
        return "stop_sequence" if last.stopped_by else "tool_use" if called else "end_turn"
    reasons = {"length": "max_tokens", "deadline": "max_tokens", "context": "model_context_window_exceeded",
               "filtered": "refusal"}  # fmt: skip
    if last.finish not in reasons:
        raise StoppedError("The answer was ended before it was whole.", remedy="Ask again.")
    return reasons[last.finish]


class Blocks:
    """Pieces of an answer as blocks, one open at a time: text, and a block for each call."""

    def __init__(self) -> None:
        self.calls = 0
        self._index, self._open, self._call = -1, "", -1

    def push(self, event: Event) -> list[dict[str, Any]]:
        """The events for a piece."""
        made: list[dict[str, Any]] = []
        if event.text:
            if self._open != "text":
                made += self.close()
                made.append(self._begin({"type": "text", "text": ""}))
            made.append(self._delta({"type": "text_delta", "text": event.text}))
        for piece in event.tool_calls:
            if self._open != "tool_use" or piece.index != self._call:
                made += self.close()
                self.calls, self._call = self.calls + 1, piece.index
                block = {"type": "tool_use", "id": piece.id or new_id("toolu_"), "name": piece.name, "input": {}}
                made.append(self._begin(block))
            if piece.arguments:
                made.append(self._delta({"type": "input_json_delta", "partial_json": piece.arguments}))
        return made

    def close(self) -> list[dict[str, Any]]:
        """The end of the block that is open, if one is."""
        if not self._open:
            return []
        self._open = ""
        return [{"type": "content_block_stop", "index": self._index}]

    def _begin(self, block: dict[str, Any]) -> dict[str, Any]:
        self._index, self._open = self._index + 1, block["type"]
        return {"type": "content_block_start", "index": self._index, "content_block": block}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}


async def _pieces(events: AsyncGenerator[dict[str, Any]]) -> AsyncGenerator[bytes]:
    async with aclosing(events):
        async for event in events:
            yield sse(event, event["type"])


async def _whole(events: AsyncGenerator[dict[str, Any]]) -> dict[str, Any]:
    """The message that the events make."""
    message: dict[str, Any] = {}
    arguments: dict[int, str] = {}
    async with aclosing(events):
        async for event in events:
            kind = event["type"]
            if kind == "message_start":
                message = event["message"]
            elif kind == "content_block_start":
                message["content"].append(event["content_block"])
            elif kind == "content_block_delta":
                index, delta = event["index"], event["delta"]
                if delta["type"] == "text_delta":
                    message["content"][index]["text"] += delta["text"]
                else:
                    arguments[index] = arguments.get(index, "") + delta["partial_json"]
            elif kind == "message_delta":
                message |= event["delta"]
                message["usage"] = event["usage"]
    for index, text in arguments.items():
        message["content"][index]["input"] = object_of(text)
    return message


def object_of(arguments: str) -> dict[str, Any]:
    """A call's arguments as an object. What is none (an answer that was cut, a model that did not keep to the form) is
    wrapped as the protocol's owner has clients wrap it: `{"INVALID_JSON": "…"}`
    (https://docs.anthropic.com/en/docs/agents-and-tools/tool-use/fine-grained-tool-streaming)."""
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"INVALID_JSON": arguments}
