"""OpenVINO GenAI with its paged-attention (continuous batching) pipeline, on a folder exported by optimum-intel.

What is surprising: a pipeline cannot be rewound, so the prompts before a decode are found in its prefix cache, or read
again; what is timed are the steps in which every stream makes a token.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from typing import Any

from puna.bench.protocol import serve


class OpenVino:
    """See protocol.Engine."""

    def __init__(self, model: str, threads: int) -> None:
        import openvino_genai

        self._genai: Any = openvino_genai
        self.version = importlib.metadata.version("openvino-genai")
        self._path, self._threads = model, threads
        self._requests = 0
        self._open: dict[int, tuple[Any, int]] = {}  # request: its handle, and tokens still to come

    def load(self) -> None:
        """See protocol.Engine."""
        with open(f"{self._path}/config.json", encoding="utf-8") as file:
            self.vocabulary = json.load(file)["vocab_size"]
        scheduler = self._genai.SchedulerConfig()
        scheduler.enable_prefix_caching = True
        scheduler.max_num_batched_tokens = 2048
        properties = {"INFERENCE_NUM_THREADS": self._threads}
        self._pipeline = self._genai.ContinuousBatchingPipeline(self._path, scheduler, "CPU", properties)

    def prefill(self, prompt: list[int]) -> int:
        """See protocol.Engine."""
        handle = self._add(prompt, 1)
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        return int(handle.read_all()[0].generated_ids[0])

    def decode(self, prompts: list[list[int]], steps: int) -> float:
        """See protocol.Engine."""
        # The first token ends the prompt's reading, so that every stream makes `steps` more together.
        handles = [self._add(prompt, steps + 1) for prompt in prompts]
        made = [0] * len(handles)
        while not all(made):
            self._pipeline.step()
            for i, handle in enumerate(handles):
                made[i] += sum(len(part.generated_ids) for part in handle.read().values()) if handle.can_read() else 0
        left = steps + 1 - max(made)
        began = time.perf_counter()
        for _ in range(left):
            self._pipeline.step()
        seconds = time.perf_counter() - began
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        return seconds / left

    def submit(self, prompt: list[int], new: int) -> int:
        """See load.Serving."""
        handle = self._add(prompt, new)
        self._open[self._requests] = handle, new
        return self._requests

    def advance(self) -> dict[int, int]:
        """See load.Serving."""
        self._pipeline.step()
        came = {}
        for request, (handle, left) in list(self._open.items()):
            tokens = sum(len(part.generated_ids) for part in handle.read().values()) if handle.can_read() else 0
            if tokens:
                came[request] = tokens
                self._open[request] = handle, left - tokens
                if left <= tokens:
                    del self._open[request]
        return came

    def _add(self, prompt: list[int], tokens: int) -> Any:
        import numpy as np
        import openvino

        config = self._genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos = tokens, True
        self._requests += 1
        ids = openvino.Tensor(np.array([prompt], np.int64))
        return self._pipeline.add_request(self._requests, ids, config)


if __name__ == "__main__":
    serve(OpenVino(**json.loads(sys.argv[1])))
