"""Random traffic on the checksum model equals one request at a time; ten planted defects and more do not.

What is surprising: the defects are planted here, by replacing a method. Each must be seen by the comparison or by
`check()`; that they are is what makes the silence of the other tests mean something.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import checksum_model
import numpy as np
import pytest
from checksum_model import ChecksumRunner, Traffic, install

from puna.engine import scheduler, turns
from puna.engine import sequence as sequence_module
from puna.engine.engine import Engine
from puna.engine.loaded import LoadedAdapters
from puna.engine.pages import LocalPool, PagePool
from puna.engine.pictures import Sights
from puna.engine.prefix import NO_PAGE, Node, PrefixCache
from puna.engine.scheduler import Scheduler
from puna.engine.sequence import Sequence
from puna.engine.windows import Windows


@pytest.fixture(autouse=True)
def _model(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


def worlds(steps: int, first: int = 0, *, check: bool = True, chunked: bool = False) -> dict[str, float]:
    """So many steps over engines of all sizes; the sums of their statistics."""
    totals: dict[str, float] = {}
    taken, seed = 0, first
    while taken < steps:
        traffic = Traffic(seed, check=check, chunked=chunked)
        try:
            taken += traffic.run(300)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error!r}") from error
        windows = traffic.engine._scheduler.windows
        seen = vars(traffic.engine.statistics()) | {
            "loads": traffic.loads,
            "kinds": traffic.kinds,
            "shown": traffic.shown,
            "seen": traffic.engine._sights.seen,
            "local_evictions": windows.pool.evicted if windows else 0,
        }
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
    assert seen["shown"] > seen["seen"] > 100, seen


def test_answers_are_those_of_one_at_a_time_where_a_layer_sees_its_chunk_only() -> None:
    seen = worlds(6_000, chunked=True)
    assert min(seen["preemptions"], seen["evictions"], seen["reused_tokens"], seen["local_evictions"]) > 400, seen
    assert min(seen["guessed_tokens"] - seen["right_guesses"], seen["right_guesses"], seen["kinds"]) > 100, seen


@pytest.mark.slow
def test_two_hundred_thousand_steps_where_a_layer_sees_its_chunk_only() -> None:
    worlds(200_000, first=10_000, chunked=True)


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


@defect
def a_picture_is_known_by_its_tokens(patch: pytest.MonkeyPatch) -> None:
    for module in (scheduler, sequence_module, checksum_model):
        patch.setattr(module, "keys", lambda tokens, pictures: list(tokens))


@defect
def a_picture_that_is_needed_makes_room(patch: pytest.MonkeyPatch) -> None:
    instead(patch, Sights, "trim", lambda old: lambda self, needed: old(self, set))


@defect
def pictures_that_have_no_room_run(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Engine, "_has_room", lambda self, sequence: True)


@defect
def what_was_seen_is_forgotten_after_the_prompt(patch: pytest.MonkeyPatch) -> None:
    instead(
        patch, Sequence, "shown",
        lambda old: lambda self, start, end: [] if start >= self.request.prompt else old(self, start, end),
    )  # fmt: skip


@defect
def a_picture_stands_in_the_row_before(patch: pytest.MonkeyPatch) -> None:
    def placed(old: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, parts: tuple(each._replace(sequence=max(each.sequence - 1, 0)) for each in old(self, parts))

    instead(patch, Engine, "_placed", placed)


RARE = {"pictures_that_have_no_room_run": 35}
"""Defects that few worlds show, and the world before one that does."""


@pytest.mark.parametrize("plant", DEFECTS.values(), ids=DEFECTS)
def test_a_planted_defect_is_caught(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError, match="seed"):
        worlds(20_000, first=RARE.get(plant.__name__, 0))


# -- pages of layers that see one chunk only -------------------------------------------------------------------------

LOCAL_DEFECTS: dict[str, Plant] = {}


def local_defect(plant: Plant) -> Plant:
    LOCAL_DEFECTS[plant.__name__] = plant
    return plant


@local_defect
def a_local_page_is_given_back_too_early(patch: pytest.MonkeyPatch) -> None:
    def pass_by(old: Callable[..., None]) -> Callable[..., None]:
        def pass_by(self: Windows, sequence: Sequence) -> None:
            computed = sequence.computed
            sequence.computed += computed % self._chunk > 0 and computed % self._chunk == self._chunk - 1
            old(self, sequence)
            sequence.computed = computed

        return pass_by

    instead(patch, Windows, "pass_by", pass_by)


@local_defect
def local_pages_are_never_given_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Windows, "pass_by", lambda self, sequence: None)


@local_defect
def an_evicted_local_page_stays_with_its_node(patch: pytest.MonkeyPatch) -> None:
    def evict(self: LocalPool) -> int:
        page, _ = self.unused.popitem(last=False)
        del self.nodes[page]
        return page

    patch.setattr(LocalPool, "evict", evict)


@local_defect
def a_prefix_is_gone_on_from_without_its_local_pages(patch: pytest.MonkeyPatch) -> None:
    def start(self: Windows, sequence: Sequence, whole: list[Node]) -> None:
        sequence.passed = self.first(len(whole) * self._page)
        sequence.local = [NO_PAGE] * sequence.passed
        self.table[sequence.slot, : sequence.passed] = NO_PAGE
        for node in whole[sequence.passed :]:
            if node.local == NO_PAGE:
                self.pool.keep(node, self.pool.take())
            else:
                self.pool.share(node.local)
            self._append(sequence, node.local)

    patch.setattr(Windows, "usable", lambda self, whole, partial: (whole, None))
    patch.setattr(Windows, "fits", lambda self, whole, end: self.pool.available > self.end(0) + 2)
    patch.setattr(Windows, "start", start)


@local_defect
def a_local_page_is_followed_where_there_is_none(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Windows, "follows", lambda self, sequence, node: sequence.depth < len(sequence.local))


@local_defect
def a_local_copy_is_not_made(patch: pytest.MonkeyPatch) -> None:
    def copy_page(old: Callable[..., None]) -> Callable[..., None]:
        return lambda self, source, target, local=False: None if local else old(self, source, target)

    instead(patch, ChecksumRunner, "copy_page", copy_page)


@local_defect
def a_fork_writes_to_its_parents_local_page(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Windows, "_shared", lambda self, sequence: False)


@local_defect
def a_fork_is_not_counted(patch: pytest.MonkeyPatch) -> None:
    def fork(self: Windows, parent: Sequence, twin: Sequence) -> None:
        twin.passed, twin.local = parent.passed, list(parent.local)
        self.table[twin.slot, : len(twin.local)] = twin.local

    patch.setattr(Windows, "fork", fork)


@local_defect
def a_node_takes_its_local_page_with_it(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LocalPool, "forget", lambda self, node: None)


@local_defect
def a_chunk_ends_a_token_late(patch: pytest.MonkeyPatch) -> None:
    instead(patch, Windows, "end", lambda old: lambda self, position: old(self, position) + 1)


@local_defect
def a_page_across_the_border_of_chunks_is_given_back(patch: pytest.MonkeyPatch) -> None:
    def first(self: Windows, position: int) -> int:
        return min(-(-(position // self._chunk * self._chunk) // self._page), position // self._page)

    patch.setattr(Windows, "first", first)


@local_defect
def pages_that_were_given_back_are_named(patch: pytest.MonkeyPatch) -> None:
    def pass_by(old: Callable[..., None]) -> Callable[..., None]:
        def pass_by(self: Windows, sequence: Sequence) -> None:
            old(self, sequence)
            self.table[sequence.slot, : sequence.passed] = 0

        return pass_by

    instead(patch, Windows, "pass_by", pass_by)


@local_defect
def room_is_promised_that_is_not_there(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Windows, "fits", lambda self, whole, end: True)


@local_defect
def guesses_take_local_pages_that_are_not_there(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Windows, "room", lambda self, sequence, spare: self.end(sequence.computed))


@local_defect
def local_pages_of_wrong_guesses_stay(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Windows, "trim", lambda self, sequence, pages: None)


@local_defect
def the_tail_of_a_text_has_a_local_page_that_another_writes_to(patch: pytest.MonkeyPatch) -> None:
    def keep_tail(self: Scheduler, sequence: Sequence) -> None:
        key = tuple(sequence.tokens[sequence.depth * self.page : sequence.computed])
        if not key or self.pool.users[sequence.pages[sequence.depth]] > 1:
            return
        children = self.cache.children(sequence.request.namespace, sequence.node)
        if key not in children:
            node = self.cache.insert(sequence.request.namespace, sequence.node, key, sequence.pages[sequence.depth])
            if self.windows is not None:
                self.windows.pool.keep(node, sequence.local[sequence.depth])

    patch.setattr(Scheduler, "_keep_tail", keep_tail)


@pytest.mark.parametrize("plant", LOCAL_DEFECTS.values(), ids=LOCAL_DEFECTS)
def test_a_planted_defect_of_local_pages_is_caught(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError, match="seed"):
        worlds(20_000, chunked=True)


SEEN_IN_ANSWERS = (
    a_local_page_is_given_back_too_early,
    an_evicted_local_page_stays_with_its_node,
    a_prefix_is_gone_on_from_without_its_local_pages,
    a_local_copy_is_not_made,
    a_fork_writes_to_its_parents_local_page,
    a_page_across_the_border_of_chunks_is_given_back,
)


@pytest.mark.parametrize("plant", SEEN_IN_ANSWERS, ids=lambda plant: plant.__name__)
def test_answers_alone_tell_of_a_wrong_local_page(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError, match="seed"):
        worlds(20_000, check=False, chunked=True)
