"""The backend that runs a model in this process: text to ids, the engine's thread, ids to text.

What it is: `LocalBackend`, a `types.Backend` over an `LLM`; the server and evaluation use it.
What it is not: HTTP, or a scheduler. It may be used from several event loops at once; each answer belongs to its own.
What is surprising: from then on the engine belongs to a thread, and the `LLM` it came from answers no more.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from puna.engine.engine import Progress
from puna.engine.pictures import Shown
from puna.engine.sampler import Draw
from puna.engine.thread import STUCK_AFTER, EngineThread, Health, Listener
from puna.errors import ChatFormatError, ContextError, PunaError, QueueFullError, TokenizerError, UsageError
from puna.gateway.card import model_card
from puna.gateway.post import Mail, Post
from puna.images import pictures_of
from puna.llm import LLM, scores_of, vector_of
from puna.text.answer import AnswerText
from puna.text.tools import CallParser, call_grammar
from puna.types import (
    Activity,
    Embeddings,
    Event,
    FinishReason,
    Grammar,
    Infill,
    Judge,
    Message,
    ModelCard,
    Pooling,
    Prompt,
    Request,
    Sampling,
    Score,
    TokenLogprob,
    Tool,
    ToolCallPiece,
    Usage,
)
from puna.weights.adapter import read_adapter

if TYPE_CHECKING:
    from puna.engine.grammar import Constraint

EMBEDDED_AT_ONCE = 64
"""Texts of one `embed` that are submitted at a time: enough to fill every step, and few among those who wait."""

TOKEN_CHARS = 32
"""Characters that a token of a prompt stands for at most, on the average of all of them. Text of people has 3 to 5, and
a text above this is refused before it is encoded: that takes a second for each megabyte, of whatever length is sent."""

PIXEL_BYTES = 2 << 30
"""Bytes of pictures made ready for the requests under way: one takes up to 23 MB."""

SHORT_PROMPT = 1000
"""Characters, or ids, of a prompt that the event loop encodes itself: well under a millisecond."""


class LocalBackend:
    """See types.Backend."""

    def __init__(self, llm: LLM, *, name: str | None = None, stuck_after: float = STUCK_AFTER) -> None:
        """`name`: what the model is called, where not as the one that it was loaded by; `stuck_after`: seconds after
        which a step that does not come back is given up. It reads some pieces of the weights, for the card's digest."""
        self._llm = llm
        engine = llm.take_engine()
        dtype, quant = llm.loaded_as
        card = model_card(llm.name, llm.checkpoint, llm.tokenizer, llm.chat_format, dtype=dtype, quant=quant)
        self._card = replace(card, name=name or card.name, context_length=engine.capacity, sees=card.sees and llm.sees)
        self._pixel_bytes = 0  # of requests under way
        self._pixel_lock = threading.Lock()  # they may be of several event loops
        self._special = frozenset(llm.tokenizer.special.values())
        self._post = Post()
        self._thread = EngineThread(engine, stuck_after=stuck_after, settle=llm.settle, step_told=self._post)

    @property
    def card(self) -> ModelCard:
        """See types.Backend. `context_length` is what the cache has room for, where that is less than the model's."""
        return self._card

    @property
    def health(self) -> Health:
        """Whether it answers, and if not, why."""
        return self._thread.health

    async def generate(self, request: Request) -> AsyncIterator[Event]:
        """See types.Backend."""
        sampling = request.sampling
        async with aclosing(self._generate(request)) as events:
            if (sampling.best_of or sampling.n) > sampling.n:
                for event in await _best(events, sampling.n):
                    yield event
            else:
                async for event in events:
                    yield event

    async def embed(
        self,
        texts: Sequence[str | tuple[int, ...]],
        *,
        pooling: Pooling = "mean",
        normalize: bool = True,
        namespace: str = "",
        priority: int = 0,
    ) -> Embeddings:
        """See types.Backend; the vectors are those of `LLM.embed`. Raises what it does, and QueueFullError."""
        if isinstance(texts, str):
            raise UsageError("embed takes a list of texts.", remedy="Put the text into a list.")
        for text in texts:
            self._check_length(text)
        prompts = await asyncio.to_thread(lambda: [self._llm.prompt_ids(text, raw=True)[0] for text in texts])
        vectors: list[tuple[float, ...]] = [()] * len(prompts)
        left = list(range(len(prompts)))
        workers = min(EMBEDDED_AT_ONCE, len(prompts))

        async def work() -> None:
            nonlocal workers
            while left:
                n = left.pop()
                begin = partial(
                    self._thread.submit_embedding,
                    prompt=prompts[n],
                    pooling=pooling,
                    namespace=namespace,
                    priority=priority,
                    adapter=self._llm.adapter,
                )
                try:
                    seen = await self._all(begin, 1)
                except QueueFullError:
                    if workers == 1:
                        raise
                    left.append(n)  # fewer at a time, then: those under way go on with it
                    break
                vectors[n] = tuple(vector_of(seen, normalize=normalize).tolist())
            workers -= 1

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(workers):
                    group.create_task(work())
        except BaseExceptionGroup as errors:
            raise _first(errors) from None
        return Embeddings(tuple(vectors), sum(map(len, prompts)))

    async def score(
        self,
        prompt: Prompt,
        continuations: Sequence[str | tuple[int, ...]],
        *,
        raw: bool = False,
        namespace: str = "",
        priority: int = 0,
    ) -> tuple[Score, ...]:
        """See types.Backend; the scores are those of `LLM.score`. Raises what it does, and QueueFullError."""
        for text in (prompt, *continuations):
            self._check_length(text)
        ids, given = await asyncio.to_thread(self._llm.given_ids, prompt, continuations, raw=raw)
        begin = partial(
            self._thread.submit_score,
            prompt=ids,
            continuations=given,
            namespace=namespace,
            priority=priority,
            adapter=self._llm.adapter,
        )
        return tuple(scores_of(await self._all(begin, len(given)), len(given)))

    async def encode(self, prompt: Prompt, *, raw: bool = False, tools: Sequence[Tool] = ()) -> tuple[int, ...]:
        """See types.Backend. Raises what `LLM.encode` does."""
        self._check_length(prompt, tools)
        made = await asyncio.to_thread(self._llm.prepared, prompt, raw=raw, tools=tools)
        return tuple(made.ids)

    async def decode(self, ids: Sequence[int]) -> str:
        """See types.Backend. Special tokens are told by their names."""
        return await asyncio.to_thread(self._llm.tokenizer.decode, ids)

    async def render(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> str:
        """See types.Backend."""
        chat_format = self._llm.chat_format
        if chat_format is None:
            raise ChatFormatError(f"{self.card.name} has no chat format.", remedy="Give it a text to continue instead.")
        self._check_length(tuple(messages), tools)
        return await asyncio.to_thread(chat_format.render, messages, tools=tools)

    def token_bytes(self, token: int) -> bytes:
        """See types.Backend."""
        if token in self._special:
            return b""
        try:
            return self._llm.tokenizer.token_bytes(token)
        except TokenizerError:  # the embedding may have more rows than there are tokens
            return b""

    async def activity(self) -> Activity:
        """See types.Backend. Raises StoppedError where the engine serves no more."""
        now = await asyncio.wrap_future(self._thread.call(lambda engine: engine.statistics()))
        cache, page_tokens, page_bytes = self._llm.cache, self._llm.page_tokens, self._llm.page_bytes
        return Activity(
            running=now.running,
            waiting=now.waiting + now.compiling,
            pages_total=cache.pages,
            pages_used=now.pages_used,
            pages_cached=now.pages_cached,
            pages_free=now.pages_free,
            page_tokens=page_tokens,
            page_bytes=page_bytes,
            local_pages_total=cache.local_pages,
            local_pages_used=now.local_pages_used,
            local_pages_cached=now.local_pages_cached,
            local_pages_free=now.local_pages_free,
            local_page_bytes=self._llm.local_page_bytes,
            steps=now.steps,
            computed_tokens=now.computed_tokens,
            reused_tokens=now.reused_tokens,
            made_tokens=now.made_tokens,
            guessed_tokens=now.guessed_tokens,
            right_guesses=now.right_guesses,
            preemptions=now.preemptions,
            evictions=now.evictions,
            schedule_seconds=now.schedule_seconds,
            run_seconds=now.run_seconds,
            sample_seconds=now.sample_seconds,
            kernels=self._llm.kernels,
            kv_type=self._llm.kv_type,
        )

    async def load_adapter(self, folder: Path, name: str | None = None) -> None:
        """As `LLM.load_adapter`, while requests are answered."""
        adapter = await asyncio.to_thread(read_adapter, folder, self._llm.config)
        name = name or folder.name
        loaded = self._thread.call(lambda engine: engine.load_adapter(name, adapter.pairs, adapter.nbytes))
        await asyncio.wrap_future(loaded)

    async def unload_adapter(self, name: str) -> None:
        """As `LLM.unload_adapter`."""
        await asyncio.wrap_future(self._thread.call(lambda engine: engine.unload_adapter(name)))

    async def close(self) -> None:
        """See types.Backend."""
        await asyncio.to_thread(self._thread.close)

    async def _generate(self, request: Request) -> AsyncGenerator[Event]:
        self._check_length(request.prompt, request.tools)
        if not pictures_of(request.prompt):
            plan = self._plan(request) if _is_short(request) else await asyncio.to_thread(self._plan, request)
            async with aclosing(self._answered(request, plan)) as events:
                async for event in events:
                    yield event
            return
        held = 0
        self._check_pixels()
        plan = await asyncio.to_thread(self._plan, request)
        try:
            held = self._hold_pixels(plan)
            async with aclosing(self._answered(request, plan)) as events:
                async for event in events:
                    yield event
        finally:
            with self._pixel_lock:
                self._pixel_bytes -= held

    def _check_pixels(self, more: int = 0) -> None:
        """Raises QueueFullError where there is no room for `more` bytes beside those of the requests under way."""
        if self._pixel_bytes + more > PIXEL_BYTES:
            raise QueueFullError(
                f"Pictures of {self._pixel_bytes / 1e6:,.0f} MB are waiting or looked at already.",
                remedy="Try again when some have been answered.",
            )

    def _hold_pixels(self, plan: _Plan) -> int:
        """Count a request's pictures among those under way; returns their bytes. Raises QueueFullError."""
        nbytes: int = sum({each.digest: each.pixels.tiles.nbytes for each in plan.pictures}.values())
        with self._pixel_lock:
            if self._pixel_bytes:  # one request alone is always taken
                self._check_pixels(nbytes)
            self._pixel_bytes += nbytes
        return nbytes

    async def _answered(self, request: Request, plan: _Plan) -> AsyncGenerator[Event]:
        sampling = request.sampling
        grammar = plan.grammar
        constraint = None if grammar is None else await asyncio.to_thread(self._compile, grammar)
        strict = {name: await self._compiled(each) for name, each in plan.strict.items()}
        mail = Mail(self._post)
        submit = partial(
            self._thread.submit,
            mail.put,
            stop_ids=self._llm.stop_ids,
            namespace=request.namespace,
            priority=request.priority,
            deadline=None if request.timeout is None else time.monotonic() + request.timeout,
            adapter=request.adapter or self._llm.adapter,
            pictures=plan.pictures,
        )
        number = await self._begun(submit(prompt=plan.prompt, sampling=sampling, constraint=constraint))
        # Which choice it is that a choice of a request of the engine's makes: a strict call has a request of its own.
        of = {(number, n): _Choice(n, self._llm, plan) for n in range(sampling.best_of or sampling.n)}
        left, made, reused = len(of), 0, 0
        try:
            while left:
                item = await mail.get()
                if isinstance(item, PunaError):
                    raise item
                place = (item.request, item.choice)
                if place not in of:
                    continue  # made before the engine heard of the end
                if item.error is not None:
                    raise item.error
                choice = of[place]
                told = choice.take(item)
                made += len(told.tokens)
                reused = item.reused if item.request == number else reused
                finish = None if told.calls else choice.finish or item.finish
                if told.calls or finish is not None:
                    del of[place]
                    if item.finish is None:
                        self._thread.cancel(*place)
                left -= finish is not None
                yield Event(
                    choice=choice.number,
                    text="".join(piece for piece in told.pieces if isinstance(piece, str)),
                    token_ids=tuple(told.tokens),
                    logprobs=_told(told.draws),
                    prompt_logprobs=_told(item.prompt_logprobs),
                    prefilled=min(item.prefilled, len(plan.prompt)),
                    finish=finish,
                    usage=None if left else Usage(len(plan.prompt), reused, made),
                    tool_calls=tuple(piece for piece in told.pieces if isinstance(piece, ToolCallPiece)),
                    stopped_by=choice.text.stopped_by,
                )
                if told.calls:
                    begun = submit(
                        prompt=[*plan.prompt, *choice.kept],
                        sampling=choice.rest(sampling),
                        constraint=strict[told.calls].copy(),
                    )
                    of[await self._begun(begun), 0] = choice
        finally:
            for each in {number, *(request for request, _ in of)}:
                self._thread.cancel(each)

    def _check_length(self, prompt: Prompt, tools: Sequence[Tool] = ()) -> None:
        """Raises ContextError for a prompt that no context has room for, whatever its tokens are."""
        size, most = _characters(prompt, tools), self._card.context_length
        if size > TOKEN_CHARS * most:
            raise ContextError(
                f"The prompt's {size} characters are far more than the model's context of {most} tokens has room for.",
                remedy="Shorten the prompt.",
            )

    def _plan(self, request: Request) -> _Plan:
        """What a request comes to. Raises what `LLM.prepared` does, and UsageError and GrammarError about tools."""
        llm, stops = self._llm, request.sampling.stop
        if not request.tools or request.tool_choice == "none":
            ids, follows, pictures = llm.prepared(request.prompt, raw=request.raw, tools=request.tools)
            return _Plan(ids, follows, request.grammar, stops=stops, pictures=pictures)
        if request.grammar is not None:
            raise UsageError(
                "An answer that may be a call of a tool cannot have a given form too.",
                remedy='Leave the form or the tools out, or set tool_choice to "none".',
            )
        ids, follows, pictures = llm.prepared(request.prompt, raw=request.raw, tools=request.tools)
        form = None if llm.chat_format is None else llm.chat_format.call_form
        assert form is not None  # else `prompt_ids` refused the tools
        names = request.callable_tools or tuple(tool.name for tool in request.tools)
        tools = [tool for tool in request.tools if tool.name in names]
        many = request.parallel_tool_calls
        if request.tool_choice == "required":
            grammar = call_grammar(form, tools, many=many)
            tag = llm.tokenizer.encode(form.tag, allow_special=True) if form.tag else []  # no grammar has room for it
            return _Plan([*ids, *tag], follows, grammar, names, many, tagged=bool(tag), stops=stops, pictures=pictures)
        # Where several calls are one list, they are one text, which may hold any of the tools.
        room = form.kind == "pythonic" and form.many and many
        strict = {tool.name: call_grammar(form, tools if room else [tool], many=many) for tool in tools if tool.strict}
        return _Plan(ids, follows, None, names, many, strict=strict, stops=stops, pictures=pictures)

    async def _begun(self, submitted: Future[int]) -> int:
        """The number of a request. Raises what submitting it did."""
        try:
            return await asyncio.wrap_future(submitted)
        except asyncio.CancelledError:  # the client left while a step kept the engine from taking its request
            submitted.add_done_callback(self._withdraw)
            raise

    async def _all(self, begin: Callable[[Listener], Future[int]], choices: int) -> list[Progress]:
        """Everything that is told of a request that makes no text."""
        mail = Mail(self._post)
        number = await self._begun(begin(mail.put))
        seen: list[Progress] = []
        try:
            while choices:
                item = await mail.get()
                error = item if isinstance(item, PunaError) else item.error
                if error is not None:
                    raise error
                assert isinstance(item, Progress)
                seen.append(item)
                choices -= item.finish is not None
        finally:
            self._thread.cancel(number)
        return seen

    def _compile(self, grammar: Grammar) -> Future[Constraint]:
        return self._llm.grammars.compile(grammar)  # the first makes the table of the vocabulary, which takes a while

    async def _compiled(self, grammar: Grammar) -> Constraint:
        return await asyncio.wrap_future(await asyncio.to_thread(self._compile, grammar))

    def _withdraw(self, submitted: Future[int]) -> None:
        if not submitted.cancelled() and submitted.exception() is None:
            self._thread.cancel(submitted.result())


@dataclass(frozen=True)
class _Plan:
    """What a request comes to: the ids that the answer follows, those that its text continues, the form it must have,
    the tools that it may call (none where calls are not looked for), whether several, whether the prompt ends with the
    tag that stands before a call, the grammars of calls of strict tools that the model chooses to make, the
    strings that end the answer, and the pictures in the prompt."""

    prompt: list[int]
    follows: list[int]
    grammar: Grammar | None
    names: tuple[str, ...] = ()
    many: bool = True
    tagged: bool = False
    strict: Mapping[str, Grammar] = field(default_factory=dict)
    stops: tuple[str, ...] = ()
    pictures: tuple[Shown, ...] = ()


@dataclass
class _Taken:
    """What an answer took of what was made: text and calls, and their tokens. `calls`: the strict tool that the model
    began to call; from there it is made anew, by the tool's grammar."""

    pieces: list[str | ToolCallPiece] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    draws: list[Draw] = field(default_factory=list)
    calls: str = ""


class _Choice:
    """One answer under way.

    Where a tool is strict, tokens that may be the beginning of a call are kept back: if they are, the engine makes the
    call once more, as a request of its own that goes on behind what was kept, by the grammar of the tool's calls.
    """

    def __init__(self, number: int, llm: LLM, plan: _Plan) -> None:
        self.number = number
        self._llm, self._plan = llm, plan
        self.text = AnswerText(llm.tokenizer, plan.follows, plan.stops)
        self._parser = CallParser(plan.names, many=plan.many, tagged=plan.tagged) if plan.names else None
        self._strict = frozenset(plan.strict)
        self.kept: list[int] = []
        """Its tokens so far, but for those that are kept back."""
        self._back: list[tuple[int, Draw | None]] = []
        self.finish: FinishReason | None = None

    def take(self, item: Progress) -> _Taken:
        """What the engine made for it. Sets `finish` where it came to an end that the engine does not know of."""
        taken, parser = _Taken(), self._parser
        draws = item.logprobs or (None,) * len(item.tokens)
        for token, draw in zip(item.tokens, draws, strict=True):
            pieces = self._read(self.text.push((token,))[0])
            self._back.append((token, draw))
            for n, piece in enumerate(pieces):
                if isinstance(piece, ToolCallPiece) and piece.name in self._strict:
                    taken.pieces += pieces[:n]
                    taken.calls = piece.name
                    self._call_anew(piece.index)
                    return taken
            taken.pieces += pieces
            if not (self._strict and parser is not None and parser.undecided):
                self._release(taken)
            if self.text.stopped or (parser is not None and parser.ended):
                self.finish = "stop"
                break
        if self.finish is not None or item.finish is not None:
            taken.pieces += self._read(self.text.finish())
            if parser is not None:
                taken.pieces += parser.finish()
            self._release(taken)
        return taken

    def rest(self, sampling: Sampling) -> Sampling:
        """What is left to make behind what was kept."""
        most, many = sampling.max_tokens, (sampling.best_of or sampling.n) > sampling.n
        return replace(
            sampling,
            n=1,
            best_of=None,
            logprobs=0 if many and sampling.logprobs is None else sampling.logprobs,
            prompt_logprobs=None,
            max_tokens=None if most is None else most - len(self.kept),
            min_tokens=max(0, sampling.min_tokens - len(self.kept)),
            # Each choice and call has luck of its own, and the same seed gives the same.
            seed=None if sampling.seed is None else (sampling.seed + (self.number + 1) * _GOLDEN) % (1 << 64),
        )

    def _read(self, text: str) -> list[str | ToolCallPiece]:
        return [text] if self._parser is None else self._parser.push(text)

    def _release(self, taken: _Taken) -> None:
        for token, draw in self._back:
            self.kept.append(token)
            taken.tokens.append(token)
            if draw is not None:
                taken.draws.append(draw)
        self._back = []

    def _call_anew(self, calls: int) -> None:
        """Forget the call that began, for it is made by its grammar now."""
        self._back = []
        self._strict = frozenset()
        self.text = AnswerText(self._llm.tokenizer, [*self._plan.follows, *self.kept], self._plan.stops)
        self._parser = CallParser(self._plan.names, many=self._plan.many, calls=calls)


def _characters(prompt: Prompt, tools: Sequence[Tool]) -> int:
    """Characters of a prompt that are to be encoded: none of ids, and what a template says is left out."""
    size = sum(len(tool.name) + len(tool.description) + len(tool.parameters) for tool in tools)
    if isinstance(prompt, str):
        return size + len(prompt)
    if isinstance(prompt, Infill):
        return size + len(prompt.prefix) + len(prompt.suffix)
    if isinstance(prompt, Judge):
        return _characters(prompt.messages, tools) + sum(len(c.name) + len(c.description) for c in prompt.categories)
    for part in prompt:
        if isinstance(part, Message):
            size += len(part.content) + sum(len(call.name) + len(call.arguments) for call in part.tool_calls)
    return size


_GOLDEN = 0x9E3779B97F4A7C15
"""2^64 divided by the golden ratio: multiples of it lie far from each other."""


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first of the errors that ended a group of tasks."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _told(draws: Sequence[Draw] | None) -> tuple[TokenLogprob, ...]:
    return tuple(TokenLogprob(draw.token, draw.logprob, draw.top) for draw in draws or () if draw.logprob is not None)


def _is_short(request: Request) -> bool:
    """Whether its prompt becomes ids sooner than a thread would have begun. A chat's template may do anything."""
    prompt = request.prompt
    if isinstance(prompt, Infill | Judge):
        return False
    plain = request.raw or not (isinstance(prompt, str) or (prompt and isinstance(prompt[0], Message)))
    return plain and not request.tools and len(prompt) <= SHORT_PROMPT


async def _best(events: AsyncIterator[Event], n: int) -> list[Event]:
    """The `n` answers with the largest mean log probability of a token, each as one event, numbered anew."""
    choices: dict[int, list[Event]] = {}
    usage = None
    of_prompt: tuple[TokenLogprob, ...] = ()
    async for event in events:
        of_prompt += event.prompt_logprobs
        choices.setdefault(event.choice, []).append(event)
        usage = event.usage or usage

    def worth(pieces: list[Event]) -> float:
        logprobs = [token.logprob for piece in pieces for token in piece.logprobs]
        return sum(logprobs) / len(logprobs) if logprobs else -math.inf  # an answer of nothing has no mean

    best = sorted(choices.values(), key=worth, reverse=True)[:n]
    return [
        Event(
            choice=i,
            text="".join(piece.text for piece in pieces),
            token_ids=tuple(token for piece in pieces for token in piece.token_ids),
            logprobs=tuple(token for piece in pieces for token in piece.logprobs),
            prompt_logprobs=of_prompt if i == 0 else (),
            prefilled=pieces[-1].prefilled,
            finish=pieces[-1].finish,
            usage=usage if i == n - 1 else None,
            tool_calls=tuple(call for piece in pieces for call in piece.tool_calls),
            stopped_by=pieces[-1].stopped_by,
        )
        for i, pieces in enumerate(best)
    ]
