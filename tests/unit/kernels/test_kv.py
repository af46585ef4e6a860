"""The KV cache in each of its types: what `write_kv` stores, bit for bit. What is read of it is test_attention.py's.

The stored words are compared with NumPy's float16, with torch's bfloat16 and with the `gguf` package's Q8_0; attention
with the reference in float64 over the numbers that the cache really holds.
What is surprising: with AVX-512 BF16, more than 8 tokens over a cache of 16 bits or less are rounded to bfloat16 on the
way, which the tolerances say.
"""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch

from puna.kernels import reference as ref
from puna.kernels.layouts import BF16, Cache, Packed, empty_cache, page_table, to_bf16, words

cpu = pytest.importorskip("puna.kernels.cpu", reason="the C++ extension is not built here")
pytestmark = pytest.mark.usefixtures("isa")

F32 = npt.NDArray[np.float32]
TYPES = ("fp32", "bf16", "fp16", "q8_0")


def normal(seed: int, *shape: int) -> F32:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def filled(kv_type: str, values: F32) -> Cache:
    """A cache [pages, page, G, D] of those numbers, written by the reference."""
    cache = empty_cache(kv_type, values.shape)
    words(cache)[...] = ref.to_cache(values, cache)
    return cache


def stored(kv_type: str, values: F32) -> npt.NDArray[Any]:
    """The words C++ stores for values [T, D]."""
    T, D = values.shape
    page = -(-T // 16) * 16
    cache_k, cache_v = (empty_cache(kv_type, (1, page, 1, D)) for _ in range(2))
    new = values.reshape(T, 1, D)
    cpu.write_kv(cache_k, cache_v, new, -new, page_table([0], [T], [[0]]))
    negative = empty_cache(kv_type, (1, page, 1, D))
    words(negative)[0, :T] = ref.to_cache(-new, negative)
    numbers = [ref.from_cache(cache, values) for cache in (cache_v, negative)]
    assert np.array_equal(*numbers, equal_nan=True)
    return words(cache_k)[0, :T, 0]


def all_kinds(count: int) -> F32:
    """Numbers of every size: ties between two halves, subnormals, the ends of float16, zeros, both signs."""
    rng = np.random.default_rng(0)
    wide = (rng.standard_normal(count) * 2.0 ** rng.integers(-32, 20, count)).astype(np.float32)
    halves = np.arange(0, 0x7C00, 7, dtype=np.uint16).view(np.float16).astype(np.float32)
    ties = (halves[:-1] + halves[1:]) / 2
    ends = np.array(
        [0.0, -0.0, 65503, 65504, 65519, 65520, 1e6, np.inf, -np.inf, 6e-8, 2.9e-8, 1e-30, 1e-42], np.float32
    )
    return np.concatenate([wide, halves, ties, -ties, ends])


def test_fp16_is_rounded_as_numpy_rounds_and_saturates() -> None:
    values = all_kinds(3001)
    got = stored("fp16", values[None])[0]
    want = np.clip(values, -65504, 65504).astype(np.float16)
    assert np.array_equal(got.view(np.uint16), want.view(np.uint16))
    assert np.isnan(stored("fp16", np.full((1, 5), np.nan, np.float32))).all()


def test_bf16_is_rounded_as_torch_rounds() -> None:
    values = all_kinds(3001)
    got = stored("bf16", values[None])[0]
    want = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(got, want)
    assert np.array_equal(got, to_bf16(values).bits)
    assert np.isnan(ref.from_cache(BF16(stored("bf16", np.full((1, 5), np.nan, np.float32))), values)).all()


def test_q8_0_is_what_the_gguf_package_writes() -> None:
    rng = np.random.default_rng(1)
    values = (rng.standard_normal((400, 96)) * 2.0 ** rng.integers(-20, 12, (400, 1))).astype(np.float32)
    values[0] = 0
    values[1, :32] = np.arange(32) / 2 - 7.75  # 127 · x / 7.75: halves among them
    values[2, :32] = np.arange(-31, 33, 2) * 0.5
    values[2, 0] = 127  # the scale is 1: each number is a tie
    want = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    assert np.array_equal(stored("q8_0", values), want)
    cache = Packed("Q8_0", (400, 96), want)
    assert np.array_equal(ref.from_cache(cache, values), gguf.quants.dequantize(want, gguf.GGMLQuantizationType.Q8_0))


def test_q8_0_of_what_is_no_number_is_nan_and_of_too_large_ones_saturates() -> None:
    values = normal(1, 4, 64)
    values[0, 3], values[1, 40], values[2, :32], values[3, 5] = np.nan, np.inf, 3e7, -3e7
    got = ref.from_cache(Packed("Q8_0", (4, 64), stored("q8_0", values)), values)
    damaged = np.isnan(got)
    assert damaged[0, :32].all()
    assert damaged[1, 32:].all()
    assert damaged.sum() == 64
    assert (got[2, :32] == 65504 * 127).all()
    assert got[3, 5] == -65504 * 127


@pytest.mark.parametrize("kv_type", TYPES)
@pytest.mark.parametrize(("tokens", "groups", "size"), [(1, 1, 32), (3, 2, 64), (70, 5, 96), (300, 3, 32)])
def test_write_kv_stores_where_the_table_says(kv_type: str, tokens: int, groups: int, size: int) -> None:
    """Three sequences, a long one between short ones; what is not theirs stays as it was."""
    start = normal(3, 66, 16, groups, size)
    got, want = ([filled(kv_type, start), filled(kv_type, start + 1)] for _ in range(2))
    pages = np.random.default_rng(7).permutation(66).reshape(3, 22)
    table = page_table([30, 5, 0], [2, tokens, 1], pages)
    k, v = normal(1, tokens + 3, groups, size), normal(2, tokens + 3, groups, size)
    cpu.write_kv(*got, k, v, table)
    ref.write_kv(*want, k, v, table)
    for ours, theirs in zip(got, want, strict=True):
        assert np.array_equal(words(ours), words(theirs))
        assert not np.array_equal(words(ours), words(filled(kv_type, start)))


@pytest.mark.parametrize("kv_type", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("size", [1, 5, 33])
def test_write_kv_of_odd_sizes(kv_type: str, size: int) -> None:
    got, want = ([empty_cache(kv_type, (2, 16, 3, size)) for _ in range(2)] for _ in range(2))
    k, v = normal(1, 2, 3, size), normal(2, 2, 3, size)
    table = page_table([15], [2], [[1, 0]])
    cpu.write_kv(*got, k, v, table)
    ref.write_kv(*want, k, v, table)
    for ours, theirs in zip(got, want, strict=True):
        assert np.array_equal(words(ours), words(theirs))
        assert np.any(words(ours)[1, 15])
        assert np.any(words(ours)[0, 0])
