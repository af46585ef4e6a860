"""The backend that runs a model in this process: text to ids, the engine's thread, ids to text.

What it is: `LocalBackend`, a `types.Backend` over an `LLM`; the server and evaluation use it.
What it is not: HTTP, or a scheduler. It may be used from several event loops at once; each answer belongs to its own.
What is surprising: from then on the engine belongs to a thread, and the `LLM` it came from answers no more.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator
from concurrent.futures import Future
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING

from puna.engine.engine import Progress
from puna.engine.sampler import Draw
from puna.engine.thread import STUCK_AFTER, EngineThread, Health
from puna.errors import PunaError
from puna.llm import LLM
from puna.text.answer import AnswerText
from puna.types import Event, Grammar, Request, TokenLogprob, Usage
from puna.weights.adapter import read_adapter

if TYPE_CHECKING:
    from puna.engine.grammar import Constraint


class LocalBackend:
    """See types.Backend."""

    def __init__(self, llm: LLM, *, stuck_after: float = STUCK_AFTER) -> None:
        """`stuck_after`: seconds after which a step that does not come back is given up."""
        self._llm = llm
        self._thread = EngineThread(llm.take_engine(), stuck_after=stuck_after, settle=llm.settle)

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
        sampling = request.sampling
        prompt, follows = await asyncio.to_thread(self._llm.prompt_ids, request.prompt, raw=request.raw)
        constraint = None if request.grammar is None else await asyncio.to_thread(self._compile, request.grammar)
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[Progress | PunaError] = asyncio.Queue()
        submitted = self._thread.submit(
            lambda item: _call(loop, arrived, item),
            prompt,
            sampling,
            stop_ids=self._llm.stop_ids,
            namespace=request.namespace,
            priority=request.priority,
            deadline=None if request.timeout is None else time.monotonic() + request.timeout,
            constraint=constraint,
            adapter=request.adapter or self._llm.adapter,
        )
        try:
            number = await asyncio.wrap_future(submitted)
        except asyncio.CancelledError:  # the client left while a step kept the engine from taking its request
            submitted.add_done_callback(self._withdraw)
            raise
        texts = [AnswerText(self._llm.tokenizer, follows, sampling.stop) for _ in range(sampling.best_of or sampling.n)]
        left, made, reused = len(texts), 0, 0
        try:
            while left:
                item = await arrived.get()
                if isinstance(item, PunaError):
                    raise item
                if item.error is not None:
                    raise item.error
                answer = texts[item.choice]
                if answer.stopped:
                    continue  # made before the engine heard of the stop string
                text, used = answer.push(item.tokens)
                finish = "stop" if answer.stopped else item.finish
                if finish is not None:
                    text += answer.finish()
                    left -= 1
                    if item.finish is None:
                        self._thread.cancel(number, item.choice)
                made, reused = made + used, item.reused
                yield Event(
                    choice=item.choice,
                    text=text,
                    token_ids=item.tokens[:used],
                    logprobs=_told(item.logprobs, used),
                    prompt_logprobs=_told(item.prompt_logprobs),
                    prefilled=item.prefilled,
                    finish=finish,
                    usage=None if left else Usage(len(prompt), reused, made),
                )
        finally:
            self._thread.cancel(number)

    def _compile(self, grammar: Grammar) -> Future[Constraint]:
        return self._llm.grammars.compile(grammar)  # the first makes the table of the vocabulary, which takes a while

    def _withdraw(self, submitted: Future[int]) -> None:
        if not submitted.cancelled() and submitted.exception() is None:
            self._thread.cancel(submitted.result())


def _told(draws: tuple[Draw, ...] | None, count: int | None = None) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(draw.token, draw.logprob, draw.top) for draw in (draws or ())[:count] if draw.logprob is not None
    )


def _call(
    loop: asyncio.AbstractEventLoop, arrived: asyncio.Queue[Progress | PunaError], item: Progress | PunaError
) -> None:
    """Hand a thing over from the engine's thread. Raises RuntimeError where the loop is closed: the client is gone."""
    loop.call_soon_threadsafe(arrived.put_nowait, item)


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
        )
        for i, pieces in enumerate(best)
    ]
