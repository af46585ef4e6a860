"""What fits this machine: how much memory the cache of keys and values may take, and what fits beside other models.

What it is: arithmetic over facts that the caller brings, and the sentences that explain its results.
What it is not: a look at the machine (`weights.limits`), or an allocation.
What is surprising: a cache's memory is taken from the system page by page as it is written, so a large budget costs
nothing until it is used; what is counted here is what it may become.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from puna.errors import UsageError

SHARE = 0.5
"""Of the memory that is available once the weights are there; the rest is for activations, and for others."""

UNKNOWN = 4 << 30
"""Bytes, where the system does not say what is available."""


@dataclass(frozen=True)
class CacheBudget:
    """How many pages the cache has, what they hold and take, and why so many.

    `draft_pages` are those of a draft model's own cache, `local_pages` those of layers that see one chunk only;
    `nbytes` counts them too.
    """

    pages: int
    tokens: int
    nbytes: int
    why: str
    draft_pages: int = 0
    local_pages: int = 0


def cache_budget(
    *,
    page: int,
    page_bytes: int,
    context: int,
    sequences: int,
    available: int | None,
    to_come: int = 0,
    asked: int | None = None,
    draft_page_bytes: int = 0,
    draft_context: int = 0,
    local_page_bytes: int = 0,
    window: int = 0,
) -> CacheBudget:
    """Pages for a model of `context` tokens that answers `sequences` at once.

    `page` is tokens a page, `page_bytes` its bytes; `available` bytes of memory, of which the weights still take
    `to_come`; `asked` bytes are the caller's own wish. A draft model of `draft_context` tokens has a page of its own,
    of `draft_page_bytes`, beside each of these, up to one full context of its. Where layers see one chunk only, these
    have pages of their own, of `local_page_bytes`, of which a sequence needs `window` at most. Raises UsageError for a
    wish that the memory does not hold, and where not even a page fits.
    """
    most = sequences * -(-context // page)
    free = None if available is None else max(0, available - to_come)
    if asked is not None:
        if free is not None and asked > free:
            raise UsageError(
                f"--kv-memory {_size(asked)}: {_size(free)} of memory are available beside the weights.",
                remedy="Ask for less, or leave it out: half of what is available is taken.",
            )
        room, why = asked, "as asked"
    elif free is None:
        room, why = UNKNOWN, "this system does not say what is available"
    else:
        room, why = int(SHARE * free), f"half of the {_size(free)} available beside the weights"
    drafts = -(-draft_context // page) if draft_page_bytes else 0
    each = page_bytes + local_page_bytes + draft_page_bytes
    pages = room // each
    local = min(pages, sequences * window)
    if pages > drafts:
        room_left = room - drafts * draft_page_bytes
        pages, local = split(room_left, page_bytes, local_page_bytes, window=window, sequences=sequences, most=most)
    if pages >= most:
        pages, why = most, f"all {sequences} sequence{'s' if sequences > 1 else ''} with a full context each"
    if pages == 0:
        raise UsageError(
            f"A page of the cache takes {_size(each)}, and there are {_size(room)} for all.",
            remedy="Use --kv-type q8_0 or a smaller model, or free some memory.",
        )
    drafts = min(pages, drafts)
    nbytes = pages * page_bytes + local * local_page_bytes + drafts * draft_page_bytes
    return CacheBudget(pages, pages * page, nbytes, why, drafts, local)


def split(
    room: int, page_bytes: int, local_page_bytes: int, *, window: int, sequences: int, most: int
) -> tuple[int, int]:
    """How many pages `room` bytes hold, `most` at the most, and how many of layers that see one chunk only.

    A sequence needs a `window` of the second, however long it is, and as many of both until it is that long. So those
    get half of the room, at least a window and at most one for each sequence: any of them, when its sequence is over,
    may have what the next one begins with. What the others cannot use is theirs too.
    """
    if not window:
        return min(most, room // page_bytes), 0
    local = min(sequences * window, max(window, room // 2 // local_page_bytes))
    # Where every layer sees one chunk only, a page of the others is none.
    pages = (room - local * local_page_bytes) // page_bytes if page_bytes else most
    if pages < local:
        pages = room // (page_bytes + local_page_bytes)
    pages = min(pages, most)
    return pages, min(sequences * window, (room - pages * page_bytes) // local_page_bytes)


SHORT = 8192
"""Tokens of a long conversation: a model that has memory for less is of little use, whatever its context."""

BUDGET_SHARE = 0.8
"""Of the memory that is available when a server starts, which its models may take; the rest is for the server, for what
steps compute with, and for others."""


@dataclass(frozen=True)
class ModelNeed:
    """Bytes that a model takes: of `weights` and what comes with them, and of cache. `cache_least` holds one
    conversation of `tokens`, `cache_most` all that it could ever use."""

    weights: int
    cache_least: int
    cache_most: int
    tokens: int

    @property
    def least(self) -> int:
        """Bytes without which it is not worth loading."""
        return self.weights + self.cache_least


def model_need(
    *,
    weights: int,
    page: int,
    page_bytes: int,
    context: int,
    sequences: int,
    cache: int | None = None,
    local_page_bytes: int = 0,
    window: int = 0,
) -> ModelNeed:
    """What a model of `context` tokens takes whose `weights` take so many bytes; arguments as for `cache_budget`.

    `cache` bytes are the caller's own wish, to be had whole.
    """
    tokens = min(SHORT, context)
    pages = sequences * -(-context // page)
    most = pages * page_bytes + sequences * window * local_page_bytes
    if cache is not None:
        cache = min(cache, most)
        held, _ = split(cache, page_bytes, local_page_bytes, window=window, sequences=sequences, most=pages)
        return ModelNeed(weights, cache, cache, min(context, held * page))
    return ModelNeed(weights, conversation_bytes(tokens, page, page_bytes, local_page_bytes, window), most, tokens)


def conversation_bytes(tokens: int, page: int, page_bytes: int, local_page_bytes: int = 0, window: int = 0) -> int:
    """Bytes of cache of one conversation of so many tokens; arguments as for `cache_budget`."""
    pages = -(-tokens // page)
    return pages * page_bytes + min(pages, window) * local_page_bytes


def cache_beside(need: ModelNeed, room: int) -> int:
    """Bytes of cache for a model that has `room` bytes for everything: half of what the weights leave, at least what
    it cannot do without and at most what it can use."""
    return min(need.cache_most, max(need.cache_least, int(SHARE * (room - need.weights))))


def why_no_room(name: str, need: ModelNeed, budget: int, staying: Sequence[tuple[str, int]]) -> str:
    """The arithmetic by which a model does not fit `budget` bytes beside those that must stay (name, bytes); empty
    where it does."""
    left = budget - sum(nbytes for _, nbytes in staying)
    if need.least <= left:
        return ""
    others = ", ".join(f"{other} with {_size(nbytes)}" for other, nbytes in staying)
    return (
        f"{name} takes {_size(need.weights)} of weights and {_size(need.cache_least)} of cache for {need.tokens} "
        f"tokens, {_size(need.least)} together; models may take {_size(budget)}"
        + (f", and {others} must stay: {_size(max(0, left))} are left." if staying else ".")
    )


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
