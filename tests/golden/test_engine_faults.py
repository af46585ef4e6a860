"""What goes wrong on the whole way from text to text, with cria: nobody waits for ever, and pages come back.

Each case breaks one thing under traffic, then asks that those it concerns are told, that all others say what they say
alone (in float32, where how many share a step decides no word), that the engine's books are right with no page in use,
and that the next request is answered.
"""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from puna import LLM
from puna.engine.engine import Engine
from puna.errors import ContextError, GrammarError, PunaError, StoppedError
from puna.gateway.local import LocalBackend
from puna.types import Event, Grammar, Request, Sampling

PROMPTS = [f"Once upon a time, {name} had a" for name in ("Tom", "Lily", "Sam", "Amy", "Ben", "Mia", "Max", "Sue")]
ASKED = [Request(prompt, Sampling(temperature=0, max_tokens=24)) for prompt in PROMPTS]
LONG = Sampling(temperature=0, ignore_eos=True)
"""Goes on until the context is full: hundreds of steps."""


@pytest.fixture(scope="module")
def alone() -> list[str]:
    llm = LLM("cria", dtype="fp32")
    return [llm.generate(prompt, temperature=0, max_tokens=24).text for prompt in PROMPTS]


async def said(backend: LocalBackend, request: Request) -> str:
    return "".join([event.text async for event in backend.generate(request)])


async def settled(backend: LocalBackend) -> None:
    """Nothing is left of anybody."""
    end = time.monotonic() + 10
    while True:
        statistics = await asyncio.wrap_future(
            backend._thread.call(lambda engine: (engine.check(), engine.statistics()))
        )
        left = statistics[1]
        if (left.pages_used, left.running, left.waiting, left.compiling) == (0, 0, 0, 0):
            return
        assert time.monotonic() < end, left
        await asyncio.sleep(0.01)


def with_backend(run: Callable[[LocalBackend], Awaitable[Any]], *, stuck_after: float = 60.0, **options: int) -> Any:
    """Run it over a backend whose engine is made of `options`; 60 seconds at most."""
    llm = LLM("cria", dtype="fp32")
    llm._engine = Engine(llm._runner, **{"pages": 64, **options})

    async def main() -> Any:
        backend = LocalBackend(llm, stuck_after=stuck_after)
        try:
            return await asyncio.wait_for(run(backend), 60)
        finally:
            await asyncio.wait_for(backend.close(), 40)

    return asyncio.run(main())


class Broken:
    """A runner's `run` that does its work, then what `fault` does at one step in the middle of the answers."""

    def __init__(self, backend: LocalBackend, fault: Callable[[], None], at: int = 12) -> None:
        self.runner = backend._llm._runner
        self.run, self.fault, self.steps = self.runner.run, fault, at
        self.runner.run = self  # type: ignore[method-assign]

    def __call__(self, batch: Any) -> Any:
        logits = self.run(batch)  # its keys and values are in the pages already
        self.steps -= 1
        if self.steps == 0:
            self.fault()
        return logits


def test_an_exception_in_a_step_ends_who_was_in_it_and_nobody_else(alone: list[str]) -> None:
    def fault() -> None:
        raise MemoryError("bad allocation")

    async def run(backend: LocalBackend) -> None:
        Broken(backend, fault)
        answers = await asyncio.gather(*(said(backend, request) for request in ASKED), return_exceptions=True)
        failed = [answer for answer in answers if isinstance(answer, PunaError)]  # which come first, threads decide
        assert ["MemoryError: bad allocation" in str(error) for error in failed] == [True] * 3
        assert all(got in (want, *failed) for got, want in zip(answers, alone, strict=True))
        await settled(backend)
        assert await asyncio.gather(*(said(backend, request) for request in ASKED)) == alone
        assert backend.health == "ready"

    with_backend(run, max_running=3)


def test_a_step_that_hangs_is_told_to_everybody_and_the_engine_comes_back(alone: list[str]) -> None:
    release = threading.Event()

    async def run(backend: LocalBackend) -> None:
        Broken(backend, lambda: assert_(release.wait(30)))
        asked = [asyncio.create_task(said(backend, request)) for request in ASKED]
        for task in asked:
            with pytest.raises(StoppedError, match="has not come back"):
                await task
        with pytest.raises(StoppedError):
            await said(backend, ASKED[0])
        release.set()
        while backend.health != "ready":
            await asyncio.sleep(0.01)
        await settled(backend)
        assert await said(backend, ASKED[1]) == alone[1]

    with_backend(run, stuck_after=1.0)


def assert_(fact: bool) -> None:
    assert fact


def test_a_pool_too_small_for_one_refuses_it_and_has_the_others_wait(alone: list[str]) -> None:
    """Two pages, 128 tokens: each answer needs one to itself, so six of eight wait."""

    async def run(backend: LocalBackend) -> None:
        with pytest.raises(ContextError, match="room in the KV cache of 128"):
            await said(backend, Request(tuple([5] * 120), Sampling(max_tokens=9)))
        with pytest.raises(ContextError):
            await said(backend, Request(tuple([5] * 129)))
        crowd = [*ASKED, Request(tuple([5] * 100), Sampling(max_tokens=28, ignore_eos=True))]
        answers = await asyncio.gather(*(said(backend, request) for request in crowd))
        assert answers[:-1] == alone
        await settled(backend)

    with_backend(run, pages=2)


def test_a_client_whose_loop_is_gone_gives_its_pages_back(alone: list[str]) -> None:
    """A thread with a loop of its own that ends in the middle of an answer: no cancellation, no close, just gone."""

    async def run(backend: LocalBackend) -> None:
        begun = threading.Event()
        kept: list[Any] = []  # or the collector would close the generator

        def client() -> None:
            loop = asyncio.new_event_loop()
            events: Any = backend.generate(Request("Once", LONG))
            kept.append(events)

            async def begin() -> None:
                async for event in events:
                    if event.token_ids:
                        return

            loop.run_until_complete(begin())
            loop.close()
            begun.set()

        threading.Thread(target=client).start()
        assert await asyncio.to_thread(begun.wait, 20)
        assert await asyncio.gather(*(said(backend, request) for request in ASKED)) == alone
        await settled(backend)

    with_backend(run)


def test_many_clients_that_leave_at_any_moment(alone: list[str]) -> None:
    async def run(backend: LocalBackend) -> None:
        tasks = [asyncio.create_task(said(backend, Request(PROMPTS[i % 8], LONG))) for i in range(24)]
        stays = asyncio.create_task(said(backend, ASKED[2]))
        for i, task in enumerate(tasks):
            await asyncio.sleep(0.002 * (i % 4))
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        # The model is small: an answer may have ended by then.
        assert asyncio.CancelledError in {type(end) for end in ends} <= {asyncio.CancelledError, str}, ends
        assert await stays == alone[2]
        await settled(backend)

    with_backend(run, pages=12, max_running=4)


@pytest.fixture
def stuck_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Regular expressions are not compiled before the event."""
    from puna.engine.grammar import Grammars

    build, release = Grammars._build, threading.Event()

    def stuck(self: Grammars, spec: Grammar) -> Any:
        if spec.kind == "regex":
            release.wait(30)
        return build(self, spec)

    monkeypatch.setattr(Grammars, "_build", stuck)
    yield release
    release.set()


def test_a_stuck_grammar_holds_up_its_own_request_only(alone: list[str], stuck_compiler: threading.Event) -> None:
    schema = Grammar("json_schema", json.dumps({"enum": ["yes", "no"]}))
    regex = Grammar("regex", "a+")

    async def run(backend: LocalBackend) -> None:
        backend._llm.grammars._seconds = 1.0
        waits = asyncio.create_task(said(backend, Request("Once", Sampling(max_tokens=5), grammar=regex)))
        leaves = asyncio.create_task(said(backend, Request("Once", Sampling(max_tokens=5), grammar=regex)))
        limited = asyncio.create_task(events_of(backend, Request("Once", grammar=regex, timeout=0.2)))
        assert await asyncio.gather(*(said(backend, request) for request in ASKED)) == alone
        structured = Request("Once", Sampling(max_tokens=9, seed=1), grammar=schema)
        assert json.loads(await said(backend, structured)) in ("yes", "no")
        leaves.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaves
        assert (await limited)[-1].finish == "deadline"
        with pytest.raises(GrammarError, match="more than 1 s"):
            await waits
        await settled(backend)

    with_backend(run)


async def events_of(backend: LocalBackend, request: Request) -> list[Event]:
    return [event async for event in backend.generate(request)]


def test_waiting_for_a_grammar_leaves_the_processor_to_it(stuck_compiler: threading.Event) -> None:
    """An engine that has nothing else to do looks now and then, not all the time."""

    async def run(backend: LocalBackend) -> None:
        engine, looks = backend._thread._engine, 0
        step = engine.step

        def counted() -> Any:
            nonlocal looks
            looks += 1
            return step()

        engine.step = counted  # type: ignore[method-assign]
        regex = Grammar("regex", "a+")
        waits = asyncio.create_task(said(backend, Request("Once", Sampling(max_tokens=5), grammar=regex)))
        while not looks:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)
        assert looks <= 200
        stuck_compiler.set()
        assert set(await waits) == {"a"}

    with_backend(run)


SERVING = """
import asyncio, signal, sys, threading
from puna import LLM
from puna.engine.grammar import Grammars
from puna.gateway.local import LocalBackend
from puna.types import Grammar, Request, Sampling

if {handled}:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

build = Grammars._build
def stuck(self, spec):
    threading.Event().wait()
Grammars._build = stuck

async def client(backend, i):
    while True:
        async for event in backend.generate(Request("Once upon a time", Sampling(seed=i, ignore_eos=True))):
            if event.token_ids:
                print("token", flush=True)

async def main():
    backend = LocalBackend(LLM("cria"))
    never = asyncio.create_task(backend.generate(Request("x", grammar=Grammar("regex", "a+"))).__anext__())
    await asyncio.gather(*(client(backend, i) for i in range(4)))

asyncio.run(main())
"""


@pytest.mark.parametrize("handled", [False, True])
def test_sigterm_ends_a_process_that_generates(handled: bool) -> None:
    """With four answers under way and a grammar that is never compiled; where a handler raises SystemExit as well."""
    ends_promptly([sys.executable, "-c", SERVING.format(handled=handled)], {143, -signal.SIGTERM})


def test_sigterm_ends_the_command() -> None:
    story = ["run", "cria", "Once upon a time", "--seed", "1", "--temperature", "1.5", "--min-tokens", "480"]
    ends_promptly([sys.executable, "-m", "puna", *story], {143, -signal.SIGTERM})


def ends_promptly(command: list[str], codes: set[int]) -> None:
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert child.stdout is not None
        assert child.stdout.read(8)
        child.send_signal(signal.SIGTERM)
        began = time.monotonic()
        _, errors = child.communicate(timeout=20)
        assert time.monotonic() - began < 5, "it was not prompt"
        assert child.returncode in codes, errors.decode()
    finally:
        child.kill()
        child.wait()
