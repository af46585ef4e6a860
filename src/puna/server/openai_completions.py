"""`/v1/completions`: texts continued, and their log probabilities, as evaluation asks for them.

What it is: OpenAI's older body to one `types.Request` a prompt, and events to its answer, after
https://platform.openai.com/docs/api-reference/completions. Left out, temperature and top_p are 1 and max_tokens is 16,
as there.
What it is not: a chat: no chat format is applied.
A `suffix` has a model that was trained for it fill the gap between the two.
What is surprising: `echo` with `logprobs` gives the prompt's own log probabilities, with `max_tokens: 0` nothing else
(the one token that the engine makes then is neither told nor counted). The first token has none: nothing stands before
it. A token that is no whole character is told as `bytes:\\xe2`, so that no two tokens have the same name.
"""

from __future__ import annotations

import asyncio
import codecs
import json
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse
from pydantic import Field
from starlette.responses import Response

from puna.server.bodies import RequestBody
from puna.server.caller import Caller, needs
from puna.server.fields import TEXT
from puna.server.infill import check_infills
from puna.server.limits import MAX_INPUTS, MAX_MODEL_NAME
from puna.server.openai_parts import (
    FINISHES,
    ResponseFormat,
    StreamOptions,
    UsageInStream,
    added,
    check_stream_options,
    completion,
    fingerprint,
    finite,
    merged,
    request_of,
    stream_error,
    usage_json,
)
from puna.server.problems import RequestError
from puna.server.sampling import SamplingFields, to_sampling
from puna.server.service import Call, Service, collect, new_id, request_id, service_of
from puna.server.streams import Streamed, answered, batches, together
from puna.types import Backend, Event, Grammar, Infill, Request, Sampling, TokenLogprob, Usage

router = APIRouter()

AT_ONCE = 32
"""Prompts of one request that are answered at once: more would fill the engine's queue for all others."""

DEFAULT_MAX_TOKENS = 16
"""As in OpenAI's API."""


class CompletionBody(RequestBody, SamplingFields):
    """A request. `user` only labels it; `timeout` and `adapter` are Puna's own, beside those of `SamplingFields`.
    `response_format` is chat's, as vLLM's clients send it here too."""

    prompt: str | list[str] | list[int] | list[list[int]]
    model: str = Field(default="", max_length=MAX_MODEL_NAME)
    best_of: int | None = None
    echo: bool | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    logprobs: int | None = None
    max_tokens: int | None = None
    n: int | None = None
    presence_penalty: float | None = None
    response_format: ResponseFormat | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    suffix: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    user: str | None = None
    timeout: float | None = None
    adapter: str | None = None


@router.post(
    "/v1/completions",
    responses=completion("text_completion", "stop", "length", "content_filter", text=TEXT),
    response_class=JSONResponse,
    tags=["OpenAI"],
)
async def completions(
    body: CompletionBody,
    http: HttpRequest,
    caller: Annotated[Caller, Depends(needs("infer"))],
    service: Annotated[Service, Depends(service_of)],
) -> Response:
    """Continue one text or several."""
    if not body.stream:
        return JSONResponse(await answered(http, complete(service, caller, body)))
    number = request_id(http)
    return Streamed(_streamed(service, caller, body, asked(body)), lambda error: stream_error(error, number))


@dataclass(frozen=True)
class Asked:
    """What a body asks for: the sampling, the prompts, what is told of each answer, and the form it must have."""

    sampling: Sampling
    prompts: list[str | tuple[int, ...]]
    echo: bool
    grammar: Grammar | None
    nothing: bool
    """`max_tokens` is 0: the prompt is looked at, and nothing is made."""


def asked(body: CompletionBody) -> Asked:
    """What a body asks for, before it is known of which model. Raises RequestError naming what is not honoured."""
    check_stream_options(body.stream, body.stream_options)
    if body.stream and (body.best_of or 1) > (body.n or 1):
        raise RequestError(
            "best_of cannot be streamed: which answers are the best is known at the end.",
            code="unsupported_parameter",
            param="best_of",
        )
    sampling = to_sampling(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        max_tokens=DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens or 1,
        seed=body.seed,
        stop=body.stop,
        n=body.n,
        best_of=body.best_of,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=body.logit_bias,
        **body.own(),
    )
    prompt = body.prompt
    prompts: list[str | tuple[int, ...]]
    if isinstance(prompt, str):
        prompts = [prompt]
    elif prompt and isinstance(prompt[0], int):
        prompts = [_ids(prompt)]
    else:
        prompts = [each if isinstance(each, str) else _ids(each) for each in prompt]  # type: ignore[arg-type]
    if not 1 <= len(prompts) <= MAX_INPUTS or () in prompts:
        raise RequestError(
            f"prompt must be from 1 to {MAX_INPUTS} texts, none without tokens.", code="invalid_value", param="prompt"
        )
    grammar = None if body.response_format is None else body.response_format.grammar()
    return Asked(sampling, prompts, bool(body.echo), grammar, body.max_tokens == 0)


def _ids(prompt: Sequence[Any]) -> tuple[int, ...]:
    if any(not 0 <= token < 1 << 31 for token in prompt):
        raise RequestError("prompt has a number that is no token id.", code="invalid_value", param="prompt")
    return tuple(prompt)


@dataclass(frozen=True)
class Prompt:
    """A prompt that is ready: what the model is asked, and what an echo says of it."""

    request: Request
    text: str = ""
    ids: tuple[int, ...] = ()


async def _ready(backend: Backend, body: CompletionBody, what: Asked, priority: int = 0) -> list[Prompt]:
    if body.suffix:
        check_infills(backend, "suffix")
        if body.echo or not all(isinstance(prompt, str) for prompt in what.prompts):
            raise RequestError(
                "suffix goes with a prompt that is text, and is not told again.",
                remedy="Leave echo out, and send no token ids.",
                code="unsupported_parameter",
                param="echo" if body.echo else "prompt",
            )
    made = []
    for prompt in what.prompts:
        if body.suffix and isinstance(prompt, str):
            gap = request_of(
                Infill(prompt, body.suffix), what.sampling, grammar=what.grammar, priority=priority,
                timeout=body.timeout, adapter=body.adapter,
            )  # fmt: skip
            made.append(Prompt(gap))
            continue
        text = ""
        ids: tuple[int, ...] = ()
        if what.echo:
            text, ids = await _echo(backend, prompt)
        asks = request_of(
            ids or prompt, what.sampling, raw=True, grammar=what.grammar, priority=priority, timeout=body.timeout,
            adapter=body.adapter,
        )  # fmt: skip
        made.append(Prompt(asks, text, ids))
    return made


async def _echo(backend: Backend, prompt: str | tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """A prompt as text and as ids. Ids that stand for no text, such as BOS, are none of the text."""
    if isinstance(prompt, str):
        return prompt, await backend.encode(prompt, raw=True)
    return await backend.decode([token for token in prompt if backend.token_bytes(token)]), prompt


async def complete(service: Service, caller: Caller, body: CompletionBody, priority: int = 0) -> dict[str, Any]:
    """The whole answer, as OpenAI's object. `stream` is not looked at."""
    what = asked(body)
    async with service.use(caller, body.model) as backend:
        call = Call(new_id("cmpl-"), caller, "text_completion", backend.card.name)
        slots = asyncio.Semaphore(AT_ONCE)

        async def one(prompt: Prompt) -> tuple[list[dict[str, Any]], Usage]:
            async with slots:
                wholes, usage = await collect(service.answer(call, backend, prompt.request), what.sampling.n)
            teller = Teller(backend, prompt, what)
            teller.prompt_logprobs = wholes[0].prompt_logprobs
            choices = [
                teller.choice(whole.text, whole.logprobs, whole.finish or "stop", begins=True) for whole in wholes
            ]
            return choices, replace(usage, completion_tokens=0) if what.nothing else usage

        done = await together([one(prompt) for prompt in await _ready(backend, body, what, priority)])
        usage = done[0][1]
        for _, more in done[1:]:
            usage = added(usage, more)
        choices = [choice for choices, _ in done for choice in choices]
        return {
            "id": call.id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model or backend.card.name,
            "choices": [{"index": i, **choice} for i, choice in enumerate(choices)],
            "usage": usage_json(usage),
            "system_fingerprint": await fingerprint(backend),
        }


class Teller:
    """Tells the choices of one prompt."""

    def __init__(self, backend: Backend, prompt: Prompt, what: Asked) -> None:
        self._backend, self._prompt, self._what = backend, prompt, what
        self.prompt_logprobs: tuple[TokenLogprob, ...] = ()
        self._offsets: dict[int, Offsets] = {}

    def choice(
        self, text: str, logprobs: tuple[TokenLogprob, ...], finish: str | None, *, begins: bool, choice: int = 0
    ) -> dict[str, Any]:
        """A choice, or a piece of one; `begins`: nothing has been told of it yet."""
        if self._what.nothing:
            text, logprobs, finish = "", (), finish and "length"
        told: dict[str, list[Any]] | None = None
        if begins:
            self._offsets[choice] = Offsets(self._prompt.text if self._what.echo else text)
        if self._what.sampling.logprobs is not None:
            told = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
            offsets = self._offsets[choice]
            if begins and self._what.echo:
                self._tell(told, TokenLogprob(self._prompt.ids[0], 0.0), offsets, first=True)
                for one in self.prompt_logprobs:
                    self._tell(told, one, offsets)
            for one in logprobs:
                self._tell(told, one, offsets)
        return {
            "text": self._prompt.text + text if begins and self._what.echo else text,
            "logprobs": told,
            "finish_reason": FINISHES[finish] if finish else None,  # type: ignore[index]
        }

    def _tell(self, told: dict[str, list[Any]], one: TokenLogprob, offsets: Offsets, first: bool = False) -> None:
        data = self._backend.token_bytes(one.token)
        name = _name(data)
        told["tokens"].append(name)
        told["text_offset"].append(offsets.of(data))
        told["token_logprobs"].append(None if first else finite(one.logprob))
        top: dict[str, float] = {}
        for token, value in (*one.top, (one.token, one.logprob)):
            top.setdefault(_name(self._backend.token_bytes(token)), finite(value))
        told["top_logprobs"].append(None if first else top)


class Offsets:
    """Where tokens begin in the text that is told, in characters; a vocabulary that begins every text with a space has
    it in the first token, and not in the text."""

    def __init__(self, text: str) -> None:
        self._spaced, self._at, self._begun = text.startswith(" "), 0, False
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def of(self, data: bytes) -> int:
        """Where this token, the next one, begins."""
        at = self._at
        if data and not self._begun:
            self._begun = True
            if data.startswith(b" ") and not self._spaced:
                data = data[1:]
        self._at += len(self._decoder.decode(data))
        return at


def _name(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


async def _streamed(service: Service, caller: Caller, body: CompletionBody, what: Asked) -> AsyncGenerator[bytes]:
    async with service.use(caller, body.model) as backend:
        call = Call(new_id("cmpl-"), caller, "text_completion", backend.card.name, stream=True)
        prompts = await _ready(backend, body, what)
        slots = asyncio.Semaphore(AT_ONCE)

        async def source(prompt: Prompt) -> AsyncGenerator[Event]:
            async with slots, aclosing(service.answer(call, backend, prompt.request)) as events:
                async for event in events:
                    yield event

        chunks = Chunks(
            [Teller(backend, prompt, what) for prompt in prompts],
            what,
            {
                "id": call.id,
                "object": "text_completion",
                "created": int(time.time()),
                "model": body.model or backend.card.name,
                "system_fingerprint": await fingerprint(backend),
            },
            usage=UsageInStream(body.stream_options, nothing=what.nothing),
        )
        async with aclosing(batches(*(source(prompt) for prompt in prompts))) as several:
            async for events in several:
                if piece := chunks.of(events):
                    yield piece
        yield chunks.last()


class Chunks:
    """The chunks of one stream: events of several prompts in, bytes out."""

    def __init__(self, tellers: list[Teller], what: Asked, head: dict[str, Any], *, usage: UsageInStream) -> None:
        self._tellers, self._what, self._usage = tellers, what, usage
        self._head = f"data: {json.dumps(head)[:-1]}"
        self._begun: set[int] = set()

    def of(self, events: list[tuple[int, Event]]) -> bytes:
        """What these events say; texts of a choice that follow one another are one chunk."""
        made: list[str] = []
        self._usage.see(events)
        for number, event in merged(events):
            teller, index = self._tellers[number], number * self._what.sampling.n + event.choice
            teller.prompt_logprobs += event.prompt_logprobs
            if not (event.text or event.logprobs or event.finish):
                continue
            one = teller.choice(
                event.text, event.logprobs, event.finish, begins=index not in self._begun, choice=event.choice
            )
            self._begun.add(index)
            made.append(f'{self._head},"choices":[{json.dumps({"index": index, **one})}]{self._usage.tail}')
        return "".join(made).encode()

    def last(self) -> bytes:
        """What stands after the last choice's end."""
        return self._usage.last(self._head)
