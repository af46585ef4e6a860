"""What this machine reaches at best: bytes read from memory, operations of each kind of product.

What it is: the probes of the C++ kernels, run some times in a row.
What it is not: a model's speed.
What is surprising: the first times are slow: a thread that slept may be woken on the core of the one that woke it, and
a system needs some milliseconds to move it to its own. The best of several counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from puna.kernels import ops

READ_BYTES = 1 << 28
"""Read by the probe of the memory: larger than any cache of a processor today."""

PIECES = 128
"""Of work in the probe of the arithmetic, shared by all threads: some ten milliseconds."""

PROBES = 6
"""Times that each probe is run in a row; the best counts."""


class Probes:
    """Probes that keep the memory that they read, for the next time."""

    def __init__(self) -> None:
        self._memory: Any = None

    def limits(self) -> dict[str, float]:
        """`read` in bytes a second, and operations a second by kind (`fp32`, `bf16`, `int8`).

        A multiplication and an addition are two operations. A kind that the instruction set has no instruction for is
        left out, and all are where the C++ is absent.
        """
        if ops.threads() is None:
            return {}
        from puna.kernels import cpu

        if self._memory is None:
            self._memory = np.ones(READ_BYTES // 4, np.float32)

        def read() -> int:
            cpu.probe_read(self._memory)
            return READ_BYTES

        found = {"read": _best_rate(read)}
        for kind in ("fp32", "bf16", "int8"):
            if rate := _best_rate(partial(cpu.probe_products, kind, PIECES)):
                found[kind] = 2 * rate
        return found


def _best_rate(probe: Callable[[], int]) -> float:
    """What a probe does in a second, the best of several times."""
    best = 0.0
    for _ in range(PROBES):
        began = time.perf_counter()
        done = probe()
        best = max(best, done / (time.perf_counter() - began))
    return best
