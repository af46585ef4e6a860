"""How much memory the cache may take: the arithmetic, and what is refused."""

from __future__ import annotations

import pytest

from puna.errors import UsageError
from puna.plan import SHORT, UNKNOWN, ModelNeed, cache_beside, cache_budget, model_need, why_no_room

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
