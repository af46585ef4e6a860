"""Running the model for the engine: a batch of token ids in, logits out, whatever the device.

What it is: what a step gives the model (`Batch`), the protocol the engine steps (`Runner`), and its form on the host
(NumPy arrays, an op at a time).
What it is not: a scheduler, or a keeper of pages. Which page belongs to whom, and which are free, is the engine's to
know; a runner does what the table says.
What is surprising: logits come back as NumPy float32 from every device; sampling is the engine's, on the host. And on
the host packed matrices in a mapped file are not regrouped before the first answer, which is there sooner without: each
step after it regroups a share before it computes. The bits are the same either way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from puna.engine.adapters import Adapters
from puna.errors import PunaError, UsageError
from puna.kernels import ops
from puna.kernels.blocks import TYPES
from puna.kernels.layouts import Mapped, PageTable, empty_cache, words
from puna.models.config import DecoderConfig
from puna.models.registry import definition, seeing
from puna.models.tree import KVCache, Pixels, Placed, Weights, leaves, tree_map
from puna.types import KV_TYPES
from puna.weights.heap import trim_memory

Logits = npt.NDArray[np.float32]
Hidden = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]

PAGE = 64
"""Tokens a page of the cache unless said otherwise."""


SHARES = 4
"""Steps that the regrouping of a model is spread over, about."""


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
    placed: tuple[Placed, ...] = ()
    """What was seen in the pictures that the tokens are computed with, and where in each sequence those stand."""


class Runner(Protocol):
    """One model on one device, with a cache of pages that any number of sequences share."""

    config: DecoderConfig
    kv_type: str
    """How its cache keeps keys and values: `fp32`, `bf16`, `fp16` or `q8_0`."""
    page: int
    """Tokens a page."""
    page_bytes: int
    """Bytes of a page: keys and values of all layers, but for those that see one chunk only."""
    local_page_bytes: int
    """Bytes of a page of those; 0 where there are none."""
    adapters: Adapters
    """What `Batch.adapters` names."""
    sees: bool
    """Whether it takes pictures; where it does not, nobody calls the two below."""

    def see(self, pixels: Pixels) -> Any:
        """What the model sees in a picture, for `Batch.placed`. Raises ValueError for pixels of another size."""

    def sight_bytes(self, pixels: Pixels) -> int:
        """The memory that this takes."""

    def allocate(self, pages: int, local: int | None = None) -> None:
        """Make the cache, of `pages` pages; one that was there is gone. Raises PunaError where there is no memory.

        Layers that see one chunk only have `local` pages, None: as many. Below, `local` says that theirs are meant.
        """

    def run(self, batch: Batch) -> Logits:
        """Write the batch's keys and values to the cache; logits [M, V] of the wanted rows, valid until the next call.

        Raises ValueError for ids, positions, rows or page numbers that do not fit.
        """

    def hidden(self, batch: Batch) -> Hidden:
        """As `run`, with the wanted rows' hidden states after the last norm, [M, dim], in place of logits."""

    def copy_page(self, source: int, target: int, *, local: bool = False) -> None:
        """Copy a page, in all its layers. Raises ValueError for one that is not there, as the two below do."""

    def read_page(self, page: int, *, local: bool = False) -> bytes:
        """What a page holds, `page_bytes` long (or `local_page_bytes`): to be written back to a cache of the same model
        and `kv_type`."""

    def write_page(self, page: int, data: bytes | memoryview, *, local: bool = False) -> None:
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
    """Bytes of a page of `page` tokens over all layers that see everything, keys and values; `kv_type` is fp32, bf16,
    fp16 or q8_0."""
    return (config.cached_layers - len(config.local_layers)) * _layer_bytes(config, kv_type, page)


def local_page_bytes(config: DecoderConfig, kv_type: str, page: int = PAGE) -> int:
    """Bytes of a page over all layers that see one chunk only; 0 where there are none."""
    return len(config.local_layers) * _layer_bytes(config, kv_type, page)


def _layer_bytes(config: DecoderConfig, kv_type: str, page: int) -> int:
    kind = TYPES[{"fp32": "F32", "bf16": "BF16", "fp16": "F16", "q8_0": "Q8_0"}[kv_type]]
    return 2 * page * config.kv_heads * kind.row_bytes(config.head_dim)


def window(config: DecoderConfig, page: int = PAGE) -> int:
    """Pages of layers that see one chunk only that a sequence needs at a time, at most; 0 where there are none.

    One more than a chunk has where pages do not divide it: both of its ends may lie within one.
    """
    if not config.local_layers:
        return 0
    return min(-(-config.chunk // page) + (config.chunk % page > 0), -(-config.context_length // page))


class PagedCache(ABC):
    """The half of a runner that every device shares: a cache of pages."""

    sees = False
    """See Runner."""

    def __init__(self, config: DecoderConfig, kv_type: str, page: int) -> None:
        self.config, self.kv_type, self.page = config, kv_type, page
        self.page_bytes = page_bytes(config, kv_type, page)
        self.local_page_bytes = local_page_bytes(config, kv_type, page)
        self._cache = KVCache((), ())
        self._pages = self._local_pages = 0

    def see(self, pixels: Pixels) -> Any:
        """See Runner."""
        raise ValueError("this model does not see")

    def sight_bytes(self, pixels: Pixels) -> int:
        """See Runner."""
        raise ValueError("this model does not see")

    def allocate(self, pages: int, local: int | None = None) -> None:
        """See Runner."""
        local = pages if local is None else local
        self._cache, self._pages, self._local_pages = KVCache((), ()), 0, 0  # first: there may be no room for both
        self._cache, self._pages, self._local_pages = self._empty(pages, local), pages, local

    def copy_page(self, source: int, target: int, *, local: bool = False) -> None:
        """See Runner."""
        for array in self._arrays(source, target, local=local):
            array[target] = array[source]

    def read_page(self, page: int, *, local: bool = False) -> bytes:
        """See Runner."""
        return b"".join(self._read(array[page]) for array in self._arrays(page, local=local))

    def write_page(self, page: int, data: bytes | memoryview, *, local: bool = False) -> None:
        """See Runner."""
        arrays = self._arrays(page, local=local)
        size = self.local_page_bytes if local else self.page_bytes
        if len(data) != size:
            raise ValueError(f"a page is {size} bytes, not {len(data)}")
        piece = size // len(arrays)
        for i, array in enumerate(arrays):
            self._write(array[page], data[i * piece : (i + 1) * piece])

    @abstractmethod
    def _empty(self, pages: int, local: int) -> KVCache:
        """A cache of that many pages, on the device; layers that see one chunk only have `local` pages."""

    @abstractmethod
    def _read(self, part: Any) -> bytes:
        """The bytes of one layer's keys or values of a page."""

    @abstractmethod
    def _write(self, part: Any, data: bytes | memoryview) -> None:
        """Put them back."""

    def _arrays(self, *pages: int, local: bool = False) -> list[Any]:
        """The arrays of its layers, whose first dimension is pages. Raises ValueError for a page that is not there."""
        count = self._local_pages if local else self._pages
        for page in pages:
            if not 0 <= page < count:
                raise ValueError(f"page {page} is not in a cache of {count}")
        keys, values = self._cache
        chunked = self.config.local_layers
        layers = chunked if local else [i for i in range(len(keys)) if i not in chunked]
        return [words(array[i]) for array in (keys, values) for i in layers]


class HostRunner(PagedCache):
    """The model on the CPU: NumPy arrays, float32 activations, and a cache of the type that `kv_type` names.

    Raises UsageError for a `kv_type` that is none, or that the model's heads do not fit.
    """

    def __init__(self, config: DecoderConfig, weights: Weights, kv_type: str = KV_TYPES[0], page: int = PAGE) -> None:
        self._weights, self._model = weights, definition(config)
        matrices = [leaf for _, leaf in leaves(weights) if len(leaf.shape) == 2]
        all_fp32 = all(isinstance(leaf, np.ndarray) and leaf.dtype == np.float32 for leaf in matrices)
        super().__init__(config, settled_kv_type(kv_type, config, all_fp32=all_fp32), page)
        self._seeing = seeing(config)
        self.sees = self._seeing is not None
        self.adapters = Adapters()
        self._mapped = [leaf for _, leaf in leaves(weights) if isinstance(leaf, Mapped)]
        self._share = sum(leaf.nbytes for leaf in self._mapped) / SHARES
        self._answered = False

    def run(self, batch: Batch) -> Logits:
        """See Runner."""
        logits: Logits = self._model.logits(self._weights, HostRunner.hidden(self, batch))
        return logits

    def hidden(self, batch: Batch) -> Hidden:
        """See Runner."""
        self._regroup()
        weights = self.adapters.upon(self._weights, batch.adapters, batch.table.starts)
        hidden: Hidden = self._model.forward(weights, self.config, batch.tokens, batch.table, self._cache, batch.placed)
        return hidden[batch.wanted]

    def see(self, pixels: Pixels) -> Any:
        """See Runner."""
        return super().see(pixels) if self._seeing is None else self._seeing.see(self._weights, self.config, pixels)

    def sight_bytes(self, pixels: Pixels) -> int:
        """See Runner."""
        model = self._seeing
        return super().sight_bytes(pixels) if model is None else model.sight_bytes(self.config, pixels)

    def _regroup(self) -> bool:
        """From the second step on, a further share of the mapped matrices regrouped; whether any was."""
        first, self._answered = not self._answered, True
        if first or not self._mapped:
            return False
        count, size = 0, 0
        while count < len(self._mapped) and size < self._share:
            size += self._mapped[count].nbytes
            count += 1
        share = self._mapped[:count]
        panels = dict(zip(map(id, share), ops.prepare_mapped(share), strict=True))
        self._weights = tree_map(lambda leaf: panels.get(id(leaf), leaf), self._weights)
        del self._mapped[:count]
        if not self._mapped:
            trim_memory()  # what reading the model left free in the heap, a tenth of a small one
        return True

    def all_logits(self, tokens: Sequence[int]) -> Logits:
        """See Runner."""
        self._regroup()
        hidden = self._model.forward(self._weights, self.config, np.array([tokens], np.int32))
        scores: Logits = self._model.logits(self._weights, hidden)[0]
        return scores

    def _empty(self, pages: int, local: int) -> KVCache:
        def zeros(shape: tuple[int, ...]) -> Any:
            return empty_cache(self.kv_type, shape)

        try:
            return self._model.make_cache(self.config, pages, self.page, zeros, local)
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
