"""Pictures in a prompt: where they stand, what the prefix cache knows them by, and what was seen in them.

What it is: `Shown`, a picture of a request; `keys`, under which its tokens lie in the prefix cache; `Sights`, what the
model saw, kept by the picture's digest within a budget of bytes.
What it is not: a reader of files (`puna.text.pictures`), or the seeing itself, which is the model's.
What is surprising: the tokens of a picture are the same for all pictures of its size, so they do not say what stands
there. A key made of the digest does, and as it is below zero it is no token's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

from puna.errors import UsageError
from puna.models.tree import Placed

SIGHT_BYTES = 1 << 30
"""Bytes of what was seen that are kept at most: two pictures of four tiles of Llama 3.2 Vision 11B, whose keys and
values of a picture take 420 MB, or twenty of 17 tiles of Llama 4 Scout."""


NEVER = 1 << 62
"""`Shown.until` of one that all that follows attends to."""


class Run(NamedTuple):
    """`length` features of a picture, from its `first` on, stand in the prompt from position `at` on."""

    at: int
    first: int
    length: int


class Shown(NamedTuple):
    """A picture in a prompt: it takes `length` tokens from position `at` on. `digest` tells it from others, `pixels` is
    what the model sees (`text.pictures`), and `runs` says where its features take the place of tokens' embeddings;
    without any, the tokens from its own up to `until` attend to the picture."""

    at: int
    length: int
    digest: bytes
    pixels: Any
    runs: tuple[Run, ...] = ()
    until: int = NEVER

    def needed(self, start: int, end: int) -> bool:
        """Whether computing the tokens from `start` to `end` takes what is seen in it."""
        if not self.runs:
            return self.at < end and start < self.until
        return any(run.at < end and start < run.at + run.length for run in self.runs)

    def placed(self, sequence: int, sight: Any, start: int, end: int) -> Iterator[Placed]:
        """What was seen, as the model takes it for the tokens from `start` to `end`, which need it, of a step's row."""
        if not self.runs:
            yield Placed(sequence, self.at, sight)
        for run in self.runs:
            if run.at < end and start < run.at + run.length:
                yield Placed(sequence, run.at, sight[run.first : run.first + run.length])


def check_pictures(pictures: Sequence[Shown], tokens: int) -> None:
    """Raises UsageError for pictures that do not stand in a prompt of so many tokens one after the other."""
    end = 0
    for each in pictures:
        inside = all(each.at <= run.at and run.at + run.length <= each.at + each.length for run in each.runs)
        if each.at < end or each.length < 1 or not inside:
            raise UsageError(
                f"A picture of {each.length} tokens stands at {each.at}, where another ends at {end}.",
                remedy="Give pictures in order, each with tokens of its own.",
            )
        end = each.at + each.length
    if end > tokens:
        raise UsageError(
            f"A picture's tokens end at {end}, and the prompt has {tokens}.", remedy="Give the prompt its tokens."
        )


def attended(pictures: Sequence[Shown]) -> tuple[Shown, ...]:
    """Pictures without features of their own, each with how far it is attended to: until after it and those right
    behind it another follows text (Llama 3.2 Vision; see `models.llama3_vision`)."""
    found: list[Shown] = []
    until = NEVER
    for i in range(len(pictures) - 1, -1, -1):
        each = pictures[i]
        found.append(each._replace(until=until))
        if i and pictures[i - 1].at + pictures[i - 1].length < each.at:
            until = each.at
    return tuple(reversed(found))


def keys(tokens: Sequence[int], pictures: Sequence[Shown]) -> list[int]:
    """What the prefix cache knows tokens by: themselves, and of a picture its digest and how far into it each is."""
    known = list(tokens)
    for each in pictures:
        digest = int.from_bytes(each.digest, "big") << 32
        known[each.at : each.at + each.length] = [-1 - (digest | offset) for offset in range(each.length)]
    return known


def words(tokens: Sequence[int], pictures: Sequence[Shown]) -> Sequence[int]:
    """The tokens that are no picture's: those of a picture may have no logit, so nothing can be said of them."""
    if not pictures:
        return tokens
    kept: list[int] = []
    end = 0
    for each in pictures:
        kept += tokens[end : each.at]
        end = each.at + each.length
    return [*kept, *tokens[end:]]


class Sights:
    """What was seen, by (namespace, digest): who waits less for a picture would learn that another showed it."""

    def __init__(self, budget: int = SIGHT_BYTES) -> None:
        self.budget = budget
        self.nbytes = 0
        self.seen = 0
        """How many pictures were looked at."""
        self._known: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._known

    def __getitem__(self, key: Hashable) -> Any:
        self._known.move_to_end(key)
        return self._known[key][0]

    def add(self, key: Hashable, sight: Any, nbytes: int) -> None:
        """Keep what was seen."""
        self._known[key] = sight, nbytes
        self.nbytes += nbytes
        self.seen += 1

    def trim(self, needed: Callable[[], Collection[Hashable]]) -> None:
        """Keep to the budget: what is longest unused goes, unless it is needed."""
        if self.nbytes <= self.budget:
            return
        staying = needed()
        for key in list(self._known):
            if self.nbytes > self.budget and key not in staying:
                self.nbytes -= self._known.pop(key)[1]

    def check(self) -> None:
        """Recount; raises AssertionError where the books are wrong."""
        assert self.nbytes == sum(nbytes for _, nbytes in self._known.values()), "bytes of what was seen are wrong"
        assert self.nbytes <= self.budget or len(self._known) == 1, "more was kept than the budget has room for"
