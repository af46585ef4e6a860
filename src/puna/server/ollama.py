"""Ollama's `/api/generate` and `/api/chat`: https://docs.ollama.com/api.

What it is: answers in lines of JSON, or whole where `stream` is false (it is true where it is left out, as there).
What it is not: bodies and their options (`ollama_bodies.py`), or lists of models (`ollama_models.py`).
What is surprising: calls of tools come whole, as the protocol knows no pieces of them. Durations are real ones, in
nanoseconds: until the model was there, from there to the first token, and from the first to the last. A conversation
whose last message is the assistant's is gone on with.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from puna.errors import StoppedError
from puna.server import ollama_bodies as bodies
from puna.server.anthropic import object_of
from puna.server.caller import Caller, needs
from puna.server.fields import TEXT, answer, check_tools, errors, shape
from puna.server.infill import check_infills
from puna.server.ollama_bodies import AnswerBody, ChatBody, GenerateBody
from puna.server.ollama_routes import kept_for, plain, stamp
from puna.server.pictures import check_sight
from puna.server.prefill import begun, check_begun
from puna.server.problems import RequestError, problem_of, shaped
from puna.server.service import Call, Service, add_piece, request_id, service_of, unknown_model
from puna.server.streams import Streamed, answered, line
from puna.types import Backend, Infill, Message, TokenLogprob, ToolCall, Usage
from puna.types import Request as Asked

router = APIRouter()


def _answers(**said: dict[str, Any]) -> dict[int | str, dict[str, Any]]:
    """What a route answers, for its description."""
    told = shape(model=TEXT, created_at=TEXT, **said, done={"const": True}, done_reason=TEXT)
    return {**errors("ollama"), **answer(told, "application/x-ndjson")}


@router.post("/api/generate", responses=_answers(response=TEXT), response_class=JSONResponse)
async def generate(
    body: GenerateBody,
    request: Request,
    caller: Annotated[Caller, Depends(needs("infer"))],
    service: Annotated[Service, Depends(service_of)],
) -> Response:
    """Answer a prompt; without one, load the model, or unload it where `keep_alive` is 0."""
    body.check()
    call = Call(request_id(request), caller, "text_completion", body.model, body.stream is not False)
    if not body.prompt:
        return await _loaded(request, service, call, body, {"response": ""})
    if body.system and (body.raw or body.suffix):
        raise RequestError(
            f"{'raw' if body.raw else 'suffix'} takes the prompt as it is, and leaves no place for system.",
            remedy="Put it into the prompt.",
            code="unsupported_parameter",
            param="system",
        )
    return await _answer(request, _lines(service, call, body), call)


@router.post(
    "/api/chat",
    responses=_answers(message=shape(role={"const": "assistant"}, content=TEXT)),
    response_class=JSONResponse,
)
async def chat(
    body: ChatBody,
    request: Request,
    caller: Annotated[Caller, Depends(needs("infer"))],
    service: Annotated[Service, Depends(service_of)],
) -> Response:
    """Answer a conversation; without one, load the model, or unload it where `keep_alive` is 0."""
    body.check()
    call = Call(request_id(request), caller, "chat", body.model, body.stream is not False)
    if not body.messages:
        return await _loaded(request, service, call, body, {"message": {"role": "assistant", "content": ""}})
    return await _answer(request, _lines(service, call, body), call)


async def _loaded(
    request: Request, service: Service, call: Call, body: AnswerBody, empty: dict[str, Any]
) -> JSONResponse:
    name, stays = plain(body.model), kept_for(body.keep_alive, call.caller)
    if stays == 0:
        if not call.caller.may_use(name):
            raise unknown_model(name)
        await answered(request, service.models.unload(name))
        return JSONResponse(_head(body) | empty | {"done": True, "done_reason": "unload"})

    async def load() -> bool:
        async with service.use(call.caller, name, keep_alive=stays):
            return True

    await answered(request, load())
    return JSONResponse(_head(body) | empty | {"done": True, "done_reason": "load"})


async def _answer(request: Request, lines: AsyncGenerator[dict[str, Any]], call: Call) -> Response:
    if not call.stream:
        return JSONResponse(await answered(request, _whole(lines)))

    def error(problem: BaseException) -> bytes:
        return line(shaped(problem_of(problem, call.id), "ollama"))

    return Streamed(_pieces(lines), error, media_type="application/x-ndjson", keep_alive=b"")


async def _asked(backend: Backend, body: AnswerBody) -> Asked:
    """What is asked of the model. Raises RequestError for what it cannot do."""
    how, grammar = bodies.sampling(body.options, backend.card, body.told_logprobs), body.grammar
    if isinstance(body, ChatBody):
        said, tools = bodies.conversation(body.messages or ()), bodies.tools(body.tools)
        check_tools(backend, tools)
        check_sight(backend, said)
        if said[-1].role == "assistant":
            check_begun(said[-1], calls=bool(tools), grammar=grammar, param=f"messages.{len(said) - 1}")
            return Asked(await begun(backend, said), how)
        return Asked(said, how, grammar=grammar, tools=tools)
    assert isinstance(body, GenerateBody)
    assert body.prompt
    if body.suffix:
        if body.images:
            raise RequestError("images have no place in a gap.", code="unsupported_parameter", param="images")
        check_infills(backend, "suffix")
        return Asked(Infill(body.prompt, body.suffix), how, grammar=grammar)
    shown = bodies.images(body.images, "images")
    if shown:
        check_sight(backend, (Message("user", "", pictures=shown),), "images")
    if body.raw or not (backend.card.chat or body.system):
        if shown:
            raise RequestError("images have no place in a raw prompt.", code="unsupported_parameter", param="images")
        return Asked(body.prompt, how, raw=True, grammar=grammar)
    system = (Message("system", body.system),) if body.system else ()
    return Asked((*system, Message("user", body.prompt, pictures=shown)), how, grammar=grammar)


async def _lines(service: Service, call: Call, body: AnswerBody) -> AsyncGenerator[dict[str, Any]]:
    """The protocol's lines; the last has `done`."""
    began = time.perf_counter_ns()
    stays = kept_for(body.keep_alive, call.caller)
    async with service.use(call.caller, plain(body.model), keep_alive=stays) as backend:
        there = time.perf_counter_ns()
        asked = await _asked(backend, body)
        first, calls, told, finish, usage = 0, list[ToolCall](), 0, "", Usage(0, 0, 0)
        async with aclosing(service.answer(call, backend, asked)) as events:
            async for event in events:
                if not first and (event.token_ids or event.text or event.tool_calls or event.finish):
                    first = time.perf_counter_ns()
                for piece in event.tool_calls:
                    add_piece(calls, piece)
                finish, usage = event.finish or finish, event.usage or usage
                whole = calls[told : len(calls) if event.finish else max(len(calls) - 1, told)]
                told += len(whole)
                if event.text or whole or event.logprobs:
                    yield (
                        _head(body) | _said(body, event.text, whole) | _told(backend, event.logprobs) | {"done": False}
                    )
        end = time.perf_counter_ns()
        yield {
            **_head(body),
            **_said(body, "", []),
            "done": True,
            "done_reason": _reason(finish),
            "total_duration": end - began,
            "load_duration": there - began,
            "prompt_eval_count": usage.prompt_tokens,
            "prompt_eval_duration": first - there,
            "eval_count": usage.completion_tokens,
            "eval_duration": end - first,
        }


def _reason(finish: str) -> str:
    """Raises StoppedError for an answer that ended without a reason, or was ended by the server."""
    if finish in ("", "cancelled"):
        raise StoppedError("The answer was ended before it was whole.", remedy="Ask again.")
    return {"stop": "stop", "filtered": "content_filter"}.get(finish, "length")


def _head(body: AnswerBody) -> dict[str, Any]:
    return {"model": body.model, "created_at": stamp()}


def _said(body: AnswerBody, text: str, calls: list[ToolCall]) -> dict[str, Any]:
    if not isinstance(body, ChatBody):
        return {"response": text}
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if calls:
        message["tool_calls"] = [
            {"id": one.id, "function": {"name": one.name, "arguments": object_of(one.arguments)}} for one in calls
        ]
    return {"message": message}


def _told(backend: Backend, logprobs: tuple[TokenLogprob, ...]) -> dict[str, Any]:
    """Log probabilities; what JSON cannot say, the logarithm of 0, is -9999, as OpenAI's clients know it."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        data = backend.token_bytes(token)
        return {"token": data.decode(errors="replace"), "logprob": max(float(logprob), -9999.0), "bytes": list(data)}

    if not logprobs:
        return {}
    return {
        "logprobs": [
            one(each.token, each.logprob) | ({"top_logprobs": [one(*pair) for pair in each.top]} if each.top else {})
            for each in logprobs
        ]
    }


async def _pieces(lines: AsyncGenerator[dict[str, Any]]) -> AsyncGenerator[bytes]:
    async with aclosing(lines):
        async for each in lines:
            yield line(each)


async def _whole(lines: AsyncGenerator[dict[str, Any]]) -> dict[str, Any]:
    """The answer that the lines make."""
    text, calls, logprobs, last = "", list[Any](), list[Any](), dict[str, Any]()
    async with aclosing(lines):
        async for last in lines:
            message = last.get("message", {})
            text += last.get("response", "") + message.get("content", "")
            calls += message.get("tool_calls", [])
            logprobs += last.get("logprobs", [])
    if "message" in last:
        last["message"] = {"role": "assistant", "content": text, **({"tool_calls": calls} if calls else {})}
    else:
        last["response"] = text
    return last | ({"logprobs": logprobs} if logprobs else {})
