"""Running the model for the engine: token ids in, the last token's logits out, whatever the device.

What it is: the protocol the engine steps, and its form on the host (NumPy arrays, C++ kernels).
What it is not: a scheduler. One sequence at a time; the cache grows as it fills, by doubling, so a short chat with a
128K-token model does not reserve gigabytes.
What is surprising: `logits` come back as NumPy float32 from every device; sampling is the engine's, on the host.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import numpy as np
import numpy.typing as npt

from puna.errors import PunaError, UsageError
from puna.kernels.blocks import TYPES
from puna.kernels.layouts import empty_cache, words
from puna.models import decoder
from puna.models.config import DecoderConfig
from puna.models.tree import DecoderWeights, KVCache, leaves
from puna.types import KV_TYPES

Logits = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]
SMALLEST_CACHE = 256


class Runner(Protocol):
    """One model on one device, with the cache of one sequence."""

    config: DecoderConfig
    kv_type: str
    """How its cache keeps keys and values: `fp32`, `bf16`, `fp16` or `q8_0`."""

    def reset(self, expected: int) -> None:
        """Forget the sequence; `expected` positions are likely to be needed (a hint, not a limit)."""

    def run(self, tokens: list[int], start: int) -> Logits:
        """Compute `tokens` at positions start, start + 1, …; returns the last one's logits [V]."""

    def all_logits(self, tokens: list[int]) -> Logits:
        """Logits after every token of a whole text from position 0, [T, V], without touching the cache."""


def capacity_for(needed: int, config: DecoderConfig, current: int) -> int:
    """How many positions to make room for: at least `needed`, doubling, never past the model's context."""
    return min(max(needed, 2 * current, SMALLEST_CACHE), config.context_length)


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


class GrowingCache(ABC):
    """The half of a runner that every device shares: the cache of one sequence, which grows as it fills."""

    kv_type: str

    def __init__(self, config: DecoderConfig) -> None:
        self.config = config
        self._cache: KVCache | None = None

    def reset(self, expected: int) -> None:
        """See Runner. A cache that is large enough is used again."""
        if self._cache is None or self._cache.capacity < expected:
            self._cache = None  # given back first: there may be no room for both
            self._cache = self._empty(capacity_for(expected, self.config, 0))

    @abstractmethod
    def _empty(self, capacity: int) -> KVCache:
        """A cache with room for `capacity` positions, on the device."""

    def _room(self, needed: int) -> KVCache:
        """The cache with room for `needed` positions, what it holds kept."""
        old = self._cache
        if old is not None and old.capacity >= needed:
            return old
        new = self._empty(capacity_for(needed, self.config, old.capacity if old else 0))
        if old is not None:
            for before, after in zip((*old.keys, *old.values), (*new.keys, *new.values), strict=True):
                words(after)[:, : old.capacity] = words(before)
        self._cache = new
        return new


class HostRunner(GrowingCache):
    """The model on the CPU: NumPy arrays, float32 activations, and a cache of the type that `kv_type` names.

    Raises UsageError for a `kv_type` that is none, or that the model's heads do not fit.
    """

    def __init__(self, config: DecoderConfig, weights: DecoderWeights, kv_type: str = KV_TYPES[0]) -> None:
        super().__init__(config)
        self._weights = weights
        matrices = [leaf for _, leaf in leaves(weights) if len(leaf.shape) == 2]
        all_fp32 = all(isinstance(leaf, np.ndarray) and leaf.dtype == np.float32 for leaf in matrices)
        self.kv_type = settled_kv_type(kv_type, config, all_fp32=all_fp32)

    def run(self, tokens: list[int], start: int) -> Logits:
        """See Runner."""
        ids = np.array([tokens], np.int32)
        positions = np.arange(start, start + len(tokens), dtype=np.int32)[None]
        last: Logits = self.step(ids, positions, self._room(start + len(tokens)))[0]
        return last

    def step(self, ids: Ids, positions: Ids, cache: KVCache) -> Logits:
        """Logits [B, V] after the last of `ids` [B, T], B sequences of a cache that is the caller's."""
        hidden = decoder.forward(self._weights, self.config, ids, positions, cache)
        last: Logits = decoder.logits(self._weights, np.ascontiguousarray(hidden[:, -1]))
        return last

    def all_logits(self, tokens: list[int]) -> Logits:
        """See Runner."""
        positions = np.arange(len(tokens), dtype=np.int32)[None]
        hidden = decoder.forward(self._weights, self.config, np.array([tokens], np.int32), positions)
        scores: Logits = decoder.logits(self._weights, hidden)[0]
        return scores

    def _empty(self, capacity: int) -> KVCache:
        return self.empty_cache(1, capacity)

    def empty_cache(self, sequences: int, capacity: int) -> KVCache:
        """A cache for `step`. Raises PunaError where there is no memory for it."""
        try:
            return decoder.make_cache(self.config, sequences, capacity, lambda shape: empty_cache(self.kv_type, shape))
        except MemoryError as error:
            raise PunaError(
                f"There is no memory for a cache of {capacity} tokens.",
                remedy="Lower --max-tokens, or use --kv-type q8_0 or a smaller model; `puna show` counts.",
            ) from error
