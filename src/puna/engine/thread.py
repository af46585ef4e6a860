"""The thread that owns an engine: others submit and cancel, and are told what becomes of their requests.

What it is: one thread in which every call to the engine is made, and a watchdog beside it.
What it is not: asyncio, though it suits it: a listener is any callable, such as one that calls `call_soon_threadsafe`.
What is surprising: nobody waits for ever. An exception in a step reaches every listener and every later submit. A step
that does not come back within `stuck_after` seconds does so too, though the thread in it cannot be ended; should it
come back later, what it worked on is cancelled and the engine serves again.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

from puna.engine.engine import Engine, Progress
from puna.errors import PunaError, StoppedError
from puna.types import Pooling, Sampling

STUCK_AFTER = 600.0
"""Seconds: longer than any step on a machine that one would use (512 tokens of a 70B model on a laptop: minutes)."""

Listener = Callable[[Progress | PunaError], None]
"""Told everything that happens to a request, from the engine's thread or the watchdog's; an error is the last thing."""

Health = Literal["ready", "stuck", "failed", "closed"]


@dataclass(slots=True)
class _Told:
    """A listener, and the choices that it has still to hear the end of."""

    listener: Listener
    choices: set[int]


class EngineThread:
    """Owns `engine` from now on. `settle` is called before each step, for choices that hold for the whole process;
    `step_told` is entered while listeners are told of one, so that they can pass all of it on at once."""

    def __init__(
        self,
        engine: Engine,
        *,
        stuck_after: float = STUCK_AFTER,
        settle: Callable[[], None] = lambda: None,
        step_told: AbstractContextManager[object] | None = None,
    ) -> None:
        self._engine = engine
        self._settle = settle
        self._step_told = step_told or nullcontext()
        self._stuck_after = stuck_after
        # Guards all that follows; held for moments only, never during a step or while a listener is called.
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._commands: deque[Callable[[], None]] = deque()
        self._listeners: dict[int, _Told] = {}
        self._down: PunaError | None = None  # why submits are refused
        self._health: Health = "ready"
        self._step_began: float | None = None
        self._thread = threading.Thread(target=self._run, name="puna-engine", daemon=True)
        self._watchdog = threading.Thread(target=self._watch, name="puna-watchdog", daemon=True)
        self._thread.start()
        self._watchdog.start()

    @property
    def health(self) -> Health:
        """Whether it serves, and if not, why."""
        return self._health

    def submit(self, listener: Listener, prompt: Sequence[int], sampling: Sampling, **options: Any) -> Future[int]:
        """Have the engine begin a request (see `Engine.submit`) whose progress `listener` is told.

        The future gives the request's number, or what `Engine.submit` raised. It waits for a step to end. Raises
        StoppedError where the engine serves no more.
        """
        choices = sampling.best_of or sampling.n
        submitted = self._begin(listener, choices, lambda engine: engine.submit(prompt, sampling, **options))
        if isinstance(constraint := options.get("constraint"), Future):
            constraint.add_done_callback(self._ready)
        return submitted

    def _ready(self, constraint: Future[Any]) -> None:
        """A grammar is ready, or never will be: the thread may be waiting for it."""
        with self._wake:
            self._wake.notify_all()

    def submit_score(
        self, listener: Listener, prompt: Sequence[int], continuations: Sequence[Sequence[int]], **options: Any
    ) -> Future[int]:
        """As `submit`, for `Engine.submit_score`."""
        choices = len(continuations)
        return self._begin(listener, choices, lambda engine: engine.submit_score(prompt, continuations, **options))

    def submit_embedding(
        self, listener: Listener, prompt: Sequence[int], pooling: Pooling = "mean", **options: Any
    ) -> Future[int]:
        """As `submit`, for `Engine.submit_embedding`."""
        return self._begin(listener, 1, lambda engine: engine.submit_embedding(prompt, pooling, **options))

    def _begin(self, listener: Listener, choices: int, submit: Callable[[Engine], int]) -> Future[int]:
        answer: Future[int] = Future()

        def begin() -> None:
            if not answer.set_running_or_notify_cancel():
                return
            try:
                request = submit(self._engine)
            except Exception as error:  # a mistake in the request, or in the engine: the caller is told either way
                answer.set_exception(error)
                return
            with self._lock:
                self._listeners[request] = _Told(listener, set(range(choices)))
            answer.set_result(request)

        def refuse(error: PunaError) -> None:
            if answer.set_running_or_notify_cancel():
                answer.set_exception(error)

        self._command(begin, refuse)
        return answer

    def cancel(self, request: int, choice: int | None = None) -> None:
        """End a request, or a choice of it: pages come back before the next step.

        Its listener may hear of a choice once more, and of a whole request nothing. What is over already is left alone.
        """
        with self._lock:
            told = self._listeners.get(request)
            if told is None:
                return
            if choice is not None:
                told.choices.discard(choice)
            if choice is None or not told.choices:
                del self._listeners[request]
            if self._down is not None:
                return  # with the engine, the request is over too
            self._commands.append(lambda: self._engine.cancel(request, choice))
            self._wake.notify_all()

    def call(self, function: Callable[[Engine], Any]) -> Future[Any]:
        """Have the engine's thread call a function with the engine, between two steps: statistics, adapters, sessions.

        Raises StoppedError where the engine serves no more.
        """
        answer: Future[Any] = Future()

        def run() -> None:
            if answer.set_running_or_notify_cancel():
                try:
                    answer.set_result(function(self._engine))
                except Exception as error:
                    answer.set_exception(error)

        def refuse(error: PunaError) -> None:
            if answer.set_running_or_notify_cancel():
                answer.set_exception(error)

        self._command(run, refuse)
        return answer

    def close(self, timeout: float = 30.0) -> bool:
        """End all requests (their listeners get StoppedError) and the thread; whether it ended in `timeout` seconds.

        It does not while a step is stuck. A second close only waits.
        """
        self._fall(StoppedError("The engine was closed.", remedy="Start it again."), "closed")
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _command(self, run: Callable[[], None], refuse: Callable[[PunaError], None] = lambda error: None) -> None:
        """Queue what the engine's thread is to do, or, should the engine fall before that, hear that it was refused."""

        def command() -> None:
            down = self._down
            refuse(down) if down is not None else run()

        with self._wake:
            if self._down is not None:
                raise self._down
            self._commands.append(command)
            self._wake.notify_all()

    def _run(self) -> None:
        try:
            self._serve()
        except Exception as error:  # the engine's own failure: nothing after it can be trusted
            self._fail(error)
            self._give_up()

    def _fail(self, error: Exception) -> None:
        wrapped = StoppedError(f"The engine failed: {type(error).__name__}: {error}", remedy="Start it again.")
        wrapped.__cause__ = error
        self._fall(wrapped, "failed")

    def _serve(self) -> None:
        while True:
            with self._wake:
                while not self._commands and self._engine.idle and self._health == "ready":
                    self._wake.wait()
                commands, self._commands = self._commands, deque()
            for command in commands:
                command()
            if self._health in ("closed", "failed"):
                self._give_up()
                return
            if not self._engine.idle:
                self._step()

    def _step(self) -> None:
        self._settle()
        with self._lock:
            self._step_began = time.monotonic()
        try:
            progress = self._engine.step()
        finally:
            with self._wake:
                self._step_began = None
                came_back = self._health == "stuck"
        if came_back:
            # The watchdog has told everybody that it is over, so it is.
            self._engine.cancel_all()
            with self._wake:
                if self._health == "stuck":
                    self._health, self._down = "ready", None
            return
        with self._step_told:
            for item in progress:
                self._tell(item)
        if not progress:
            with self._wake:
                if not self._commands and self._health == "ready" and self._engine.blocked:
                    self._wake.wait(self._engine.seconds_left)  # others compile, and `_ready` says when

    def _tell(self, item: Progress) -> None:
        with self._lock:
            told = self._listeners.get(item.request)
            if told is None:
                return
            if item.finish is not None or item.error is not None:
                told.choices.discard(item.choice)
                if not told.choices:
                    del self._listeners[item.request]
        try:
            told.listener(item)
        except Exception:  # the client's loop is gone: nobody is left to tell
            with self._lock:
                self._listeners.pop(item.request, None)
            self._engine.cancel(item.request)

    def _fall(self, error: PunaError, health: Health, step_began: float | None = None) -> None:
        """Refuse submits from now on, and tell everyone who waits; not if it is for a step that is over by now."""
        with self._wake:
            if self._health in ("closed", "failed") or (health == "stuck" and self._step_began != step_began):
                return
            self._health, self._down = health, error
            listeners, self._listeners = [told.listener for told in self._listeners.values()], {}
            waiting = []
            if health == "stuck":  # the thread will not come to them
                waiting, self._commands = list(self._commands), deque()
            self._wake.notify_all()
        for command in waiting:
            command()
        for listener in listeners:
            try:
                listener(error)
            except Exception:  # a client that is gone has no use for the news
                continue

    def _give_up(self) -> None:
        """The thread's end: what was submitted meanwhile is refused, and pages come back."""
        with self._wake:
            commands, self._commands = self._commands, deque()
        for command in commands:
            command()
        if self._health == "closed":
            self._engine.cancel_all()

    def _watch(self) -> None:
        while True:
            with self._wake:
                self._wake.wait(self._stuck_after / 4)
                if self._health in ("closed", "failed"):
                    return
                began = self._step_began
            if began is not None and self._health == "ready" and time.monotonic() - began > self._stuck_after:
                self._fall(
                    StoppedError(
                        f"A step of the engine has not come back for {self._stuck_after:g} seconds.",
                        remedy="Try again later; if it goes on, restart, with a smaller model or shorter prompts.",
                    ),
                    "stuck",
                    began,
                )
