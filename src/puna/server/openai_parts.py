"""What OpenAI's routes have in common: fields that are refused by name, usage, log probabilities, forms, tools.

What it is: the pieces of OpenAI's JSON that more than one of its endpoints uses, after
https://platform.openai.com/docs/api-reference.
What it is not: a route.
What is surprising: `refuse` knows what asks for nothing: a field that is not honoured may still be sent with the value
that it has where it is left out, as many clients do.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

from pydantic import BaseModel, Field

from puna import __version__
from puna.errors import UsageError
from puna.server.bodies import Body
from puna.server.fields import COUNT, TEXT, answer, several, shape
from puna.server.limits import MAX_SCHEMA_BYTES, MAX_TOOLS
from puna.server.pictures import check_sight
from puna.server.problems import RequestError, problem_of, shaped
from puna.server.service import Seen
from puna.server.streams import sse
from puna.types import (
    Backend,
    Event,
    FinishReason,
    Grammar,
    Prompt,
    Request,
    Sampling,
    TokenLogprob,
    Tool,
    ToolChoice,
    Usage,
)

DONE = b"data: [DONE]\n\n"
"""The end of every stream of OpenAI's older endpoints."""

LEAST_LOGPROB = -9999.0
"""What stands for the logarithm of 0, which JSON cannot say; OpenAI's API gives the same."""


class ErrorBody(BaseModel):
    """What stands in an error."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    """An error, as OpenAI words it: https://platform.openai.com/docs/guides/error-codes."""

    error: ErrorBody


_WHY = {
    400: "The request cannot be honoured as it is; `param` names the field.",
    401: "No key, or a wrong one.",
    403: "The key may not do that.",
    404: "There is no such model, file, batch or response, or it is not this key's.",
    405: "The path takes another method.",
    409: "The batch has ended already.",
    413: "The body is too large.",
    429: "A limit of the key, or the queue, is full; `Retry-After` says how long.",
    500: "The server failed; its log has the reason under the request id.",
    503: "The model does not fit the memory now, or its engine has stopped.",
}

RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": why} for status, why in _WHY.items()
}
"""The errors that every route may give, for the description at /openapi.json."""


USAGE = shape(prompt_tokens=COUNT, completion_tokens=COUNT, total_tokens=COUNT)
"""`usage_json`, for the description."""


def completion(kind: str, *finishes: str, **choice: dict[str, Any]) -> dict[int | str, dict[str, Any]]:
    """What a route that makes choices answers, for the description; `choice` is what they hold."""
    one = shape(index=COUNT, **choice, logprobs={"type": ["object", "null"]}, finish_reason={"enum": list(finishes)})
    told = shape(id=TEXT, object={"const": kind}, created=COUNT, model=TEXT, choices=several(one), usage=USAGE)
    return {**RESPONSES, **answer(told, "text/event-stream")}


def refuse(body: Body, rules: Mapping[str, tuple[tuple[object, ...], str]]) -> None:
    """Raise RequestError for the first field whose value asks for something that is not honoured.

    `rules` has for each the values that ask for nothing, and why others are refused.
    """
    for name, (harmless, why) in rules.items():
        value = getattr(body, name)
        if value is not None and value not in harmless:
            raise RequestError(
                f"{name} is not honoured: {why}.", remedy="Leave it out.", code="unsupported_parameter", param=name
            )


def unsupported(param: str, why: str = "") -> RequestError:
    """The error for what is not honoured, inside of a field."""
    about = f": {why}" if why else ""
    return RequestError(f"{param} is not honoured{about}.", code="unsupported_parameter", param=param)


def stream_error(error: BaseException, request_id: str) -> bytes:
    """The last event of a stream that ends in the middle."""
    return sse(shaped(problem_of(error, request_id), "openai"))


def request_of(prompt: Prompt, sampling: Sampling, **more: Any) -> Request:
    """A request. Raises RequestError for a timeout that is none."""
    try:
        return Request(prompt, sampling, **more)
    except UsageError as error:  # of all that may be wrong here only this has not been looked at
        raise RequestError(error.message, remedy=error.remedy, code="invalid_value", param="timeout") from error


_FINGERPRINTS: WeakKeyDictionary[Backend, str] = WeakKeyDictionary()


async def fingerprint(backend: Backend) -> str:
    """`system_fingerprint`: the same as long as the same model is computed by the same code."""
    known = _FINGERPRINTS.get(backend)
    if known is None:
        card, doing = backend.card, await backend.activity()
        told = (card.name, card.digest, card.quantization, doing.kernels, doing.kv_type, __version__)
        known = _FINGERPRINTS[backend] = f"fp_{hashlib.sha256(repr(told).encode()).hexdigest()[:10]}"
    return known


def usage_json(usage: Usage) -> dict[str, Any]:
    """https://platform.openai.com/docs/api-reference/chat/object#chat-object-usage."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.reused_tokens},
    }


def added(first: Usage, second: Usage) -> Usage:
    """The use of two answers together."""
    return Usage(
        first.prompt_tokens + second.prompt_tokens,
        first.reused_tokens + second.reused_tokens,
        first.completion_tokens + second.completion_tokens,
    )


FINISHES: dict[FinishReason, Literal["stop", "length", "content_filter"]] = {
    "stop": "stop", "length": "length", "context": "length", "deadline": "length", "cancelled": "length",
    "filtered": "content_filter",
}  # fmt: skip
"""Why an answer ended, in OpenAI's words; where a tool was called, chat says tool_calls in the place of stop."""


def finite(logprob: float) -> float:
    """A logarithm of a probability that JSON can say."""
    return max(float(logprob), LEAST_LOGPROB)


def token_json(backend: Backend, token: int, logprob: float) -> dict[str, Any]:
    """A token in a chat's log probabilities. Half a character is told as U+FFFD; `bytes` has it exactly."""
    data = backend.token_bytes(token)
    return {"token": data.decode(errors="replace"), "logprob": finite(logprob), "bytes": list(data)}


def logprobs_json(backend: Backend, logprobs: tuple[TokenLogprob, ...]) -> list[dict[str, Any]]:
    """https://platform.openai.com/docs/api-reference/chat/object#chat-object-choices-logprobs."""
    return [
        {
            **token_json(backend, one.token, one.logprob),
            "top_logprobs": [token_json(backend, token, value) for token, value in one.top],
        }
        for one in logprobs
    ]


class StreamOptions(Body):
    """`stream_options`. Nothing is obfuscated: `include_obfuscation` may only be false. `continuous_usage_stats` has
    each chunk say what was used so far, as vLLM's clients ask for it."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None


def check_stream_options(stream: bool | None, options: StreamOptions | None) -> None:
    """Raise RequestError for options of a stream where there is none."""
    if options is not None and not stream:
        raise RequestError(
            "stream_options is only honoured with stream.", code="unsupported_parameter", param="stream_options"
        )
    if options is not None and options.continuous_usage_stats and not options.include_usage:
        raise RequestError(
            "continuous_usage_stats needs include_usage.",
            code="invalid_value",
            param="stream_options.continuous_usage_stats",
        )


class UsageInStream:
    """What a stream says of its use: nothing, at its end, or in every chunk (`StreamOptions`)."""

    def __init__(self, options: StreamOptions | None, *, nothing: bool = False) -> None:
        """`nothing`: no token was asked for, so none counts."""
        self._told = options is not None and bool(options.include_usage)
        self._always = self._told and options is not None and bool(options.continuous_usage_stats)
        self._nothing = nothing
        self._seen: dict[int, Seen] = {}
        self.tail = ',"usage":null}\n\n' if self._told else "}\n\n"
        """How a chunk ends now."""

    def see(self, events: list[tuple[int, Event]]) -> None:
        """Take in what came of each prompt."""
        if not self._told:
            return
        for number, event in events:
            if self._always or event.usage is not None:
                self._seen.setdefault(number, Seen()).add(event)
        if self._always:
            self.tail = f',"usage":{json.dumps(usage_json(self._usage()))}}}\n\n'

    def last(self, head: str) -> bytes:
        """The end of a stream whose chunks begin with `head`."""
        if not self._told:
            return DONE
        return f'{head},"choices":[],"usage":{json.dumps(usage_json(self._usage()))}}}\n\n'.encode() + DONE

    def _usage(self) -> Usage:
        total = Usage(0, 0, 0)
        for seen in self._seen.values():
            total = added(total, replace(seen.usage, completion_tokens=0) if self._nothing else seen.usage)
        return total


def merged(events: list[tuple[int, Event]]) -> list[tuple[int, Event]]:
    """Events in which texts of a choice of a source that follow one another are one."""
    made: list[tuple[int, Event]] = []
    for number, event in events:
        if made and _only_text(event):
            last_number, last = made[-1]
            if last_number == number and last.choice == event.choice and _only_text(last):
                made[-1] = number, Event(event.choice, last.text + event.text)
                continue
        made.append((number, event))
    return made


def _only_text(event: Event) -> bool:
    return bool(event.text) and not (
        event.logprobs or event.prompt_logprobs or event.tool_calls or event.finish or event.usage
    )


def schema_text(schema: Mapping[str, Any], param: str) -> str:
    """A JSON schema as text. Raises RequestError for one that is too long."""
    text = json.dumps(schema)
    if len(text) > MAX_SCHEMA_BYTES:
        raise RequestError(
            f"{param} has {len(text)} bytes; at most {MAX_SCHEMA_BYTES} are compiled.",
            remedy="Ask for less at once.",
            code="invalid_schema",
            param=param,
        )
    return text


def form(kind: str, schema: Mapping[str, Any] | None, param: str) -> Grammar | None:
    """The grammar of a `response_format` (in `/v1/responses`: `text.format`). A schema is held to, strict or not."""
    if kind == "text":
        return None
    if kind == "json_object":
        return Grammar("json_object")
    if schema is None:
        raise RequestError(f"{param} needs a schema.", code="invalid_schema", param=param)
    return Grammar("json_schema", schema_text(schema, param))


class JsonSchema(Body):
    """A form's schema; `name` and `description` only label it."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """The form that an answer must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def grammar(self) -> Grammar | None:
        """As the backend knows it. Raises RequestError for a schema that is missing, too long, or not asked for."""
        if self.json_schema is not None and self.type != "json_schema":
            raise unsupported("response_format.json_schema", f"A form of the type {self.type} has no schema")
        schema = None if self.json_schema is None else self.json_schema.schema_
        return form(self.type, schema, "response_format.json_schema")


class Function(Body):
    """What a tool is."""

    name: str = Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_-]+$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def tool(self, param: str) -> Tool:
        """As the backend knows it."""
        kept: dict[str, Any] = {"strict": bool(self.strict)}
        if self.parameters is not None:
            kept["parameters"] = schema_text(self.parameters, param)
        return Tool(self.name, self.description or "", **kept)


class Tools:
    """The tools of a request, and which may or must be called."""

    def __init__(
        self, tools: list[Tool], choice: ToolChoice | None, names: tuple[str, ...] = (), parallel: bool | None = None
    ) -> None:
        if len(tools) > MAX_TOOLS:
            raise RequestError(
                f"tools has {len(tools)}; at most {MAX_TOOLS} are taken.", code="invalid_value", param="tools"
            )
        known = {tool.name for tool in tools}
        for name in names:
            if name not in known:
                raise RequestError(
                    f"tool_choice names {name!r:.80}, which is none of the tools.",
                    code="invalid_value",
                    param="tool_choice",
                )
        if choice == "required" and not tools:
            raise RequestError("tool_choice needs a tool to call.", code="invalid_value", param="tool_choice")
        self.asked: dict[str, Any] = {
            "tools": tuple(tools),
            "tool_choice": choice or "auto",
            "callable_tools": names,
            "parallel_tool_calls": True if parallel is None else parallel,
        }

    def put_into(self, request: Request, backend: Backend) -> Request:
        """The request with them. Raises RequestError where the model cannot be told about tools, or shown pictures."""
        if self.asked["tools"] and not backend.card.tools:
            raise RequestError(
                f"{backend.card.name} has no form for tools.",
                remedy="Leave tools out, or use a model that was trained to call them.",
                code="unsupported_parameter",
                param="tools",
            )
        check_sight(backend, request.prompt)
        return replace(request, **self.asked)


def metadata_checked(metadata: Mapping[str, str] | None) -> dict[str, str]:
    """Labels: at most 16, as OpenAI limits them; keys of 64 characters, values of 512."""
    labels = dict(metadata or {})
    if len(labels) > 16 or any(len(key) > 64 or len(value) > 512 for key, value in labels.items()):
        raise RequestError(
            "metadata has more than 16 labels, or one that is too long.",
            remedy="Keys have at most 64 characters, values 512.",
            code="invalid_value",
            param="metadata",
        )
    return labels
