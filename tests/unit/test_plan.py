"""How much memory the cache may take: the arithmetic, and what is refused."""

from __future__ import annotations

import pytest

from puna.errors import UsageError
from puna.plan import UNKNOWN, cache_budget

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


def test_where_nothing_is_known_and_where_nothing_fits() -> None:
    assert cache_budget(**PAGE, context=131072, sequences=64, available=None).nbytes == UNKNOWN
    with pytest.raises(UsageError, match=r"A page of the cache takes 2\.1 MB"):
        cache_budget(**PAGE, context=131072, sequences=1, available=1 << 20)
