"""Running the model for the engine: a batch of token ids in, logits out, whatever the device.

What it is: what a step gives the model (`Batch`), the protocol the engine steps (`Runner`), and its form on the host
(NumPy arrays, an op at a time).
What it is not: a scheduler, or a keeper of pages. Which page belongs to whom, and which are free, is the engine's to
know; a runner does what the table says.
What is surprising: logits come back as NumPy float32 from every device; sampling is the engine's, on the host.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from puna.engine.adapters import Adapters
from puna.errors import PunaError, UsageError
from puna.kernels.blocks import TYPES
from puna.kernels.layouts import PageTable, empty_cache, words
from puna.models import decoder
from puna.models.config import DecoderConfig
from puna.models.tree import DecoderWeights, KVCache, leaves
from puna.types import KV_TYPES

Logits = npt.NDArray[np.float32]
Hidden = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]

PAGE = 64
"""Tokens a page of the cache unless said otherwise."""


class Batch(NamedTuple):
    """One step: the tokens of several sequences one after another, where they stand, and which answers are wanted."""

    tokens: Ids
    """[N]."""
    table: PageTable
    """Where they stand: NumPy arrays."""
    wanted: Ids
    """[M]: the rows of `tokens`, ascending, whose logits or hidden states are wanted; often the last of each sequence,
    none of a part of a prompt."""
    adapters: Ids | None = None
    """[B]: the number of each sequence's adapter, -1 for none; None: nobody has one."""


class Runner(Protocol):
    """One model on one device, with a cache of pages that any number of sequences share."""

    config: DecoderConfig
    kv_type: str
    """How its cache keeps keys and values: `fp32`, `bf16`, `fp16` or `q8_0`."""
    page: int
    """Tokens a page."""
    page_bytes: int
    """Bytes of a page: keys and values of all layers."""
    adapters: Adapters
    """What `Batch.adapters` names."""

    def allocate(self, pages: int) -> None:
        """Make the cache, of `pages` pages; one that was there is gone. Raises PunaError where there is no memory."""

    def run(self, batch: Batch) -> Logits:
        """Write the batch's keys and values to the cache; logits [M, V] of the wanted rows, valid until the next call.

        Raises ValueError for ids, positions, rows or page numbers that do not fit.
        """

    def hidden(self, batch: Batch) -> Hidden:
        """As `run`, with the wanted rows' hidden states after the last norm, [M, dim], in place of logits."""

    def copy_page(self, source: int, target: int) -> None:
        """Copy a page, in all layers. Raises ValueError for one that is not there, as the two below do."""

    def read_page(self, page: int) -> bytes:
        """What a page holds, `page_bytes` long: to be written back to a cache of the same model and `kv_type`."""

    def write_page(self, page: int, data: bytes | memoryview) -> None:
        """Put back what `read_page` gave. Raises ValueError for another length."""

    def all_logits(self, tokens: Sequence[int]) -> Logits:
        """Logits after every token of a whole text from position 0, [T, V], without touching the cache."""


def settled_kv_type(asked: str, config: DecoderConfig, *, all_fp32: bool) -> str:
    """The type a cache on the host gets when `asked` (one of KV_TYPES) is asked for: fp32, bf16, fp16 or q8_0.

    `all_fp32` says whether all matrices of the model are fp32. Raises UsageError for a type that is none, or that the
    model's heads do not fit.
    """
    if asked not in KV_TYPES:
        raise UsageError(f"--kv-type {asked}: no such type.", remedy=f"One of: {', '.join(KV_TYPES)}.")
    if asked == "q8_0" and config.head_dim % TYPES["Q8_0"].block:
        raise UsageError(
            f"--kv-type q8_0 packs 32 numbers together, and this model's heads have {config.head_dim}.",
            remedy="Use --kv-type fp16.",
        )
    return ("fp32" if all_fp32 else "fp16") if asked == "auto" else asked


def page_bytes(config: DecoderConfig, kv_type: str, page: int = PAGE) -> int:
    """Bytes of a page of `page` tokens over all layers, keys and values; `kv_type` is fp32, bf16, fp16 or q8_0."""
    kind = TYPES[{"fp32": "F32", "bf16": "BF16", "fp16": "F16", "q8_0": "Q8_0"}[kv_type]]
    return 2 * config.layers * page * config.kv_heads * kind.row_bytes(config.head_dim)


class PagedCache(ABC):
    """The half of a runner that every device shares: a cache of pages."""

    def __init__(self, config: DecoderConfig, kv_type: str, page: int) -> None:
        self.config, self.kv_type, self.page = config, kv_type, page
        self.page_bytes = page_bytes(config, kv_type, page)
        self._cache = KVCache((), ())
        self._pages = 0

    def allocate(self, pages: int) -> None:
        """See Runner."""
        self._cache, self._pages = KVCache((), ()), 0  # given back first: there may be no room for both
        self._cache, self._pages = self._empty(pages), pages

    def copy_page(self, source: int, target: int) -> None:
        """See Runner."""
        for array in self._arrays(source, target):
            array[target] = array[source]

    def read_page(self, page: int) -> bytes:
        """See Runner."""
        return b"".join(self._read(array[page]) for array in self._arrays(page))

    def write_page(self, page: int, data: bytes | memoryview) -> None:
        """See Runner."""
        arrays = self._arrays(page)
        if len(data) != self.page_bytes:
            raise ValueError(f"a page is {self.page_bytes} bytes, not {len(data)}")
        piece = self.page_bytes // len(arrays)
        for i, array in enumerate(arrays):
            self._write(array[page], data[i * piece : (i + 1) * piece])

    @abstractmethod
    def _empty(self, pages: int) -> KVCache:
        """A cache of that many pages, on the device."""

    @abstractmethod
    def _read(self, part: Any) -> bytes:
        """The bytes of one layer's keys or values of a page."""

    @abstractmethod
    def _write(self, part: Any, data: bytes | memoryview) -> None:
        """Put them back."""

    def _arrays(self, *pages: int) -> list[Any]:
        """The arrays of all layers, whose first dimension is pages. Raises ValueError for a page that is not there."""
        for page in pages:
            if not 0 <= page < self._pages:
                raise ValueError(f"page {page} is not in a cache of {self._pages}")
        return [words(array) for array in (*self._cache.keys, *self._cache.values)]


class HostRunner(PagedCache):
    """The model on the CPU: NumPy arrays, float32 activations, and a cache of the type that `kv_type` names.

    Raises UsageError for a `kv_type` that is none, or that the model's heads do not fit.
    """

    def __init__(
        self, config: DecoderConfig, weights: DecoderWeights, kv_type: str = KV_TYPES[0], page: int = PAGE
    ) -> None:
        self._weights = weights
        matrices = [leaf for _, leaf in leaves(weights) if len(leaf.shape) == 2]
        all_fp32 = all(isinstance(leaf, np.ndarray) and leaf.dtype == np.float32 for leaf in matrices)
        super().__init__(config, settled_kv_type(kv_type, config, all_fp32=all_fp32), page)
        self.adapters = Adapters()

    def run(self, batch: Batch) -> Logits:
        """See Runner."""
        logits: Logits = decoder.logits(self._weights, HostRunner.hidden(self, batch))
        return logits

    def hidden(self, batch: Batch) -> Hidden:
        """See Runner."""
        weights = self.adapters.upon(self._weights, batch.adapters, batch.table.starts)
        hidden: Hidden = decoder.forward(weights, self.config, batch.tokens, batch.table, self._cache)
        return hidden[batch.wanted]

    def all_logits(self, tokens: Sequence[int]) -> Logits:
        """See Runner."""
        hidden = decoder.forward(self._weights, self.config, np.array([tokens], np.int32))
        scores: Logits = decoder.logits(self._weights, hidden)[0]
        return scores

    def _empty(self, pages: int) -> KVCache:
        try:
            return decoder.make_cache(self.config, pages, self.page, lambda shape: empty_cache(self.kv_type, shape))
        except MemoryError as error:
            raise PunaError(
                f"There is no memory for a cache of {pages * self.page} tokens.",
                remedy="Lower --max-tokens, or use --kv-type q8_0 or a smaller model; `puna show` counts.",
            ) from error

    def _read(self, part: Any) -> bytes:
        data: bytes = part.tobytes()
        return data

    def _write(self, part: Any, data: bytes | memoryview) -> None:
        part.reshape(-1).view(np.uint8)[:] = np.frombuffer(data, np.uint8)
