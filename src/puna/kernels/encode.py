"""Packs float32 numbers into the block types of GGML: the definition, in NumPy.

What it is: round-to-nearest for each type a GGUF file is usually made of. Types of 32 numbers take the scale that their
extreme sets, bit for bit as the `gguf` package does. Types of 256 (the K types) look for the scale, and the minimum
where there is one, that leaves the smallest squared error: some spreads are tried, each with the scale and minimum that
fit its rounded numbers best (least squares), and after these are rounded themselves, their neighbours are tried too.
What it is not: fast (`ops.encode` has the C++ form, which gives the same bytes), or aware of what the numbers do in a
model: no importance matrix.
What is surprising: every sum is taken one by one in a written order, and no product is fused with an addition, so that
C++ can give the same bytes on every instruction set. Numbers lie transposed, [position, stretch], for that.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from puna.kernels.blocks import TYPES
from puna.kernels.layouts import F32, convert, to_bf16

U8 = npt.NDArray[np.uint8]
F16 = npt.NDArray[np.float16]

KINDS = (
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
)  # fmt: skip
"""The types that can be written; the others of `blocks.TYPES` can only be read."""

LARGEST = 2.0**30
"""No packed type holds a larger number: float16 scales end at 65504, times 63 · 15 at most, or 128 · 32."""

SPREADS = tuple(n / 4 for n in range(-4, 5))
"""How much wider than its steps a stretch is taken to be, in steps: the starting points of the search."""

_CHUNK = 4096  # blocks in memory at a time


def quantize(kind: str, values: F32) -> U8:
    """The blocks of float32 values [..., n · block]: uint8 [..., n · size].

    Raises ValueError for a type that cannot be written, a row that is no whole number of blocks, or a number that is
    infinite or NaN in a packed type; OverflowError for one that is too large for the type.
    """
    if kind not in KINDS:
        raise ValueError(f"{kind} cannot be written; one of {', '.join(KINDS)} can")
    row_bytes = TYPES[kind].row_bytes(values.shape[-1])
    values = np.ascontiguousarray(values, np.float32)
    shape = (*values.shape[:-1], row_bytes)
    if kind == "F32":
        return values.view(np.uint8).reshape(shape)
    if kind == "F16":
        half = convert(values, "fp16")
        assert isinstance(half, np.ndarray)
        return half.view(np.uint8).reshape(shape)
    if kind == "BF16":
        return to_bf16(values).bits.view(np.uint8).reshape(shape)
    check(kind, values)
    out = np.empty((values.size // TYPES[kind].block, TYPES[kind].size), np.uint8)
    blocks = values.reshape(-1, TYPES[kind].block)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):
        for at in range(0, len(blocks), _CHUNK):
            out[at : at + _CHUNK] = _encode(kind, blocks[at : at + _CHUNK])
    return out.reshape(shape)


def check(kind: str, values: F32) -> None:
    """Raises ValueError where a number is not finite, OverflowError where one is larger than any packed type holds."""
    if not values.size:
        return
    low, high = float(values.min()), float(values.max())  # NaN comes through both
    if not np.isfinite(low) or not np.isfinite(high):
        raise ValueError(f"a weight is infinite or not a number, which {kind} cannot hold")
    if max(-low, high) > LARGEST:
        raise too_large(kind)


def too_large(kind: str) -> OverflowError:
    """The error for a number whose scale float16 cannot hold."""
    return OverflowError(f"a weight is larger than {kind} can hold")


def _encode(kind: str, blocks: F32) -> U8:
    if kind == "Q8_0":
        return _q8_0(blocks)
    if kind in ("Q4_0", "Q5_0"):
        return _signed_32(kind, blocks, 8 if kind == "Q4_0" else 16)
    if kind in ("Q4_1", "Q5_1"):
        return _ranged_32(kind, blocks, 15 if kind == "Q4_1" else 31)
    if kind in ("Q3_K", "Q6_K"):
        return _signed_k(kind, blocks)
    return _ranged_k(kind, blocks)


def _ratio(a: Any, b: F32) -> F32:
    """a / b, and 0 where that is no finite number."""
    quotient = (np.float32(a) if not isinstance(a, np.ndarray) else a) / b
    return np.where(np.isfinite(quotient), quotient, np.float32(0))


def _half(kind: str, scales: F32) -> F16:
    """Scales as they are stored. Raises OverflowError for one that float16 cannot hold."""
    half = scales.astype(np.float16)
    if not bool(np.isfinite(half).all()):
        raise too_large(kind)
    return half


def _bytes(half: F16) -> U8:
    """float16 [n] → its bytes [n, 2]."""
    return half.astype("<f2", copy=False).view(np.uint8).reshape(-1, 2)


# ---- types of 32 numbers ----


def _q8_0(x: F32) -> U8:
    """q = round(x / d), halves away from zero; d = max |x| / 127."""
    d = np.abs(x).max(axis=1) / np.float32(127)
    scaled = x * _ratio(1, d)[:, None]
    whole = np.floor(np.abs(scaled))
    q = np.sign(scaled) * (whole + np.floor(2 * (np.abs(scaled) - whole)))
    return np.concatenate([_bytes(_half("Q8_0", d)), q.astype(np.int8).view(np.uint8)], axis=1)


def _signed_32(kind: str, x: F32, half: int) -> U8:
    """q = floor(x / d + half + 1/2), at most 2 · half - 1; d maps the number farthest from 0 to -half."""
    d = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], 1)[:, 0] / np.float32(-half)
    q = np.minimum(np.trunc(x * _ratio(1, d)[:, None] + np.float32(half + 0.5)), 2 * half - 1).astype(np.uint8)
    return np.concatenate([_bytes(_half(kind, d)), *_nibbles(q, half == 16)], axis=1)


def _ranged_32(kind: str, x: F32, top: int) -> U8:
    """q = floor((x - min) / d + 1/2), at most `top`; d = (max - min) / top."""
    # Of 0 and -0 either may be the minimum, or the maximum; adding 0 leaves 0.
    least = x.min(axis=1) + np.float32(0)
    d = (x.max(axis=1) - least + np.float32(0)) / np.float32(top)
    q = np.minimum(np.trunc((x - least[:, None]) * _ratio(1, d)[:, None] + np.float32(0.5)), top).astype(np.uint8)
    scales = [_bytes(_half(kind, d)), _bytes(_half(kind, least))]
    return np.concatenate([*scales, *_nibbles(q, top == 31)], axis=1)


def _nibbles(q: U8, fifth: bool) -> list[U8]:
    """[n, 32] → the fifth bits as 4 bytes where there are any, and 16 bytes with q[i] below and q[i + 16] above."""
    low: U8 = (q[:, :16] & np.uint8(15)) | (q[:, 16:] << np.uint8(4))
    return [np.packbits(q >> np.uint8(4), axis=1, bitorder="little"), low] if fifth else [low]


# ---- types of 256 numbers ----


def _columns(x: F32, stretch: int) -> F32:
    """[n, 256] → [stretch, n · 256 / stretch]: a column is what shares a scale."""
    return np.ascontiguousarray(x.reshape(-1, stretch).T)


def _sum(terms: F32) -> F32:
    """Over the first axis, one by one."""
    total: F32 = terms[0].copy()
    for term in terms[1:]:
        total += term
    return total


def _largest(scales: F32) -> F32:
    """[n, g] → of each row the number farthest from 0, the first of equals."""
    largest: F32 = np.take_along_axis(scales, np.abs(scales).argmax(axis=1)[:, None], 1)[:, 0]
    return largest


def _rounded(x: F32, scale: F32, minimum: F32, low: int, high: int) -> tuple[F32, F32]:
    """The nearest whole q in [low, high] for x = scale · q - minimum, and the sum of the squared errors."""
    q = np.rint(np.clip((x + minimum) * _ratio(1, scale), np.float32(low), np.float32(high)))
    error = x - (q * scale - minimum)
    return q, _sum(error * error)


def _fit_range(x: F32, top: int) -> tuple[F32, F32]:
    """Scale > 0 and minimum >= 0 of x ≈ scale · q - minimum with q in [0, top], for each column of x [k, n]."""
    count = np.float32(len(x))
    low = np.minimum(x.min(axis=0), np.float32(0))
    span = x.max(axis=0) - low
    total = _sum(x)
    scale, minimum = span / np.float32(top), -low
    _, least = _rounded(x, scale, minimum, 0, top)
    for spread in SPREADS:
        q = np.rint(np.clip((x - low) * _ratio(top + spread, span), np.float32(0), np.float32(top)))
        q1, q2, qx = _sum(q), _sum(q * q), _sum(q * x)
        s = _ratio(count * qx - q1 * total, count * q2 - q1 * q1)
        m = (s * q1 - total) / count
        s = np.where(m < 0, _ratio(qx, q2), s)
        m = np.maximum(m, np.float32(0))
        _, error = _rounded(x, s, m, 0, top)
        better = (error < least) & (s > 0)
        scale, minimum, least = (np.where(better, a, b) for a, b in ((s, scale), (m, minimum), (error, least)))
    return scale, minimum


def _ranged_k(kind: str, blocks: F32) -> U8:
    """Q2_K, Q4_K and Q5_K: scale and minimum of each stretch in whole multiples of the block's own d and dmin."""
    top, stretch, most = {"Q2_K": (3, 16, 15), "Q4_K": (15, 32, 63), "Q5_K": (31, 32, 63)}[kind]
    x = _columns(blocks, stretch)
    groups = 256 // stretch
    scale, minimum = _fit_range(x, top)
    # The largest, and never the negative zero that a maximum of zeros may be.
    d, dmin = (
        _half(kind, (each.reshape(-1, groups).max(axis=1) + np.float32(0)) / np.float32(most))
        for each in (scale, minimum)
    )
    unit, unit_min = (np.repeat(each.astype(np.float32), groups) for each in (d, dmin))

    def whole(multiple: F32) -> F32:
        return np.rint(np.clip(multiple, np.float32(0), np.float32(most)))

    first, first_min = whole(scale * _ratio(1, unit)), whole(minimum * _ratio(1, unit_min))
    best, best_min = first, first_min
    _, least = _rounded(x, unit * best, unit_min * best_min, 0, top)
    for step in (-1, 0, 1):
        for step_min in (-1, 0, 1):
            if step or step_min:
                s, m = whole(first + np.float32(step)), whole(first_min + np.float32(step_min))
                _, error = _rounded(x, unit * s, unit_min * m, 0, top)
                better = error < least
                best, best_min, least = (np.where(better, a, b) for a, b in ((s, best), (m, best_min), (error, least)))
    values, _ = _rounded(x, unit * best, unit_min * best_min, 0, top)
    q = values.T.reshape(-1, 256).astype(np.uint8)
    sc, mn = (each.reshape(-1, groups).astype(np.uint8) for each in (best, best_min))
    if kind == "Q2_K":
        return np.concatenate([sc | (mn << 4), _crumbs(q), _bytes(d), _bytes(dmin)], axis=1)
    # Six bits each in 12 bytes: the first four of each kind below, the others' low bits next, their high bits on top.
    first_four = [(each[:, :4] & 63) | ((each[:, 4:] >> 4) << 6) for each in (sc, mn)]
    scales = np.concatenate([*first_four, (sc[:, 4:] & 15) | ((mn[:, 4:] & 15) << 4)], axis=1)
    pairs = q.reshape(-1, 4, 2, 32)
    low = ((pairs[:, :, 0] & 15) | ((pairs[:, :, 1] & 15) << 4)).reshape(-1, 128)
    parts = [_bytes(d), _bytes(dmin), scales]
    if kind == "Q5_K":
        parts.append(np.packbits((q.reshape(-1, 8, 32) >> 4).swapaxes(1, 2), axis=2, bitorder="little")[:, :, 0])
    return np.concatenate([*parts, low], axis=1)


def _fit_signed(x: F32, half: int) -> F32:
    """The scale, of either sign, of x ≈ scale · q with q in [-half, half - 1], for each column of x [k, n]."""
    peak = _largest(x.T)
    zero = np.zeros_like(peak)
    scale = peak / np.float32(-half)
    _, least = _rounded(x, scale, zero, -half, half - 1)
    for spread in SPREADS:
        q = np.rint(np.clip(x * _ratio(-half - spread, peak), np.float32(-half), np.float32(half - 1)))
        s = _ratio(_sum(q * x), _sum(q * q))
        _, error = _rounded(x, s, zero, -half, half - 1)
        better = error < least
        scale, least = np.where(better, s, scale), np.where(better, error, least)
    return scale


def _signed_k(kind: str, blocks: F32) -> U8:
    """Q3_K and Q6_K: the scale of each stretch of 16 in whole multiples, of either sign, of the block's own d."""
    half, most = {"Q3_K": (4, 31), "Q6_K": (32, 127)}[kind]
    x = _columns(blocks, 16)
    scale = _fit_signed(x, half)
    d = _half(kind, _largest(scale.reshape(-1, 16)) / np.float32(-most - 1))
    unit = np.repeat(d.astype(np.float32), 16)

    def whole(multiple: F32) -> F32:
        return np.rint(np.clip(multiple, np.float32(-most - 1), np.float32(most)))

    zero = np.zeros_like(scale)
    first = whole(scale * _ratio(1, unit))
    best = first
    _, least = _rounded(x, unit * best, zero, -half, half - 1)
    for step in (-1, 1):
        s = whole(first + np.float32(step))
        _, error = _rounded(x, unit * s, zero, -half, half - 1)
        better = error < least
        best, least = np.where(better, s, best), np.where(better, error, least)
    values, _ = _rounded(x, unit * best, zero, -half, half - 1)
    q = (values.T.reshape(-1, 256) + np.float32(half)).astype(np.uint8)
    if kind == "Q6_K":
        quarters = q.reshape(-1, 2, 4, 32)
        low = (quarters[:, :, :2] & 15) | ((quarters[:, :, 2:] & 15) << 4)
        return np.concatenate(
            [
                low.reshape(-1, 128),
                _crumbs(q >> np.uint8(4)),
                best.reshape(-1, 16).astype(np.int8).view(np.uint8),
                _bytes(d),
            ],
            axis=1,
        )
    high = np.packbits((q.reshape(-1, 8, 32) >> 2).swapaxes(1, 2), axis=2, bitorder="little")[:, :, 0]
    sc = (best.reshape(-1, 16) + np.float32(32)).astype(np.uint8)
    low_bits = (sc[:, :8] & 15) | ((sc[:, 8:] & 15) << 4)
    top_bits = sc.reshape(-1, 4, 4) >> 4
    high_bits = top_bits[:, 0] | (top_bits[:, 1] << 2) | (top_bits[:, 2] << 4) | (top_bits[:, 3] << 6)
    return np.concatenate([high, _crumbs(q), low_bits, high_bits, _bytes(d)], axis=1)


def _crumbs(q: U8) -> U8:
    """Two bits each: [n, 256] → [n, 64]; of 128 numbers, 32 bytes hold the four that lie 32 apart."""
    quarters = (q & np.uint8(3)).reshape(-1, 2, 4, 32) << np.array([[0], [2], [4], [6]], np.uint8)
    packed: U8 = np.bitwise_or.reduce(quarters, axis=2).reshape(-1, 64)
    return packed
