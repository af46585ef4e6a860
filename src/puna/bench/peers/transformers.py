"""transformers' LlamaForCausalLM on PyTorch's CPU kernels: eager, its default attention (sdpa), its own cache."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from puna.bench.protocol import serve


class Transformers:
    """See protocol.Engine. `dtype` is torch's name of the type to compute in."""

    def __init__(self, model: str, threads: int, dtype: str) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self._torch, self._transformers = torch, transformers
        self.version = transformers.__version__
        self._path, self._dtype = model, getattr(torch, dtype)
        self._cache: Any = None
        self._filled: tuple[int, int] = (0, 0)

    def load(self) -> None:
        """See protocol.Engine."""
        kind: Any = self._transformers.LlamaForCausalLM
        self._model = kind.from_pretrained(self._path, dtype=self._dtype).eval()
        self.vocabulary = self._model.config.vocab_size

    def prefill(self, prompt: list[int]) -> int:
        """See protocol.Engine."""
        return int(self._run([prompt], self._transformers.DynamicCache())[0, 0])

    def decode(self, prompts: list[list[int]], steps: int) -> float:
        """See protocol.Engine."""
        streams, context = len(prompts), len(prompts[0])
        if self._filled != (streams, context):
            self._cache = self._transformers.DynamicCache()
            self._run(prompts, self._cache)
            self._filled = (streams, context)
        tokens: Any = [prompt[-1:] for prompt in prompts]
        began = time.perf_counter()
        for _ in range(steps):
            tokens = self._run(tokens, self._cache)
        seconds = (time.perf_counter() - began) / steps
        self._cache.crop(context)
        return seconds

    def _run(self, tokens: Any, cache: Any) -> Any:
        """The likeliest next tokens [streams, 1]."""
        ids = self._torch.as_tensor(tokens)
        return self._model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)


if __name__ == "__main__":
    serve(Transformers(**json.loads(sys.argv[1])))
