"""What fits this machine: so far, how much memory the cache of keys and values may take.

What it is: arithmetic over facts that the caller brings, and the sentence that explains its result.
What it is not: a look at the machine (`weights.limits`), or an allocation.
What is surprising: a cache's memory is taken from the system page by page as it is written, so a large budget costs
nothing until it is used; what is counted here is what it may become.
"""

from __future__ import annotations

from dataclasses import dataclass

from puna.errors import UsageError

SHARE = 0.5
"""Of the memory that is available once the weights are there; the rest is for activations, and for others."""

UNKNOWN = 4 << 30
"""Bytes, where the system does not say what is available."""


@dataclass(frozen=True)
class CacheBudget:
    """How many pages the cache has, what they hold and take, and why so many."""

    pages: int
    tokens: int
    nbytes: int
    why: str


def cache_budget(
    *,
    page: int,
    page_bytes: int,
    context: int,
    sequences: int,
    available: int | None,
    to_come: int = 0,
    asked: int | None = None,
) -> CacheBudget:
    """Pages for a model of `context` tokens that answers `sequences` at once.

    `page` is tokens a page, `page_bytes` its bytes; `available` bytes of memory, of which the weights still take
    `to_come`; `asked` bytes are the caller's own wish. Raises UsageError for a wish that the memory does not hold, and
    where not even a page fits.
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
    pages = room // page_bytes
    if pages >= most:
        pages, why = most, f"all {sequences} sequence{'s' if sequences > 1 else ''} with a full context each"
    if pages == 0:
        raise UsageError(
            f"A page of the cache takes {_size(page_bytes)}, and there are {_size(room)} for all of them.",
            remedy="Use --kv-type q8_0 or a smaller model, or free some memory.",
        )
    return CacheBudget(pages, pages * page, pages * page_bytes, why)


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
