"""Ratios, their intervals and the order of turns, by value."""

from __future__ import annotations

import itertools
import math

import pytest

from puna.bench import compare


def test_the_ratio_is_the_median_of_pairs_not_the_ratio_of_medians() -> None:
    found = compare.paired_ratio([2.0, 30.0, 8.0], [1.0, 10.0, 2.0])
    assert (found.median, found.low, found.high, found.pairs) == (3.0, 2.0, 4.0, 3)


@pytest.mark.parametrize(
    ("pairs", "k"),
    # The usual table of the sign test at 95 %: of n pairs the k-th smallest and largest.
    [(6, 1), (8, 1), (9, 2), (11, 2), (12, 3), (15, 4), (20, 6), (25, 8)],
)
def test_the_interval_is_that_of_the_sign_test(pairs: int, k: int) -> None:
    ratios = [float(i) for i in range(1, pairs + 1)]
    found = compare.paired_ratio(ratios, [1.0] * pairs)
    assert (found.low, found.high) == (float(k), float(pairs + 1 - k))
    missed = 2 * sum(math.comb(pairs, i) for i in range(k)) / 2**pairs
    assert missed <= 0.05 < 2 * sum(math.comb(pairs, i) for i in range(k + 1)) / 2**pairs


def test_below_six_pairs_the_interval_is_everything() -> None:
    found = compare.paired_ratio([1.0, 5.0, 2.0, 4.0, 3.0], [1.0] * 5)
    assert (found.low, found.median, found.high) == (1.0, 3.0, 5.0)


def test_pairs_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        compare.paired_ratio([1.0], [1.0, 2.0])


def test_turns_go_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "PAUSE", 0.0)
    order: list[str] = []
    count = itertools.count()

    def engine(name: str) -> compare.Measure:
        def measure() -> dict[str, float]:
            order.append(name)
            return {"seconds": float(next(count))}

        return measure

    taken = compare.take_turns({name: engine(name) for name in "abc"}, 3, lambda: order.append("-"))
    assert "".join(order) == "-abc-cba-abc"
    assert taken["c"] == [{"seconds": 2.0}, {"seconds": 3.0}, {"seconds": 8.0}]


def test_who_comes_near() -> None:
    assert compare.near_best({"a": 1.0, "b": 1.2, "c": 1.21}, 1.2) == ["a", "b"]
    assert compare.near_best({}, 1.2) == []
