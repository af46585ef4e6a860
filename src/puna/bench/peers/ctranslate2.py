"""CTranslate2's Generator, on a folder made by its transformers converter.

What is surprising: it keeps no cache between calls, so the prompts before a decode are read each time; the steps are
timed by its callback, from the first token of the first stream to the last.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from puna.bench.protocol import serve


class CTranslate2:
    """See protocol.Engine. `compute` is CTranslate2's compute type."""

    def __init__(self, model: str, threads: int, compute: str) -> None:
        import ctranslate2

        self._library: Any = ctranslate2
        self.version = ctranslate2.__version__
        self._path, self._threads, self._compute = model, threads, compute

    def load(self) -> None:
        """See protocol.Engine."""
        with open(f"{self._path}/vocabulary.json", encoding="utf-8") as file:
            self._words = json.load(file)
        self.vocabulary = len(self._words)
        self._generator = self._library.Generator(
            self._path, device="cpu", intra_threads=self._threads, compute_type=self._compute
        )

    def prefill(self, prompt: list[int]) -> int:
        """See protocol.Engine."""
        return int(self._generate([prompt], 1)[0].sequences_ids[0][0])

    def decode(self, prompts: list[list[int]], steps: int) -> float:
        """See protocol.Engine."""
        times = []

        def made(result: Any) -> bool:
            if result.batch_id == 0:
                times.append(time.perf_counter())
            return False

        self._generate(prompts, steps + 1, callback=made)
        return (times[-1] - times[0]) / (len(times) - 1)

    def _generate(self, prompts: list[list[int]], tokens: int, **options: Any) -> Any:
        words = [[self._words[token] for token in prompt] for prompt in prompts]
        return self._generator.generate_batch(
            words, max_length=tokens, min_length=tokens, end_token=[], include_prompt_in_result=False, **options
        )


if __name__ == "__main__":
    serve(CTranslate2(**json.loads(sys.argv[1])))
