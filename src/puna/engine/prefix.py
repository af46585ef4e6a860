"""The prefix cache: pages of tokens computed before, found by what they say and all that stood before them.

What it is: a tree for each namespace. An edge is a page's tokens, so a path from the root is a text, and a sequence
that begins with it uses the path's pages instead of computing them. A path may end in a page that is not full.
What it is not: a reader of the pages' contents, or a counter of their users (`PagePool` is).
What is surprising: eviction needs neither a clock nor a search. Who uses a page uses all before it, and releases the
last first; so in the order of release every page stands before the ones it builds on, and the first is always a leaf.

A namespace is a caller's (and, with adapters, an adapter's): whoever waits less for a text that another namespace
computed would learn that it was.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from itertools import islice

LOOKS = 32
"""How many of the children are compared for a beginning in common: the newest."""


NO_PAGE = -1
"""In place of a local page that is not there."""


class Node:
    """A page in the tree: `tokens` are its own, the parent's stand before them."""

    __slots__ = ("children", "local", "page", "parent", "root", "tokens")

    def __init__(self, root: Hashable, parent: Node | None, tokens: tuple[int, ...], page: int) -> None:
        self.root, self.parent, self.tokens, self.page = root, parent, tokens, page
        self.local = NO_PAGE
        """The page of the layers that see one chunk only, as long as there is one (see `LocalPool`)."""
        self.children: dict[tuple[int, ...], Node] = {}


class PrefixCache:
    """Trees over pages of `page` tokens, one a namespace. `evicted_node` is told of each that is forgotten."""

    def __init__(self, page: int, evicted_node: Callable[[Node], None] | None = None) -> None:
        self._page = page
        self._evicted_node = evicted_node
        self._roots: dict[Hashable, dict[tuple[int, ...], Node]] = {}
        self.nodes: dict[int, Node] = {}
        """By number of page."""
        self.unused: OrderedDict[int, Node] = OrderedDict()
        """Pages that no sequence uses, longest unused first."""
        self.evicted = 0

    def children(self, namespace: Hashable, parent: Node | None) -> dict[tuple[int, ...], Node]:
        """What follows `parent`, or begins where it is None."""
        return self._roots.get(namespace, {}) if parent is None else parent.children

    def match(self, namespace: Hashable, tokens: list[int]) -> tuple[list[Node], tuple[Node, int] | None]:
        """Whole pages with which `tokens` begin, and the page that begins like what follows, with how many tokens."""
        path: list[Node] = []
        parent: Node | None = None
        for start in range(0, len(tokens), self._page):
            children = self.children(namespace, parent)
            parent = children.get(tuple(tokens[start : start + self._page])) if children else None
            if parent is None or len(parent.tokens) < self._page:
                return path, _longest(children, tokens[start : start + self._page])
            path.append(parent)
        return path, None

    def insert(self, namespace: Hashable, parent: Node | None, tokens: tuple[int, ...], page: int) -> Node:
        """Keep a page that is in use, its sequence at `parent`; there must be no child with these tokens."""
        node = Node(namespace, parent, tokens, page)
        if parent is None:
            self._roots.setdefault(namespace, {})[tokens] = node
        else:
            parent.children[tokens] = node
        self.nodes[page] = node
        return node

    def use(self, page: int) -> None:
        """The page has users again."""
        del self.unused[page]

    def leave(self, page: int) -> bool:
        """The page has no users any more; False where it is not of the cache."""
        node = self.nodes.get(page)
        if node is None:
            return False
        self.unused[page] = node
        return True

    def evict(self) -> int:
        """Forget the page whose use is longest past, and return it. There must be one that is unused."""
        page, node = self.unused.popitem(last=False)
        assert not node.children, "a page was released before one that builds on it"
        siblings = self.children(node.root, node.parent)
        del siblings[node.tokens]
        if node.parent is None and not siblings:
            del self._roots[node.root]
        del self.nodes[page]
        if self._evicted_node is not None:
            self._evicted_node(node)
        self.evicted += 1
        return page

    def check(self) -> None:
        """Walk the trees; raises AssertionError where they are wrong."""
        found: dict[int, Node] = {}
        for root, siblings in self._roots.items():
            assert siblings, "an empty namespace was kept"
            ahead: list[tuple[Node | None, tuple[int, ...], Node]] = [
                (None, key, node) for key, node in siblings.items()
            ]
            while ahead:
                parent, key, node = ahead.pop()
                assert (node.parent, node.root, node.tokens) == (parent, root, key), "a node is misplaced"
                assert 0 < len(key) <= self._page, "a page holds too many tokens"
                assert len(key) == self._page or not node.children, "something follows a page that is not full"
                if parent is not None and parent.page in self.unused:
                    assert node.page in self.unused, "a page is used without the one before it"
                assert found.setdefault(node.page, node) is node, "a page is in the tree twice"
                ahead += [(node, key, child) for key, child in node.children.items()]
        assert found == self.nodes, "the tree and its pages differ"


def _longest(children: dict[tuple[int, ...], Node], tokens: list[int]) -> tuple[Node, int] | None:
    """The child with the most leading tokens in common, and how many; None where there is none."""
    best: tuple[Node, int] | None = None
    for node in islice(reversed(children.values()), LOOKS):
        same = common(node.tokens, tokens)
        if same > (best[1] if best else 0):
            best = node, same
    return best


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading tokens are the same."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
