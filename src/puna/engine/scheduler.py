"""What runs next: who is admitted, who has pages, and which tokens a step computes.

What it is: the waiting and the running sequences, and the pages of the latter. `plan()` makes the next step in three
moves: admit; one step of every answer under way; prompts with what is left of the step.
What it is not: a maker of tokens. It reads a sequence's tokens and never adds one.
What is surprising: a prompt gets all its pages when it is admitted, so only an answer can find no page; then the
running sequence of the lowest rank gives up its own, waits and is computed again. The highest rank never does, and only
requests that fit the pool alone get here: something always moves.

A model with layers that see one chunk only has pages of two kinds. Those of these layers are kept by `Windows`; a
prompt gets them a chunk at a time, so that it too may find none.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Hashable, Iterable
from heapq import heappop, heappush
from typing import NamedTuple

import numpy as np

from puna.engine.pages import PagePool
from puna.engine.pictures import keys
from puna.engine.prefix import NO_PAGE, Node, PrefixCache
from puna.engine.runner import Batch
from puna.engine.sequence import Sequence
from puna.engine.windows import Windows
from puna.kernels.layouts import ChunkedTable, PageTable

BESIDE_ANSWERS = 128
"""Tokens of prompts that a step computes at most while answers are under way, whose next tokens wait for it."""

TURN = 4
"""In one step of so many prompts are read in turns."""


class Part(NamedTuple):
    """What a step computes of a sequence: `length` of its tokens from `start` on, then guesses of what follows."""

    sequence: Sequence
    start: int
    length: int
    guesses: list[int]


Bytes = bytes | memoryview

Guess = Callable[[Sequence, int, int], list[int]]
"""Guesses for a sequence: (sequence, how many at most, how many sequences the step decodes)."""


class Scheduler:
    """Not thread-safe. `copy_page(source, target)` copies keys and values at once; `has_room(sequence)` says whether
    what else it needs (its pictures) has room beside that of those that run, and does where nothing runs.

    A step computes about `step_tokens` tokens; of sequences of which every token's logits are wanted, `step_rows`.
    Where the model has layers that see only `chunk` tokens (0: none has), these have `local_pages` of their own, and
    `copy_local` for them.
    """

    def __init__(
        self,
        *,
        pages: int,
        page: int,
        context: int,
        step_tokens: int,
        step_rows: int,
        max_running: int,
        prefix_cache: bool,
        copy_page: Callable[[int, int], None],
        chunk: int = 0,
        local_pages: int = 0,
        copy_local: Callable[[int, int], None] | None = None,
        has_room: Callable[[Sequence], bool] = lambda sequence: True,
    ) -> None:
        self.page, self.step_tokens, self.step_rows, self.max_running = page, step_tokens, step_rows, max_running
        self._copy_page, self._has_room = copy_page, has_room
        width = min(pages, -(-context // page))
        self.windows: Windows | None = None
        if copy_local is not None and chunk:
            self.windows = Windows(
                pages=local_pages, page=page, chunk=chunk, slots=max_running, width=width, copy_page=copy_local
            )
        self.cache = PrefixCache(page, self.windows.pool.forget if self.windows else None)
        self.pool = PagePool(pages, self.cache)
        self.reserved: list[int] = []
        """Pages whose memory is counted as that of adapters."""
        self.running: list[Sequence] = []
        """By rank."""
        self._queue: list[tuple[tuple[int, int, int], Sequence]] = []  # a heap; who left it is skipped
        self._queued: set[Sequence] = set()
        self._caching = prefix_cache
        self._slots = list(range(max_running - 1, -1, -1))
        # Rows stay from step to step: a step with 16 contexts of 100,000 tokens must not write 25,000 numbers.
        self._table = np.zeros((max_running, width), np.int32)
        self._steps = 0
        self._pooling = False  # whether the step is one of hidden states, not of logits
        self._rows = 0  # how many rows of logits it has left
        self.preempted = 0
        self.reused = 0

    # -- in and out ------------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """How many sequences wait."""
        return len(self._queued)

    def add(self, sequence: Sequence) -> None:
        """Have it wait for its turn."""
        self._queued.add(sequence)
        heappush(self._queue, (sequence.rank, sequence))

    def add_fork(self, parent: Sequence, twin: Sequence) -> None:
        """Have `twin`, of the same tokens, run on its parent's pages, or wait where there is no room to run."""
        if len(self.running) == self.max_running:
            self.add(twin)
            return
        twin.computed, twin.goal, twin.depth, twin.node = parent.computed, parent.goal, parent.depth, parent.node
        self._run(twin)
        for page in parent.pages:
            self.pool.share(page)
            self._append(twin, page)
        if self.windows is not None:
            self.windows.fork(parent, twin)

    def remove(self, sequence: Sequence, *, keep: bool = True) -> None:
        """Take it out, waiting or running, its pages with it; where `keep` says so the prefix cache has them."""
        if not sequence.running:
            self._queued.discard(sequence)
            return
        if keep and self._caching:
            self.commit(sequence)
            self._keep_tail(sequence)
        self.running.remove(sequence)
        if self.windows is not None:
            self.windows.leave(sequence)
        self._slots.append(sequence.slot)
        sequence.slot = -1
        for page in reversed(sequence.pages):
            self.pool.release(page)
        sequence.pages = []
        sequence.computed = sequence.depth = 0
        sequence.node = None

    def reserve(self, count: int) -> list[int]:
        """Take pages out of the pool, at the cost of the lowest ranks; what is left must hold any one sequence."""
        while self.pool.available < count:
            self._preempt(self.running[-1])
        pages = self.pool.reserve(count)
        self.reserved += pages
        return pages

    def give_back(self, pages: list[int]) -> None:
        """Put reserved pages back into the pool."""
        for page in pages:
            self.reserved.remove(page)
            self.pool.release(page)

    def _run(self, sequence: Sequence) -> None:
        self._queued.discard(sequence)
        sequence.slot = self._slots.pop()
        insort(self.running, sequence, key=_rank)

    # -- the next step ---------------------------------------------------------------------------------------------

    def plan(self, guess: Guess | None = None) -> list[Part]:
        """What the next step computes, pages and all; empty where nothing can."""
        self._steps += 1
        if self.windows is not None:
            self._move_windows(self.windows)
        self._admit()
        pooling = sum(sequence.request.pooling is not None for sequence in self.running)
        self._pooling = pooling > 0 and (pooling == len(self.running) or not self._pooling)  # else in turns
        self._rows = self.step_tokens if self._pooling else self.step_rows
        parts = [] if self._pooling else self._decode(guess)
        self._prefill(parts)
        return parts

    def batch(self, parts: list[Part]) -> Batch:
        """The parts as the runner takes them. The logits after a sequence's last token are wanted, and its guesses'.

        Of a part those from `Sequence.first` on are, so that a part of an ordinary prompt has none.
        """
        tokens: list[int] = []
        positions: list[int] = []
        wanted: list[int] = []
        starts, slots, adapters = [0], [], []
        widest = 1
        for sequence, start, length, guesses in parts:
            end = start + length
            tokens += sequence.tokens[start:end]
            wanted += range(len(tokens) - end + max(start, sequence.first), len(tokens))
            if guesses:
                wanted += range(len(tokens), len(tokens) + len(guesses))
                tokens += guesses
                end += len(guesses)
            positions += range(start, end)
            starts.append(len(tokens))
            slots.append(sequence.slot)
            adapters.append(sequence.request.adapter)
            widest = max(widest, len(sequence.pages))
        table = PageTable(
            np.array(positions, np.int32), np.array(starts, np.int32), np.take(self._table[:, :widest], slots, axis=0)
        )
        if self.windows is not None:
            table = ChunkedTable(*table, np.take(self.windows.table[:, :widest], slots, axis=0))
        numbers = np.array(adapters, np.int32) if max(adapters) >= 0 else None
        return Batch(np.array(tokens, np.int32), table, np.array(wanted, np.int32), numbers)

    def _admit(self) -> None:
        while self._queue:
            sequence = self._queue[0][1]
            if sequence not in self._queued or (len(self.running) < self.max_running and self._start(sequence)):
                heappop(self._queue)
                continue
            lowest = self.running[-1]
            if lowest.request.priority >= sequence.request.priority:
                return
            self._preempt(lowest)

    def _start(self, sequence: Sequence) -> bool:
        """Give it the pages of all its tokens, cached ones where they are; False where there are too few."""
        tokens, pool = sequence.tokens, self.pool
        request = sequence.request
        if not self._has_room(sequence):
            return False
        # One more than the prompt's: room for the answer to begin.
        needed = self._pages_for(min(len(tokens) + 1, request.limit))
        whole, partial = self.cache.match(request.namespace, sequence.keys[: sequence.first])
        windows = self.windows
        if windows is not None:
            whole, partial = windows.usable(whole, partial)
        unused = sum(not pool.users[node.page] for node in whole)
        if needed - len(whole) > pool.available - unused:
            return False
        if windows is not None and not windows.fits(whole, min(len(tokens) + 1, request.limit)):
            return False
        self._run(sequence)
        sequence.goal = len(tokens)
        for node in whole:
            pool.share(node.page)
            self._append(sequence, node.page)
        sequence.depth, sequence.node = len(whole), whole[-1] if whole else None
        reused = len(whole) * self.page
        if windows is not None:
            windows.start(sequence, whole)
        if partial is not None:
            node, same = partial
            pool.share(node.page)  # or it might be evicted to make room for its copy
            if windows is not None:
                windows.pool.share(node.local)
            copied = pool.available > 0 and (windows is None or windows.pool.available > 0)
            if copied:
                self._append(sequence, pool.take())
                reused += same
                if windows is not None:
                    windows.copy(sequence, node.local)
            if windows is not None:
                windows.pool.release(node.local)
            pool.release(node.page)
            if copied:
                self._copy_page(node.page, sequence.pages[-1])
        while len(sequence.pages) < self._pages_for(len(tokens)):
            self._append(sequence, pool.take())
        sequence.computed = reused
        if windows is not None:
            windows.extend(sequence, min(windows.end(len(whole) * self.page), len(tokens)))
            windows.pass_by(sequence)
        self._count_reused(sequence, reused)
        return True

    def _move_windows(self, windows: Windows) -> None:
        """Give back what everybody has passed by, and get each prompt the local pages of the chunk that it is in."""
        for sequence in self.running:
            windows.pass_by(sequence)
        for sequence in list(self.running):
            if sequence.running and sequence.computed < sequence.goal:
                self._make_local_room(windows, sequence, min(windows.end(sequence.computed), sequence.goal))

    def _decode(self, guess: Guess | None) -> list[Part]:
        """A step of every answer under way, the highest rank first."""
        parts: list[Part] = []
        decoding = sum(sequence.computed >= sequence.goal for sequence in self.running)
        spare = max(self.step_tokens - decoding, 0)  # for forced tokens, and for guesses
        for sequence in list(self.running):
            if sequence.computed < sequence.goal or not sequence.running:
                continue
            start = sequence.computed
            count = min(len(sequence.tokens) - start, 1 + spare)
            if self.windows is not None:
                count = min(count, self.windows.end(start) - start)
            count = self._affordable(sequence, count)
            if not count or not self._make_room(sequence, start + count):
                continue
            spare -= count - 1
            guesses: list[int] = []
            if guess is not None and start + count == len(sequence.tokens):
                room = len(sequence.pages) * self.page + max(self.pool.available - decoding, 0) * self.page
                most = min(spare, room - len(sequence.tokens), sequence.request.limit - len(sequence.tokens) - 1)
                if self.windows is not None:
                    most = min(most, self.windows.room(sequence, decoding) - len(sequence.tokens))
                guesses = guess(sequence, most, decoding) if most > 0 else []
                spare -= len(guesses)
                while len(sequence.pages) * self.page < start + count + len(guesses):
                    self._append(sequence, self.pool.take())
                if self.windows is not None:
                    self.windows.extend(sequence, start + count + len(guesses))
            parts.append(Part(sequence, start, count, guesses))
        return parts

    def _prefill(self, parts: list[Part]) -> None:
        """Prompts one after the other, the highest priority first; each takes what it can of the step.

        The one with the least left is read first: of several that came at once the first can be answered before all
        are read. In each `TURN`-th step it is the one that waited longest, so that many short ones cannot hold up a
        long one for ever.
        """
        prompts = [
            sequence
            for sequence in self.running
            if sequence.computed < sequence.goal and (sequence.request.pooling is not None) == self._pooling
        ]
        if len(prompts) > 1:
            prompts.sort(key=_turn if self._steps % TURN == 0 else _left)
        left = max(self.step_tokens - sum(part.length + len(part.guesses) for part in parts), 1)
        if parts:
            left = min(left, BESIDE_ANSWERS)
        claimed: set[tuple[object, ...]] = set()
        for sequence in prompts:
            if not left:
                return
            if self._caching and not self._claim(sequence, claimed):
                continue  # another computes this page right now: the next step has it from the cache
            count = min(sequence.goal - sequence.computed, left)
            if self.windows is not None:
                count = min(count, self.windows.has(sequence))
            count = self._affordable(sequence, count)
            if not count:
                continue
            parts.append(Part(sequence, sequence.computed, count, []))
            sequence.turn = self._steps
            left -= count

    def _affordable(self, sequence: Sequence, count: int) -> int:
        """Of its next `count` tokens so many as the step has rows of logits left for, which are taken.

        The last row of a sequence is free: each has but one.
        """
        first = sequence.first
        if first == len(sequence.tokens) - 1:
            return count
        unseen = max(first - sequence.computed, 0)
        count = min(count, unseen + self._rows)
        self._rows -= max(count - unseen, 0)
        return count

    def _claim(self, sequence: Sequence, claimed: set[tuple[object, ...]]) -> bool:
        """Take what the cache has by now of the prompt, then claim the next page; False where another has it."""
        while (sequence.depth + 1) * self.page <= sequence.first:
            key = self._key(sequence)
            namespace = sequence.request.namespace
            node = self.cache.children(namespace, sequence.node).get(key)
            if node is None or (self.windows is not None and not self.windows.follows(sequence, node)):
                claim = (namespace, sequence.node, key)
                if claim in claimed:
                    return False
                claimed.add(claim)
                return True
            self._share_instead(sequence, node.page)
            if self.windows is not None:
                self.windows.share_instead(sequence, node)
            sequence.depth, sequence.node = sequence.depth + 1, node
            self._count_reused(sequence, sequence.depth * self.page - sequence.computed)
            sequence.computed = sequence.depth * self.page
        return True

    # -- after it --------------------------------------------------------------------------------------------------

    def commit(self, sequence: Sequence) -> None:
        """Put the pages that are full by now into the prefix cache; one that it has already is used in their place."""
        if not self._caching:
            return
        while (sequence.depth + 1) * self.page <= sequence.computed:
            key, namespace = self._key(sequence), sequence.request.namespace
            node = self.cache.children(namespace, sequence.node).get(key)
            if node is None:
                node = self.cache.insert(namespace, sequence.node, key, sequence.pages[sequence.depth])
            elif node.page != sequence.pages[sequence.depth]:
                self._share_instead(sequence, node.page)
            if self.windows is not None:
                self.windows.settle(sequence, node)
            sequence.depth, sequence.node = sequence.depth + 1, node

    def trim(self, sequence: Sequence) -> None:
        """Give back the pages that only wrong guesses needed."""
        while len(sequence.pages) > self._pages_for(len(sequence.tokens)):
            self.pool.release(sequence.pages.pop())
        if self.windows is not None:
            self.windows.trim(sequence, len(sequence.pages))

    def _keep_tail(self, sequence: Sequence) -> None:
        """Put a last page that is not full into the cache, as a leaf."""
        key = tuple(sequence.keys[sequence.depth * self.page : sequence.computed])
        if not key or self.pool.users[sequence.pages[sequence.depth]] > 1:
            return
        windows, namespace = self.windows, sequence.request.namespace
        if windows is not None and windows.pool.users[sequence.local[sequence.depth]] > 1:
            return
        node = self.cache.children(namespace, sequence.node).get(key)
        if node is None:
            node = self.cache.insert(namespace, sequence.node, key, sequence.pages[sequence.depth])
        if windows is not None and node.local == NO_PAGE:
            windows.pool.keep(node, sequence.local[sequence.depth])

    # -- what outlives the engine ----------------------------------------------------------------------------------

    def kept(self, namespace: Hashable, tokens: list[int]) -> list[tuple[int, int]]:
        """The pages that hold the beginning of a text, whole ones alone: behind a text's end may stand another's.

        Beside each is its local page, or NO_PAGE where nobody sees one who goes on after the last of them.
        """
        whole, _ = self.cache.match(namespace, tokens)
        if self.windows is None:
            return [(node.page, NO_PAGE) for node in whole]
        whole, _ = self.windows.usable(whole, None)
        first = self.windows.first(len(whole) * self.page)
        return [(node.page, node.local if i >= first else NO_PAGE) for i, node in enumerate(whole)]

    def restore(
        self,
        namespace: Hashable,
        tokens: list[int],
        contents: Iterable[tuple[Bytes, Bytes | None]],
        write: Callable[[int, Bytes], None],
        write_local: Callable[[int, Bytes], None],
    ) -> int:
        """Put what `kept` pages held back into the cache, as much as there is room for; returns its tokens.

        `contents` are what each page held, and what its local page did or None.
        """
        held: list[int] = []
        held_local: list[int] = []
        path: list[Node] = []
        node = None
        windows = self.windows
        try:
            for i, (data, local) in enumerate(contents):
                key = tuple(tokens[i * self.page : (i + 1) * self.page])
                known = self.cache.children(namespace, node).get(key)
                if known is None and not (self._caching and self.pool.available):
                    break
                if known is None:
                    held.append(self.pool.take())
                    write(held[-1], data)
                    known = self.cache.insert(namespace, node, key, held[-1])
                else:
                    self.pool.share(known.page)
                    held.append(known.page)
                node = known
                path.append(node)
                if windows is None or local is None:
                    continue
                if node.local != NO_PAGE:
                    windows.pool.share(node.local)
                    held_local.append(node.local)
                elif windows.pool.available:
                    held_local.append(windows.pool.take())
                    write_local(held_local[-1], local)
                    windows.pool.keep(node, held_local[-1])
                else:
                    break
            return self.page * len(path if windows is None else windows.usable(path, None)[0])
        finally:
            if windows is not None:
                for page in reversed(held_local):
                    windows.pool.release(page)
            for page in reversed(held):
                self.pool.release(page)

    # -- pages -----------------------------------------------------------------------------------------------------

    def _make_room(self, sequence: Sequence, end: int) -> bool:
        """Pages to write to for its tokens up to `end`, at others' cost; False where it had to give way itself."""
        first = sequence.computed // self.page
        while True:
            shared = first < len(sequence.pages) and self.pool.users[sequence.pages[first]] > 1
            if not shared and len(sequence.pages) * self.page >= end:
                return self.windows is None or self._make_local_room(self.windows, sequence, end)
            if not self.pool.available:
                lowest = self.running[-1]
                self._preempt(lowest)
                if lowest is sequence:
                    return False
            elif shared:
                page = sequence.pages[first]
                self._replace(sequence, first, self.pool.take())  # copied last: should that fail, the books are right
                self._copy_page(page, sequence.pages[first])
            else:
                self._append(sequence, self.pool.take())

    def _make_local_room(self, windows: Windows, sequence: Sequence, end: int) -> bool:
        """The same in the layers that see one chunk only."""
        while not windows.ready(sequence, end):
            if windows.pool.available:
                windows.provide(sequence)
                continue
            lowest = self.running[-1]
            self._preempt(lowest)
            if lowest is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.remove(sequence)
        sequence.restarted = True
        self.add(sequence)
        self.preempted += 1

    def _append(self, sequence: Sequence, page: int) -> None:
        self._table[sequence.slot, len(sequence.pages)] = page
        sequence.pages.append(page)

    def _share_instead(self, sequence: Sequence, page: int) -> None:
        """Use a page of the tree in place of its own first one that is not."""
        self.pool.share(page)
        self._replace(sequence, sequence.depth, page)

    def _replace(self, sequence: Sequence, index: int, page: int) -> None:
        self.pool.release(sequence.pages[index])
        sequence.pages[index] = page
        self._table[sequence.slot, index] = page

    def _key(self, sequence: Sequence) -> tuple[int, ...]:
        """What the first page that is not in the cache's tree says, as the tree knows it."""
        return tuple(sequence.keys[sequence.depth * self.page : (sequence.depth + 1) * self.page])

    def _count_reused(self, sequence: Sequence, tokens: int) -> None:
        self.reused += tokens
        if not sequence.restarted:  # else it may well have computed them itself
            sequence.reused += tokens

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page)

    def check(self) -> None:
        """Recompute the books; raises AssertionError where they are wrong."""
        self.pool.check([*(sequence.pages for sequence in self.running), self.reserved])
        self.cache.check()
        if self.windows is not None:
            self.windows.check(self.running, self.cache.nodes)
        slots = [sequence.slot for sequence in self.running]
        assert sorted(slots + self._slots) == list(range(self.max_running)), "a slot is lost"
        assert all(a.rank < b.rank for a, b in zip(self.running, self.running[1:], strict=False)), "out of rank"
        queued = {sequence for _, sequence in self._queue}
        assert self._queued <= queued, "a waiting sequence is not queued"
        for sequence in self._queued:
            assert (sequence.running, sequence.pages, sequence.computed) == (False, [], 0), "it waits and has pages"
            assert (sequence.local, sequence.passed) == ([], 0), "it waits and has local pages"
        rows = self._table[slots].tolist() if slots else []
        for sequence, row in zip(self.running, rows, strict=True):
            pages, depth = sequence.pages, sequence.depth
            assert row[: len(pages)] == pages, "the table names other pages"
            assert sequence.computed < len(sequence.tokens), "nothing is left to compute"
            known = keys(sequence.tokens, sequence.request.pictures)
            assert sequence.keys == known, "its tokens are known by other keys"
            assert len(pages) >= self._pages_for(sequence.computed), "computed tokens lie in no page"
            assert len(pages) <= self._pages_for(max(len(sequence.tokens), sequence.goal)), "pages too many"
            assert sequence.computed - self.page < depth * self.page <= sequence.computed or not self._caching, "depth"
            node = sequence.node
            for page in reversed(pages[:depth]):
                assert node is not None, "its path is too short"
                assert node.page == page, "its pages are not those of the tree"
                start = depth * self.page - self.page
                assert list(node.tokens) == known[start : start + self.page], "a page says something else"
                node, depth = node.parent, depth - 1
            assert node is None, "its path does not begin at a root"
            for page in pages[sequence.depth :]:
                assert page not in self.cache.nodes, "a page that is written to is in the tree"


def _rank(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.rank


def _left(sequence: Sequence) -> tuple[int, int, tuple[int, int, int]]:
    return -sequence.request.priority, sequence.goal - sequence.computed, sequence.rank


def _turn(sequence: Sequence) -> tuple[int, int]:
    return -sequence.request.priority, sequence.turn
