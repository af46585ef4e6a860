"""The model on a torch device: the same functions, the same weights, moved there.

What it is: `Runner` for `--device cuda` (or `cpu` through torch, which the tests use to compare).
What it is not: fast yet. It is eager torch; graphs and fused kernels come with the GPU engine.
What is surprising: activations have the weights' type here (as in transformers), where the host computes in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from puna.engine.adapters import Adapters
from puna.engine.runner import PAGE, Batch, Hidden, Logits, PagedCache
from puna.errors import DeviceError, UsageError
from puna.kernels.layouts import BF16, PageTable, dtype_name
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


class TorchRunner(PagedCache):
    """The model on `device`.

    `kv_type` auto keeps keys and values in the weights' type. Raises DeviceError when torch has no such device or its
    memory is too small, and UsageError for weights of several types, or a `kv_type` that only the CPU has.
    """

    def __init__(
        self,
        config: DecoderConfig,
        weights: DecoderWeights,
        device: str,
        kv_type: str = KV_TYPES[0],
        page: int = PAGE,
    ) -> None:
        types = {dtype_name(leaf) for name, leaf in leaves(weights) if name != "inv_freq"}
        if len(types) > 1:  # torch multiplies like with like only
            raise UsageError(
                f"--device {device}: the weights are stored in several types ({', '.join(sorted(types))}).",
                remedy="Name the one to compute in with --dtype.",
            )
        settled = types.pop() if kv_type == "auto" else kv_type
        if settled not in _CACHES:
            raise UsageError(
                f"--kv-type {kv_type}: --device {device} keeps keys and values in {', '.join(_CACHES)} only.",
                remedy="Leave it out, or use --device cpu.",
            )
        super().__init__(config, settled, page)
        self._device = open_device(device)
        with self._fitting("the model"):
            self._weights: DecoderWeights = tree_map(self._move, weights)
        dtype = self._weights.norm.dtype
        self.adapters = Adapters(lambda array: torch.from_numpy(array).to(self._device, dtype))

    def _move(self, leaf: Any) -> torch.Tensor:
        # A copy in between, one tensor at a time: the mapped file is read-only, and torch wants what it may write to.
        if isinstance(leaf, BF16):
            return torch.from_numpy(leaf.bits.view(np.int16).copy()).view(torch.bfloat16).to(self._device)
        return torch.from_numpy(leaf.copy()).to(self._device)

    def free_memory(self) -> int | None:
        """Bytes that the device has left, or None where that is the host's memory."""
        return torch.cuda.mem_get_info(self._device)[0] if self._device.type == "cuda" else None

    def allocate(self, pages: int) -> None:
        """See Runner."""
        with self._fitting(f"a cache of {pages * self.page} tokens"):
            super().allocate(pages)

    @torch.inference_mode()
    def run(self, batch: Batch) -> Logits:
        """See Runner."""
        with self._fitting(f"a step of {len(batch.tokens)} tokens"):
            return _host(decoder.logits(self._weights, self._forward(batch)))

    @torch.inference_mode()
    def hidden(self, batch: Batch) -> Hidden:
        """See Runner."""
        with self._fitting(f"a step of {len(batch.tokens)} tokens"):
            return _host(self._forward(batch))

    @torch.inference_mode()
    def all_logits(self, tokens: Sequence[int]) -> Logits:
        """See Runner."""
        with self._fitting(f"a text of {len(tokens)} tokens"):
            ids = torch.tensor([tokens], dtype=torch.int32, device=self._device)
            return _host(decoder.logits(self._weights, decoder.forward(self._weights, self.config, ids))[0])

    def _forward(self, batch: Batch) -> torch.Tensor:
        """Hidden states of the wanted rows, on the device."""
        table = PageTable(*(torch.from_numpy(array).to(self._device) for array in batch.table))
        ids, wanted = (torch.from_numpy(array).to(self._device) for array in (batch.tokens, batch.wanted))
        weights = self.adapters.upon(self._weights, batch.adapters, batch.table.starts)
        hidden: torch.Tensor = decoder.forward(weights, self.config, ids, table, self._cache)
        return hidden[wanted]

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

    def _empty(self, pages: int) -> KVCache:
        dtype = _CACHES[self.kv_type]
        return decoder.make_cache(
            self.config, pages, self.page, lambda shape: torch.zeros(shape, dtype=dtype, device=self._device)
        )

    def _read(self, part: torch.Tensor) -> bytes:
        return part.reshape(-1).view(torch.uint8).cpu().numpy().tobytes()

    def _write(self, part: torch.Tensor, data: bytes | memoryview) -> None:
        part.reshape(-1).view(torch.uint8).copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))


def _host(tensor: torch.Tensor) -> Logits:
    """float32 on the host, from any type on any device."""
    array: Logits = tensor.float().cpu().numpy()
    return array
