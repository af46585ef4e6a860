"""Adapters by name, and the pages of the KV cache whose memory each takes.

What it is: which adapters an engine has loaded, under which number the runner holds each, and what that leaves the
cache.
What it is not: their matrices (`engine.adapters`), or a look at requests: the engine says which are under way.
What is surprising: a number is never used twice. The prefix cache knows an adapter's pages by it, and they outlive it.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable
from typing import NamedTuple

from puna.engine.adapters import Pairs
from puna.engine.runner import Runner
from puna.engine.scheduler import Scheduler
from puna.errors import AdapterError


class Loaded(NamedTuple):
    """An adapter: its number at the runner, and the pages whose memory it takes."""

    number: int
    pages: list[int]


class LoadedAdapters:
    """The adapters of one engine."""

    def __init__(self, runner: Runner, scheduler: Scheduler) -> None:
        self._runner, self._scheduler = runner, scheduler
        self._by_name: dict[str, Loaded] = {}
        self._last = -1

    @property
    def names(self) -> tuple[str, ...]:
        """Of those that are loaded."""
        return tuple(self._by_name)

    @property
    def pages_left(self) -> int:
        """The pages that keys and values may use."""
        return self._scheduler.pool.count - len(self._scheduler.reserved)

    def find(self, name: str | None, namespace: str) -> tuple[int, Hashable]:
        """An adapter's number at the runner, and the namespace in the prefix cache. Raises AdapterError."""
        if name is None:
            return -1, namespace
        if name not in self._by_name:
            raise AdapterError(
                f"There is no adapter {name!r:.80}.",
                remedy=f"Loaded are: {', '.join(self._by_name)}." if self._by_name else "Load it first.",
            )
        number = self._by_name[name].number
        return number, (namespace, number)

    def load(self, name: str, pairs: Pairs, nbytes: int, longest: int) -> None:
        """See Engine.load_adapter. `longest`: tokens that one request under way may come to, 0 without one."""
        if name in self._by_name:
            raise AdapterError(f"There is an adapter {name!r:.80} already.", remedy="Unload it, or use another name.")
        taken = -(-nbytes // self._runner.page_bytes)
        left, needed = self.pages_left - taken, max(-(-longest // self._runner.page), 1)
        if left < needed:
            whose = "the longest request under way may need" if longest else "a request needs"
            raise AdapterError(
                f"Adapter {name!r:.80} takes {nbytes} bytes, which are {taken} pages of {self._runner.page_bytes} of "
                f"the KV cache's {self.pages_left}, and {whose} {needed} of the {max(left, 0)} left.",
                remedy="Unload another adapter, make the cache larger, or wait for long requests to end.",
            )
        self._last += 1
        self._runner.adapters.load(self._last, pairs)
        self._by_name[name] = Loaded(self._last, self._scheduler.reserve(taken))

    def unload(self, name: str, used: list[int]) -> None:
        """See Engine.unload_adapter. `used`: the number that each request under way uses."""
        number, _ = self.find(name, "")
        if users := used.count(number):
            raise AdapterError(
                f"Adapter {name!r:.80} is in use by {users} request{'s' if users > 1 else ''}.",
                remedy="Unload it when they have ended, or cancel them.",
            )
        self._runner.adapters.drop(number)
        self._scheduler.give_back(self._by_name.pop(name).pages)

    def check(self, used: Collection[int]) -> None:
        """Recount; `used` are the numbers of requests under way. Raises AssertionError where the books are wrong."""
        reserved = sorted(page for adapter in self._by_name.values() for page in adapter.pages)
        assert reserved == sorted(self._scheduler.reserved), "an adapter's pages are lost"
        numbers = {adapter.number for adapter in self._by_name.values()}
        assert set(used) <= {-1, *numbers}, "an adapter in use is gone"
