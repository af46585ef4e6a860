"""From the engine's thread to event loops: what a step made is handed to each loop in one call.

What it is: `Post`, which carries, and `Mail`, the box of one answer under way.
What it is not: a queue without an end that anybody may fill: a box holds what its own request made.
What is surprising: waking a loop is a system call that lets go of Python's lock, and the thread waits to have it back.
Once a step instead of once a stream is what sixteen streams' tokens a second hang on. Where steps take less than
`PACE`, tokens in the middle of answers wait for those of the steps that follow (the first of an answer and its end wait
for nothing): a piece costs what it costs, however many tokens are in it. And what was made for a choice while its
reader was busy is read as one piece.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections import deque

from puna.engine.engine import Progress
from puna.errors import PunaError

Item = Progress | PunaError

PACE = 0.01
"""Seconds between two deliveries of what nobody waits for. A step of a model of a billion parameters takes longer."""


class Post:
    """Carries items to boxes. While it is entered (by one thread at a time), they are only gathered."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._gathered: dict[asyncio.AbstractEventLoop, list[tuple[Mail, Item]]] = {}
        self._urgent: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()
        # Loops that come by themselves within PACE.
        self._paced: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()
        self._held = False

    def __enter__(self) -> None:
        """Gather from now on."""
        self._held = True

    def __exit__(self, *_: object) -> None:
        """Carry what was gathered."""
        self._held = False
        with self._lock:
            loops = [loop for loop in self._gathered if loop in self._urgent or loop not in self._paced]
        for loop in loops:
            try:
                self._wake(loop)
            except RuntimeError:  # it was closed just now, and its readers are gone with it
                with self._lock:
                    for of in (self._urgent, self._paced):
                        of.discard(loop)
                    self._gathered.pop(loop, None)

    def send(self, mail: Mail, item: Item) -> None:
        """Take an item, from any thread. Raises RuntimeError where the loop is closed: the reader is gone."""
        loop = mail.loop
        if loop.is_closed():
            raise RuntimeError("The event loop is closed.")
        with self._lock:
            self._gathered.setdefault(loop, []).append((mail, item))
            if mail.waits_for(item):
                self._urgent.add(loop)
        if not self._held:
            self._wake(loop)

    def _wake(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.call_soon_threadsafe(self._deliver, loop)

    def _deliver(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._lock:
            items = self._gathered.pop(loop, ())
            self._urgent.discard(loop)
            again = bool(items) and loop not in self._paced
            if again:
                self._paced.add(loop)
        for mail, item in items:
            mail.arrived(item)
        if again:
            loop.call_later(PACE, self._come_by, loop)

    def _come_by(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._lock:
            self._paced.discard(loop)
        self._deliver(loop)


class Mail:
    """What is told of one answer; read in the event loop that it was made in."""

    def __init__(self, post: Post) -> None:
        self.loop = asyncio.get_running_loop()
        self._post = post
        self._items: deque[Item] = deque()
        self._begun: set[int] = set()
        self._news: asyncio.Future[None] | None = None

    def put(self, item: Item) -> None:
        """The engine's thread, or its watchdog, tells (`thread.Listener`)."""
        self._post.send(self, item)

    def waits_for(self, item: Item) -> bool:
        """Whether somebody waits for this: all but tokens in the middle of an answer. Asked once an item, in order."""
        if isinstance(item, PunaError) or not item.tokens or item.finish is not None or item.error is not None:
            return True
        if item.choice in self._begun:
            return False
        self._begun.add(item.choice)
        return True

    def arrived(self, item: Item) -> None:
        """An item is there."""
        items = self._items
        if items and (more := joined(items[-1], item)) is not None:
            items[-1] = more
        else:
            items.append(item)
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    async def get(self) -> Item:
        """The next item; what followed it of the same kind is in it."""
        while not self._items:
            self._news = self.loop.create_future()
            await self._news
        return self._items.popleft()


def joined(first: Item, then: Item) -> Item | None:
    """Two reports of one choice as one: tokens, and what is told of each; None where they are not of that kind."""
    if isinstance(first, PunaError) or isinstance(then, PunaError):
        return None
    if first.request != then.request or first.choice != then.choice or not first.tokens or not then.tokens:
        return None
    if first.finish is not None or first.error is not None or then.error is not None:
        return None
    if (first.logprobs is None) != (then.logprobs is None) or first.prompt_logprobs or then.prompt_logprobs:
        return None
    logprobs = None if first.logprobs is None or then.logprobs is None else first.logprobs + then.logprobs
    return then._replace(tokens=first.tokens + then.tokens, logprobs=logprobs)
