"""The model on a torch device: the same functions, the same weights, moved there.

What it is: `Runner` for `--device cuda` (or `cpu` through torch, which the tests use to compare).
What it is not: fast yet. It is eager torch; graphs and fused kernels come with the GPU engine.
What is surprising: activations have the weights' type here (as in transformers), where the host computes in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from puna.engine.runner import GrowingCache, Logits
from puna.errors import DeviceError, UsageError
from puna.kernels.layouts import BF16, dtype_name
from puna.models import decoder
from puna.models.config import DecoderConfig
from puna.models.tree import DecoderWeights, KVCache, leaves, tree_map
from puna.types import KV_TYPES

_CACHES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def open_device(device: str) -> torch.device:
    """The torch device of that name, shown to work. Raises DeviceError when torch has no such device."""
    try:
        found = torch.device(device)
        torch.zeros(1, device=found)
    except (RuntimeError, AssertionError) as error:
        raise DeviceError(
            f"--device {device}: {str(error).splitlines()[0]}",
            remedy="Use --device cpu, or install a torch with that device.",
        ) from error
    return found


def describe(device: str) -> str:
    """A device in words, with its memory where torch knows it. Raises DeviceError as `open_device` does."""
    found = open_device(device)
    if found.type != "cuda":
        return f"{found.type}, torch {torch.__version__}"
    properties = torch.cuda.get_device_properties(found)
    free, total = torch.cuda.mem_get_info(found)
    return (
        f"{properties.name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free, compute capability "
        f"{properties.major}.{properties.minor}, torch {torch.__version__}"
    )


class TorchRunner(GrowingCache):
    """The model on `device`.

    `kv_type` auto keeps keys and values in the weights' type. Raises DeviceError when torch has no such device or its
    memory is too small, and UsageError for weights of several types, or a `kv_type` that only the CPU has.
    """

    def __init__(self, config: DecoderConfig, weights: DecoderWeights, device: str, kv_type: str = KV_TYPES[0]) -> None:
        super().__init__(config)
        types = {dtype_name(leaf) for name, leaf in leaves(weights) if name != "inv_freq"}
        if len(types) > 1:  # torch multiplies like with like only
            raise UsageError(
                f"--device {device}: the weights are stored in several types ({', '.join(sorted(types))}).",
                remedy="Name the one to compute in with --dtype.",
            )
        self.kv_type = types.pop() if kv_type == "auto" else kv_type
        if self.kv_type not in _CACHES:
            raise UsageError(
                f"--kv-type {kv_type}: --device {device} keeps keys and values in {', '.join(_CACHES)} only.",
                remedy="Leave it out, or use --device cpu.",
            )
        self._device = open_device(device)
        with self._fitting("the model"):
            self._weights: DecoderWeights = tree_map(self._move, weights)

    def _move(self, leaf: Any) -> torch.Tensor:
        # A copy in between, one tensor at a time: the mapped file is read-only, and torch wants what it may write to.
        if isinstance(leaf, BF16):
            return torch.from_numpy(leaf.bits.view(np.int16).copy()).view(torch.bfloat16).to(self._device)
        return torch.from_numpy(leaf.copy()).to(self._device)

    def reset(self, expected: int) -> None:
        """See Runner."""
        with self._fitting(f"a conversation of {expected} tokens"):
            super().reset(expected)

    @torch.inference_mode()
    def run(self, tokens: list[int], start: int) -> Logits:
        """See Runner."""
        with self._fitting(f"a conversation of {start + len(tokens)} tokens"):
            cache = self._room(start + len(tokens))
            ids, positions = self._inputs(tokens, start)
            hidden = decoder.forward(self._weights, self.config, ids, positions, cache)
            last: Logits = decoder.logits(self._weights, hidden[:, -1])[0].float().cpu().numpy()
        return last

    @torch.inference_mode()
    def all_logits(self, tokens: list[int]) -> Logits:
        """See Runner."""
        with self._fitting(f"a text of {len(tokens)} tokens"):
            ids, positions = self._inputs(tokens, 0)
            hidden = decoder.forward(self._weights, self.config, ids, positions)
            scores: Logits = decoder.logits(self._weights, hidden)[0].float().cpu().numpy()
        return scores

    @contextmanager
    def _fitting(self, what: str) -> Iterator[None]:
        """The device's memory running out, as a DeviceError that says what does not fit."""
        try:
            yield
        except torch.cuda.OutOfMemoryError as error:
            raise DeviceError(
                f"--device {self._device}: {what} does not fit its memory beside what is there.",
                remedy="Use --device cpu, a smaller model, or less text (--max-tokens).",
            ) from error

    def _inputs(self, tokens: list[int], start: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.tensor([tokens], dtype=torch.int32, device=self._device)
        return ids, torch.arange(start, start + len(tokens), dtype=torch.int32, device=self._device)[None]

    def _empty(self, capacity: int) -> KVCache:
        dtype = _CACHES[self.kv_type]
        return decoder.make_cache(
            self.config, 1, capacity, lambda shape: torch.zeros(shape, dtype=dtype, device=self._device)
        )
