"""How much memory the cache may take: the arithmetic, and what is refused."""

from __future__ import annotations

import pytest

from puna.errors import UsageError
from puna.plan import (
    SHORT,
    UNKNOWN,
    ModelNeed,
    cache_beside,
    cache_budget,
    conversation_bytes,
    model_need,
    split,
    why_no_room,
)

PAGE = {"page": 64, "page_bytes": 2 << 20}  # the 1B's, fp16


def test_half_of_what_is_free_beside_the_weights() -> None:
    found = cache_budget(**PAGE, context=131072, sequences=64, available=20 << 30, to_come=4 << 30)
    assert (found.pages, found.tokens, found.nbytes) == (4096, 262144, 8 << 30)
    assert "half of the 17.2 GB" in found.why


def test_never_more_than_can_be_used() -> None:
    found = cache_budget(**PAGE, context=100, sequences=3, available=20 << 30)
    assert (found.pages, found.why) == (6, "all 3 sequences with a full context each")


def test_a_wish_is_honoured_or_refused() -> None:
    found = cache_budget(**PAGE, context=131072, sequences=64, available=20 << 30, asked=1 << 30)
    assert (found.nbytes, found.why) == (1 << 30, "as asked")
    with pytest.raises(UsageError, match=r"1\.1 GB of memory are available"):
        cache_budget(**PAGE, context=131072, sequences=64, available=2 << 30, to_come=1 << 30, asked=2 << 30)


def test_a_draft_models_cache_is_counted() -> None:
    draft = {"draft_page_bytes": 1 << 20, "draft_context": 640}
    little = cache_budget(**PAGE, context=131072, sequences=64, available=20 << 20, **draft)
    assert (little.pages, little.draft_pages, little.nbytes) == (3, 3, 9 << 20)  # 3 MiB each: ten would not fit
    large = cache_budget(**PAGE, context=131072, sequences=64, available=200 << 20, **draft)
    assert (large.pages, large.draft_pages, large.nbytes) == (45, 10, 100 << 20)
    whole = cache_budget(**PAGE, context=100, sequences=3, available=20 << 30, **draft)
    assert (whole.pages, whole.draft_pages, whole.nbytes) == (6, 6, 18 << 20)


SCOUT = {"page": 64, "page_bytes": 3 << 20, "local_page_bytes": 9 << 20, "window": 128}  # fp16, a chunk of 8,192


def test_layers_that_see_one_chunk_have_pages_of_their_own() -> None:
    found = cache_budget(**SCOUT, context=131072, sequences=16, available=20 << 30)
    local = (5 << 30) // (9 << 20)  # half of what is taken
    assert (found.local_pages, found.pages) == (local, ((10 << 30) - local * (9 << 20)) // (3 << 20))
    assert found.nbytes <= 10 << 30 < found.nbytes + (9 << 20)
    assert found.tokens == found.pages * 64
    little = cache_budget(**SCOUT, context=131072, sequences=16, available=4 << 30)  # a window, and the rest
    assert (little.local_pages, little.pages) == (128, (2048 - 128 * 9) // 3)
    less = cache_budget(**SCOUT, context=131072, sequences=16, available=1 << 30)  # not even one
    assert (less.local_pages, less.pages) == (42, 42)
    whole = cache_budget(**SCOUT, context=131072, sequences=2, available=100 << 30)
    assert (whole.local_pages, whole.pages, whole.nbytes) == (256, 4096, 256 * (9 << 20) + 4096 * (3 << 20))
    assert whole.why == "all 2 sequences with a full context each"
    short = cache_budget(**(SCOUT | {"window": 4}), context=256, sequences=3, available=100 << 30)
    assert (short.local_pages, short.pages) == (12, 12)
    draft = {"draft_page_bytes": 1 << 20, "draft_context": 640}
    beside = cache_budget(**SCOUT, context=131072, sequences=16, available=4 << 30, **draft)
    assert (beside.local_pages, beside.pages, beside.draft_pages) == (128, (2048 - 10 - 128 * 9) // 3, 10)
    with pytest.raises(UsageError, match=r"A page of the cache takes 12\.6 MB"):
        cache_budget(**SCOUT, context=131072, sequences=1, available=20 << 20)


def test_what_a_model_with_such_layers_needs() -> None:
    need = model_need(weights=1000, **SCOUT, context=131072, sequences=16)
    window = 128 * (9 << 20)
    assert (need.tokens, need.cache_least) == (SHORT, 128 * (3 << 20) + window)
    assert need.cache_most == 16 * (2048 * (3 << 20) + window)
    wish = model_need(weights=1000, **SCOUT, context=131072, sequences=16, cache=2 << 30)
    assert (wish.cache_least, wish.tokens) == (2 << 30, (2048 - 128 * 9) // 3 * 64)
    assert conversation_bytes(100, 64, 10, 30, 1) == 50
    assert conversation_bytes(64, 64, 10, 30, 4) == 40
    assert conversation_bytes(6400, 64, 10) == 1000


def test_where_nothing_is_known_and_where_nothing_fits() -> None:
    assert cache_budget(**PAGE, context=131072, sequences=64, available=None).nbytes == UNKNOWN
    with pytest.raises(UsageError, match=r"A page of the cache takes 2\.1 MB"):
        cache_budget(**PAGE, context=131072, sequences=1, available=1 << 20)


def test_what_a_model_needs() -> None:
    long = model_need(weights=1000, page=64, page_bytes=640, context=131072, sequences=16)
    assert (long.tokens, long.cache_least, long.cache_most) == (SHORT, SHORT * 10, 16 * 131072 * 10)
    assert long.least == 1000 + SHORT * 10
    short = model_need(weights=1000, page=64, page_bytes=640, context=100, sequences=2)
    assert (short.tokens, short.cache_least, short.cache_most) == (100, 1280, 2560)
    wish = model_need(weights=1000, page=64, page_bytes=640, context=1000, sequences=2, cache=6400)
    assert (wish.tokens, wish.cache_least, wish.cache_most) == (640, 6400, 6400)


def test_a_cache_beside_the_weights() -> None:
    need = ModelNeed(weights=100, cache_least=20, cache_most=200, tokens=8)
    assert [cache_beside(need, room) for room in (120, 140, 160, 300, 500, 10_000)] == [20, 20, 30, 100, 200, 200]


def test_why_a_model_does_not_fit() -> None:
    need = ModelNeed(weights=4_900_000_000, cache_least=1_100_000_000, cache_most=9_000_000_000, tokens=8192)
    assert why_no_room("m", need, 6_000_000_000, ()) == ""
    assert why_no_room("m", need, 5_999_999_999, ()) == (
        "m takes 4.9 GB of weights and 1.1 GB of cache for 8192 tokens, 6.0 GB together; models may take 6.0 GB."
    )
    assert why_no_room("m", need, 8_000_000_000, [("a", 3_000_000_000), ("b", 500_000_000)]) == (
        "m takes 4.9 GB of weights and 1.1 GB of cache for 8192 tokens, 6.0 GB together; models may take 8.0 GB, and "
        "a with 3.0 GB, b with 500.0 MB must stay: 4.5 GB are left."
    )


def test_pages_of_no_bytes_are_as_many_as_there_may_be() -> None:
    assert split(1000, 0, 10, window=4, sequences=2, most=50) == (50, 8)
