"""Random traffic on the checksum model equals one request at a time; ten planted defects and more do not.

What is surprising: the defects are planted here, by replacing a method. Each must be seen by the comparison or by
`check()`; that they are is what makes the silence of the other tests mean something.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from checksum_model import ChecksumRunner, Traffic, install

from puna.engine import turns
from puna.engine.loaded import LoadedAdapters
from puna.engine.pages import PagePool
from puna.engine.prefix import Node, PrefixCache
from puna.engine.scheduler import Scheduler
from puna.engine.sequence import Sequence


@pytest.fixture(autouse=True)
def _model(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


def worlds(steps: int, first: int = 0, *, check: bool = True) -> dict[str, float]:
    """So many steps over engines of all sizes; the sums of their statistics."""
    totals: dict[str, float] = {}
    taken, seed = 0, first
    while taken < steps:
        traffic = Traffic(seed, check=check)
        try:
            taken += traffic.run(300)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error!r}") from error
        seen = vars(traffic.engine.statistics()) | {"loads": traffic.loads, "kinds": traffic.kinds}
        for name, value in seen.items():
            totals[name] = totals.get(name, 0) + value
        seed += 1
    return totals


def test_answers_are_those_of_one_at_a_time() -> None:
    seen = worlds(20_000)
    # What the traffic is to go through, it goes through.
    assert min(seen["preemptions"], seen["evictions"], seen["reused_tokens"], seen["right_guesses"]) > 500, seen
    assert seen["guessed_tokens"] > seen["right_guesses"] + 500
    assert min(seen["kinds"] / 10, seen["loads"]) > 100, seen


@pytest.mark.slow
def test_a_million_steps_in_five_minutes() -> None:
    began = time.process_time()  # of this process alone: others may be at work
    worlds(1_000_000, first=10_000)
    assert time.process_time() - began < 300


Plant = Callable[[pytest.MonkeyPatch], None]
DEFECTS: dict[str, Plant] = {}


def defect(plant: Plant) -> Plant:
    DEFECTS[plant.__name__] = plant
    return plant


def instead(patch: pytest.MonkeyPatch, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    patch.setattr(owner, name, make(getattr(owner, name)))


@defect
def a_page_too_few(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Scheduler, "_pages_for", lambda self, tokens: tokens // self.page)


@defect
def a_page_off_by_one_in_the_table(patch: pytest.MonkeyPatch) -> None:
    def append(self: Scheduler, sequence: Sequence, page: int) -> None:
        sequence.pages.append(page)
        self._table[sequence.slot, min(len(sequence.pages), self._table.shape[1] - 1)] = page

    patch.setattr(Scheduler, "_append", append)


@defect
def no_copy_on_write(patch: pytest.MonkeyPatch) -> None:
    def make_room(self: Scheduler, sequence: Sequence, end: int) -> bool:
        while len(sequence.pages) * self.page < end:
            if not self.pool.available:
                lowest = self.running[-1]
                self._preempt(lowest)
                if lowest is sequence:
                    return False
            self._append(sequence, self.pool.take())
        return True

    patch.setattr(Scheduler, "_make_room", make_room)


@defect
def copy_on_write_without_the_copy(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ChecksumRunner, "copy_page", lambda self, source, target: None)


@defect
def an_evicted_page_stays_in_the_tree(patch: pytest.MonkeyPatch) -> None:
    def evict(self: PrefixCache) -> int:
        page, _ = self.unused.popitem(last=False)
        self.nodes.pop(page, None)
        return page

    patch.setattr(PrefixCache, "evict", evict)


@defect
def a_shared_page_is_counted_once(patch: pytest.MonkeyPatch) -> None:
    def share(self: PagePool, page: int) -> None:
        if not self.users[page]:
            self._cache.use(page)
            self.users[page] = 1

    patch.setattr(PagePool, "share", share)


@defect
def a_shared_page_is_freed_by_the_first_who_leaves(patch: pytest.MonkeyPatch) -> None:
    def release(self: PagePool, page: int) -> None:
        self.users[page] = 0
        if not self._cache.leave(page):
            self._free.append(page)

    patch.setattr(PagePool, "release", release)


@defect
def namespaces_are_ignored(patch: pytest.MonkeyPatch) -> None:
    instead(patch, PrefixCache, "children", lambda old: lambda self, namespace, parent: old(self, "", parent))
    instead(patch, PrefixCache, "insert", lambda old: lambda self, namespace, *rest: old(self, "", *rest))


@defect
def a_page_is_shared_before_it_is_computed(patch: pytest.MonkeyPatch) -> None:
    def start(old: Callable[..., bool]) -> Callable[..., bool]:
        def start(self: Scheduler, sequence: Sequence) -> bool:
            if not old(self, sequence):
                return False
            computed, sequence.computed = sequence.computed, sequence.goal - 1
            self.commit(sequence)
            sequence.computed = computed
            return True

        return start

    instead(patch, Scheduler, "_start", start)


@defect
def preemption_forgets_what_was_made(patch: pytest.MonkeyPatch) -> None:
    def preempt(old: Callable[..., None]) -> Callable[..., None]:
        def preempt(self: Scheduler, sequence: Sequence) -> None:
            old(self, sequence)
            del sequence.tokens[sequence.request.prompt :]

        return preempt

    instead(patch, Scheduler, "_preempt", preempt)


@defect
def starts_count_one_token_too_many(patch: pytest.MonkeyPatch) -> None:
    def batch(old: Callable[..., Any]) -> Callable[..., Any]:
        def batch(self: Scheduler, parts: Any) -> Any:
            made = old(self, parts)
            if len(made.table.starts) > 2:
                made.table.starts[1:-1] += 1
            return made

        return batch

    instead(patch, Scheduler, "batch", batch)


@defect
def a_partial_match_counts_one_token_too_many(patch: pytest.MonkeyPatch) -> None:
    def match(old: Callable[..., Any]) -> Callable[..., Any]:
        def match(self: PrefixCache, namespace: str, tokens: list[int]) -> tuple[list[Node], tuple[Node, int] | None]:
            whole, partial = old(self, namespace, tokens)
            fits = partial and len(whole) * self._page + partial[1] < len(tokens)
            return whole, (partial[0], partial[1] + 1) if fits and partial else partial

        return match

    instead(patch, PrefixCache, "match", match)


@defect
def a_whole_prompt_is_taken_from_the_cache(patch: pytest.MonkeyPatch) -> None:
    instead(patch, PrefixCache, "match", lambda old: lambda self, ns, tokens: old(self, ns, [*tokens, 5]))


@defect
def a_wrong_guess_counts_as_computed(patch: pytest.MonkeyPatch) -> None:
    def add(old: Callable[..., bool]) -> Callable[..., bool]:
        def add(turn: Any, draw: Any) -> bool:
            goes_on = old(turn, draw)
            if not goes_on and turn.finish is None and turn.right < len(turn.guesses):
                turn.sequence.computed += 1
            return goes_on

        return add

    instead(patch, turns, "_add", add)


@defect
def a_page_too_many_is_given_back_after_guesses(patch: pytest.MonkeyPatch) -> None:
    def trim(self: Scheduler, sequence: Sequence) -> None:
        while len(sequence.pages) > len(sequence.tokens) // self.page:
            self.pool.release(sequence.pages.pop())

    patch.setattr(Scheduler, "trim", trim)


@defect
def the_cache_hides_tokens_that_are_asked_for(patch: pytest.MonkeyPatch) -> None:
    instead(patch, Scheduler, "_start", lambda old: lambda self, sequence: _as_if_ordinary(old, self, sequence))


def _as_if_ordinary(start: Callable[..., bool], scheduler: Scheduler, sequence: Sequence) -> bool:
    wanted, sequence.wanted = sequence.wanted, 1 << 62
    started = start(scheduler, sequence)
    sequence.wanted = wanted
    return started


@defect
def an_embedding_that_starts_over_counts_twice(patch: pytest.MonkeyPatch) -> None:
    def preempt(old: Callable[..., None]) -> Callable[..., None]:
        def preempt(self: Scheduler, sequence: Sequence) -> None:
            old(self, sequence)
            if sequence.request.pooling == "mean":
                sequence.wanted = 0

        return preempt

    instead(patch, Scheduler, "_preempt", preempt)


@defect
def adapters_share_a_prefix_cache(patch: pytest.MonkeyPatch) -> None:
    instead(patch, LoadedAdapters, "find", lambda old: lambda self, name, space: (old(self, name, space)[0], space))


@defect
def an_adapters_number_is_used_again(patch: pytest.MonkeyPatch) -> None:
    def unload(old: Callable[..., None]) -> Callable[..., None]:
        def unload(self: LoadedAdapters, name: str, used: list[int]) -> None:
            old(self, name, used)
            self._last = max((adapter.number for adapter in self._by_name.values()), default=-1)

        return unload

    instead(patch, LoadedAdapters, "unload", unload)


@defect
def an_adapter_is_that_of_the_sequence_before(patch: pytest.MonkeyPatch) -> None:
    def batch(old: Callable[..., Any]) -> Callable[..., Any]:
        def batch(self: Scheduler, parts: Any) -> Any:
            made = old(self, parts)
            return made if made.adapters is None else made._replace(adapters=np.roll(made.adapters, 1))

        return batch

    instead(patch, Scheduler, "batch", batch)


@defect
def an_adapters_pages_are_taken_twice(patch: pytest.MonkeyPatch) -> None:
    def reserve(self: PagePool, count: int) -> list[int]:
        return self._free[:count] + [self.take() for _ in range(count - len(self._free))]

    patch.setattr(PagePool, "reserve", reserve)


@defect
def an_adapter_in_use_may_go(patch: pytest.MonkeyPatch) -> None:
    def unload(self: LoadedAdapters, name: str, used: list[int]) -> None:
        adapter = self._by_name.pop(name)
        self._runner.adapters.drop(adapter.number)
        self._scheduler.give_back(adapter.pages)

    patch.setattr(LoadedAdapters, "unload", unload)


@pytest.mark.parametrize("plant", DEFECTS.values(), ids=DEFECTS)
def test_a_planted_defect_is_caught(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError, match="seed"):
        worlds(20_000)
