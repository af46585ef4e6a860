"""The pages of the KV cache: which are free, and how many sequences use each.

What it is: counts. A page is used (by one sequence or several), cached (by the prefix cache alone), or free.
`LocalPool` is the same for layers that see one chunk only, whose pages stand beside the others in the prefix cache.
What it is not: the keys and values (the runner has them), or what a page says (the prefix cache knows).
What is surprising: a cached page is as good as a free one. Taking a page evicts the one whose use is longest past.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Protocol

from puna.engine.prefix import NO_PAGE, Node


class Keeper(Protocol):
    """What has pages that no sequence uses: the prefix cache."""

    nodes: dict[int, Node]
    unused: OrderedDict[int, Node]

    def use(self, page: int) -> None:
        """The page has users again."""

    def leave(self, page: int) -> bool:
        """The page has no users any more; False where it is not of the cache."""

    def evict(self) -> int:
        """Forget the page whose use is longest past, and return it."""


class PagePool:
    """`count` pages. Whoever takes or shares a page releases it again."""

    def __init__(self, count: int, cache: Keeper) -> None:
        self.count = count
        self.users = [0] * count
        """How many sequences use each page."""
        self._cache = cache
        self._free = list(range(count - 1, -1, -1))  # the last comes first: a small load stays in the low pages

    @property
    def available(self) -> int:
        """How many pages can be taken."""
        return len(self._free) + len(self._cache.unused)

    @property
    def free(self) -> int:
        """How many pages hold nothing."""
        return len(self._free)

    def take(self) -> int:
        """A page for one sequence to write to, what was in it forgotten. There must be one available."""
        page = self._free.pop() if self._free else self._cache.evict()
        self.users[page] = 1
        return page

    def share(self, page: int) -> None:
        """One more sequence uses the page; whoever writes to a shared page copies it first."""
        if not self.users[page]:
            self._cache.use(page)
        self.users[page] += 1

    def release(self, page: int) -> None:
        """One sequence less uses the page. Of a sequence's pages, the last is released first (see `PrefixCache`)."""
        self.users[page] -= 1
        if not self.users[page] and not self._cache.leave(page):
            self._free.append(page)

    def reserve(self, count: int) -> list[int]:
        """Pages that nobody writes to until they are released, so that their memory serves for something else.

        As many must be available. Those that were used least come first: a page takes memory from its first use on.
        """
        pages = self._free[:count]
        del self._free[:count]
        for page in pages:
            self.users[page] = 1
        while len(pages) < count:
            pages.append(self.take())
        return pages

    def check(self, held: list[list[int]]) -> None:
        """Recount, given the pages of each sequence; raises AssertionError where the books are wrong."""
        counted = [0] * self.count
        for pages in held:
            for page in pages:
                counted[page] += 1
        assert counted == self.users, "a page's count of users is wrong"
        assert len(set(self._free)) == len(self._free), "a page is free twice"
        cached = self._cache.nodes
        assert not any(self.users[page] or page in cached for page in self._free), "a free page is in use"
        used = sum(map(bool, counted))
        assert used + self.available == self.count, "a page is lost"
        assert all((page in self._cache.unused) == (not self.users[page]) for page in cached), "unused is wrong"


class LocalPool(PagePool):
    """Pages of the layers that see one chunk only, and its own keeper of those that nodes of the prefix cache have.

    Any of them can be evicted, whatever follows it: a node stays without it, and serves as long as nobody has to see
    this page.
    """

    def __init__(self, count: int) -> None:
        self.nodes: dict[int, Node] = {}
        """By number of page."""
        self.unused: OrderedDict[int, Node] = OrderedDict()
        """Pages that no sequence uses, in the order in which they go."""
        self.evicted = 0
        super().__init__(count, self)

    def keep(self, node: Node, page: int) -> None:
        """Have a node keep a page that is in use."""
        node.local = page
        self.nodes[page] = node

    def forget(self, node: Node) -> None:
        """The node is no more; nobody uses its page."""
        if node.local != NO_PAGE:
            del self.unused[node.local]
            del self.nodes[node.local]
            self._free.append(node.local)

    def release_first(self, page: int) -> None:
        """Release a page that its sequence has passed by: of those that nobody uses it is the first to go."""
        self.release(page)
        if page in self.unused:
            self.unused.move_to_end(page, last=False)

    def use(self, page: int) -> None:
        """See Keeper."""
        del self.unused[page]

    def leave(self, page: int) -> bool:
        """See Keeper."""
        node = self.nodes.get(page)
        if node is None:
            return False
        self.unused[page] = node
        return True

    def evict(self) -> int:
        """See Keeper."""
        page, node = self.unused.popitem(last=False)
        del self.nodes[page]
        node.local = NO_PAGE
        self.evicted += 1
        return page

    def check_nodes(self, found: Mapping[int, Node]) -> None:
        """Compare with the nodes of the tree, by their page; raises AssertionError where the books are wrong."""
        kept = {node.local: node for node in found.values() if node.local != NO_PAGE}
        assert kept == self.nodes, "the tree's local pages are not those of the pool"
