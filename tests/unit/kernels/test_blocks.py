"""The block types against PyPI's `gguf`, by value, and what reads them: layouts and the reference ops.

What is surprising: random bytes serve as blocks. Every pattern means something, and one float16 scale in 32 is infinite
or NaN, so both the usual and the extreme come up.
"""

from __future__ import annotations

import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from gguf.constants import GGML_QUANT_SIZES

from puna.kernels import codebooks
from puna.kernels import reference as ref
from puna.kernels.blocks import TYPES, dequantize, exact_int8
from puna.kernels.layouts import BF16, Packed, Panels, convert, dtype_name, to_bf16, to_float32

KINDS = list(TYPES)
DENSE = {"F32", "F16", "BF16"}
WITH_OFFSETS = {"Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K"}
OURS_TO_INT8 = sorted(set(KINDS) - DENSE - WITH_OFFSETS)


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    """Infinite and NaN scales are data, nothing to warn of."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def random_bytes(seed: int, *shape: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def theirs(kind: str, data: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])


def assert_same(got: npt.NDArray[Any], want: npt.NDArray[Any]) -> None:
    """The same float32 numbers, signs of zeros included; NaN is NaN, whatever its payload."""
    assert got.dtype == np.float32
    assert got.shape == want.shape
    numbers = ~np.isnan(want)
    assert np.array_equal(numbers, ~np.isnan(got))
    assert np.array_equal(got[numbers].view(np.uint32), want[numbers].view(np.uint32))


def moderate(kind: str, count: int) -> npt.NDArray[np.uint8]:
    """`count` blocks whose largest values lie between 0.01 and 100: uint8 [count, size]."""
    pool = random_bytes(0, 60 * count, TYPES[kind].size)
    with np.errstate(invalid="ignore"):
        largest = np.abs(dequantize(kind, pool)).max(axis=1)
        chosen = pool[(largest > 0.01) & (largest < 100)][:count]
    assert len(chosen) == count
    return chosen


def packed(kind: str, rows: int, columns: int) -> Packed:
    return Packed(kind, (rows, columns), moderate(kind, rows * columns // TYPES[kind].block).reshape(rows, -1))


def test_table_is_that_of_ggml() -> None:
    for kind, known in TYPES.items():
        number = gguf.GGMLQuantizationType[kind]
        assert (known.name, known.ggml_id) == (kind, number.value)
        assert (known.block, known.size) == GGML_QUANT_SIZES[number]


@pytest.mark.parametrize("kind", KINDS)
def test_random_blocks(kind: str) -> None:
    data = random_bytes(1, 3, 5, 7 * TYPES[kind].size)
    got = dequantize(kind, data)
    assert got.shape == (3, 5, 7 * TYPES[kind].block)
    assert_same(got, theirs(kind, data))
    if kind != "F32":  # where a number in 256 is one
        assert np.isfinite(got).mean() > 0.8


@pytest.mark.parametrize("kind", KINDS)
def test_more_than_is_decoded_at_a_time(kind: str) -> None:
    data = random_bytes(2, ((1 << 18) // TYPES[kind].block + 3) * TYPES[kind].size)
    assert_same(dequantize(kind, data), theirs(kind, data))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("byte", [0x00, 0x01, 0x7B, 0x7C, 0x80, 0xFC, 0xFF])
def test_extreme_blocks(kind: str, byte: int) -> None:
    """Zeros, subnormal, largest, infinite and NaN scales, smallest and largest codes."""
    for low in (byte, 0):
        data = np.full((2, 2 * TYPES[kind].size), byte, np.uint8)
        data[:, ::2] = low
        assert_same(dequantize(kind, data), theirs(kind, data))


@pytest.mark.parametrize("kind", KINDS)
def test_all_zero_bytes_are_zeros(kind: str) -> None:
    assert not dequantize(kind, np.zeros((2, TYPES[kind].size), np.uint8)).any()


@pytest.mark.parametrize("kind", KINDS)
def test_every_bit_counts(kind: str) -> None:
    """Each bit of a block changes some value, in at least one of ten blocks: no field is overlooked."""
    bits = np.arange(8 * TYPES[kind].size)
    counts = np.zeros(len(bits), bool)
    for block in moderate(kind, 10):
        flipped = np.tile(block, (len(bits), 1))
        flipped[bits, bits // 8] ^= (1 << bits % 8).astype(np.uint8)
        changed = dequantize(kind, flipped).view(np.uint32) != dequantize(kind, block).view(np.uint32)
        counts |= changed.any(axis=1)
    assert counts.all(), np.flatnonzero(~counts)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_need_not_be_contiguous_or_aligned(kind: str) -> None:
    row = 2 * TYPES[kind].size
    wide = random_bytes(4, 6, row + 5)
    got = dequantize(kind, wide[::2, 3 : 3 + row])
    assert_same(got, theirs(kind, np.ascontiguousarray(wide[::2, 3 : 3 + row])))
    readonly = wide[:1, :row].copy()
    readonly.flags.writeable = False
    assert dequantize(kind, readonly).flags.writeable


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_gives_nothing(kind: str) -> None:
    assert dequantize(kind, np.empty((0, 3 * TYPES[kind].size), np.uint8)).shape == (0, 3 * TYPES[kind].block)
    assert dequantize(kind, np.empty((4, 0), np.uint8)).shape == (4, 0)


@pytest.mark.parametrize("read", [dequantize, exact_int8])
def test_wrong_data_is_refused(read: Callable[..., Any]) -> None:
    for kind in OURS_TO_INT8:
        size = TYPES[kind].size
        for wrong in (size - 1, size + 1, 1):
            with pytest.raises(ValueError, match=f"whole number of {kind} blocks of {size} bytes"):
                read(kind, np.zeros((2, wrong), np.uint8))
    with pytest.raises(ValueError, match="whole number"):
        read("Q8_0", np.array(3, np.uint8))
    with pytest.raises(ValueError, match="no block type 'Q9_0'"):
        read("Q9_0", np.zeros(34, np.uint8))
    with pytest.raises(TypeError, match="not int8"):
        read("Q8_0", np.zeros(34, np.int8))


@pytest.mark.parametrize("kind", OURS_TO_INT8)
def test_int8_form_loses_nothing(kind: str) -> None:
    columns = 3 * TYPES[kind].block
    data = random_bytes(5, 2, 5, 3 * TYPES[kind].size)
    integers, scales = exact_int8(kind, data)
    assert (integers.dtype, integers.shape) == (np.int8, (2, 5, columns))
    assert (scales.dtype, scales.shape) == (np.float32, (2, 5, columns // 16))
    with np.errstate(all="ignore"):
        values = integers.reshape(2, 5, -1, 16).astype(np.float32) * scales[..., None]
    assert_same(values.reshape(2, 5, columns), theirs(kind, data))


def test_int8_form_crosses_chunks() -> None:
    data = random_bytes(6, 1030, TYPES["IQ1_M"].size)
    integers, scales = exact_int8("IQ1_M", data)
    for row in (0, 1023, 1024, 1029):
        one, its_scales = exact_int8("IQ1_M", data[row])
        assert np.array_equal(integers[row], one)
        assert np.array_equal(scales[row], its_scales, equal_nan=True)


@pytest.mark.parametrize("kind", sorted(DENSE | WITH_OFFSETS))
def test_int8_form_of_other_types_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="is not integers times scales"):
        exact_int8(kind, np.zeros(TYPES[kind].size, np.uint8))


@pytest.mark.parametrize("name", ["IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"])
def test_codebooks(name: str) -> None:
    known = getattr(gguf.quants, name)
    known.init_grid()
    assert np.array_equal(codebooks.grid(name), known.grid.reshape(known.grid_shape))
    assert codebooks.grid(name) is codebooks.grid(name)
    with pytest.raises(ValueError, match="read-only"):
        codebooks.grid(name)[0] = 0


# ---- what reads blocks


@pytest.mark.parametrize("kind", KINDS)
def test_layouts_read_packed(kind: str) -> None:
    weight = packed(kind, 6, 512)
    values = theirs(kind, weight.data)
    assert dtype_name(weight) == kind
    assert_same(to_float32(weight), values)
    assert_same(np.asarray(convert(weight, "fp32")), values)
    as_bf16 = convert(weight, "bf16")
    assert isinstance(as_bf16, BF16)
    assert np.array_equal(as_bf16.bits, to_bf16(values).bits)
    as_fp16 = convert(weight, "fp16")
    assert isinstance(as_fp16, np.ndarray)
    assert np.array_equal(as_fp16, values.astype(np.float16))


def test_indexing_takes_whole_rows() -> None:
    cache = Packed("Q8_0", (2, 5, 3, 64), random_bytes(7, 2, 5, 3, 68))
    part = cache[1, ::2]
    assert part.shape == (3, 3, 64)
    assert_same(to_float32(part), to_float32(cache)[1, ::2])
    with pytest.raises(TypeError, match="takes uint8"):
        cache[..., :34]
    with pytest.raises(TypeError, match="takes uint8"):
        cache[0, 0, 0, 0:1]


def test_conversions_that_are_refused() -> None:
    huge = Packed("Q8_0", (1, 32), np.full((1, 34), 0x7B, np.uint8))
    with pytest.raises(OverflowError, match="65504"):
        convert(huge, "fp16")
    with pytest.raises(ValueError, match="unknown type 'int7'"):
        convert(huge, "int7")
    panels = Panels("Q4_K", (16, 256), np.zeros(16, np.uint8))
    assert dtype_name(panels) == "Q4_K"
    for refused in (to_float32, lambda p: convert(p, "bf16"), lambda p: ref.embedding(p, np.array([0]))):
        with pytest.raises(TypeError, match=r"Panels\(Q4_K"):
            refused(panels)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("x_type", [np.float32, np.float64])
def test_reference_linear(kind: str, x_type: type[np.floating[Any]]) -> None:
    weight = packed(kind, 7, 512)
    x = np.random.default_rng(8).standard_normal((2, 3, 512)).astype(x_type)
    bias = np.arange(7, dtype=np.float32)
    got = ref.linear(x, weight, bias)
    assert got.dtype == x_type
    assert np.array_equal(got, ref.linear(x, theirs(kind, weight.data), bias))


@pytest.mark.parametrize("kind", KINDS)
def test_reference_embedding(kind: str) -> None:
    table = packed(kind, 9, 512)
    ids = np.array([[8, 0], [3, 3]])
    assert_same(ref.embedding(table, ids), theirs(kind, table.data)[ids])


def test_a_large_matrix_never_exists_as_float32() -> None:
    rows, columns = 60_000, 256  # 61 MB as float32
    weight = Packed("TQ2_0", (rows, columns), np.tile(packed("TQ2_0", 50, columns).data, (rows // 50, 1)))
    x = np.random.default_rng(9).standard_normal((1, columns), dtype=np.float32)
    few = ref.linear(x, weight[:50])
    tracemalloc.start()
    y = ref.linear(x, weight)
    _, peak_of_linear = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    words = convert(weight, "bf16")
    _, peak_of_convert = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    np.testing.assert_allclose(
        y.reshape(-1, 50), np.tile(few, (rows // 50, 1)), rtol=1e-5, atol=1e-4 * np.abs(few).max()
    )
    assert isinstance(words, BF16)
    assert np.array_equal(words.bits[-50:], to_bf16(to_float32(weight[:50])).bits)
    assert peak_of_linear < 25e6
    assert peak_of_convert - words.nbytes < 40e6


def test_reference_linear_takes_infinite_scales_in_silence() -> None:
    """Infinity times zero, and infinities that cancel, are NaN, as in C++; they are no warning on the terminal."""
    data = np.full((2, 18), 0x98, np.uint8)  # nibbles of +1 and 0
    data[:, :2] = np.array([[0x00, 0x7C], [0x00, 0x3C]])  # scales: infinity, 1
    x = np.ones((1, 32), np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = ref.linear(x, Packed("Q4_0", (2, 32), data))
    assert np.isnan(got[0, 0])
    assert got[0, 1] == 16
