"""Filling in the middle: `/infill`, as llama.vscode and llama.vim call it, and `/v1/fim/completions`, as minuet and Zed.

What it is: llama-server's body (https://github.com/ggml-org/llama.cpp/tree/master/tools/server#post-infill-for-code-infilling)
and Mistral's (https://docs.mistral.ai/api/endpoint/fim) to a `types.Infill`, and events to their answers. Left out,
`/infill` samples as llama-server does (temperature 0.8, top_k 40, top_p 0.95, min_p 0.05), `/v1/fim/completions` with
temperature 0.2 and top_p 1.
What it is not: an answer by any model: one that was not trained to fill a gap makes nonsense of such a prompt, and is
refused by name.
What is surprising: `input_extra` stands before the prefix, each piece behind a line that says it is a snippet, as
llama-server has it for models without tokens for files; nothing is cut to fit. `samplers` names what is not switched
off; "infill", llama-server's own, takes the likeliest token here. `id_slot` and `t_max_prompt_ms` are taken and not
looked at: what was read is remembered for all, whichever slot a client means, and llama-server, whose clients always
send the second, ends no reading by it either.
"""  # noqa: E501 - an address

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse
from pydantic import Field
from starlette.responses import Response

from puna.server.bodies import Body, RequestBody
from puna.server.caller import Caller, needs
from puna.server.fields import COUNT, TEXT, answer, shape
from puna.server.limits import MAX_INPUTS, MAX_MODEL_NAME
from puna.server.openai_parts import DONE, FINISHES, RESPONSES, completion, request_of, stream_error, usage_json
from puna.server.problems import RequestError
from puna.server.sampling import to_sampling
from puna.server.service import Call, Service, new_id, request_id, service_of
from puna.server.streams import Streamed, answered, sse
from puna.types import Backend, Infill, Request, Sampling, Usage

router = APIRouter(tags=["Infill"])

Name = Annotated[str, Field(max_length=MAX_MODEL_NAME)]
Infers = Annotated[Caller, Depends(needs("infer"))]
Services = Annotated[Service, Depends(service_of)]

SNIPPET = "\n\n--- snippet ---\n\n"
"""What stands before a piece of another file, as in llama-server's own prompts."""


class ExtraFile(Body):
    """A file, or a piece of one, that stands before the one that is edited. `filename` and `time` (when the editor took
    it, in whatever form) only label it: llama.vim and llama.vscode send both."""

    text: str
    filename: str | None = None
    time: Any = None


class InfillBody(RequestBody):
    """The body of `/infill`: what stands before the cursor's line, after it, and on it (`prompt`).

    `n_indent` ends the answer at the first line that is indented less, `t_max_predict_ms` at the first line that
    begins so long after the first token.
    """

    input_prefix: str
    input_suffix: str
    input_extra: list[ExtraFile] | None = Field(default=None, max_length=MAX_INPUTS)
    prompt: str | None = None
    model: Name = ""
    n_predict: int | None = Field(default=None, ge=-1)
    n_indent: int | None = Field(default=None, ge=0)
    n_probs: Literal[0] | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: list[str] | None = None
    samplers: list[Literal["top_k", "top_p", "min_p", "temperature", "infill"]] | None = None
    stream: bool | None = None
    cache_prompt: Literal[True] | None = None
    id_slot: int | None = Field(default=None, ge=-1)
    t_max_prompt_ms: float | None = Field(default=None, ge=-1)
    t_max_predict_ms: float | None = Field(default=None, ge=0)
    response_fields: list[Annotated[str, Field(max_length=200)]] | None = Field(default=None, max_length=100)


class FimBody(RequestBody):
    """The body of `/v1/fim/completions`: what stands before the cursor, and after it. `metadata` only labels it."""

    prompt: str
    suffix: str | None = None
    model: Name = ""
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    min_tokens: int | None = Field(default=None, ge=0)
    stream: bool | None = None
    stop: str | list[str] | None = None
    random_seed: int | None = Field(default=None, ge=0)
    metadata: dict[str, Any] | None = None


def check_infills(backend: Backend, param: str) -> None:
    """Raise RequestError where the model was not trained to fill a gap; `param` is the field that asks for it."""
    if not backend.card.infills:
        raise RequestError(
            f"{param} is not honoured: {backend.card.name} was not trained to fill in the middle of a text."
            if param != "model"
            else f"{backend.card.name} cannot fill in the middle of a text.",
            remedy="Use a model that was, such as codellama:7b, or have /v1/completions go on from the prefix alone.",
            code="unsupported_model" if param == "model" else "unsupported_parameter",
            param=param,
        )


_CONTENT = shape(content=TEXT, model=TEXT, stop={"type": "boolean"}, tokens_predicted=COUNT, tokens_evaluated=COUNT)


@router.post(
    "/infill",
    responses={**RESPONSES, **answer({"anyOf": [_CONTENT, {"type": "object"}]}, "text/event-stream")},
    response_class=JSONResponse,
)
async def infill(body: InfillBody, http: HttpRequest, caller: Infers, service: Services) -> Response:
    """Fill in the middle, as llama-server does."""
    sampling = _sampling(body)
    pieces = _llama(service, caller, body, sampling)
    if not body.stream:
        return JSONResponse(await answered(http, _whole(pieces, body)))
    number = request_id(http)
    return Streamed(_sent(pieces, body), lambda error: stream_error(error, number))


def _sampling(body: InfillBody) -> Sampling:
    on = body.samplers
    asked: dict[str, Any] = {
        "temperature": (0.8, body.temperature, 1.0),
        "top_k": (40, body.top_k, 0),
        "top_p": (0.95, body.top_p, 1.0),
        "min_p": (0.05, body.min_p, 0.0),
    }
    chosen = {
        name: off if on is not None and name not in on else default if given is None else given
        for name, (default, given, off) in asked.items()
    }
    if on is not None and "infill" in on:
        chosen["temperature"] = 0.0
    most = body.n_predict if body.n_predict is not None and body.n_predict >= 0 else None
    return to_sampling(max_tokens=1 if most == 0 else most, stop=body.stop, seed=body.seed, **chosen)


async def _llama(
    service: Service, caller: Caller, body: InfillBody, sampling: Sampling
) -> AsyncGenerator[dict[str, Any]]:
    """The pieces of an answer as llama-server words them; the last has `stop`."""
    extra = "".join(SNIPPET + each.text for each in body.input_extra or ())
    gap = Infill(extra + body.input_prefix + (body.prompt or ""), body.input_suffix)
    nothing = body.n_predict == 0
    async with service.use(caller, body.model) as backend:
        check_infills(backend, "model")
        call = Call(new_id("infill-"), caller, "text_completion", backend.card.name, stream=bool(body.stream))
        began = time.perf_counter()
        first, lines, finish, word, usage, made = began, Lines(body.n_indent or 0), "", "", None, 0
        reused, read, newline = 0, 0, False
        async with aclosing(service.answer(call, backend, Request(gap, sampling))) as events:
            async for event in events:
                read, usage = max(read, event.prefilled), event.usage or usage
                if not made and event.token_ids:
                    first = time.perf_counter()
                made += len(event.token_ids)
                finish, word = event.finish or finish, event.stopped_by or word
                text = "" if nothing else lines.push(event.text)
                newline = newline or "\n" in text
                if text:
                    yield {"index": 0, "content": text, "tokens": [], "stop": False, "id_slot": -1}
                late = body.t_max_predict_ms and (time.perf_counter() - first) * 1e3 > body.t_max_predict_ms
                if not finish and (lines.ended or (late and "\n" in text)):
                    finish = "length"
                    break
        end = time.perf_counter()
        used = usage or Usage(read, reused, made)
        predicted = 0 if nothing else used.completion_tokens
        yield {
            "index": 0,
            "content": "",
            "tokens": [],
            "id_slot": -1,
            "stop": True,
            "model": body.model or backend.card.name,
            "tokens_predicted": predicted,
            "tokens_evaluated": used.prompt_tokens,
            "has_new_line": newline,
            "truncated": False,
            "stop_type": "word" if word else "eos" if finish == "stop" and not nothing else "limit",
            "stopping_word": word,
            "tokens_cached": used.prompt_tokens + predicted,
            "timings": {
                **_timing("prompt", used.prompt_tokens - used.reused_tokens, first - began),
                **_timing("predicted", predicted, end - first),
                "cache_n": used.reused_tokens,
            },
        }


def _timing(name: str, count: int, seconds: float) -> dict[str, float]:
    return {
        f"{name}_n": count,
        f"{name}_ms": seconds * 1e3,
        f"{name}_per_token_ms": seconds * 1e3 / max(count, 1),
        f"{name}_per_second": count / max(seconds, 1e-9),
    }


class Lines:
    """Passes text through up to the first line that is indented less than so many characters; 0: all of it.

    The text's own beginning is no line: it stands behind what the client has.
    """

    def __init__(self, least: int) -> None:
        self._least = least
        self._indent = -1
        """How far the line that begins is indented so far; below 0 within a line."""
        self.ended = False

    def push(self, text: str) -> str:
        """The text that belongs to the answer."""
        if self._least == 0:
            return text
        if self.ended:
            return ""
        for at, character in enumerate(text):
            if self._indent >= 0:
                if character in " \t":
                    self._indent += 1
                    continue
                if self._indent < self._least:
                    self.ended = True
                    return text[:at]
                self._indent = -1
            if character == "\n":
                self._indent = 0
        return text


def _told(piece: dict[str, Any], fields: list[str] | None) -> dict[str, Any]:
    """What of a piece the client wants to have: a field of a field by its path, as in `timings/prompt_ms`."""
    if fields is None:
        return piece
    found: dict[str, Any] = {}
    for path in fields:
        value: Any = piece
        for name in path.split("/"):
            value = value.get(name) if isinstance(value, dict) else None
        if value is not None:
            found[path] = value
    return found


async def _whole(pieces: AsyncGenerator[dict[str, Any]], body: InfillBody) -> dict[str, Any]:
    text, last = "", dict[str, Any]()
    async with aclosing(pieces):
        async for last in pieces:
            text += last["content"]
    return _told(last | {"content": text}, body.response_fields)


async def _sent(pieces: AsyncGenerator[dict[str, Any]], body: InfillBody) -> AsyncGenerator[bytes]:
    async with aclosing(pieces):
        async for piece in pieces:
            yield sse(_told(piece, body.response_fields))


@router.post(
    "/v1/fim/completions",
    responses=completion(
        "chat.completion", "stop", "length", "content_filter", message=shape(role={"const": "assistant"}, content=TEXT)
    ),
    response_class=JSONResponse,
)
async def fim_completions(body: FimBody, http: HttpRequest, caller: Infers, service: Services) -> Response:
    """Fill in the middle, as Mistral's server does."""
    sampling = to_sampling(
        temperature=0.2 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        max_tokens=body.max_tokens,
        min_tokens=body.min_tokens,
        stop=body.stop,
        seed=body.random_seed,
    )
    chunks = _fim(service, caller, body, sampling)
    if not body.stream:
        return JSONResponse(await answered(http, _message(chunks)))
    number = request_id(http)
    return Streamed(_events(chunks), lambda error: stream_error(error, number))


async def _fim(service: Service, caller: Caller, body: FimBody, sampling: Sampling) -> AsyncGenerator[dict[str, Any]]:
    """The chunks of an answer; the last has a finish reason and the usage."""
    async with service.use(caller, body.model) as backend:
        check_infills(backend, "model")
        call = Call(new_id("fim-"), caller, "text_completion", backend.card.name, stream=bool(body.stream))
        asks = request_of(Infill(body.prompt, body.suffix or ""), sampling)
        head = {
            "id": call.id,
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": body.model or backend.card.name,
        }
        begun = False
        async with aclosing(service.answer(call, backend, asks)) as events:
            async for event in events:
                if not (event.text or event.finish):
                    continue
                delta: dict[str, Any] = (
                    {"content": event.text} if begun else {"role": "assistant", "content": event.text}
                )
                begun = True
                finish = FINISHES[event.finish] if event.finish else None
                chunk: dict[str, Any] = {
                    **head,
                    "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}],
                }
                yield chunk | ({"usage": usage_json(event.usage)} if event.usage else {})


async def _message(chunks: AsyncGenerator[dict[str, Any]]) -> dict[str, Any]:
    text, last = "", dict[str, Any]()
    async with aclosing(chunks):
        async for last in chunks:
            text += last["choices"][0]["delta"]["content"]
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "logprobs": None,
        "finish_reason": last["choices"][0]["finish_reason"],
    }
    return last | {"object": "chat.completion", "choices": [choice]}


async def _events(chunks: AsyncGenerator[dict[str, Any]]) -> AsyncGenerator[bytes]:
    async with aclosing(chunks):
        async for chunk in chunks:
            yield sse(chunk)
    yield DONE
