"""A fleet of models: who is loaded, who must leave, and that nobody loses a model while using it.

What is surprising: nothing here waits for time to pass: models are scripted, their loads wait for the test, and the
clock is the test's own.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.errors import CheckpointError, NoRoomError, StoppedError, UnknownModelError
from puna.gateway.fleet import Described, Fleet, Served
from puna.gateway.scripted import ScriptedBackend
from puna.plan import ModelNeed
from puna.types import Backend, ModelCard, Models

SECONDS = 30.0


class Toy(ScriptedBackend):
    """A model that takes memory of its shelf until it is closed."""

    def __init__(self, shelf: ToyShelf, name: str, nbytes: int) -> None:
        super().__init__(card=ModelCard(name))
        self._shelf, self._nbytes = shelf, nbytes
        shelf.taken += nbytes
        shelf.most = max(shelf.most, shelf.taken)

    async def close(self) -> None:
        """Give it back."""
        if not self.closed:
            self._shelf.taken -= self._nbytes
        await super().close()


class ToyShelf:
    """Models by name: bytes of weights and of cache, least and most."""

    def __init__(self, models: dict[str, tuple[int, int, int]], stays: tuple[str, ...] = ()) -> None:
        self.models, self.stays = models, stays
        self.aliases: dict[str, tuple[str, ...]] = {}
        self.loads: list[str] = []
        self.failing: set[str] = set()
        self.gate = threading.Event()
        self.gate.set()
        self.taken = self.most = self.returned = 0

    def served(self) -> list[Served]:
        """See fleet.Shelf."""
        return [Served(name, self.aliases.get(name, ()), stays=name in self.stays) for name in self.models]

    def describe(self, model: Served) -> Described:
        """See fleet.Shelf."""
        weights, least, most = self.models[model.name]
        return Described(ModelCard(model.name, parameters=weights), ModelNeed(weights, least, most, 8))

    def load(self, model: Served, described: Described, cache: int | None) -> Backend:
        """See fleet.Shelf."""
        assert self.gate.wait(SECONDS)
        self.loads.append(model.name)
        if model.name in self.failing:
            raise CheckpointError(f"{model.name} is damaged.")
        return Toy(self, model.name, described.need.weights + (cache or 0))

    def unloaded(self) -> None:
        """See fleet.Shelf."""
        self.returned += 1


def run(work: Coroutine[Any, Any, None]) -> None:
    """Run a test's coroutine; one that hangs fails."""
    asyncio.run(asyncio.wait_for(work, SECONDS))


async def settled() -> None:
    """Let everything that can go on go on, but for threads."""
    for _ in range(20):
        await asyncio.sleep(0)


async def until(true: Any) -> None:
    """Wait for something that a thread does."""
    while not true():
        await asyncio.sleep(0.001)


def loaded(fleet: Fleet) -> set[str]:
    """The names of the models that are there."""
    return {name for name, slot in fleet._slots.items() if slot.backend is not None}


def test_it_is_models() -> None:
    async def work() -> None:
        fleet = Fleet(ToyShelf({"a": (10, 1, 1)}))
        assert isinstance(fleet, Models)
        await fleet.close()

    run(work())


def test_a_model_is_loaded_when_it_is_asked_for_and_once_for_all_who_ask() -> None:
    async def work() -> None:
        shelf = ToyShelf({"a": (10, 1, 1), "b": (10, 1, 1)})
        fleet = Fleet(shelf, memory=100)
        shelf.gate.clear()
        got: list[Backend] = []

        async def ask() -> None:
            async with fleet.use("a") as backend:
                got.append(backend)

        tasks = [asyncio.create_task(ask()) for _ in range(5)]
        await settled()
        fleet.check()
        assert shelf.loads == []
        assert got == []
        shelf.gate.set()
        await asyncio.gather(*tasks)
        assert shelf.loads == ["a"]
        assert len({id(backend) for backend in got}) == 1
        assert got[0].card.name == "a"
        assert loaded(fleet) == {"a"}
        assert fleet.loaded() == got[:1]
        fleet.check()
        await fleet.close()
        assert shelf.taken == 0
        assert fleet.loaded() == []

    run(work())


def test_a_load_that_fails_tells_everybody_and_is_tried_anew() -> None:
    async def work() -> None:
        shelf = ToyShelf({"a": (10, 1, 1)})
        fleet = Fleet(shelf, memory=100)
        shelf.failing.add("a")
        shelf.gate.clear()

        async def ask() -> None:
            async with fleet.use("a"):
                raise AssertionError("it was given out")

        tasks = [asyncio.create_task(ask()) for _ in range(3)]
        await settled()
        shelf.gate.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results] == [CheckpointError] * 3
        fleet.check()
        assert shelf.loads == ["a"]
        assert (await fleet.states())[0].resident == 0
        shelf.failing.clear()
        async with fleet.use("a") as backend:
            assert backend.card.name == "a"
        assert shelf.loads == ["a", "a"]
        await fleet.close()

    run(work())


def test_the_least_recently_used_idle_one_makes_room() -> None:
    async def work() -> None:
        shelf = ToyShelf({"a": (40, 1, 1), "b": (40, 1, 1), "c": (40, 1, 1)})
        now = [0.0]
        fleet = Fleet(shelf, memory=100, clock=lambda: now[0])
        for name in ("a", "b", "a"):
            now[0] += 1
            async with fleet.use(name):
                pass
        async with fleet.use("c"):
            assert loaded(fleet) == {"a", "c"}
            fleet.check()
        assert shelf.most <= 100
        assert shelf.returned == 1
        await fleet.close()

    run(work())


def test_one_in_use_is_not_taken_and_the_request_waits_for_its_turn() -> None:
    async def work() -> None:
        shelf = ToyShelf({"a": (60, 1, 1), "b": (60, 1, 1)})
        fleet = Fleet(shelf, memory=100)
        order: list[str] = []

        async def ask(name: str) -> None:
            async with fleet.use(name) as backend:
                order.append(name)
                await settled()
                assert not backend.closed  # type: ignore[attr-defined]

        async with fleet.use("a") as first:
            b = asyncio.create_task(ask("b"))
            await until(lambda: fleet._slots["a"].leaving is not None)
            again = asyncio.create_task(ask("a"))  # comes after b has asked: it does not hold a there for ever
            await settled()
            assert not first.closed  # type: ignore[attr-defined]
            assert order == []
            fleet.check()
        await asyncio.gather(b, again)
        assert order == ["b", "a"]
        assert shelf.loads == ["a", "b", "a"]
        assert shelf.most <= 100
        fleet.check()
        await fleet.close()

    run(work())


def test_who_waits_too_long_for_one_in_use_is_told_the_arithmetic_and_it_stays() -> None:
    async def work() -> None:
        shelf = ToyShelf({"a": (60_000_000, 1, 1), "b": (60_000_000, 1, 1)})
        fleet = Fleet(shelf, memory=100_000_000, patience=0.0)
        async with fleet.use("a") as backend:
            with pytest.raises(NoRoomError) as error:
                async with fleet.use("b"):
                    pass
            assert "b takes 60.0 MB of weights" in str(error.value)
            assert "a with 60.0 MB must stay: 40.0 MB are left" in str(error.value)
            assert not backend.closed  # type: ignore[attr-defined]
            fleet.check()
            async with fleet.use("a") as same:
                assert same is backend
        await fleet.close()

    run(work())


def test_a_model_that_never_fits_is_refused_before_anything_is_read_or_unloaded() -> None:
    async def work() -> None:
        shelf = ToyShelf({"a": (40, 1, 1), "big": (99, 2, 2)})
        fleet = Fleet(shelf, memory=100)
        async with fleet.use("a"):
            pass
        with pytest.raises(NoRoomError, match="big takes"):
            async with fleet.use("big"):
                pass
        assert shelf.loads == ["a"]
        assert loaded(fleet) == {"a"}
        a, big = await fleet.states()
        assert (a.loaded, a.fits) == (True, True)
        assert (big.loaded, big.fits) == (False, False)
        assert "big takes 0.0 MB of weights" in big.why
        await fleet.close()

    run(work())


def test_what_other_programs_took_meanwhile_counts() -> None:
    async def work() -> None:
        free = [30]
        shelf = ToyShelf({"a": (40, 1, 50)})
        fleet = Fleet(shelf, memory=100, available=lambda: free[0])
        with pytest.raises(NoRoomError, match="Other programs"):
            async with fleet.use("a"):
                pass
        fleet.check()
        free[0] = 60
        async with fleet.use("a"):
            assert shelf.taken == 40 + 10  # half of what is there beside the weights
        await fleet.close()

    run(work())


def test_the_cache_is_half_of_the_rest_within_its_bounds() -> None:
    async def work() -> None:
        shelf = ToyShelf({"a": (20, 5, 1000), "b": (20, 15, 1000), "c": (10, 1, 2)})
        fleet = Fleet(shelf, memory=100)
        async with fleet.use("a"):
            assert shelf.taken == 20 + 40
            async with fleet.use("b"):
                assert shelf.taken == 60 + 20 + 15  # half would be 10: less than it needs
        await fleet.close()
        fleet = Fleet(shelf, memory=100)
        async with fleet.use("c"):
            assert shelf.taken == 12
        await fleet.close()

    run(work())


def test_idle_ones_leave_after_their_time_and_those_that_were_named_stay() -> None:
    async def work() -> None:
        now = [0.0]
        shelf = ToyShelf({"named": (1, 1, 1), "a": (1, 1, 1), "b": (1, 1, 1), "c": (1, 1, 1)}, stays=("named",))
        fleet = Fleet(shelf, memory=100, keep_alive=300, clock=lambda: now[0])
        await fleet.start()
        assert loaded(fleet) == {"named"}
        for name, keep in (("a", None), ("b", 10.0), ("c", -1.0)):
            async with fleet.use(name, keep_alive=keep):
                now[0] += 1000
                fleet.sweep()  # in use: stays
        assert loaded(fleet) == {"named", "a", "b", "c"} - {"a", "b"} | {"b"}  # a had its time while b and c were used
        now[0] += 9.5
        fleet.sweep()
        await settled()
        states = {state.card.name: state for state in await fleet.states()}
        assert states["b"].loaded is False
        assert states["c"].unload_in is None
        assert states["c"].idle == 9.5
        now[0] += 1e9
        fleet.sweep()
        await until(lambda: not fleet._tasks)
        assert loaded(fleet) == {"named", "c"}
        fleet.check()
        await fleet.close()

    run(work())


def test_a_wish_of_zero_unloads_at_once_and_a_later_request_has_its_own() -> None:
    async def work() -> None:
        shelf = ToyShelf({"a": (1, 1, 1)})
        fleet = Fleet(shelf, memory=100)
        async with fleet.use("a", keep_alive=0):
            pass
        await until(lambda: not fleet._tasks)
        assert loaded(fleet) == set()
        async with fleet.use("a", keep_alive=0), fleet.use("a"):
            pass
        await until(lambda: not fleet._tasks)
        assert loaded(fleet) == {"a"}
        await fleet.close()

    run(work())


def test_unload_waits_for_who_uses_it() -> None:
    async def work() -> None:
        shelf = ToyShelf({"a": (1, 1, 1)}, stays=("a",))
        fleet = Fleet(shelf, memory=100)
        await fleet.unload("a")
        async with fleet.use("a") as backend:
            await fleet.unload("a")
            await settled()
            assert not backend.closed  # type: ignore[attr-defined]
        await until(lambda: not fleet._tasks)
        assert loaded(fleet) == set()
        async with fleet.use("a"):
            pass
        await fleet.unload("a")
        assert shelf.taken == 0
        with pytest.raises(UnknownModelError):
            await fleet.unload("b")
        await fleet.close()

    run(work())


def test_names_aliases_and_what_is_pulled_meanwhile() -> None:
    async def work() -> None:
        shelf = ToyShelf({"a": (1, 1, 1), "b": (1, 1, 1)})
        shelf.aliases = {"a": ("first", "b", "both"), "b": ("both",)}
        fleet = Fleet(shelf, memory=100)
        for asked, name in (("a", "a"), ("first", "a"), ("b", "b"), ("both", "a"), ("", "a")):
            async with fleet.use(asked) as backend:
                assert backend.card.name == name, asked
        for unknown in ("c", "A", "a ", "../a", "/", "~", "./a"):
            with pytest.raises(UnknownModelError):
                async with fleet.use(unknown):
                    pass
        shelf.models = {"c": (1, 1, 1), "a": (1, 1, 1)}  # c was pulled, b removed
        async with fleet.use("c"):
            pass
        assert [state.card.name for state in await fleet.states()] == ["c", "a", "b"]  # b is loaded still
        await fleet.unload("b")
        assert [state.card.name for state in await fleet.states()] == ["c", "a"]
        await fleet.close()

    run(work())


def test_a_close_tells_who_waits_and_ends_what_is_open() -> None:
    async def work() -> None:
        shelf = ToyShelf({"a": (1, 1, 1), "b": (1, 1, 1)})
        fleet = Fleet(shelf, memory=100)
        async with fleet.use("a") as backend:
            shelf.gate.clear()

            async def ask() -> None:
                async with fleet.use("b"):
                    raise AssertionError("it was given out")

            waiting = asyncio.create_task(ask())
            await settled()
            closing = asyncio.create_task(fleet.close())
            with pytest.raises(StoppedError):
                await waiting
            await until(lambda: backend.closed)  # type: ignore[attr-defined]
            shelf.gate.set()
        await closing
        await fleet.close()
        assert shelf.taken == 0
        with pytest.raises(StoppedError):
            async with fleet.use("a"):
                pass

    run(work())


def test_a_close_waits_for_no_client_that_never_ends() -> None:
    async def work() -> None:
        shelf = ToyShelf({"a": (60, 1, 1), "b": (60, 1, 1)})
        fleet = Fleet(shelf, memory=100)
        async with fleet.use("a"):

            async def ask() -> None:
                async with fleet.use("b"):
                    raise AssertionError("it was given out")

            waiting = asyncio.create_task(ask())
            await until(lambda: fleet._slots["a"].leaving is not None)
            await fleet.close()  # while "a" is still in use, and has to make room when it no longer is
            with pytest.raises(StoppedError):
                await waiting
            assert shelf.taken == 0

    run(work())


def test_one_that_does_not_close_keeps_no_other_from_it() -> None:
    async def work() -> None:
        shelf = ToyShelf({"a": (1, 1, 1), "b": (1, 1, 1)})
        fleet = Fleet(shelf, memory=100)
        async with fleet.use("a") as a, fleet.use("b"):

            async def fail() -> None:
                raise RuntimeError("no")

            a.close = fail  # type: ignore[method-assign]
        await fleet.close()
        assert shelf.taken == 2  # "a" still has its own

    run(work())


def test_a_room_that_was_left_is_free_though_giving_it_back_failed() -> None:
    async def work() -> None:
        shelf = ToyShelf({"a": (60, 1, 1), "b": (60, 1, 1)})

        def unloaded() -> None:
            raise OSError("no")

        shelf.unloaded = unloaded  # type: ignore[method-assign]
        fleet = Fleet(shelf, memory=100)
        async with fleet.use("a"):
            pass
        async with fleet.use("b"):
            fleet.check()
        await fleet.close()

    run(work())


def test_the_error_of_a_load_keeps_nothing_that_was_loaded() -> None:
    class Half:
        """What was loaded when it failed."""

    async def work() -> None:
        left: list[weakref.ref[Half]] = []

        def load(*given: Any) -> Backend:
            half = Half()
            left.append(weakref.ref(half))
            try:
                raise ValueError("the other half is missing")
            except ValueError as error:
                raise CheckpointError("It is damaged.") from error

        shelf = ToyShelf({"a": (1, 1, 1)})
        shelf.load = load  # type: ignore[method-assign]
        fleet = Fleet(shelf, memory=100)
        with pytest.raises(CheckpointError) as raised:
            async with fleet.use("a"):
                pass
        assert raised.value.__traceback__ is not None
        assert left[0]() is None
        await fleet.close()

    run(work())


def test_who_leaves_while_it_loads_leaves_no_trace() -> None:
    async def work() -> None:
        shelf = ToyShelf({"a": (1, 1, 1)})
        fleet = Fleet(shelf, memory=100)
        shelf.gate.clear()

        async def ask() -> None:
            async with fleet.use("a", keep_alive=0):
                raise AssertionError("it was given out")

        task = asyncio.create_task(ask())
        await settled()
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        shelf.gate.set()
        await until(lambda: shelf.loads == ["a"] and not fleet._tasks)
        fleet.check()
        assert shelf.taken == 0  # nobody wanted it any more
        await fleet.close()

    run(work())


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["use", "use", "use", "end", "leave", "unload", "time", "fail", "mend", "states"]),
        st.integers(0, 3),
        st.sampled_from([None, 0.0, 5.0, -1.0]),
        st.integers(0, 6),
    ),
    max_size=30,
)


@settings(max_examples=60, deadline=None)
@given(OPERATIONS)
def test_whatever_happens_nobody_loses_a_model_and_the_books_are_right(
    operations: list[tuple[str, int, float | None, int]],
) -> None:
    names = ["kept", "a", "b", "c"]

    async def work() -> None:
        shelf = ToyShelf({"kept": (10, 1, 4), "a": (30, 5, 90), "b": (50, 5, 90), "c": (70, 5, 9)}, stays=("kept",))
        now = [0.0]
        fleet = Fleet(shelf, memory=100, patience=SECONDS, keep_alive=20, clock=lambda: now[0])
        await fleet.start()
        open_: list[tuple[asyncio.Task[str], asyncio.Event]] = []

        async def ask(name: str, keep: float | None, end: asyncio.Event) -> str:
            try:
                async with fleet.use(name, keep_alive=keep) as backend:
                    assert backend.card.name == name
                    while not end.is_set():
                        assert not backend.closed  # type: ignore[attr-defined]
                        await asyncio.sleep(0)
                    assert not backend.closed  # type: ignore[attr-defined]
                return "answered"
            except CheckpointError:
                return "damaged"

        for kind, number, keep, turns in operations:
            if kind == "use":
                end = asyncio.Event()
                open_.append((asyncio.create_task(ask(names[number], keep, end)), end))
            elif kind == "end" and open_:
                open_[number % len(open_)][1].set()
            elif kind == "leave" and open_:
                open_[number % len(open_)][0].cancel()
            elif kind == "unload":
                open_.append((asyncio.create_task(unload(fleet, names[number])), asyncio.Event()))
            elif kind == "time":
                now[0] += 7.0
                fleet.sweep()
            elif kind == "fail" and number:
                shelf.failing.add(names[number])
            elif kind == "mend":
                shelf.failing.clear()
            elif kind == "states":
                assert len(await fleet.states()) == 4
            for _ in range(turns):
                await asyncio.sleep(0)
                fleet.check()
        for _, end in open_:
            end.set()
        results = await asyncio.gather(*(task for task, _ in open_), return_exceptions=True)
        assert all(
            result in ("answered", "damaged", "done") or isinstance(result, asyncio.CancelledError)
            for result in results
        ), results
        assert shelf.failing or all(result != "damaged" for result in results) or "mend" in str(operations)
        await until(lambda: not fleet._tasks)
        fleet.check()
        assert shelf.most <= 100
        assert fleet._held() == shelf.taken
        await fleet.close()
        assert shelf.taken == 0

    run(work())


async def unload(fleet: Fleet, name: str) -> str:
    """Unload it; what became of that."""
    await fleet.unload(name)
    return "done"
