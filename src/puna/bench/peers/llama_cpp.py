"""llama.cpp through its Python binding's low-level calls: `llama_decode` with as little Python around it as can be.

What it is: defaults everywhere (flash attention auto, cache in fp16) but for the threads and `use_extra_bufts`, which
is whether weights are repacked on load: neither setting is always the faster, so both are measured.
What is surprising: a context is made for the streams and the length that are asked for, since its memory is taken at
once. Rewinding is removing the cache's tail.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from puna.bench.protocol import serve


class LlamaCpp:
    """See protocol.Engine. `repack` is llama.cpp's model parameter use_extra_bufts."""

    def __init__(self, model: str, threads: int, repack: bool) -> None:
        import llama_cpp

        self._c: Any = llama_cpp
        self.version = llama_cpp.__version__
        self._path, self._threads, self._repack = model, threads, repack
        self._context: Any = None
        self._sizes = (0, 0)
        self._filled: tuple[int, int] = (0, 0)
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)  # kept: C holds on to it

    def load(self) -> None:
        """See protocol.Engine."""
        c = self._c
        c.llama_log_set(self._quiet, None)
        c.llama_backend_init()
        parameters = c.llama_model_default_params()
        parameters.use_extra_bufts = self._repack
        self._model = c.llama_model_load_from_file(self._path.encode(), parameters)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {self._path}")
        self.vocabulary = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self._model))

    def prefill(self, prompt: list[int]) -> int:
        """See protocol.Engine."""
        self._room(1, len(prompt) + 32)
        self._filled = (0, 0)
        self._c.llama_memory_clear(self._memory, False)
        return self._read(prompt, 0)

    def decode(self, prompts: list[list[int]], steps: int) -> float:
        """See protocol.Engine."""
        streams, context = len(prompts), len(prompts[0])
        self._room(streams, context + steps)
        if self._filled != (streams, context):
            self._c.llama_memory_clear(self._memory, False)
            for stream, prompt in enumerate(prompts):
                self._read(prompt, stream)
            self._filled = (streams, context)
        tokens = [prompt[-1] for prompt in prompts]
        began = time.perf_counter()
        for step in range(steps):
            tokens = self._run(tokens, [context + step] * streams, list(range(streams)), list(range(streams)))
        seconds = (time.perf_counter() - began) / steps
        for stream in range(streams):
            self._c.llama_memory_seq_rm(self._memory, stream, context, -1)
        return seconds

    def _room(self, streams: int, length: int) -> None:
        """A context with at least this room; a new one where the streams differ or it is too short."""
        c = self._c
        if self._sizes[0] == streams and self._sizes[1] >= length:
            return
        if self._context is not None:
            c.llama_free(self._context)
        parameters = c.llama_context_default_params()
        each = -(-length // 256) * 256
        parameters.n_seq_max, parameters.n_ctx = streams, streams * each
        parameters.n_threads = parameters.n_threads_batch = self._threads
        self._context = c.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise RuntimeError(f"llama.cpp has no room for {streams} streams of {length} tokens")
        self._memory = c.llama_get_memory(self._context)
        self._sizes, self._filled = (streams, each), (0, 0)

    def _read(self, prompt: list[int], stream: int) -> int:
        """A prompt into one stream, in batches of the size that the library takes by default."""
        most = self._c.llama_n_batch(self._context)
        token = 0
        for at in range(0, len(prompt), most):
            part = prompt[at : at + most]
            rows = list(range(at, at + len(part)))
            token = self._run(part, rows, [stream] * len(part), [len(part) - 1])[0]
        return token

    def _run(self, tokens: list[int], positions: list[int], streams: list[int], wanted: list[int]) -> list[int]:
        """One `llama_decode`; the likeliest token after each row of `wanted`."""
        import numpy as np

        c = self._c
        batch = c.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, (token, position, stream) in enumerate(zip(tokens, positions, streams, strict=True)):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, position, 1, stream
            batch.logits[i] = 0
        for i in wanted:
            batch.logits[i] = 1
        failed = c.llama_decode(self._context, batch)
        if failed:
            raise RuntimeError(f"llama_decode gave {failed}")
        best = [
            int(np.ctypeslib.as_array(c.llama_get_logits_ith(self._context, i), (self.vocabulary,)).argmax())
            for i in wanted
        ]
        c.llama_batch_free(batch)
        return best


if __name__ == "__main__":
    serve(LlamaCpp(**json.loads(sys.argv[1])))
