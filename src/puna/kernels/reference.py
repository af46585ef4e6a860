"""The definition of every op, in plain NumPy: what each fast form is compared with.

What it is: the shortest correct statement of each operation, in float32, or in float64 where the input is float64
(that is how the tests measure the error of every other form, this one included).
What it is not: fast. It also runs whole models (`--kernels reference`), which is how the C++ is checked end to end.
What is surprising: a position of -1 marks padding. Padding writes nothing to the cache, sees nothing, and attends to
zeros; its rows of the output are 0 and mean nothing.

Shapes: `*` any leading dimensions, B sequences, T new tokens, S cached tokens, H query heads, G key/value heads
(H % G == 0), D head size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from puna.kernels.layouts import Weight, to_float32

# Any, not np.floating: NumPy's stubs widen most float arithmetic to it, and every signature would need a cast.
Floats = npt.NDArray[Any]
Ints = npt.NDArray[Any]


def _as(weight: Weight, like: Floats) -> Floats:
    return to_float32(weight).astype(like.dtype, copy=False)


def embedding(table: Weight, ids: Ints) -> Floats:
    """Rows of `table` [V, dim] for `ids` [*], as float32 [*, dim]."""
    return to_float32(table[ids])


def rms_norm(x: Floats, weight: Weight, eps: float) -> Floats:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension: [*, dim] → [*, dim] (Zhang & Sennrich 2019)."""
    scaled: Floats = x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + x.dtype.type(eps))
    return scaled * _as(weight, x)


def linear(x: Floats, weight: Weight, bias: Weight | None = None) -> Floats:
    """x · weightᵀ + bias: x [*, in], weight [out, in], bias [out] → [*, out]."""
    y = x @ _as(weight, x).T
    return y if bias is None else y + _as(bias, x)


def rope_table(positions: Ints, inv_freq: npt.NDArray[np.float32]) -> tuple[Floats, Floats]:
    """cos and sin of position · inv_freq: positions [*, T], inv_freq [D/2] → two of [*, T, D/2] (Su et al. 2021).

    The angle is a float32 product, as in Meta's code and transformers: at position 100,000 a more exact one would
    differ from what the models were trained with.
    """
    angle = positions[..., None].astype(np.float32) * inv_freq
    return np.cos(angle), np.sin(angle)


def rope(x: Floats, cos: Floats, sin: Floats, interleaved: bool) -> Floats:
    """Rotate pairs of x [*, T, H, D] by the angles of `rope_table` [*, T, D/2].

    A pair is (x[2i], x[2i+1]) when `interleaved` (Meta, llama2.c) and (x[i], x[i + D/2]) otherwise (Hugging Face).
    """
    cos, sin = cos[..., None, :].astype(x.dtype), sin[..., None, :].astype(x.dtype)
    half = x.shape[-1] // 2
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    turned = (a * cos - b * sin, b * cos + a * sin)
    return np.stack(turned, axis=-1).reshape(x.shape) if interleaved else np.concatenate(turned, axis=-1)


def write_kv(cache_k: Floats, cache_v: Floats, k: Floats, v: Floats, positions: Ints) -> None:
    """Store k, v [B, T, G, D] in the caches [B, S, G, D], in place, at `positions` [B, T]; -1 is not stored."""
    row, column = np.nonzero(positions >= 0)
    cache_k[row, positions[row, column]] = k[row, column]
    cache_v[row, positions[row, column]] = v[row, column]


def attention(q: Floats, k: Floats, v: Floats, positions: Ints | None) -> Floats:
    """softmax(q·kᵀ/√D)·v, causal and grouped: q [B, T, H, D], k and v [B, S, G, D] → [B, T, H, D].

    A query at position p sees keys 0 to p, where key s is the one of position s; `positions` [B, T], -1 is padding.
    `positions=None` means that q, k and v are one stretch that starts at 0 (T == S): training, or scoring.
    Query head h reads key/value head h // (H / G) (Ainslie et al. 2023).
    """
    B, T, H, D = q.shape
    S, G = k.shape[1], k.shape[2]
    if positions is None:
        positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    grouped = q.reshape(B, T, G, H // G, D)
    # einsum may lay its result out any way; over a last axis that is not contiguous np.sum adds one by one, not in
    # pairs, and 9,000 keys then cost a relative error of 1e-4 in float32.
    scores = np.ascontiguousarray(np.einsum("btgrd,bsgd->btgrs", grouped, k)) / q.dtype.type(D) ** 0.5
    seen = np.arange(S) <= positions[..., None]  # [B, T, S]
    scores = np.where(seen[:, :, None, None, :], scores, -np.inf)
    peak = np.max(scores, axis=-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(peak), peak, 0))
    total = np.sum(weights, axis=-1, keepdims=True)
    weights = weights / np.where(total == 0, 1, total)
    out: Floats = np.einsum("btgrs,bsgd->btgrd", weights, v).reshape(B, T, H, D)
    return out.astype(q.dtype, copy=False)


def swiglu(gate: Floats, up: Floats) -> Floats:
    """silu(gate) · up, with silu(x) = x / (1 + e⁻ˣ): [*, hidden] twice → [*, hidden] (Shazeer 2020)."""
    with np.errstate(over="ignore"):
        gated: Floats = gate / (1 + np.exp(-gate)) * up
    return gated


def argmax(logits: Floats) -> Ints:
    """The id of the largest logit (the first of equals): [*, V] → int32 [*]."""
    ids: Ints = np.argmax(logits, axis=-1).astype(np.int32)
    return ids
