"""Many models in one process: loaded when they are asked for, unloaded when their memory is needed or nobody asks.

What it is: `Fleet`, a `types.Models`: who holds which model, what memory all take together, and who must leave.
What it is not: files, or loading; a `Shelf` knows both (`shelf.py`). Nor a measurement of memory: what a model takes is
worked out before it is loaded, and refused before a byte is read where it does not fit.
What is surprising: a model in use is never taken from who uses it. Where one must go though it is in use, new requests
for it wait until those that have it are done, it has left and come back: two models that do not fit together take
turns, and no request is lost. One model is loaded at a time. A fleet belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from puna.errors import NoRoomError, PunaError, StoppedError, UnknownModelError
from puna.plan import ModelNeed, cache_beside, why_no_room
from puna.types import Backend, ModelCard, ModelState

LOG = logging.getLogger("puna.fleet")

KEEP_ALIVE = 300.0
"""Seconds that a model stays without use."""

PATIENCE = 120.0
"""Seconds that a request waits for models in use to make room."""

T = TypeVar("T")


@dataclass(frozen=True)
class Served:
    """A model that may be asked for: by its `name`, an alias, or by what is `untold`: names that lists do not show.
    `source` is what its shelf finds it by; one that changes is another model. What `stays` is not unloaded for want of
    use, or to make room."""

    name: str
    aliases: tuple[str, ...] = ()
    untold: tuple[str, ...] = ()
    source: str = ""
    stays: bool = False


@dataclass(frozen=True)
class Described:
    """What is known of a model without loading it."""

    card: ModelCard
    need: ModelNeed


class Shelf(Protocol):
    """Where models come from. All methods block, are called from threads, and raise PunaError."""

    def served(self) -> list[Served]:
        """Every model there is now, the default first."""

    def describe(self, model: Served) -> Described:
        """What it is and takes, without loading it."""

    def load(self, model: Served, described: Described, cache: int | None) -> Backend:
        """Load it, with a cache of so many bytes (None: as many as it likes)."""

    def unloaded(self) -> None:
        """A backend has just been closed and dropped: give its memory back to the system."""


@dataclass(eq=False)
class _Slot:
    """A model and how it stands. `leases` counts the requests that have it or wait for its loading."""

    served: Served
    described: Described | None = None
    backend: Backend | None = None
    loading: asyncio.Future[None] | None = None
    leaving: asyncio.Task[None] | None = None
    leases: int = 0
    quiet: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while nobody has it."""
    resident: int = 0
    keep: float = 0.0
    used: float = 0.0

    def until(self) -> float | None:
        """When it is to be unloaded for want of use; None for never, or not while it is used."""
        idle = self.backend is not None and not self.leases and self.leaving is None
        return self.used + self.keep if idle and self.keep >= 0 else None


class Fleet:
    """See types.Models. `memory`: bytes that all may take together, None for no bound. `available` tells the bytes
    that the machine has left now, None where it is not known."""

    def __init__(
        self,
        shelf: Shelf,
        *,
        memory: int | None = None,
        keep_alive: float = KEEP_ALIVE,
        patience: float = PATIENCE,
        available: Callable[[], int | None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._shelf, self._memory, self._keep, self._patience = shelf, memory, keep_alive, patience
        self._available, self._clock = available, clock
        self._slots: dict[str, _Slot] = {}
        self._names: dict[str, str] = {}
        self._turn = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    async def start(self, said: Callable[[str], None] = lambda name: None) -> None:
        """Load all that stay, in their order; `said` is told the name of each before. Raises what loading raises."""
        await self._refresh()
        for slot in list(self._slots.values()):
            if slot.served.stays:
                said(slot.served.name)
                async with self.use(slot.served.name):
                    pass

    async def states(self) -> list[ModelState]:
        """See types.Models."""
        await self._refresh()
        return [await self._state(slot) for slot in list(self._slots.values())]

    def loaded(self) -> list[Backend]:
        """The backends that are there now, for who only looks: it keeps none of them from being unloaded."""
        return [slot.backend for slot in self._slots.values() if slot.backend is not None]

    @asynccontextmanager
    async def use(self, name: str, *, keep_alive: float | None = None) -> AsyncIterator[Backend]:
        """See types.Models. Raises StoppedError after `close`."""
        while (slot := await self._find(name)).leaving is not None:
            await asyncio.wait([slot.leaving])
        slot.leases += 1
        slot.quiet.clear()
        slot.keep = -1.0 if slot.served.stays else self._keep if keep_alive is None else keep_alive
        try:
            if slot.backend is None:
                if slot.loading is None:
                    slot.loading = asyncio.get_running_loop().create_future()
                    self._spawn(self._load(slot, slot.loading))
                await asyncio.shield(slot.loading)
            if slot.backend is None:  # closed since it was loaded
                raise _stopped()
            yield slot.backend
        finally:
            slot.leases -= 1
            self._idle(slot)

    async def unload(self, name: str) -> None:
        """See types.Models; one that stays too, until somebody asks for it again."""
        slot = await self._find(name)
        if slot.backend is None or slot.leases:
            slot.keep = 0.0  # as soon as nobody has it; a later request has its own wish
            return
        await asyncio.shield(slot.leaving or self._leave(slot))

    async def close(self) -> None:
        """See types.Models. Who waits for a model is told at once; a load under way is waited for."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for slot in self._slots.values():
            if slot.loading is not None:
                _end(slot.loading, _stopped())
        for slot in self._slots.values():
            if slot.leaving is not None and slot.leases:
                slot.leaving.cancel()  # it waits for answers that may never end: a client that does not read
        for slot in self._slots.values():
            if slot.backend is not None:  # in use or not: its close ends every answer under way
                await _close(slot.backend, slot.served.name)
        while self._tasks:
            await asyncio.wait(list(self._tasks))
        for slot in self._slots.values():
            slot.backend, slot.resident = None, 0

    def sweep(self) -> None:
        """Unload what was idle for long enough. A timer does it; only who has a clock of their own needs to call it."""
        due = None
        now = self._clock()
        for slot in self._slots.values():
            until = slot.until()
            if until is not None and until <= now:
                self._leave(slot)
            elif until is not None:
                due = until if due is None else min(due, until)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if due is not None:
            self._timer = asyncio.get_running_loop().call_later(due - now, self.sweep)

    def check(self) -> None:
        """Recompute the books. Raises AssertionError where they are wrong."""
        for slot in self._slots.values():
            name, there = slot.served.name, slot.backend is not None
            assert slot.leases >= 0, f"{name} has {slot.leases} leases"
            assert not (slot.leases and slot.quiet.is_set()), f"{name} is in use and quiet"
            assert not (there and slot.loading is not None), f"{name} is loaded and being loaded"
            assert there or slot.loading is not None or slot.leaving is not None or not slot.resident, (
                f"{name} is not there and takes {slot.resident} bytes"
            )
            assert not there or slot.described is not None, f"{name} is loaded and not described"
        assert sum(slot.loading is not None and slot.resident > 0 for slot in self._slots.values()) <= 1, "two loads"
        assert self._memory is None or self._held() <= self._memory, f"{self._held()} bytes are held"
        assert all(name in self._slots for name in self._names.values()), "a name of nothing"

    # Names

    async def _find(self, name: str) -> _Slot:
        self._alive()
        if name not in self._names and (name or not self._slots):
            await self._refresh()  # somebody may have pulled it since
        if not name and self._slots:
            return next(iter(self._slots.values()))
        if name in self._names:
            return self._slots[self._names[name]]
        raise UnknownModelError(
            f"The model {name!r:.100} is not served here.", remedy="The list of models has those that are."
        )

    async def _refresh(self) -> None:
        self._alive()
        found = await in_thread(self._shelf.served)
        slots: dict[str, _Slot] = {}
        for served in found:
            old = self._slots.get(served.name)
            if old is None or (old.served.source != served.source and not _busy(old)):
                slots[served.name] = _Slot(served)
            else:  # a model that was pulled anew while it is in use is taken up once it was unloaded
                slots[served.name] = old
                if old.served.source == served.source:
                    old.served = served
        for name, slot in self._slots.items():  # removed from the disk, and still in use
            if name not in slots and _busy(slot):
                slots[name] = slot
        self._slots = slots
        self._names = {
            other: name
            for name, slot in reversed(slots.items())  # the first model of a name has it
            for other in (*slot.served.untold, *slot.served.aliases)
        }
        self._names |= {name: name for name in slots}

    # Coming

    async def _load(self, slot: _Slot, loading: asyncio.Future[None]) -> None:
        error: BaseException | None = None
        try:
            async with self._turn:
                await self._load_now(slot)
        except BaseException as raised:
            error = raised
            slot.resident = 0
            if not isinstance(raised, Exception):
                raise
        finally:
            slot.loading = None
            if error is None and slot.backend is None:
                error = _stopped()
            _end(loading, error)
            if not slot.leases:  # all who asked have left
                self._idle(slot)

    async def _load_now(self, slot: _Slot) -> None:
        self._alive()
        described = slot.described = await in_thread(self._shelf.describe, slot.served)
        self._alive()
        cache = await self._make_room(slot, described.need)
        self._alive()
        backend = await in_thread(self._shelf.load, slot.served, described, cache)
        if self._closed:
            await _close(backend, slot.served.name)
            return
        slot.backend = backend

    async def _make_room(self, slot: _Slot, need: ModelNeed) -> int | None:
        """Have others leave until it fits, and enter it into the books; the bytes of its cache. Raises NoRoomError."""
        if self._memory is None:
            return None
        self._refuse(slot, need, lambda other: other.served.stays)
        lacking = need.least - (self._memory - self._held())
        leaving = [other for other in self._slots.values() if other.leaving is not None]
        lacking -= sum(other.resident for other in leaving)
        staying = [
            other
            for other in self._slots.values()
            if other.backend is not None and other.leaving is None and not other.served.stays
        ]
        for other in sorted(staying, key=lambda other: (other.leases > 0, other.used)):
            if lacking <= 0:
                break
            lacking -= other.resident
            self._leave(other)
            leaving.append(other)
        tasks = [other.leaving for other in leaving if other.leaving is not None]
        if need.least > self._memory - self._held() and tasks:
            await asyncio.wait(tasks, timeout=self._patience)
            for other in leaving:
                if other.leaving is not None and other.leases:
                    other.leaving.cancel()  # it stays: who waits for it gets it
            await asyncio.wait(tasks)
        self._refuse(slot, need, lambda other: other.resident > 0)
        room = self._memory - self._held()
        free = self._available()
        if free is not None and free < room:
            if free < need.least:
                raise NoRoomError(
                    f"{why_no_room(slot.served.name, need, free, ())} Other programs have the rest.",
                    remedy="Free some memory, or ask for a smaller model.",
                )
            room = free
        cache = cache_beside(need, room)
        slot.resident = need.weights + cache
        return cache

    def _refuse(self, slot: _Slot, need: ModelNeed, stays: Callable[[_Slot], bool]) -> None:
        assert self._memory is not None
        others = [
            (other.served.name, other.resident)
            for other in self._slots.values()
            if other is not slot and other.resident and stays(other)
        ]
        if why := why_no_room(slot.served.name, need, self._memory, others):
            raise NoRoomError(why, remedy="Ask for a smaller model, or give models more memory (puna serve --memory).")

    def _held(self) -> int:
        return sum(slot.resident for slot in self._slots.values())

    # Leaving

    def _idle(self, slot: _Slot) -> None:
        """A request is done with it, or nobody wanted it after all."""
        if slot.leases:
            return
        slot.quiet.set()
        slot.used = self._clock()
        if not self._closed:
            self.sweep()

    def _leave(self, slot: _Slot) -> asyncio.Task[None]:
        slot.leaving = self._spawn(self._left(slot))
        return slot.leaving

    async def _left(self, slot: _Slot) -> None:
        try:
            if slot.leases:
                await slot.quiet.wait()
            backend, slot.backend = slot.backend, None
            if backend is not None:
                await _close(backend, slot.served.name)
                del backend
                await in_thread(self._shelf.unloaded)
        finally:
            slot.leaving = None
            if slot.backend is None:
                slot.resident = 0
            if not self._closed:
                self.sweep()

    # Telling

    async def _state(self, slot: _Slot) -> ModelState:
        served, why = slot.served, ""
        if slot.described is None:
            try:
                slot.described = await in_thread(self._shelf.describe, served)
            except PunaError as error:
                why = f"{error.message} {error.remedy}".strip()
        card = ModelCard(served.name)
        if slot.backend is not None:
            card = slot.backend.card
        elif slot.described is not None:
            card = slot.described.card
        if slot.backend is None and slot.described is not None and self._memory is not None:
            try:
                self._refuse(slot, slot.described.need, lambda other: other.served.stays)
            except NoRoomError as error:
                why = error.message
        now, until = self._clock(), slot.until()
        return ModelState(
            replace(card, name=served.name, aliases=served.aliases),
            loaded=slot.backend is not None,
            fits=not why,
            why=why,
            idle=now - slot.used if slot.backend is not None and not slot.leases else 0.0,
            unload_in=None if until is None else max(0.0, until - now),
            resident=slot.resident,
        )

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _alive(self) -> None:
        if self._closed:
            raise _stopped()


def _busy(slot: _Slot) -> bool:
    return bool(slot.backend is not None or slot.loading is not None or slot.leaving is not None or slot.leases)


async def _close(backend: Backend, name: str) -> None:
    """Close it. One that fails at that is as good as gone, and keeps nobody else from leaving."""
    try:
        await backend.close()
    except Exception:
        LOG.exception("%s did not close as it should", name)


def _stopped() -> StoppedError:
    return StoppedError("The server is stopping.", remedy="Ask again when it is back.")


def _end(loading: asyncio.Future[None], error: BaseException | None) -> None:
    """Tell all who wait for a load how it ended."""
    if loading.done():
        return
    if error is None:
        loading.set_result(None)
    else:
        loading.set_exception(error if isinstance(error, Exception) else _stopped())
        loading.exception()  # nobody may be left to hear of it


async def in_thread(work: Callable[..., T], *arguments: Any) -> T:
    """As `asyncio.to_thread`, in a thread that does not keep the process from ending: a large model loads for
    minutes."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def tell(result: T | None, error: BaseException | None) -> None:
        if done.done():
            return  # nobody waits any more
        if error is None:
            done.set_result(result)  # type: ignore[arg-type]
        else:
            done.set_exception(error)

    def run() -> None:
        result, error = None, None
        try:
            result = work(*arguments)
        except BaseException as raised:
            error = raised
            _forget_locals(raised)
        try:
            loop.call_soon_threadsafe(tell, result, error)
        except RuntimeError:  # the loop is closed: the process ends
            LOG.debug("nobody heard what became of %s", work)

    threading.Thread(target=run, name="puna-fleet", daemon=True).start()
    return await done


def _forget_locals(error: BaseException | None) -> None:
    """Drop what the functions that an error came through had in their hands: an error that is told to many, or logged,
    would keep half a model in memory for as long."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
