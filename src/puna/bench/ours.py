"""Puna as one of the measured engines: the loader, runner and kernels that `puna run` uses, in a process of its own.

What it is: also the one that measures the machine's limits, because the probes are part of the same C++.
What is surprising: the engine runs one request at a time, so several streams are the rows of one cache, stepped
together by the runner's own forward.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from puna import __version__
from puna.bench.protocol import serve
from puna.engine.engine import PREFILL_CHUNK
from puna.engine.native_runner import host_runner
from puna.kernels import ops
from puna.models.tree import KVCache
from puna.weights.find import find_model
from puna.weights.load import load

READ_BYTES = 1 << 28
"""Read by the probe of the memory: larger than any cache of a processor today."""

PIECES = 128
"""Of work in the probe of the arithmetic, shared by all threads: some ten milliseconds."""

PROBES = 6
"""Times that each probe is run in a row; the best counts."""


class Puna:
    """See protocol.Engine."""

    def __init__(self, model: str, threads: int) -> None:
        self.version = __version__
        self._path = find_model(model)
        ops.select()
        if ops.threads() is not None:
            from puna.kernels import cpu

            cpu.set_threads(threads)
        self._streams: tuple[tuple[int, int], KVCache] | None = None
        self._memory: Any = None

    def load(self) -> None:
        """See protocol.Engine. The tokenizer is loaded too, as for `puna run`."""
        loaded = load(self._path)
        self._config = loaded.config
        self._runner = host_runner(loaded.config, loaded.weights)
        self.vocabulary = loaded.config.vocab_size

    def prefill(self, prompt: list[int]) -> int:
        """See protocol.Engine. In the chunks that the engine takes."""
        self._streams = None
        self._runner.reset(len(prompt) + 1)
        for at in range(0, len(prompt), PREFILL_CHUNK):
            logits = self._runner.run(prompt[at : at + PREFILL_CHUNK], at)
        return int(ops.argmax(logits))

    def decode(self, prompts: list[list[int]], steps: int) -> float:
        """See protocol.Engine."""
        streams, context = len(prompts), len(prompts[0])
        if self._streams is None or self._streams[0] != (streams, context):
            self._streams = None  # given back first
            self._streams = (streams, context), self._filled(prompts, context + steps)
        cache = self._streams[1]
        ids = np.array([prompt[-1:] for prompt in prompts], np.int32)
        began = time.perf_counter()
        for step in range(steps):
            logits = self._runner.step(ids, np.full((streams, 1), context + step, np.int32), cache)
            ids = ops.argmax(logits)[:, None]
        return (time.perf_counter() - began) / steps

    def limits(self) -> dict[str, float]:
        """What this machine reaches: bytes a second read from memory, operations a second by kind of number.

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

    def _filled(self, prompts: list[list[int]], capacity: int) -> KVCache:
        """A cache that holds the prompts."""
        ids = np.array(prompts, np.int32)
        streams, context = ids.shape
        cache = self._runner.empty_cache(streams, capacity)
        for at in range(0, context, PREFILL_CHUNK):
            part = np.ascontiguousarray(ids[:, at : at + PREFILL_CHUNK])
            positions = np.broadcast_to(np.arange(at, at + part.shape[1], dtype=np.int32), part.shape)
            self._runner.step(part, np.ascontiguousarray(positions), cache)
        return cache


def _best_rate(probe: Callable[[], int]) -> float:
    """What a probe does in a second, the best of several times in a row.

    The first times are slow: a thread that slept may be woken on the core of the one that woke it, and a system needs
    some milliseconds to move it to its own.
    """
    best = 0.0
    for _ in range(PROBES):
        began = time.perf_counter()
        done = probe()
        best = max(best, done / (time.perf_counter() - began))
    return best


if __name__ == "__main__":
    serve(Puna(**json.loads(sys.argv[1])))
