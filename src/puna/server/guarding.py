"""A guard before and after every answer: what a Llama Guard calls unsafe is kept back.

What it is: `Guarding`, a `service.Guard` over a guard model, for every protocol at once; and `judged`, the verdict and
the score of what a guard model said, which `/v1/moderations` gives too.
What it is not: a prompt or a parser (`puna.text.guard`), or a protocol's words for what was kept back.
What is surprising: an answer is judged whole, at its end, so a stream brings nothing of it until then, only how far it
is. A guard that fails to judge fails the request: nothing goes out unjudged. Ids and texts to be continued are judged
as a user's message; system messages, which are the operator's, are not. The guard's own tokens are on nobody's account.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from puna.errors import StoppedError, UsageError
from puna.server.exchange import CURRENT
from puna.server.service import add_piece
from puna.text.guard import Verdict, longest_verdict, verdict
from puna.types import (
    Backend,
    Category,
    Event,
    Infill,
    Judge,
    Message,
    Prompt,
    Request,
    Sampling,
    TokenLogprob,
    ToolCall,
    ToolCallPiece,
    Usage,
)

LIKELIEST = 20
"""Tokens that are looked at for the score of a verdict's first one."""


@dataclass(frozen=True)
class Judged:
    """A verdict, and the probability of "unsafe" against "safe" that the model gave where its verdict begins."""

    verdict: Verdict
    score: float
    usage: Usage

    @property
    def told(self) -> str:
        """In one line, for a log."""
        codes = ",".join(each.code for each in self.verdict.categories)
        return f"unsafe {codes}".rstrip() if self.verdict.unsafe else "safe"


def question(
    backend: Backend,
    messages: Sequence[Message],
    categories: Sequence[Category] = (),
    *,
    namespace: str = "",
    priority: int = 0,
) -> Request:
    """What a guard model is asked about the last of these messages."""
    most = longest_verdict(backend.card.guards, categories)
    sampling = Sampling(temperature=0, top_p=1, max_tokens=most, logprobs=LIKELIEST)
    return Request(Judge(tuple(messages), tuple(categories)), sampling, namespace=namespace, priority=priority)


async def judged(backend: Backend, events: AsyncIterator[Event], categories: Sequence[Category] = ()) -> Judged:
    """The verdict in the events of a guard's answer. Raises VerdictError where there is none."""
    text, logprobs, usage, ended = "", list[TokenLogprob](), Usage(0, 0, 0), False
    async for event in events:
        text += event.text
        logprobs += event.logprobs
        usage, ended = event.usage or usage, ended or event.finish is not None
    if not ended:
        raise StoppedError("The guard was ended before it had judged.", remedy="Ask again.")
    found = verdict(text, backend.card.guards, categories)
    return Judged(found, _score(logprobs, backend.token_bytes, found.unsafe), usage)


def _score(logprobs: Sequence[TokenLogprob], bytes_of: Callable[[int], bytes], unsafe: bool) -> float:
    """From the first token that is more than white space: both words' first tokens may be whole or a part of them."""

    def word(token: int) -> str:
        return bytes_of(token).decode(errors="replace").strip()

    for one in logprobs:
        if not word(one.token):
            continue
        sums = {"safe": 0.0, "unsafe": 0.0}
        for token, value in (dict(one.top) | {one.token: one.logprob}).items():
            for said in sums:
                if word(token) and said.startswith(word(token)):
                    sums[said] += math.exp(value)
        total = sum(sums.values())
        if total > 0:
            return sums["unsafe"] / total
        break
    return float(unsafe)


@dataclass
class _Held:
    """One choice of an answer that is not judged yet."""

    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    pieces: tuple[ToolCallPiece, ...] = ()
    calls: list[ToolCall] = field(default_factory=list)

    def add(self, event: Event) -> None:
        self.text += event.text
        self.logprobs += event.logprobs
        self.prompt_logprobs += event.prompt_logprobs
        self.pieces += event.tool_calls
        for piece in event.tool_calls:
            add_piece(self.calls, piece)

    def told(self, last: Event) -> Event:
        """Its last event, with all that was held."""
        return replace(
            last, text=self.text, logprobs=self.logprobs, prompt_logprobs=self.prompt_logprobs, tool_calls=self.pieces
        )


class Guarding:
    """See service.Guard. `before` judges what is asked, `after` what is answered, both by these categories (none: those
    that the guard was trained on). Raises UsageError for a model that is no guard."""

    def __init__(
        self, backend: Backend, *, before: bool = True, after: bool = True, categories: Sequence[Category] = ()
    ) -> None:
        if not backend.card.guards:
            raise UsageError(
                f"{backend.card.name} is no guard model.", remedy="Name a Llama Guard, such as llama-guard3:1b."
            )
        self.backend = backend
        self.categories = tuple(categories)
        self._before, self._after = before, after

    def guards(self, backend: Backend, request: Request) -> bool:
        """See service.Guard: all but what a guard is asked for a verdict, which is read and not passed on."""
        return not isinstance(request.prompt, Judge)

    async def answered(self, backend: Backend, request: Request) -> AsyncGenerator[Event]:
        """See service.Guard: what a guard model says of a conversation is not judged itself, and must be a verdict; a
        text that it is to go on with is judged, as with any model."""
        prompt = request.prompt
        if backend.card.guards and isinstance(prompt, tuple) and prompt and isinstance(prompt[0], Message):
            async for event in _verdicts(backend, request):
                yield event
            return
        said = await _conversation(backend, prompt)
        if self._before:
            found = await self._judge("before", said, request)
            if found.verdict.unsafe:
                count = request.sampling.n
                for choice in range(count):
                    yield Event(
                        choice,
                        finish="filtered",
                        refusal=_why("What was asked", found.verdict),
                        usage=Usage(0, 0, 0) if choice == count - 1 else None,
                    )
                return
        async with aclosing(backend.generate(request)) as events:  # type: ignore[type-var]
            held: dict[int, _Held] = {}
            async for event in events:
                if not self._after:
                    yield event
                    continue
                one = held.setdefault(event.choice, _Held())
                one.add(event)
                if event.finish is None:
                    yield Event(event.choice, token_ids=event.token_ids, prefilled=event.prefilled)
                else:
                    yield await self._released(said, one, event, request)

    async def _released(self, said: Sequence[Message], one: _Held, last: Event, request: Request) -> Event:
        """The last event of a choice, with all that was held of it, or why it is kept back."""
        if one.text or one.calls:
            answer = Message("assistant", one.text, tuple(one.calls))
            found = await self._judge("after", (*said, answer), request)
            if found.verdict.unsafe:
                return Event(
                    last.choice,
                    token_ids=last.token_ids,
                    prefilled=last.prefilled,
                    finish="filtered",
                    usage=last.usage,
                    refusal=_why("The answer", found.verdict),
                )
        return one.told(last)

    async def _judge(self, when: str, messages: Sequence[Message], request: Request) -> Judged:
        asks = question(self.backend, messages, self.categories, namespace=request.namespace, priority=request.priority)
        seen = CURRENT.get()
        try:
            async with aclosing(self.backend.generate(asks)) as events:  # type: ignore[type-var]
                found = await judged(self.backend, events, self.categories)
        except Exception as error:
            if seen is not None:
                seen.guard.append(f"{when}: {type(error).__name__}")
            raise
        if seen is not None:
            seen.guard.append(f"{when}: {found.told}")
        return found


async def _verdicts(backend: Backend, request: Request) -> AsyncGenerator[Event]:
    """The verdicts of a guard model that is talked to. Raises VerdictError for anything else: a grammar or a bias that
    a client sends could have it say what it likes. The beginning of a word is a verdict that max_tokens cut short."""
    async with aclosing(backend.generate(request)) as events:  # type: ignore[type-var]
        held: dict[int, _Held] = {}
        async for event in events:
            one = held.setdefault(event.choice, _Held())
            one.add(event)
            if event.finish is None:
                yield Event(event.choice, token_ids=event.token_ids, prefilled=event.prefilled)
                continue
            text = one.text.strip()
            cut = event.finish == "length" and any(word.startswith(text) for word in ("safe", "unsafe"))
            if one.calls or not cut:
                verdict(one.text, backend.card.guards)
            yield one.told(event)


async def _conversation(backend: Backend, prompt: Prompt) -> tuple[Message, ...]:
    """What is asked, as a conversation."""
    if isinstance(prompt, Judge):
        return prompt.messages
    if isinstance(prompt, Infill):
        return (Message("user", prompt.prefix + prompt.suffix),)
    if isinstance(prompt, str):
        return (Message("user", prompt),)
    messages = tuple(part for part in prompt if isinstance(part, Message))
    if messages:
        return messages
    return (Message("user", await backend.decode([part for part in prompt if isinstance(part, int)])),)


def _why(what: str, found: Verdict) -> str:
    named = ", ".join(f"{each.code} ({each.name.rstrip('.')})" for each in found.categories)
    return f"{what} was kept back: the guard found it unsafe{f': {named}' if named else ''}."
