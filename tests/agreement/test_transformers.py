"""Puna against transformers' LlamaForCausalLM, by value, on small random models of every generation.

What it is: logits over {each generation page} x {fp32, bf16, fp16 weights} x {every way of feeding a sequence} x {short,
past the original context} x {NumPy reference, each C++ instruction set, torch}; gradients of the torch form; and the
two pairings of rope.
What is surprising: transformers always sees a row alone and whole. Padding, chunks and caches are ours to get right, so
the oracle has none of them.

Two measures. With fp32 weights: max |error| < 1e-4 x the largest |logit|. With bf16 or fp16 weights: both libraries
are compared with transformers' float32 answer on the same rounded weights, and Puna's distance may not be larger than
transformers' own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F

from puna.kernels import ops
from puna.models import decoder, llama3
from puna.models.config import DecoderConfig, read_hub
from puna.models.tree import DecoderWeights, KVCache, leaves, tree_map
from puna.weights import names

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]
CASES = (
    "llama1", "llama2-gqa", "codellama", "llama3", "llama3.1", "llama3.2", "biases", "linear", "head-dim",
)  # fmt: skip
SPANS = {"short": (11, 6, 9), "past-original-context": (83, 70, 77)}
FP32_LIMIT = 1e-4


class Ours:
    """A model of Puna on one kind of array, fed with NumPy ids and positions: logits come back as NumPy."""

    def __init__(self, config: DecoderConfig, weights: DecoderWeights) -> None:
        self.config, self.weights = config, weights
        self.torch = isinstance(weights.norm, torch.Tensor)

    def cache(self, batch: int, capacity: int) -> KVCache:
        def zeros(shape: tuple[int, ...]) -> Any:
            return torch.zeros(shape, dtype=self.weights.norm.dtype) if self.torch else np.zeros(shape, np.float32)

        return decoder.make_cache(self.config, batch, capacity, zeros)

    @torch.no_grad()
    def __call__(self, tokens: Ints, positions: Ints, cache: KVCache | None) -> Floats:
        """[B, T] twice → logits [B, T, V]."""
        inputs = (torch.from_numpy(tokens), torch.from_numpy(positions)) if self.torch else (tokens, positions)
        scores = decoder.logits(self.weights, decoder.forward(self.weights, self.config, *inputs, cache))
        result: Floats = scores.float().numpy() if self.torch else scores
        assert result.dtype == np.float32
        return result


def whole(length: int) -> Ints:
    return np.arange(length, dtype=np.int32)[None]


def prefill(model: Ours, rows: list[Ints]) -> list[Floats]:
    """Each row at once, into a cache with room to spare."""
    return [model(row[None], whole(len(row)), model.cache(1, len(row) + 5))[0] for row in rows]


def no_cache(model: Ours, rows: list[Ints]) -> list[Floats]:
    """Whole stretches, as training has them: the rows, cut to one length, in one batch."""
    length = min(map(len, rows))
    batch = np.stack([row[:length] for row in rows])
    return list(model(batch, np.repeat(whole(length), len(rows), 0), None))


def in_pieces(model: Ours, row: Ints, sizes: list[int]) -> Floats:
    cache, parts, start = model.cache(1, len(row)), [], 0
    for size in sizes:
        piece = row[None, start : start + size]
        parts.append(model(np.ascontiguousarray(piece), whole(len(row))[:, start : start + size].copy(), cache)[0])
        start += size
    assert start == len(row)
    return np.concatenate(parts)


def token_by_token(model: Ours, rows: list[Ints]) -> list[Floats]:
    """The first row, one token a call."""
    return [in_pieces(model, rows[0], [1] * len(rows[0]))]


def chunked(model: Ours, rows: list[Ints]) -> list[Floats]:
    """The first row in pieces of unequal sizes."""
    row = rows[0]
    return [in_pieces(model, row, [1, 4, 2, len(row) - 10, 3])]


def padded(rows: list[Ints], *, left: bool) -> tuple[Ints, Ints]:
    """Tokens and positions [B, T] of rows filled up to one length; what stands in for a token is a real id."""
    width = max(map(len, rows)) + 2
    tokens = np.full((len(rows), width), 7, np.int32)
    positions = np.full((len(rows), width), -1, np.int32)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if left else slice(0, len(row))
        tokens[i, where], positions[i, where] = row, whole(len(row))
    return tokens, positions


def batched(model: Ours, rows: list[Ints], *, left: bool) -> list[Floats]:
    tokens, positions = padded(rows, left=left)
    scores = model(tokens, positions, model.cache(len(rows), max(map(len, rows)) + 1))
    return [scores[i, positions[i] >= 0] for i in range(len(rows))]


def padded_right(model: Ours, rows: list[Ints]) -> list[Floats]:
    """All rows in one call, padding after them."""
    return batched(model, rows, left=False)


def padded_left(model: Ours, rows: list[Ints]) -> list[Floats]:
    """All rows in one call, padding before them."""
    return batched(model, rows, left=True)


def staggered(model: Ours, rows: list[Ints]) -> list[Floats]:
    """A padded prefill of all but four tokens, then steps of the whole batch, a different row idle at each of three."""
    last = 4
    heads = [row[:-last] for row in rows]
    tokens, positions = padded(heads, left=True)
    cache = model.cache(len(rows), max(map(len, rows)))
    scores = model(tokens, positions, cache)
    found = [[scores[i, positions[i] >= 0]] for i in range(len(rows))]
    at = [len(head) for head in heads]
    for step in range(last + 1):
        busy = [i for i in range(len(rows)) if i != step % (last + 1) and at[i] < len(rows[i])]
        tokens = np.array([[rows[i][at[i]] if i in busy else 5] for i in range(len(rows))], np.int32)
        positions = np.array([[at[i] if i in busy else -1] for i in range(len(rows))], np.int32)
        scores = model(tokens, positions, cache)
        for i in busy:
            found[i].append(scores[i])
            at[i] += 1
    assert at == [len(row) for row in rows]
    return [np.concatenate(parts) for parts in found]


def prefix_cached(model: Ours, rows: list[Ints]) -> list[Floats]:
    """The first row, its beginning computed elsewhere and its keys and values copied in."""
    row, shared = rows[0], len(rows[0]) // 2
    source, target = model.cache(1, shared), model.cache(1, len(row) + 3)
    first = model(row[None, :shared].copy(), whole(shared), source)[0]
    for old, new in zip((*source.keys, *source.values), (*target.keys, *target.values), strict=True):
        new[:, :shared] = old
    rest = model(row[None, shared:].copy(), whole(len(row))[:, shared:].copy(), target)[0]
    return [np.concatenate([first, rest])]


WAYS: tuple[Callable[[Ours, list[Ints]], list[Floats]], ...] = (
    prefill, no_cache, token_by_token, chunked, padded_right, padded_left, staggered, prefix_cached,
)  # fmt: skip


def flat(rows: list[Floats], like: list[Floats]) -> npt.NDArray[np.float64]:
    """Rows cut to the lengths of those in `like`, as one long vector."""
    return np.concatenate([row[: len(of)].ravel() for row, of in zip(rows, like, strict=False)]).astype(np.float64)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("case", CASES)
def test_logits(oracle: Any, kernels: str, case: str, dtype: str, span: str, way: Any) -> None:
    known = oracle(case, dtype)
    model = Ours(known.config, known.tensors if kernels == "torch" else known.host)
    found = way(model, [row[:length] for row, length in zip(known.ids, SPANS[span], strict=True)])
    exact, ours = flat(known.exact, found), flat(found, found)
    scale = np.abs(exact).max()
    error = np.abs(ours - exact)
    if dtype == "fp32":
        assert error.max() < FP32_LIMIT * scale
        return
    theirs = np.abs(flat(known.rounded, found) - exact)
    import os
    if os.environ.get("DUMP"):
        rms = lambda e: float(np.sqrt(np.mean(np.square(e))))
        with open(os.environ["DUMP"], "a") as f: print(kernels, dtype, case, span, way.__name__, rms(error)/rms(theirs), error.max()/theirs.max(), rms(theirs)/scale, file=f)
