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

from puna.errors import PunaError
from puna.models import decoder
from puna.models.config import DecoderConfig
from puna.models.tree import DecoderWeights, KVCache

Logits = npt.NDArray[np.float32]
SMALLEST_CACHE = 256


class Runner(Protocol):
    """One model on one device, with the cache of one sequence."""

    config: DecoderConfig

    def reset(self, expected: int) -> None:
        """Forget the sequence; `expected` positions are likely to be needed (a hint, not a limit)."""

    def run(self, tokens: list[int], start: int) -> Logits:
        """Compute `tokens` at positions start, start + 1, …; returns the last one's logits [V]."""

    def all_logits(self, tokens: list[int]) -> Logits:
        """Logits after every token of a whole text from position 0, [T, V], without touching the cache."""


def capacity_for(needed: int, config: DecoderConfig, current: int) -> int:
    """How many positions to make room for: at least `needed`, doubling, never past the model's context."""
    return min(max(needed, 2 * current, SMALLEST_CACHE), config.context_length)


class GrowingCache(ABC):
    """The half of a runner that every device shares: the cache of one sequence, which grows as it fills."""

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
                after[:, : old.capacity] = before
        self._cache = new
        return new


class HostRunner(GrowingCache):
    """The model on the CPU: NumPy arrays, float32 activations and cache."""

    def __init__(self, config: DecoderConfig, weights: DecoderWeights) -> None:
        super().__init__(config)
        self._weights = weights

    def run(self, tokens: list[int], start: int) -> Logits:
        """See Runner."""
        cache = self._room(start + len(tokens))
        ids = np.array([tokens], np.int32)
        positions = np.arange(start, start + len(tokens), dtype=np.int32)[None]
        hidden = decoder.forward(self._weights, self.config, ids, positions, cache)
        last: Logits = decoder.logits(self._weights, np.ascontiguousarray(hidden[:, -1]))[0]
        return last

    def all_logits(self, tokens: list[int]) -> Logits:
        """See Runner."""
        positions = np.arange(len(tokens), dtype=np.int32)[None]
        hidden = decoder.forward(self._weights, self.config, np.array([tokens], np.int32), positions)
        scores: Logits = decoder.logits(self._weights, hidden)[0]
        return scores

    def _empty(self, capacity: int) -> KVCache:
        try:
            return decoder.make_cache(self.config, 1, capacity, lambda shape: np.zeros(shape, np.float32))
        except MemoryError as error:
            raise PunaError(
                f"There is no memory for a cache of {capacity} tokens.",
                remedy="Lower --max-tokens or use a smaller model; `puna show` has the arithmetic.",
            ) from error
