"""What every protocol does with a request: find the model, let it answer, count what was used.

What it is: the walk between a route and a `Backend`, the same for all protocols.
What it is not: a protocol, or the door's rules; it asks the door at the right moments.
What is surprising: `answer` is where a caller's namespace and priority enter a request, so no route can forget them.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

from starlette.requests import Request as HttpRequest

from puna.errors import StoppedError, UnknownModelError
from puna.server.caller import Caller
from puna.server.elsewhere import Fetcher
from puna.types import (
    Backend,
    Embeddings,
    Event,
    Models,
    Pooling,
    Request,
    TokenLogprob,
    ToolCall,
    ToolCallPiece,
    Usage,
)


@dataclass(frozen=True)
class Call:
    """One request of a client: `id` is told to the client and stands in every log line; `operation` is what it is,
    as OpenTelemetry's GenAI conventions name it (chat, text_completion, embeddings, ...)."""

    id: str
    caller: Caller
    operation: str
    model: str
    stream: bool = False
    began: float = field(default_factory=time.monotonic)


class Ledger(Protocol):
    """Who counts: limits of keys before, use of tokens after (`door.py`)."""

    async def admit(self, caller: Caller) -> None:
        """Raises RequestError 429 where a limit of the caller's key is reached, and 401 where the key is revoked."""

    async def stands(self, caller: Caller) -> None:
        """Raises RequestError 401 where the caller's key is no longer in force."""

    async def spent(self, call: Call, usage: Usage) -> None:
        """What was used; called once an answer, also where it ended early."""


class Watch(Protocol):
    """Who looks on while one call is answered: metrics, traces, the audit log (`observe.py`)."""

    def event(self, event: Event) -> None:
        """A piece of the answer."""

    def end(self, usage: Usage | None, error: BaseException | None) -> None:
        """The end, whatever it was."""


class Observer(Protocol):
    """Gives a `Watch` for each call."""

    def begin(self, call: Call, request: Request | None = None, model: str = "") -> Watch:
        """A call begins; `request` is what is asked, `model` the name of who answers, where they are known."""


class Guard(Protocol):
    """Who judges what is asked and answered (`guarding.py`)."""

    def guards(self, backend: Backend, request: Request) -> bool:
        """Whether this request is judged."""

    def answered(self, backend: Backend, request: Request) -> AsyncGenerator[Event]:
        """The events of an answer, but for what is kept back."""


async def service_of(request: HttpRequest) -> Service:
    """The dependency that gives a route the service. Async, for FastAPI would send one that is not to a thread."""
    service: Service = request.app.state.service
    return service


def request_id(request: HttpRequest) -> str:
    """The id that the client is told in `x-request-id`, and that stands in the log."""
    return str(getattr(request.state, "request_id", ""))


def new_id(prefix: str) -> str:
    """An id that nobody can guess: `chatcmpl-…`."""
    return f"{prefix}{uuid.uuid4().hex}"


LOOK_AGAIN = 1.0
"""Seconds after which an answer under way asks again whether its caller's key is in force."""


class Service:
    """The models, those who count and look on, and who fetches pictures."""

    def __init__(
        self,
        models: Models,
        ledger: Ledger,
        observer: Observer,
        guard: Guard | None = None,
        pictures: Fetcher | None = None,
    ) -> None:
        self.models, self.ledger, self.observer, self.guard = models, ledger, observer, guard
        self.pictures = pictures or Fetcher()

    @asynccontextmanager
    async def use(self, caller: Caller, model: str, *, keep_alive: float | None = None) -> AsyncIterator[Backend]:
        """The backend of a model that this caller may use, "" for the default.

        Raises UnknownModelError, for one that is not theirs too: whether it exists is not told; and what `Ledger.admit`
        raises: a key that may ask nothing now has no model loaded.
        """
        await self.ledger.admit(caller)
        if model and not caller.may_use(model):
            raise unknown_model(model)
        async with self.models.use(model, keep_alive=keep_alive) as backend:
            if not caller.may_use(backend.card.name) and not (model and caller.may_use(model)):
                raise unknown_model(model or "the default model")
            yield backend

    async def answer(self, call: Call, backend: Backend, request: Request) -> AsyncGenerator[Event]:
        """The events of an answer, counted and looked on. Closing it early cancels the request.

        Raises StoppedError where the backend ended without the end of every choice: nobody takes a half for a whole;
        what `Ledger.stands` raises: who takes a key back ends its answers too; and what `Fetcher.seen` raises.
        """
        await self.ledger.admit(call.caller)
        request = replace(
            request,
            prompt=await self.pictures.seen(request.prompt),
            namespace=call.caller.namespace,
            priority=request.priority + call.caller.priority,
        )
        watch = self.observer.begin(call, request, backend.card.name)
        seen = Seen()
        failed: BaseException | None = None
        left = request.sampling.n
        looked = time.monotonic()
        try:
            guarded = self.guard is not None and self.guard.guards(backend, request)
            source = self.guard.answered(backend, request) if self.guard and guarded else backend.generate(request)
            async with aclosing(source) as events:  # type: ignore[type-var]
                async for event in events:
                    if (now := time.monotonic()) > looked + LOOK_AGAIN:
                        looked = now
                        await self.ledger.stands(call.caller)
                    left -= event.finish is not None
                    seen.add(event)
                    watch.event(event)
                    yield event
            if left > 0:
                raise StoppedError("The answer was ended before it was whole.", remedy="Ask again.")
        except BaseException as error:
            failed = error
            raise
        finally:
            watch.end(seen.usage, failed)
            await self.ledger.spent(call, seen.usage)

    async def embed(
        self,
        call: Call,
        backend: Backend,
        texts: Sequence[str | tuple[int, ...]],
        *,
        pooling: Pooling = "mean",
        normalize: bool = True,
        priority: int = 0,
    ) -> Embeddings:
        """A vector for each text, counted and looked on."""
        await self.ledger.admit(call.caller)
        watch = self.observer.begin(call, None, backend.card.name)
        usage = Usage(0, 0, 0)
        failed: BaseException | None = None
        try:
            made = await backend.embed(
                texts,
                pooling=pooling,
                normalize=normalize,
                namespace=call.caller.namespace,
                priority=priority + call.caller.priority,
            )
            usage = Usage(made.prompt_tokens, 0, 0)
            return made
        except BaseException as error:
            failed = error
            raise
        finally:
            watch.end(usage, failed)
            await self.ledger.spent(call, usage)


def unknown_model(name: str) -> UnknownModelError:
    """The error for a name that is not served, or not to this caller."""
    return UnknownModelError(
        f"The model {name!r:.100} is not served here.", remedy="GET /v1/models lists those that are."
    )


class Seen:
    """What came of an answer so far, for who must count one that ends early."""

    def __init__(self) -> None:
        self.usage = Usage(0, 0, 0)

    def add(self, event: Event) -> None:
        """Take a piece in. The last brings the exact figures."""
        before = self.usage
        self.usage = event.usage or Usage(
            max(before.prompt_tokens, event.prefilled),
            before.reused_tokens,
            before.completion_tokens + len(event.token_ids),
        )


@dataclass
class Whole:
    """One choice of an answer, whole."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    tool_calls: list[ToolCall] = field(default_factory=list)
    finish: str = ""
    refusal: str = ""


async def collect(events: AsyncGenerator[Event], choices: int = 1) -> tuple[list[Whole], Usage]:
    """Every choice whole, in order, and what was used."""
    wholes = [Whole() for _ in range(choices)]
    usage = Usage(0, 0, 0)
    async with aclosing(events):
        async for event in events:
            one = wholes[event.choice]
            one.text += event.text
            one.token_ids += event.token_ids
            one.logprobs += event.logprobs
            one.prompt_logprobs += event.prompt_logprobs
            for piece in event.tool_calls:
                add_piece(one.tool_calls, piece)
            one.finish = event.finish or one.finish
            one.refusal = event.refusal or one.refusal
            usage = event.usage or usage
    return wholes, usage


def add_piece(calls: list[ToolCall], piece: ToolCallPiece) -> None:
    """Put a piece of a call of a tool to the calls it belongs to."""
    while len(calls) <= piece.index:
        calls.append(ToolCall("", ""))
    call = calls[piece.index]
    calls[piece.index] = ToolCall(call.name + piece.name, call.arguments + piece.arguments, call.id or piece.id)
