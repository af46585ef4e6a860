"""The definition of every op, in plain NumPy: what each fast form is compared with.

What it is: the shortest correct statement of each operation, in float32, or in float64 where the input is float64
(that is how the tests measure the error of every other form, this one included).
What it is not: fast; packed weights are dequantized on each call, some rows at a time. It also runs whole models
(`--kernels reference`), which is how the C++ is checked end to end.
What is surprising: there is no padding. The tokens of a step are one row [N], whatever sequences they are of, and a
`PageTable` says where each stands and in which pages of the cache its sequence lies.

Shapes: `*` any leading dimensions, N tokens of B sequences, T tokens of a stretch, H query heads, G key/value heads
(H % G == 0), D head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from puna.kernels.encode import quantize
from puna.kernels.layouts import BF16, Cache, Packed, PageTable, Panels, Weight, to_bf16, to_float32, words

# Any, not np.floating: NumPy's stubs widen most float arithmetic to it, and every signature would need a cast.
Floats = npt.NDArray[Any]
Ints = npt.NDArray[Any]


def _as(weight: Weight, like: Floats) -> Floats:
    return to_float32(weight).astype(like.dtype, copy=False)


def embedding(table: Weight, ids: Ints) -> Floats:
    """Rows of `table` [V, dim] for `ids` [*], as float32 [*, dim]."""
    return to_float32(table if isinstance(table, Panels) else table[ids])  # which refuses Panels


def rms_norm(x: Floats, weight: Weight | None, eps: float) -> Floats:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension: [*, dim] → [*, dim] (Zhang & Sennrich 2019).

    Without a weight, its numbers are one.
    """
    scaled: Floats = x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + x.dtype.type(eps))
    return scaled if weight is None else scaled * _as(weight, x)


def layer_norm(x: Floats, weight: Weight, bias: Weight, eps: float) -> Floats:
    """(x − mean(x)) / sqrt(var(x) + eps) · weight + bias over the last dimension (Ba et al. 2016); var divides by n."""
    centred = x - np.mean(x, axis=-1, keepdims=True)
    scaled: Floats = centred / np.sqrt(np.mean(np.square(centred), axis=-1, keepdims=True) + x.dtype.type(eps))
    return scaled * _as(weight, x) + _as(bias, x)


def linear(x: Floats, weight: Weight, bias: Weight | None = None) -> Floats:
    """x · weightᵀ + bias: x [*, in], weight [out, in], bias [out] → [*, out].

    Infinity and NaN go through as IEEE 754 says, in silence, as in C++: a file may hold them.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if isinstance(weight, Packed):
            y = np.empty((*x.shape[:-1], weight.shape[0]), x.dtype)
            for rows in weight.row_chunks():
                y[..., rows] = x @ _as(weight[rows], x).T
        else:
            y = x @ _as(weight, x).T
        return y if bias is None else y + _as(bias, x)


def positions(ids: Ints) -> Ints:
    """The positions of ids [B, T] whose rows are whole stretches: 0 to T - 1 in each, int32 [B, T]."""
    return np.tile(np.arange(ids.shape[1], dtype=np.int32), (len(ids), 1))


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


def to_cache(values: Floats, cache: Cache) -> npt.NDArray[Any]:
    """Numbers [*, D] as the words of a KV cache of the same type as `cache`.

    bfloat16 and float16 round to nearest, ties to even; float16 saturates at ±65504, where infinity would make NaN of
    every later score. Q8_0 is ggml's: 32 numbers share d = max|x| / 127, kept in float16 (saturating too), and are
    round(x / d) with halves away from zero; a block with infinity or NaN in it is NaN as a whole.
    """
    if isinstance(cache, BF16):
        return to_bf16(values).bits
    if not isinstance(cache, Packed):
        most = np.finfo(cache.dtype).max
        return np.clip(values, -most, most).astype(cache.dtype) if cache.dtype == np.float16 else values
    blocks = values.astype(np.float32).reshape(*values.shape[:-1], -1, 32)
    scale = np.max(np.abs(blocks), axis=-1, keepdims=True) / np.float32(127)
    scale[~np.isfinite(scale)] = np.nan
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        scaled = np.where(scale > 0, blocks * (np.float32(1) / scale), 0)
        whole = np.trunc(scaled) + np.trunc(2 * (scaled - np.trunc(scaled)))
        numbers = np.clip(np.nan_to_num(whole), -127, 127).astype(np.int8)
    heads = np.concatenate([np.minimum(scale, 65504).astype(np.float16).view(np.uint8), numbers.view(np.uint8)], -1)
    return heads.reshape(*values.shape[:-1], -1)


def from_cache(cache: Cache, like: Floats) -> Floats:
    """The numbers of a KV cache, exactly, in the type of `like`."""
    if isinstance(cache, BF16):
        return _as(cache, like)
    if not isinstance(cache, Packed):
        return cache.astype(like.dtype, copy=False)
    blocks = cache.data.reshape(*cache.shape[:-1], -1, 34)
    scale = np.ascontiguousarray(blocks[..., :2]).view(np.float16).astype(like.dtype)
    return (scale * blocks[..., 2:].view(np.int8)).reshape(cache.shape)


def write_kv(cache_k: Cache, cache_v: Cache, k: Floats, v: Floats, table: PageTable) -> None:
    """Store k, v [N, G, D] in the caches [pages, page, G, D], in place, where `table` says; see `PageTable`.

    The caches' type says how numbers are rounded: see `to_cache`.
    """
    page = cache_k.shape[1]
    sequence = np.repeat(np.arange(len(table.pages)), np.diff(table.starts))
    number, row = table.pages[sequence, table.positions // page], table.positions % page
    for cache, new in ((cache_k, k), (cache_v, v)):
        words(cache)[number, row] = to_cache(new, cache)


def attention(q: Floats, k: Cache, v: Cache, table: PageTable | None, bf16: bool = False, chunk: int = 0) -> Floats:
    """softmax(q·kᵀ/√D)·v, causal and grouped, of q [N, H, D] over caches k and v [pages, page, G, D] → [N, H, D].

    A query at position p sees the keys of positions 0 to p of its own sequence, which lie where `table` says.
    `table=None` means that q [B, T, H, D], k and v [B, T, G, D] are whole stretches from 0: training, or scoring.
    `bf16` allows rounding, and nothing is rounded here.
    With a `chunk`, the token at position p sees nothing before p // chunk · chunk (Llama 4's local layers).
    Query head h reads key/value head h // (H / G) (Ainslie et al. 2023).
    """
    out = np.empty(q.shape, q.dtype)
    if table is None:
        for b, stretch in enumerate(q):
            out[b] = _causal(stretch, from_cache(k[b], q), from_cache(v[b], q), np.arange(q.shape[1]), chunk, 0)
        return out
    page = k.shape[1]
    for b, pages in enumerate(table.pages):
        tokens = slice(table.starts[b], table.starts[b + 1])
        seen = table.positions[tokens][-1] + 1
        first = table.positions[tokens][0] // chunk * chunk // page if chunk else 0
        used, seen = pages[first : -(-seen // page)], seen - first * page
        keys, values = (from_cache(cache[used], q).reshape(-1, *cache.shape[2:])[:seen] for cache in (k, v))
        out[tokens] = _causal(q[tokens], keys, values, table.positions[tokens], chunk, first * page)
    return out


def _causal(q: Floats, keys: Floats, values: Floats, positions: Ints, chunk: int, first: int) -> Floats:
    """Attention of the tokens q [T, H, D] at `positions` [T] over their own sequence's keys and values [S, G, D].

    The first of those stands at position `first`.
    """
    T, H, D = q.shape
    S, G, _ = keys.shape
    grouped = q.reshape(T, G, H // G, D)
    # einsum may lay its result out any way; over a last axis that is not contiguous np.sum adds one by one, not in
    # pairs, and 9,000 keys then cost a relative error of 1e-4 in float32.
    scores = np.ascontiguousarray(np.einsum("tgrd,sgd->tgrs", grouped, keys)) / q.dtype.type(D) ** 0.5
    keyed = np.arange(first, first + S)
    seen = keyed <= positions[:, None]  # [T, S]
    if chunk:
        seen &= keyed >= (positions // chunk * chunk)[:, None]
    scores = np.where(seen[:, None, None, :], scores, -np.inf)
    weights = np.exp(scores - np.max(scores, axis=-1, keepdims=True))
    weights = weights / np.sum(weights, axis=-1, keepdims=True)
    out: Floats = np.einsum("tgrs,sgd->tgrd", weights, values).reshape(T, H, D)
    return out


SCORES = 1 << 21
"""How many scores `attend` holds at a time: 8 MB of them are handled in the caches, not in memory."""


def attend(q: Floats, k: Floats, v: Floats) -> Floats:
    """softmax(q·kᵀ/√D)·v of q [*, Tq, H, D] over all of k and v [*, Tk, G, D] → [*, Tq, H, D]; grouped as `attention`.

    One key/value head after another and some queries at a time: 6,400 tokens of a picture that all see each other have
    scores of 2.6 GB in float32.
    """
    *lead, tokens, H, D = q.shape
    seen, G = k.shape[-3:-1]
    out = np.empty(q.shape, q.dtype)
    step = max(1, SCORES // (seen * (H // G)))
    for index in np.ndindex(*lead):
        for g in range(G):
            heads = slice(g * (H // G), (g + 1) * (H // G))
            # Each head's numbers beside one another: strided ones cost the products half of their speed.
            keys, values = np.ascontiguousarray(k[index][:, g].T), np.ascontiguousarray(v[index][:, g])
            for at in range(0, tokens, step):
                queries = q[index][at : at + step, heads] / q.dtype.type(math.sqrt(D))
                weights = queries.reshape(-1, D) @ keys
                weights -= np.max(weights, axis=-1, keepdims=True)
                np.exp(weights, out=weights)
                mean = (weights @ values) / np.sum(weights, axis=-1, keepdims=True)
                out[index][at : at + step, heads] = mean.reshape(queries.shape)
    return out


def gelu(x: Floats) -> Floats:
    """x · (1 + erf(x / √2)) / 2, any shape (Hendrycks & Gimpel 2016; the exact form, not the one with tanh)."""
    erf = np.frompyfunc(math.erf, 1, 1)(x / math.sqrt(2))
    halves: Floats = x * x.dtype.type(0.5) * (1 + np.asarray(erf, x.dtype))
    return halves


def gated(x: Floats, gate: Weight) -> Floats:
    """x · tanh(gate): x [*], gate [1]; a gate at 0 shuts off what it stands before (Alayrac et al. 2022)."""
    shut: Floats = x * np.tanh(_as(gate, x))
    return shut


def concat(parts: Sequence[Any], axis: int = -2) -> Floats:
    """Rows after one another: parts [*, T, dim], a vector [dim] of weights being a row, → [*, sum of T, dim].

    The leading dimensions broadcast. At least one part is an array of numbers, whose type the result has.
    With `axis` -1 columns beside one another, of arrays [*, T, columns].
    """
    if axis == -1:
        return np.concatenate(parts, axis=-1)
    like = max((part for part in parts if isinstance(part, np.ndarray)), key=lambda part: part.ndim)
    numbers = [part if getattr(part, "dtype", None) == like.dtype else _as(part, like) for part in parts]
    rows = [np.atleast_2d(part) for part in numbers]
    lead = np.broadcast_shapes(*(row.shape[:-2] for row in rows))
    return np.concatenate([np.broadcast_to(row, (*lead, *row.shape[-2:])) for row in rows], axis=-2)


def pad(x: Floats, rows: int) -> Floats:
    """x [*, T, dim] with rows of zeros after it: [*, rows, dim]."""
    out = np.zeros((*x.shape[:-2], rows, x.shape[-1]), x.dtype)
    out[..., : x.shape[-2], :] = x
    return out


def swiglu(gate: Floats, up: Floats) -> Floats:
    """silu(gate) · up, with silu(x) = x / (1 + e⁻ˣ): [*, hidden] twice → [*, hidden] (Shazeer 2020)."""
    with np.errstate(over="ignore"):
        gated: Floats = gate / (1 + np.exp(-gate)) * up
    return gated


def temperature(q: Floats, positions: Ints, floor: int, scale: float) -> Floats:
    """q [*, T, H, D] times 1 + scale · log(1 + ⌊(p + 1) / floor⌋) for its positions p [*, T].

    Llama 4's global layers: keys far away do not drown the near ones as there come to be more of them (Nakanishi 2025,
    arXiv 2501.19399).
    """
    scaled: Floats = q * temperatures(positions, floor, scale, q.dtype)[..., None, None]
    return scaled


def temperatures(positions: Ints, floor: int, scale: float, dtype: npt.DTypeLike) -> Floats:
    """What `temperature` multiplies the queries at positions [*] by."""
    number: Any = np.dtype(dtype).type
    steps = np.floor((positions + number(1)) / number(floor))
    longer: Floats = (np.log1p(steps) * number(scale) + number(1)).astype(dtype)
    return longer


def route(logits: Floats, k: int) -> tuple[Ints, Floats]:
    """The experts of each token, the k of the largest logits [*, E] (equals by their lower id), and sigmoid of those.

    Two of [*, k]. Raises ValueError for a k that is not between 1 and E.
    """
    chosen, values = top_k(logits, k)
    with np.errstate(over="ignore"):
        scores: Floats = 1 / (1 + np.exp(-values))
    return chosen, scores


def experts(
    x: Floats,
    chosen: Ints,
    scores: Floats,
    part: Callable[[int], tuple[Weight, Weight, Weight]],
    shared: tuple[Weight, Weight, Weight],
) -> Floats:
    """f(x), and Σ over a token's experts e of fₑ(s · x), with f(x) = down · (silu(gate · x) · (up · x)).

    `chosen` and `scores` are [*, k]; `part` gives the gate, up and down of an expert, and is asked for those that were
    chosen; `shared` are those of f. The score multiplies what goes in (Llama 4). Experts are added in their order.
    """

    def gated(rows: Floats, matrices: tuple[Weight, Weight, Weight]) -> Floats:
        gate, up, down = matrices
        return linear(swiglu(linear(rows, gate), linear(rows, up)), down)

    rows = x.reshape(-1, x.shape[-1])
    ids, weights = chosen.reshape(len(rows), -1), scores.reshape(len(rows), -1)
    out = gated(rows, shared)
    for e in np.unique(ids).tolist():
        at, slot = np.nonzero(ids == e)
        out[at] += gated(rows[at] * weights[at, slot, None], part(e))
    return out.reshape(x.shape)


def argmax(logits: Floats) -> Ints:
    """The id of the largest logit (the first of equals): [*, V] → int32 [*]."""
    ids: Ints = np.argmax(logits, axis=-1).astype(np.int32)
    return ids


def encode(kind: str, values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """float32 values [*, n · block] as blocks of a GGML type: uint8 [*, n · size]; `encode.quantize` defines them."""
    return quantize(kind, values)


def top_k(logits: Floats, k: int) -> tuple[Ints, Floats]:
    """The ids (int32) and values of the k largest logits: [*, V] → two of [*, k], 1 ≤ k ≤ V.

    Largest first, equals by their lower id; NaN counts as larger than any number.
    """
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"top_k: k = {k} is not between 1 and the vocabulary of {logits.shape[-1]}")
    # NaN sorts last, so of -x it would come last: it is made the largest by hand.
    ids = np.argsort(np.where(np.isnan(logits), -np.inf, -logits), axis=-1, kind="stable")
    nan_first = np.take_along_axis(~np.isnan(logits), ids, axis=-1)
    ids = np.take_along_axis(ids, np.argsort(nan_first, axis=-1, kind="stable"), axis=-1)[..., :k]
    return ids.astype(np.int32), np.take_along_axis(logits, ids, axis=-1)


SUM_PART = 512
"""How many exponentials `shortlist` sums together."""


def shortlist(
    rows: Sequence[npt.NDArray[np.float32]], scales: npt.NDArray[np.float32], k: int
) -> tuple[Ints, Floats, Floats]:
    """What a sampler needs to know of R rows of logits [V]: ids and values [R, k] as of `top_k`, and the sums of
    exp((x − max) · scale) over each SUM_PART logits, float32 [R, ceil(V / SUM_PART)], with a scale [R] for each row.

    A scale is above 0 and lies within 1e-37 and 1e30. Sums of a row whose largest logit is not finite mean nothing.
    """
    ids, values = top_k(np.stack(rows), k)
    return ids, values, above(rows, scales, values[:, 0], np.full(len(rows), -np.inf, np.float32))


def above(
    rows: Sequence[npt.NDArray[np.float32]],
    scales: npt.NDArray[np.float32],
    tops: npt.NDArray[np.float32],
    bounds: npt.NDArray[np.float32],
) -> Floats:
    """The sums of `shortlist` of only those logits that are above a bound [R]; tops [R] are the rows' maxima."""
    logits = np.stack(rows)
    with np.errstate(over="ignore", invalid="ignore"):
        weights = np.exp((logits - tops[:, None]) * scales[:, None]) * (logits > bounds[:, None])
    sums: Floats = np.add.reduceat(weights, np.arange(0, logits.shape[1], SUM_PART), axis=1)
    return sums


def allowed(rows: Sequence[npt.NDArray[np.float32]], masks: Sequence[npt.NDArray[np.uint32]]) -> Floats:
    """Copies [R, V] of R rows of logits [V] with minus infinity where the row's mask [ceil(V / 32)] has a bit 0.

    Token i has bit i % 32 of word i // 32, the lowest bit first. Raises ValueError for a mask of another length.
    """
    logits = np.stack(rows)
    if any(mask.shape != (-(-logits.shape[1] // 32),) for mask in masks) or len(masks) != len(rows):
        raise ValueError(f"allowed: a mask of the vocabulary of {logits.shape[1]} has another length")
    words = np.stack(masks).astype("<u4").view(np.uint8)
    bits = np.unpackbits(words, axis=1, count=logits.shape[1], bitorder="little")
    return np.where(bits, logits, np.float32(-np.inf))
