"""Puna as one of the measured engines: the loader, runner and kernels that `puna run` uses, in a process of its own.

What it is: also the one that measures the machine's limits, because the probes are part of the same C++.
What is surprising: `decode` steps its streams by the runner directly, so nothing there is the engine's but the size of
its chunks; only `submit` and `advance` are the engine.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict

import numpy as np

from puna import __version__
from puna.bench.probes import Probes
from puna.bench.protocol import serve
from puna.engine.engine import PREFILL_CHUNK, Engine
from puna.engine.native_runner import host_runner
from puna.engine.runner import Batch, Ids, Logits
from puna.kernels import ops
from puna.kernels.layouts import page_table
from puna.types import Sampling
from puna.weights.find import find_model
from puna.weights.load import load


class Puna:
    """See protocol.Engine and, for an engine whose cache holds `room` tokens, load.Serving."""

    def __init__(self, model: str, threads: int, room: int = 0, step_tokens: int | None = None) -> None:
        self.version = __version__
        self._path = find_model(model)
        ops.select()
        if ops.threads() is not None:
            from puna.kernels import cpu

            cpu.set_threads(threads)
        self._pages: Ids = np.zeros((0, 0), np.int32)
        self._filled: tuple[int, int] | None = None
        self._probes = Probes()
        self._room, self._step_tokens = room, step_tokens or PREFILL_CHUNK

    def load(self) -> None:
        """See protocol.Engine. The tokenizer is loaded too, as for `puna run`."""
        loaded = load(self._path)
        self._config = loaded.config
        self._runner = host_runner(loaded.config, loaded.weights)
        self.vocabulary = loaded.config.vocab_size
        if self._room:
            pages = -(-self._room // self._runner.page)
            self._engine = Engine(self._runner, pages=pages, step_tokens=self._step_tokens)

    def prefill(self, prompt: list[int]) -> int:
        """See protocol.Engine. In the chunks that the engine takes."""
        self._filled = None
        return int(ops.argmax(self._fill([prompt], len(prompt))[0]))

    def decode(self, prompts: list[list[int]], steps: int) -> float:
        """See protocol.Engine."""
        streams, context = len(prompts), len(prompts[0])
        if self._filled != (streams, context):
            self._fill(prompts, context + steps)
            self._filled = streams, context
        ids = np.array([prompt[-1] for prompt in prompts], np.int32)
        table = page_table([context] * streams, [1] * streams, self._pages)
        wanted = np.arange(streams, dtype=np.int32)
        began = time.perf_counter()
        for step in range(steps):
            at = table._replace(positions=table.positions + np.int32(step))
            ids = ops.argmax(self._runner.run(Batch(ids, at, wanted)))
        return (time.perf_counter() - began) / steps

    def submit(self, prompt: list[int], new: int) -> int:
        """See load.Serving."""
        return self._engine.submit(prompt, Sampling(temperature=0.0, max_tokens=new, ignore_eos=True))

    def advance(self) -> dict[int, int]:
        """See load.Serving. Raises what ended a request before its time."""
        came = {}
        for progress in self._engine.step():
            if progress.error is not None:
                raise progress.error
            if progress.tokens:
                came[progress.request] = len(progress.tokens)
        return came

    def counts(self) -> dict[str, float]:
        """The engine's statistics."""
        return asdict(self._engine.statistics())

    def limits(self) -> dict[str, float]:
        """See `probes.Probes.limits`."""
        return self._probes.limits()

    def _fill(self, prompts: list[list[int]], capacity: int) -> Logits:
        """Put prompts of one length into a new cache with room for `capacity` tokens each; logits after each [B, V]."""
        streams, each = len(prompts), -(-capacity // self._runner.page)
        self._runner.allocate(streams * each)
        self._pages = np.arange(streams * each, dtype=np.int32).reshape(streams, each)
        for at in range(0, len(prompts[0]), PREFILL_CHUNK):
            parts = np.array([prompt[at : at + PREFILL_CHUNK] for prompt in prompts], np.int32)
            table = page_table([at] * streams, [parts.shape[1]] * streams, self._pages)
            whole = at + PREFILL_CHUNK >= len(prompts[0])
            wanted = table.starts[1:] - np.int32(1) if whole else np.zeros(0, np.int32)
            logits = self._runner.run(Batch(parts.reshape(-1), table, wanted))
        return logits


if __name__ == "__main__":
    serve(Puna(**json.loads(sys.argv[1])))
