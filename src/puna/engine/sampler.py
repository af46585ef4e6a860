"""Choosing the next token from logits.

What it is: greedy choice, and temperature, top-k, top-p and min-p sampling, with a generator of its own per request.
What it is not: batched; it takes one row.
What is surprising: filters apply in transformers' order (temperature, top-k, top-p, min-p), each to what the one before
left. Ties at the border of top-k are all kept, as there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from puna.kernels import ops
from puna.types import Sampling

_NO_NUMBERS = "the model's logits are not numbers"


class Sampler:
    """Draws token ids from logits [V] for one request; the same seed gives the same draws."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._random: np.random.Generator | None = None

    def pick(self, logits: npt.NDArray[np.float32]) -> int:
        """The next token's id. Raises FloatingPointError for NaN or infinite logits: the weights are damaged."""
        if self._sampling.temperature == 0:
            token = int(ops.argmax(logits))
            if not np.isfinite(logits[token]):
                raise FloatingPointError(_NO_NUMBERS)
            return token
        probabilities = distribution(logits, self._sampling)
        if self._random is None:
            self._random = np.random.default_rng(self._sampling.seed)
        # Inverse transform sampling over the running sum; rounding may leave it short of 1, so scale the draw.
        running = np.cumsum(probabilities)
        return int(np.searchsorted(running, self._random.random() * running[-1], side="right"))


def distribution(logits: npt.NDArray[np.float32], sampling: Sampling) -> npt.NDArray[Any]:
    """The probabilities [V], float64, from which `pick` draws; temperature must be above 0."""
    scores = logits.astype(np.float64)
    largest = scores.max()
    if not np.isfinite(largest):  # NaN is the largest of anything it is among
        raise FloatingPointError(_NO_NUMBERS)
    with np.errstate(over="ignore"):  # a temperature near 0 sends all but the largest to minus infinity, as it should
        scores = (scores - largest) / sampling.temperature
    if 0 < sampling.top_k < scores.size:
        scores[scores < np.partition(scores, -sampling.top_k)[-sampling.top_k]] = -np.inf
    if sampling.top_p < 1:
        # Keep the fewest of the likeliest whose sum reaches top_p: drop those before which it is reached already.
        order = np.argsort(-scores, kind="stable")
        ranked = _softmax(scores[order])
        scores[order[np.cumsum(ranked) - ranked >= sampling.top_p]] = -np.inf
    probabilities = _softmax(scores)
    if sampling.min_p > 0:
        probabilities[probabilities < sampling.min_p * probabilities.max()] = 0
        probabilities /= probabilities.sum()
    return probabilities


def _softmax(scores: npt.NDArray[Any]) -> npt.NDArray[Any]:
    weights = np.exp(scores - scores.max())
    return np.asarray(weights / weights.sum())
