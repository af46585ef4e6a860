"""Choosing the next token from logits.

What it is: greedy choice, and temperature, top-k, top-p and min-p sampling, with a generator of its own per request.
What it is not: batched; it takes one row.
What is surprising: filters apply in transformers' order (temperature, top-k, top-p, min-p), each to what the one before
left. Ties at the border of top-k are all kept, as there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from puna.kernels import ops
from puna.types import Sampling

FEW = 64
"""How many of the likeliest tokens are looked at first."""

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
        ids, probabilities = candidates(logits, self._sampling)
        if self._random is None:
            self._random = np.random.default_rng(self._sampling.seed)
        drawn = _draw(probabilities, self._random.random())
        return drawn if ids is None else int(ids[drawn])


def candidates(
    logits: npt.NDArray[np.float32], sampling: Sampling
) -> tuple[npt.NDArray[np.signedinteger[Any]] | None, npt.NDArray[np.float64]]:
    """The ids from which `pick` draws, ascending (None: all), and their probabilities, float64.

    The temperature must be above 0. Raises FloatingPointError for NaN or infinite logits.
    """
    largest = logits.max()
    if not np.isfinite(largest):  # NaN is the largest of anything it is among
        raise FloatingPointError(_NO_NUMBERS)

    def weights(chosen: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        # A temperature near 0 sends all but the largest to minus infinity, as it should.
        with np.errstate(over="ignore"):
            scores = chosen.astype(np.float64)
            scores -= float(largest)
            scores /= sampling.temperature
            return np.asarray(np.exp(scores, out=scores))

    ids: npt.NDArray[np.signedinteger[Any]] | None = None
    if 0 < sampling.top_k < logits.size:
        ids = np.flatnonzero(logits >= ops.top_k(logits, sampling.top_k)[1][-1])
    if sampling.top_p < 1:
        ids = _nucleus(logits, ids, sampling.top_p, sampling.temperature, weights)
    elif ids is None and sampling.min_p > 0:  # the bulk goes before the exponentials; what is near stays for below
        ids = np.flatnonzero(logits > largest + sampling.temperature * np.log(sampling.min_p) * 1.001 - 0.01)
    probabilities = weights(logits if ids is None else logits[ids])
    probabilities /= probabilities.sum()
    if sampling.min_p > 0:
        likely = np.flatnonzero(probabilities >= sampling.min_p * probabilities.max())
        ids = likely if ids is None else ids[likely]
        probabilities = probabilities[likely] / probabilities[likely].sum()
    return ids, probabilities


def distribution(logits: npt.NDArray[np.float32], sampling: Sampling) -> npt.NDArray[np.float64]:
    """The probabilities [V] from which `pick` draws; arguments and errors as `candidates`."""
    ids, probabilities = candidates(logits, sampling)
    if ids is None:
        return probabilities
    whole = np.zeros(logits.size)
    whole[ids] = probabilities
    return whole


def _nucleus(
    logits: npt.NDArray[np.float32],
    ids: npt.NDArray[np.signedinteger[Any]] | None,
    top_p: float,
    temperature: float,
    weights: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float64]],
) -> npt.NDArray[np.signedinteger[Any]]:
    """The fewest of the likeliest of `ids` (None: all) whose share reaches top_p (Holtzman et al. 2020), ascending."""
    some = logits if ids is None else logits[ids]
    with np.errstate(over="ignore"):
        below = (some - some.max()) / np.float32(max(temperature, 1e-30))
    total = float(np.exp(below).sum())  # float32 is enough to see whether a few tokens reach top_p
    order, values = ops.top_k(some, min(FEW, some.size))
    share = weights(values) / total
    wanted = order[_wanted(share, top_p)]
    if len(wanted) == len(order) < some.size:  # more are wanted: sort only those about the border
        share = weights(some)
        share /= share.sum()
        depth = np.minimum(below * np.float32(-64), 8191).astype(np.int32)
        reached = np.cumsum(np.bincount(depth, share))
        border = min(int(np.searchsorted(reached, top_p)), len(reached) - 1)
        before = float(reached[border - 1]) if border else 0.0
        about = np.flatnonzero(depth == border)
        about = about[np.argsort(-some[about], kind="stable")]
        wanted = np.concatenate([np.flatnonzero(depth < border), about[_wanted(share[about], top_p - before)]])
    return np.sort(wanted if ids is None else ids[wanted])


def _wanted(share: npt.NDArray[np.float64], top_p: float) -> npt.NDArray[np.bool_]:
    """Of shares, largest first: those before which top_p is not reached yet."""
    return np.asarray(np.cumsum(share) - share < top_p)


def _draw(probabilities: npt.NDArray[np.float64], uniform: float) -> int:
    """The index that a number from [0, 1) stands for: inverse transform sampling over the running sum.

    Rounding may leave the sum short of 1, so the number is scaled. Whole stretches are passed over first: a running sum
    over a vocabulary takes as long as its exponentials.
    """
    starts = np.arange(0, len(probabilities), 512)
    running = np.cumsum(np.add.reduceat(probabilities, starts))
    at = uniform * running[-1]
    stretch = int(np.searchsorted(running, at, side="right"))
    first = int(starts[stretch])
    within = np.cumsum(probabilities[first : first + 512])
    before = running[stretch - 1] if stretch else 0.0
    # The stretch's own sums may round below what the sum of stretches says: then it is the last that has any.
    return first + min(
        int(np.searchsorted(within, at - before, side="right")), int(np.flatnonzero(within < within[-1]).size)
    )
