"""The pages of layers that see one chunk only: what of a sequence is kept, shared, taken and given back.

What it is: the second book of a scheduler whose model has such layers (Llama 4: 36 of 48, a chunk is 8,192 tokens). A
token in the chunk that begins at position c sees keys from c on, so a sequence needs the pages from that of c to that
of its next token, its *window*; what stands before has been passed by, and is given back.
What it is not: the book of the other layers' pages (the scheduler's), or a decider about who has to give way.
What is surprising: a step never computes tokens of two chunks of one sequence, so that one window is enough. And where
a chunk begins nothing before it is needed here: what the prefix cache knows of a text serves up to the last beginning
of a chunk at least, with no local page left at all.

A page need not divide a chunk: one across the border belongs to both windows.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from puna.engine.pages import LocalPool
from puna.engine.prefix import NO_PAGE, Node
from puna.engine.sequence import Sequence


class Windows:
    """Local pages of the sequences of one scheduler: `pages` of `page` tokens, chunks of `chunk` tokens.

    `table` has a row for each of `slots` slots and `width` entries a row. `copy_page(source, target)` copies at once.
    """

    def __init__(
        self, *, pages: int, page: int, chunk: int, slots: int, width: int, copy_page: Callable[[int, int], None]
    ) -> None:
        self.pool = LocalPool(pages)
        self.table = np.full((slots, width), NO_PAGE, np.int32)
        self._page, self._chunk, self._copy_page = page, chunk, copy_page

    # -- where a window lies ---------------------------------------------------------------------------------------

    def first(self, position: int) -> int:
        """The first page that a token at `position` sees."""
        return (position - position % self._chunk) // self._page

    def end(self, position: int) -> int:
        """Where the chunk of `position` ends."""
        return position - position % self._chunk + self._chunk

    def has(self, sequence: Sequence) -> int:
        """How many of its next tokens, all of one chunk, have pages here."""
        return min(self.end(sequence.computed), len(sequence.local) * self._page) - sequence.computed

    def room(self, sequence: Sequence, spare: int) -> int:
        """Up to which token it may have pages, if `spare` stay available: no further than to its chunk's end."""
        pages = len(sequence.local) + max(self.pool.available - spare, 0)
        return min(self.end(sequence.computed), pages * self._page)

    # -- the prefix cache ------------------------------------------------------------------------------------------

    def usable(self, whole: list[Node], partial: tuple[Node, int] | None) -> tuple[list[Node], tuple[Node, int] | None]:
        """Of what the cache has of a text (`PrefixCache.match`), what can be gone on from: all pages of its window are
        there."""
        depth = self._usable(whole, len(whole) * self._page)
        if depth < len(whole) or partial is None:
            return whole[:depth], None
        node, same = partial
        there = node.local != NO_PAGE and self._usable(whole, depth * self._page + same) == depth
        return whole, partial if there else None

    def _usable(self, whole: list[Node], position: int) -> int:
        """How many of the pages serve whoever goes on at `position`, in the page after them or at their end."""
        depth = len(whole)
        while True:
            missing = (i for i in range(self.first(position), depth) if whole[i].local == NO_PAGE)
            if (found := next(missing, None)) is None:
                return depth
            depth, position = found, found * self._page

    def follows(self, sequence: Sequence, node: Node) -> bool:
        """Whether the node's page can stand for the sequence's own first one that is not of the tree."""
        return node.local != NO_PAGE and sequence.depth < len(sequence.local)

    def settle(self, sequence: Sequence, node: Node) -> None:
        """The sequence's first page that is not of the tree is now that of `node`: the two share a local page."""
        page = sequence.local[sequence.depth]
        if node.local == NO_PAGE:
            self.pool.keep(node, page)
        elif node.local != page:
            self.share_instead(sequence, node)

    def share_instead(self, sequence: Sequence, node: Node) -> None:
        """Use the node's page in place of its own first one that is not of the tree."""
        self.pool.share(node.local)
        self._replace(sequence, sequence.depth, node.local)

    # -- in and out ------------------------------------------------------------------------------------------------

    def fits(self, whole: list[Node], end: int) -> bool:
        """Whether there are pages for who goes on after `whole`, to the end of the chunk or of its `end` tokens."""
        depth = len(whole)
        position = depth * self._page
        seen = whole[self.first(position) :]
        unused = sum(not self.pool.users[node.local] for node in seen)
        return self._pages_for(min(self.end(position), end)) - depth <= self.pool.available - unused

    def start(self, sequence: Sequence, whole: list[Node]) -> None:
        """Have it use the window's pages of `whole`, with which it begins."""
        sequence.passed = self.first(len(whole) * self._page)
        sequence.local = [NO_PAGE] * sequence.passed
        self.table[sequence.slot, : sequence.passed] = NO_PAGE
        for node in whole[sequence.passed :]:
            self.pool.share(node.local)
            self._append(sequence, node.local)

    def fork(self, parent: Sequence, twin: Sequence) -> None:
        """Have `twin` use what its parent does."""
        twin.passed, twin.local = parent.passed, list(parent.local)
        self.table[twin.slot, : len(twin.local)] = twin.local
        for page in twin.local[twin.passed :]:
            self.pool.share(page)

    def leave(self, sequence: Sequence) -> None:
        """It runs no more."""
        for page in reversed(sequence.local[sequence.passed :]):
            self.pool.release(page)
        sequence.local, sequence.passed = [], 0

    # -- pages on the way ------------------------------------------------------------------------------------------

    def extend(self, sequence: Sequence, end: int) -> None:
        """Pages for its tokens up to `end`; there must be so many."""
        while len(sequence.local) * self._page < end:
            self._append(sequence, self.pool.take())

    def ready(self, sequence: Sequence, end: int) -> bool:
        """Whether it has pages of its own for its next tokens up to `end`."""
        return len(sequence.local) * self._page >= end and not self._shared(sequence)

    def provide(self, sequence: Sequence) -> None:
        """One page more for who is not ready; one must be available."""
        if not self._shared(sequence):
            self._append(sequence, self.pool.take())
            return
        first = sequence.computed // self._page
        page = sequence.local[first]
        self._replace(sequence, first, self.pool.take())
        self._copy_page(page, sequence.local[first])

    def copy(self, sequence: Sequence, page: int) -> None:
        """Begin its next page with a copy of another; one must be available beside that."""
        self._append(sequence, self.pool.take())
        self._copy_page(page, sequence.local[-1])

    def trim(self, sequence: Sequence, pages: int) -> None:
        """Give back what is behind its first `pages`."""
        while len(sequence.local) > pages:
            self.pool.release(sequence.local.pop())

    def pass_by(self, sequence: Sequence) -> None:
        """Give back the pages that nothing of what it computes from now on sees."""
        first = self.first(sequence.computed)
        if first == sequence.passed:
            return
        for i in range(sequence.passed, first):
            self.pool.release_first(sequence.local[i])
            sequence.local[i] = NO_PAGE
        self.table[sequence.slot, sequence.passed : first] = NO_PAGE
        sequence.passed = first

    def _shared(self, sequence: Sequence) -> bool:
        """Whether the page that it writes to next is another's too."""
        first = sequence.computed // self._page
        return first < len(sequence.local) and self.pool.users[sequence.local[first]] > 1

    def _append(self, sequence: Sequence, page: int) -> None:
        self.table[sequence.slot, len(sequence.local)] = page
        sequence.local.append(page)

    def _replace(self, sequence: Sequence, index: int, page: int) -> None:
        self.pool.release(sequence.local[index])
        sequence.local[index] = page
        self.table[sequence.slot, index] = page

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self._page)

    def check(self, running: list[Sequence], nodes: dict[int, Node]) -> None:
        """Recompute the book, given the nodes of the prefix cache; raises AssertionError where it is wrong."""
        self.pool.check([sequence.local[sequence.passed :] for sequence in running])
        self.pool.check_nodes(nodes)
        for sequence in running:
            local, passed = sequence.local, sequence.passed
            assert self.table[sequence.slot, : len(local)].tolist() == local, "the table names other local pages"
            assert local[:passed] == [NO_PAGE] * passed, "a page that was passed by is held"
            assert NO_PAGE not in local[passed:], "a page of a window is not there"
            assert passed <= self.first(sequence.computed), "a page was given back that is seen"
            assert passed >= self.first(max(sequence.computed - self._chunk, 0)), "pages of two chunks before are held"
            assert len(local) >= self._pages_for(sequence.computed), "computed tokens lie in no local page"
            assert len(local) <= len(sequence.pages), "more local pages than others"
            most = self._pages_for(self._chunk) + (self._chunk % self._page > 0)
            assert len(local) - passed <= most, "a sequence holds more than a window"
            node = sequence.node
            for depth in range(sequence.depth - 1, passed - 1, -1):
                assert node is not None
                assert node.local == local[depth], "its local pages are not those of the tree"
                node = node.parent
            for page in local[max(sequence.depth, passed) :]:
                assert page not in self.pool.nodes, "a local page that is written to is in the tree"
