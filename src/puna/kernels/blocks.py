"""The block types of GGML: how a stretch of 32 or 256 numbers of a GGUF file is packed into bytes.

What it is: the table of types, with the numbers of ggml's `ggml-common.h`, and the definition of each: what its bytes
stand for. Every packed type is small integers, a scale for each group of them and, in some types, an offset for each
group: value = scale · integer + offset. A type has one short function that says where these lie in a block.
What it is not: a file format (`puna.weights.gguf`), the order in which a kernel likes its weights (`layouts.Panels`),
or an encoder.
What is surprising: a row is a whole number of blocks, so a type fits a matrix only when its block divides the row.
Roundings happen in ggml's order, so the float32 values equal those of ggml and of PyPI's `gguf`, they are not just
close. Bytes of every pattern decode: a scale may be infinite or NaN, and then so are its values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from puna.kernels import codebooks

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class BlockType:
    """One type: ggml's number for it, how many values a block holds, and how many bytes it takes."""

    name: str
    ggml_id: int
    block: int
    size: int

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of `columns` values. Raises ValueError when a row is not a whole number of blocks."""
        if columns % self.block:
            raise ValueError(f"a row of {columns} is not a whole number of {self.name} blocks of {self.block}")
        return columns // self.block * self.size


TYPES: dict[str, BlockType] = {
    name: BlockType(name, ggml_id, block, size)
    for name, ggml_id, block, size in (
        ("F32", 0, 1, 4),
        ("F16", 1, 1, 2),
        ("Q4_0", 2, 32, 18),
        ("Q4_1", 3, 32, 20),
        ("Q5_0", 6, 32, 22),
        ("Q5_1", 7, 32, 24),
        ("Q8_0", 8, 32, 34),
        ("Q2_K", 10, 256, 84),
        ("Q3_K", 11, 256, 110),
        ("Q4_K", 12, 256, 144),
        ("Q5_K", 13, 256, 176),
        ("Q6_K", 14, 256, 210),
        ("IQ2_XXS", 16, 256, 66),
        ("IQ2_XS", 17, 256, 74),
        ("IQ3_XXS", 18, 256, 98),
        ("IQ1_S", 19, 256, 50),
        ("IQ4_NL", 20, 32, 18),
        ("IQ3_S", 21, 256, 110),
        ("IQ2_S", 22, 256, 82),
        ("IQ4_XS", 23, 256, 136),
        ("IQ1_M", 29, 256, 56),
        ("BF16", 30, 1, 2),
        ("TQ1_0", 34, 256, 54),
        ("TQ2_0", 35, 256, 66),
        ("MXFP4", 39, 32, 17),
    )
}  # fmt: skip
"""Every type a tensor of a Llama file may have, by ggml's name."""

_CHUNK = 1 << 18
"""Values that are decoded at a time: the temporaries stay within a few megabytes, near the caches."""


def dequantize(kind: str, data: U8) -> F32:
    """The values of rows of blocks: uint8 [*, n · size] → float32 [*, n · block], a new array.

    Equal to `gguf.quants.dequantize`. Raises ValueError for a `kind` outside TYPES or a last dimension that is not a
    whole number of blocks, and TypeError for data that is not uint8.
    """
    blocks, shape = _as_blocks(kind, data)
    out = np.empty((len(blocks), TYPES[kind].block), np.float32)
    for part in _parts(kind, len(blocks)):
        if kind in _DENSE:
            out[part] = _DENSE[kind](blocks[part])
            continue
        integers, scale, offset = _decode(kind, blocks[part])
        with np.errstate(invalid="ignore", over="ignore"):  # 0 · inf; and MXFP4 goes up to 12 · 2^127
            values = integers.astype(np.float32)
            values *= scale[:, :, None]
            if offset is not None:
                values += offset[:, :, None]
        out[part] = values.reshape(out[part].shape)
    return out.reshape(shape)


def exact_int8(kind: str, data: U8) -> tuple[npt.NDArray[np.int8], F32]:
    """The same values as integers, and a scale for each 16 of them: the form in which a kernel that has no code for a
    type of its own runs it.

    uint8 [*, n · size] → int8 [*, n · block] and float32 [*, n · block / 16]. Lossless: integer times scale in float32
    is what `dequantize` gives, bit for bit. Raises ValueError for a type that is not of this form (F32, F16, BF16, and
    those with offsets: Q4_1, Q5_1, Q2_K, Q4_K, Q5_K), and whatever `dequantize` raises.
    """
    blocks, shape = _as_blocks(kind, data)
    if kind in _DENSE or kind in _WITH_OFFSETS:
        raise ValueError(f"{kind} is not integers times scales")
    integers = np.empty((len(blocks), TYPES[kind].block), np.int8)
    scales = np.empty((len(blocks), TYPES[kind].block // 16), np.float32)
    for part in _parts(kind, len(blocks)):
        found, scale, _ = _decode(kind, blocks[part])
        integers[part] = found.reshape(integers[part].shape)
        scales[part] = np.repeat(scale, scales.shape[1] // scale.shape[1], axis=1)
    return integers.reshape(shape), scales.reshape(*shape[:-1], shape[-1] // 16)


def bf16_to_float32(bits: npt.NDArray[np.uint16]) -> F32:
    """bfloat16 words are the upper halves of float32 ones."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _as_blocks(kind: str, data: U8) -> tuple[U8, tuple[int, ...]]:
    """The data as [blocks, size], and the shape of its values."""
    if kind not in TYPES:
        raise ValueError(f"no block type {kind!r}; one of {', '.join(TYPES)}")
    if data.dtype != np.uint8:
        raise TypeError(f"blocks are uint8, not {data.dtype}")
    size, block = TYPES[kind].size, TYPES[kind].block
    if data.ndim == 0 or data.shape[-1] % size:
        raise ValueError(f"uint8 {list(data.shape)} is not a whole number of {kind} blocks of {size} bytes")
    return data.reshape(data.size // size, size), (*data.shape[:-1], data.shape[-1] // size * block)


def _parts(kind: str, blocks: int) -> Iterator[slice]:
    step = _CHUNK // TYPES[kind].block
    return (slice(start, start + step) for start in range(0, blocks, step))


_DENSE: dict[str, Callable[[U8], F32]] = {
    "F32": lambda blocks: blocks.view("<f4"),
    "F16": lambda blocks: _halves(blocks),
    "BF16": lambda blocks: bf16_to_float32(blocks.view("<u2")),
}

_Decoded = tuple[Array, Array, Array | None]
"""Integers [N, groups, group], float32 scales [N, groups], and offsets like the scales where the type has them.

Each of the functions below makes them of blocks [N, size]; its comment lists the fields of a block in their order, with
their bytes.
"""


def _decode(kind: str, blocks: U8) -> _Decoded:
    with np.errstate(invalid="ignore"):  # scales may be infinite or NaN
        return _DECODERS[kind](blocks)


def _halves(data: U8) -> Array:
    """float16 words as float32: [*, 2 n] → [*, n]."""
    return data.view("<f2").astype(np.float32)


def _planes(data: U8, bits: int) -> Array:
    """Bit fields, all the first ones before all the second ones: [N, *, W] → [N, *, 8 / bits, W]."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    planes: Array = (data[..., None, :] >> shifts[:, None]) & ((1 << bits) - 1)
    return planes


def _fields(data: U8, bits: int) -> Array:
    """Bit fields in the order of the bits, lowest first: [N, W] → [N, W · 8 / bits]."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    fields: Array = (data[..., None] >> shifts) & ((1 << bits) - 1)
    return fields.reshape(len(data), -1)


def _bit_signs(data: U8) -> Array:
    """1 where a bit is clear and -1 where it is set, lowest first: [N, W] → int8 [N, 8 W]."""
    return 1 - 2 * np.unpackbits(data, axis=-1, bitorder="little").view(np.int8)


def _q4_0(b: U8) -> _Decoded:  # scale 2, 4-bit codes 16: value i in the low half of byte i, i + 16 in the high half
    return _planes(b[:, 2:], 4).reshape(-1, 1, 32).view(np.int8) - 8, _halves(b[:, :2]), None


def _q4_1(b: U8) -> _Decoded:  # scale 2, offset 2, codes 16
    return _planes(b[:, 4:], 4).reshape(-1, 1, 32), _halves(b[:, :2]), _halves(b[:, 2:4])


def _five_bits(high: U8, low: U8) -> Array:
    """Codes of 5 bits: the fifth of value i is bit i of `high` [N, 4], the others as in Q4_0 in `low` [N, 16]."""
    fifth = np.unpackbits(high, axis=-1, bitorder="little")
    codes: Array = _planes(low, 4).reshape(-1, 32) | fifth << 4
    return codes.reshape(-1, 1, 32)


def _q5_0(b: U8) -> _Decoded:  # scale 2, fifth bits 4, low bits 16
    return _five_bits(b[:, 2:6], b[:, 6:]).view(np.int8) - 16, _halves(b[:, :2]), None


def _q5_1(b: U8) -> _Decoded:  # scale 2, offset 2, fifth bits 4, low bits 16
    return _five_bits(b[:, 4:8], b[:, 8:]), _halves(b[:, :2]), _halves(b[:, 2:4])


def _q8_0(b: U8) -> _Decoded:  # scale 2, integers 32
    return b[:, None, 2:].view(np.int8), _halves(b[:, :2]), None


def _q2_k(b: U8) -> _Decoded:  # groups of 16: scales 16 (4 bits for the scale, 4 for the offset), codes 64, 2 × float16
    scale = _halves(b[:, 80:82]) * (b[:, :16] & 15)
    offset = _halves(b[:, 82:84]) * (b[:, :16] >> 4)
    return _planes(b[:, 16:80].reshape(-1, 2, 32), 2).reshape(-1, 16, 16), scale, -offset


def _q3_k(b: U8) -> _Decoded:  # groups of 16: third bits 32, low bits 64, 6-bit scales 12, float16
    low, high = _planes(b[:, 96:104], 4).reshape(-1, 16), _planes(b[:, 104:108], 2).reshape(-1, 16)
    scale = _halves(b[:, 108:]) * ((low | high << 4).view(np.int8) - 32)
    codes = _planes(b[:, 32:96].reshape(-1, 2, 32), 2).reshape(-1, 16, 16)
    third = _planes(b[:, :32], 1).reshape(-1, 16, 16)
    return (codes | third << 2).view(np.int8) - 4, scale, None


def _k_scales(b: U8) -> tuple[Array, Array]:
    """Scales and offsets of Q4_K and Q5_K for 8 groups of 32: two float16, then 12 bytes with 2 × 8 numbers of 6 bits.

    Bytes 0-3 have those of scales 0-3, bytes 4-7 of offsets 0-3; the low halves of bytes 8-11 have the low bits of
    scales 4-7, the high halves those of offsets 4-7, whose two high bits are on top of bytes 0-3 and 4-7.
    """
    first, second, last = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scales = np.concatenate([first & 63, last & 15 | first >> 6 << 4], axis=1)
    offsets = np.concatenate([second & 63, last >> 4 | second >> 6 << 4], axis=1)
    return _halves(b[:, :2]) * scales, -(_halves(b[:, 2:4]) * offsets)


def _q4_k(b: U8) -> _Decoded:  # 2 × float16, scales and offsets 12, codes 128
    return _planes(b[:, 16:].reshape(-1, 4, 32), 4).reshape(-1, 8, 32), *_k_scales(b)


def _q5_k(b: U8) -> _Decoded:  # 2 × float16, scales and offsets 12, fifth bits 32, low bits 128
    low = _planes(b[:, 48:].reshape(-1, 4, 32), 4).reshape(-1, 8, 32)
    return low | _planes(b[:, 16:48], 1) << 4, *_k_scales(b)


def _q6_k(b: U8) -> _Decoded:  # groups of 16: low bits 128, high bits 64, scales 16, float16
    low = _planes(b[:, :128].reshape(-1, 2, 64), 4).reshape(-1, 16, 16)
    high = _planes(b[:, 128:192].reshape(-1, 2, 32), 2).reshape(-1, 16, 16)
    scale = _halves(b[:, 208:]) * b[:, 192:208].view(np.int8)
    return (low | high << 4).view(np.int8) - 32, scale, None


def _iq4_nl(b: U8) -> _Decoded:  # scale 2, codes 16 as in Q4_0
    levels = np.array(codebooks.IQ4_LEVELS, np.int8)
    return levels[_planes(b[:, 2:], 4).reshape(-1, 1, 32)], _halves(b[:, :2]), None


def _iq4_xs(b: U8) -> _Decoded:  # groups of 32: float16, high 2 bits of the scales 2, low 4 bits 4, codes 128
    scales = (_fields(b[:, 4:8], 4) | _fields(b[:, 2:4], 2) << 4).view(np.int8) - 32
    levels = np.array(codebooks.IQ4_LEVELS, np.int8)
    codes = _planes(b[:, 8:].reshape(-1, 8, 16), 4).reshape(-1, 8, 32)
    return levels[codes], _halves(b[:, :2]) * scales, None


def _mxfp4(b: U8) -> _Decoded:  # power-of-two scale 1, codes 16 as in Q4_0
    levels = np.array(codebooks.FP4_LEVELS, np.int8)
    # The levels are doubled, hence 128 for the standard's 127.
    scale = np.ldexp(np.float32(1), b[:, :1].astype(np.int32) - 128)
    return levels[_planes(b[:, 1:], 4).reshape(-1, 1, 32)], scale, None


def _tq1_0(b: U8) -> _Decoded:  # five ternary digits a byte 48, four a byte 4, float16
    # A byte is a fraction of 256: times 3^i, modulo 1, its first ternary digit is digit i.
    def digits(data: U8, count: int) -> Array:
        turned = data[:, None, :] * 3 ** np.arange(count, dtype=np.uint8)[:, None]
        return (turned.astype(np.uint16) * 3 >> 8).reshape(len(data), -1)

    every = np.concatenate([digits(b[:, :32], 5), digits(b[:, 32:48], 5), digits(b[:, 48:52], 4)], axis=1)
    return every.astype(np.int8)[:, None, :] - 1, _halves(b[:, 52:]), None


def _tq2_0(b: U8) -> _Decoded:  # 2-bit codes 64, float16
    return _planes(b[:, :64].reshape(-1, 2, 32), 2).reshape(-1, 1, 256).view(np.int8) - 1, _halves(b[:, 64:]), None


def _quarter_scales(scale: Array, numerators: Array) -> Array:
    """(numerator + ½) · scale / 4, the scales of IQ2."""
    scales: Array = scale * (numerators.astype(np.float32) + 0.5) * 0.25
    return scales


def _signs_and_scale(words: Array) -> tuple[Array, Array]:
    """Words of IQ2_XXS and IQ3_XXS, [N, 8]: four 7-bit indices of 8 signs → [N, 8, 32], and a 4-bit number [N, 8]."""
    indices = words[:, :, None] >> np.arange(0, 28, 7, dtype=np.uint32) & 127
    return codebooks.signs()[indices].reshape(-1, 8, 32), words >> 28


def _iq2_xxs(b: U8) -> _Decoded:  # float16, 8 groups of 32: four 8-bit indices 4, signs and scale 4
    groups = b[:, 2:].reshape(-1, 8, 8)
    signs, numerators = _signs_and_scale(groups[:, :, 4:].view("<u4")[:, :, 0])
    vectors = codebooks.grid("IQ2_XXS")[groups[:, :, :4]].reshape(-1, 8, 32)
    return vectors * signs, _quarter_scales(_halves(b[:, :2]), numerators), None


def _iq2_xs(
    b: U8,
) -> _Decoded:  # groups of 16: float16, 32 words of a 9-bit index and a 7-bit one of signs 64, scales 8
    words = b[:, 2:66].view("<u2")
    integers = codebooks.grid("IQ2_XS")[words & 511] * codebooks.signs()[words >> 9]
    return integers.reshape(-1, 16, 16), _quarter_scales(_halves(b[:, :2]), _fields(b[:, 66:], 4)), None


def _iq2_s(b: U8) -> _Decoded:  # groups of 16: float16, low 8 bits of indices 32, signs 32, high 2 bits 8, scales 8
    indices = b[:, 2:34] | _fields(b[:, 66:74], 2).astype(np.uint16) << 8
    integers = codebooks.grid("IQ2_S")[indices].reshape(-1, 256) * _bit_signs(b[:, 34:66])
    return integers.reshape(-1, 16, 16), _quarter_scales(_halves(b[:, :2]), _fields(b[:, 74:], 4)), None


def _iq3_xxs(b: U8) -> _Decoded:  # groups of 32: float16, 8-bit indices 64, signs and scales 32
    signs, numerators = _signs_and_scale(b[:, 66:].view("<u4"))
    vectors = codebooks.grid("IQ3_XXS")[b[:, 2:66]].reshape(-1, 8, 32)
    return vectors * signs, _halves(b[:, :2]) * (numerators.astype(np.float32) + 0.5) * 0.5, None


def _iq3_s(b: U8) -> _Decoded:  # groups of 32: float16, low 8 bits of indices 64, ninth bits 8, signs 32, scales 4
    indices = b[:, 2:66] | np.unpackbits(b[:, 66:74], axis=-1, bitorder="little").astype(np.uint16) << 8
    integers = codebooks.grid("IQ3_S")[indices].reshape(-1, 256) * _bit_signs(b[:, 74:106])
    return integers.reshape(-1, 8, 32), _halves(b[:, :2]) * (2 * _fields(b[:, 106:], 4) + 1), None


def _eighths(indices: Array, minus: Array) -> Array:
    """The vectors of IQ1 (-1, 0, 1, each plus or minus ⅛), in eighths: indices and `minus` [N, 32] → int8 [N, 256]."""
    shift = np.where(minus, np.int8(-1), np.int8(1))
    return (codebooks.grid("IQ1_S")[indices] * 8 + shift[:, :, None]).reshape(-1, 256)


def _iq1_s(b: U8) -> _Decoded:  # groups of 32: float16, low 8 bits of indices 32, words 16
    words = b[:, 34:].view("<u2")  # four times the high 3 bits of an index, scale 3 bits, sign of the eighth
    high = words[:, :, None] >> np.arange(0, 12, 3, dtype=np.uint16) & 7
    indices = b[:, 2:34] | high.reshape(-1, 32) << 8
    integers = _eighths(indices, np.repeat(words >> 15, 4, axis=1))
    return integers.reshape(-1, 8, 32), _halves(b[:, :2]) * (2 * (words >> 12 & 7) + 1) / 8, None


def _iq1_m(
    b: U8,
) -> _Decoded:  # groups of 16: low 8 bits of indices 32, high 3 bits and sign of the eighth 16, scales 8
    words = b[:, 48:].view("<u2")  # four scales of 3 bits, and on top a quarter of the float16, the lowest first
    tops = (words >> 12) << np.arange(0, 16, 4, dtype=np.uint16)
    scale = np.bitwise_or.reduce(tops, axis=1, keepdims=True).view(np.float16).astype(np.float32)
    numerators = (words[:, :, None] >> np.arange(0, 12, 3, dtype=np.uint16) & 7).reshape(-1, 16)
    high = _fields(b[:, 32:48], 4)
    integers = _eighths(b[:, :32] | (high & 7).astype(np.uint16) << 8, high & 8)
    return integers.reshape(-1, 16, 16), scale * (2 * numerators + 1) / 8, None


_DECODERS: dict[str, Callable[[U8], _Decoded]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ1_S": _iq1_s,
    "IQ1_M": _iq1_m,
    "IQ2_XXS": _iq2_xxs,
    "IQ2_XS": _iq2_xs,
    "IQ2_S": _iq2_s,
    "IQ3_XXS": _iq3_xxs,
    "IQ3_S": _iq3_s,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
    "MXFP4": _mxfp4,
}

_WITH_OFFSETS = frozenset({"Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K"})
