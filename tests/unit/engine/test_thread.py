"""The engine's thread: everybody is told, whatever becomes of the engine. The engine here is a script."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from queue import Queue
from typing import Any

import pytest
from checksum_model import ChecksumRunner, embedded

from puna.engine.engine import Engine, Progress
from puna.engine.thread import EngineThread
from puna.errors import GrammarError, PunaError, StoppedError, UsageError
from puna.types import Sampling


class Script:
    """An engine whose requests count down from their prompt's length, a token a step."""

    def __init__(self) -> None:
        self.left: dict[int, int] = {}
        self.number = 0
        self.gate = threading.Event()
        self.gate.set()
        self.fail: Exception | None = None
        self.cancelled: list[int] = []

    blocked = False

    @property
    def idle(self) -> bool:
        return not self.left

    def submit(self, prompt: list[int], sampling: Sampling, **options: Any) -> int:
        if not prompt:
            raise UsageError("The prompt has no tokens.")
        self.number += 1
        self.left[self.number] = len(prompt)
        return self.number

    def step(self) -> list[Progress]:
        self.gate.wait(20)
        if self.fail is not None:
            raise self.fail
        reports = []
        for request in list(self.left):
            self.left[request] -= 1
            done = self.left[request] == 0
            reports.append(Progress(request, 0, (self.left[request],), finish="length" if done else None))
            if done:
                del self.left[request]
        return reports

    def cancel(self, request: int, choice: int | None = None) -> None:
        self.cancelled.append(request)
        self.left.pop(request, None)

    def cancel_all(self) -> None:
        for request in list(self.left):
            self.cancel(request)


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def thread(script: Script) -> Iterator[EngineThread]:
    made = EngineThread(script, stuck_after=1.0)  # type: ignore[arg-type]
    yield made
    script.gate.set()
    assert made.close(5)


def ask(thread: EngineThread, tokens: int) -> tuple[int, Queue[Progress | PunaError]]:
    heard: Queue[Progress | PunaError] = Queue()
    return thread.submit(heard.put, [0] * tokens, Sampling()).result(5), heard


def test_each_listener_hears_its_own_request_to_the_end(thread: EngineThread) -> None:
    asked = [ask(thread, tokens) for tokens in (3, 1, 5)]
    for tokens, (request, heard) in zip((3, 1, 5), asked, strict=True):
        got = [heard.get(timeout=5) for _ in range(tokens)]
        assert [each.request for each in got] == [request] * tokens
        assert [each.tokens[0] for each in got] == list(reversed(range(tokens)))
        assert got[-1].finish == "length"


def test_what_is_wrong_with_a_request_is_told_to_its_caller_alone(thread: EngineThread) -> None:
    with pytest.raises(UsageError, match="no tokens"):
        thread.submit(print, [], Sampling()).result(5)
    assert ask(thread, 1)[1].get(timeout=5).finish == "length"


def test_a_cancelled_request_frees_what_it_has(thread: EngineThread, script: Script) -> None:
    script.gate.clear()
    heard: Queue[Progress | PunaError] = Queue()
    first = thread.submit(heard.put, [0] * 1000, Sampling())
    request = first.result(5)
    thread.cancel(request)
    thread.cancel(request)
    thread.cancel(77)
    script.gate.set()
    assert ask(thread, 1)[1].get(timeout=5).finish == "length"
    assert script.cancelled == [request]


def test_a_listener_that_fails_is_a_client_that_left(thread: EngineThread, script: Script) -> None:
    def gone(item: Progress | PunaError) -> None:
        raise RuntimeError("Event loop is closed")

    request = thread.submit(gone, [0] * 1000, Sampling()).result(5)
    assert ask(thread, 2)[1].get(timeout=5).finish is None
    assert request in script.cancelled


def test_an_exception_in_a_step_reaches_every_waiting_and_later_stream(thread: EngineThread, script: Script) -> None:
    script.gate.clear()
    heard = [ask(thread, 10)[1]]
    waiting = [thread.submit(queue.put, [0], Sampling()) for queue in (Queue(), Queue())]
    script.fail = ValueError("out of range")
    script.gate.set()
    error = heard[0].get(timeout=5)
    assert isinstance(error, StoppedError)
    assert "out of range" in str(error)
    for each in waiting:
        with pytest.raises(StoppedError, match="out of range"):
            each.result(5)
    with pytest.raises(StoppedError, match="out of range"):
        thread.submit(print, [0], Sampling())
    assert thread.health == "failed"


def test_a_stuck_step_is_noticed_and_the_engine_serves_again_when_it_comes_back(
    thread: EngineThread, script: Script
) -> None:
    script.gate.clear()
    _, heard = ask(thread, 10)
    late = thread.submit(print, [0], Sampling())
    error = heard.get(timeout=5)
    assert isinstance(error, StoppedError)
    assert "has not come back for 1 seconds" in str(error)
    with pytest.raises(StoppedError):
        late.result(5)
    with pytest.raises(StoppedError):
        thread.submit(print, [0], Sampling())
    assert thread.health == "stuck"
    script.gate.set()
    end = time.monotonic() + 5
    while thread.health != "ready":
        assert time.monotonic() < end
        time.sleep(0.01)
    assert script.left == {}
    assert ask(thread, 1)[1].get(timeout=5).finish == "length"


def test_closing_tells_everybody_and_ends_the_thread(script: Script) -> None:
    thread = EngineThread(script)  # type: ignore[arg-type]
    script.gate.clear()
    _, heard = ask(thread, 10)
    threading.Timer(0.1, script.gate.set).start()
    assert thread.close(5)
    assert isinstance(heard.get(timeout=5), StoppedError)
    assert script.left == {}
    with pytest.raises(StoppedError, match="closed"):
        thread.submit(print, [0], Sampling())
    assert thread.close(5)


def test_a_call_between_steps(thread: EngineThread) -> None:
    assert thread.call(lambda engine: engine.idle).result(5) is True
    with pytest.raises(ZeroDivisionError):
        thread.call(lambda engine: 1 / 0).result(5)


def test_an_exception_between_steps_reaches_everybody_too(script: Script) -> None:
    def settle() -> None:
        raise ValueError("no such kernels")

    thread = EngineThread(script, settle=settle)  # type: ignore[arg-type]
    _, heard = ask(thread, 10)
    error = heard.get(timeout=5)
    assert isinstance(error, StoppedError)
    assert "no such kernels" in str(error)
    assert thread.health == "failed"
    with pytest.raises(StoppedError, match="no such kernels"):
        thread.submit(print, [0], Sampling())
    assert thread.close(5)


def test_a_step_that_came_back_is_not_stuck(thread: EngineThread) -> None:
    """The watchdog may look just before a step ends, and speak just after."""
    thread._fall(StoppedError("late"), "stuck", time.monotonic() - 1)
    assert thread.health == "ready"
    assert ask(thread, 1)[1].get(timeout=5).finish == "length"


def test_waiting_for_a_grammar_takes_no_processor_and_ends_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(ChecksumRunner(), pages=20)
    steps = 0

    def step() -> list[Progress]:
        nonlocal steps
        steps += 1
        return Engine.step(engine)

    monkeypatch.setattr(engine, "step", step)
    thread = EngineThread(engine)
    heard: Queue[Any] = Queue()
    grammar: Future[Any] = Future()
    thread.submit(heard.put, [3, 1, 4], Sampling(max_tokens=1), constraint=grammar).result(5)
    time.sleep(0.1)
    assert steps <= 2
    grammar.set_exception(GrammarError("no such rule"))
    assert "no such rule" in str(heard.get(timeout=5).error)
    late = time.monotonic() + 0.05
    thread.submit(heard.put, [3], Sampling(max_tokens=1), constraint=Future(), deadline=late).result(5)
    assert heard.get(timeout=5).finish == "deadline"  # though nothing else happens
    assert steps < 20
    assert thread.close(5)


def test_scores_and_embeddings_are_heard_to_their_ends() -> None:
    thread = EngineThread(Engine(ChecksumRunner(), pages=20))
    heard: Queue[Any] = Queue()
    score = thread.submit_score(heard.put, [3, 1, 4], [[1], [5, 9], [2, 6, 5]], namespace="mine").result(5)
    seen = []
    while [report.finish for report in seen].count("length") < 3:
        seen.append(heard.get(timeout=5))
    assert {(report.request, report.choice) for report in seen} == {(score, choice) for choice in range(3)}
    told = [draw.token for report in seen if report.choice == 2 for draw in report.logprobs or ()]
    assert told == [2, 6, 5]
    thread.submit_embedding(heard.put, [3, 1, 4], "last").result(5)
    assert heard.get(timeout=5).embedding.tolist() == embedded([3, 1, 4], "last")
    assert thread._listeners == {}
    with pytest.raises(UsageError):
        thread.submit_score(heard.put, [3], []).result(5)
    assert thread.close(5)
