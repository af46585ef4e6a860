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
from puna.engine.runner import PAGE, Batch, Hidden, Ids, Logits, PagedCache
from puna.errors import DeviceError, UsageError
from puna.kernels.layouts import BF16, ChunkedTable, PageTable, dtype_name
from puna.models.config import DecoderConfig
from puna.models.registry import definition
from puna.models.tree import TABLES, KVCache, Weights, leaves, tree_map
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
        weights: Weights,
        device: str,
        kv_type: str = KV_TYPES[0],
        page: int = PAGE,
    ) -> None:
        types = {dtype_name(leaf) for name, leaf in leaves(weights) if name not in TABLES}
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
        self._model = definition(config)
        self._device = open_device(device)
        with self._fitting("the model"):
            self._weights: Weights = tree_map(self._move, weights)
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

    def allocate(self, pages: int, local: int | None = None) -> None:
        """See Runner."""
        with self._fitting(f"a cache of {pages * self.page} tokens"):
            super().allocate(pages, local)

    @torch.inference_mode()
    def run(self, batch: Batch) -> Logits:
        """See Runner."""
        with self._fitting(f"a step of {len(batch.tokens)} tokens"):
            return _host(self._model.logits(self._weights, self._forward(batch)))

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
            return _host(self._model.logits(self._weights, self._model.forward(self._weights, self.config, ids))[0])

    def _forward(self, batch: Batch) -> torch.Tensor:
        """Hidden states of the wanted rows, on the device."""
        table = PageTable(*map(self._ids, batch.table))
        if batch.table.local is not None:
            table = ChunkedTable(*table, self._ids(batch.table.local))
        ids, wanted = self._ids(batch.tokens), self._ids(batch.wanted)
        weights = self.adapters.upon(self._weights, batch.adapters, batch.table.starts)
        hidden: torch.Tensor = self._model.forward(weights, self.config, ids, table, self._cache)
        return hidden[wanted]

    def _ids(self, array: Ids) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)

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

    def _empty(self, pages: int, local: int) -> KVCache:
        dtype = _CACHES[self.kv_type]

        def zeros(shape: tuple[int, ...]) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=self._device)

        return self._model.make_cache(self.config, pages, self.page, zeros, local)

    def _read(self, part: torch.Tensor) -> bytes:
        return part.reshape(-1).view(torch.uint8).cpu().numpy().tobytes()

    def _write(self, part: torch.Tensor, data: bytes | memoryview) -> None:
        part.reshape(-1).view(torch.uint8).copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))


def _host(tensor: torch.Tensor) -> Logits:
    """float32 on the host, from any type on any device."""
    array: Logits = tensor.float().cpu().numpy()
    return array
