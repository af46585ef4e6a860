"""The arithmetic of a comparison: who takes turns with whom, medians, ratios of neighbours and their intervals.

What it is not: a clock, or a process; it is given functions that measure.
What is surprising: machines drift by tens of per cent within a minute, so what counts is the ratio of two measurements
that stand side by side in time; neither absolute does.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Measure = Callable[[], dict[str, float]]
"""One measurement of one engine: quantity → value."""

PAUSE = 0.5
"""Seconds before each measurement: the threads of another engine spin for a while after their work."""


@dataclass(frozen=True)
class Ratio:
    """Median of paired ratios, and its 95 % interval."""

    median: float
    low: float
    high: float
    pairs: int


def take_turns(
    measures: Mapping[str, Measure], rounds: int, before: Callable[[], None] = lambda: None
) -> dict[str, list[dict[str, float]]]:
    """`rounds` measurements of each engine, one after another; every second round goes in the other order.

    `before` is called at the start of each.
    """
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in measures}
    names = list(measures)
    for turn in range(rounds):
        before()
        for name in names if turn % 2 == 0 else reversed(names):
            time.sleep(PAUSE)
            taken[name].append(measures[name]())
    return taken


def paired_ratio(better: Sequence[float], base: Sequence[float]) -> Ratio:
    """Median of the paired ratios better / base, with the order-statistic interval of that median (sign test).

    The k-th smallest and the k-th largest of n enclose the median with at least 95 % when the chance that fewer than k
    of n fair coins show heads is at most 2.5 %. Below six pairs no k does, and the interval is all of them.
    """
    ratios = sorted(x / y for x, y in zip(better, base, strict=True))
    n = len(ratios)
    tail, k, term = 0.0, 0, 0.5**n
    while tail + term <= 0.025:
        tail += term
        term = term * (n - k) / (k + 1)
        k += 1
    low, high = (ratios[k - 1], ratios[n - k]) if k else (ratios[0], ratios[-1])
    return Ratio(statistics.median(ratios), low, high, n)


def near_best(medians: Mapping[str, float], within: float) -> list[str]:
    """Those whose value (smaller is better) is at most `within` times the smallest."""
    best = min(medians.values(), default=0.0)
    return [name for name, value in medians.items() if value <= within * best]
