"""The KV cache in each of its types: what `write_kv` stores, bit for bit, and what `attention` makes of it.

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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from puna.kernels import reference as ref
from puna.kernels.layouts import BF16, Cache, Packed, empty_cache, to_bf16, words

cpu = pytest.importorskip("puna.kernels.cpu", reason="the C++ extension is not built here")

F32 = npt.NDArray[np.float32]
TYPES = ("fp32", "bf16", "fp16", "q8_0")
TABLES = [(index, reason) for index, (_, runs, reason) in enumerate(cpu._cpu.tables()) if runs]


@pytest.fixture(params=TABLES, ids=[reason.removeprefix("cpuid: ") for _, reason in TABLES], autouse=True)
def isa(request: pytest.FixtureRequest) -> Any:
    """Every test of this file runs once an instruction set."""
    index, reason = request.param
    cpu._cpu.use(index)
    yield reason
    cpu.use()


def normal(seed: int, *shape: int) -> F32:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def filled(kv_type: str, values: F32) -> Cache:
    """A cache [B, S, G, D] of those numbers, written by the reference."""
    cache = empty_cache(kv_type, values.shape)
    words(cache)[...] = ref.to_cache(values, cache)
    return cache


def stored(kv_type: str, values: F32) -> npt.NDArray[Any]:
    """The words C++ stores for values [T, D]."""
    T, D = values.shape
    cache_k, cache_v = (empty_cache(kv_type, (1, T, 1, D)) for _ in range(2))
    new, positions = values.reshape(1, T, 1, D), np.arange(T, dtype=np.int32)[None]
    cpu.write_kv(cache_k, cache_v, new, -new, positions)
    negative = empty_cache(kv_type, (1, T, 1, D))
    words(negative)[...] = ref.to_cache(-new, negative)
    numbers = [ref.from_cache(cache, values) for cache in (cache_v, negative)]
    assert np.array_equal(*numbers, equal_nan=True)
    return words(cache_k)[0, :, 0]


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
def test_write_kv_stores_where_positions_say(kv_type: str, tokens: int, groups: int, size: int) -> None:
    S = tokens + 4
    start = normal(3, 2, S, groups, size)
    got, want = ([filled(kv_type, start), filled(kv_type, start + 1)] for _ in range(2))
    positions = np.stack([np.random.default_rng(i).permutation(S)[:tokens] for i in range(2)]).astype(np.int32)
    positions[0, 0] = -1
    k, v = normal(1, 2, tokens, groups, size), normal(2, 2, tokens, groups, size)
    cpu.write_kv(*got, k, v, positions)
    ref.write_kv(*want, k, v, positions)
    for ours, theirs in zip(got, want, strict=True):
        assert np.array_equal(words(ours), words(theirs))
        assert not np.array_equal(words(ours), words(filled(kv_type, start)))


@pytest.mark.parametrize("kv_type", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("size", [1, 5, 33])
def test_write_kv_of_odd_sizes(kv_type: str, size: int) -> None:
    got, want = ([empty_cache(kv_type, (1, 4, 3, size)) for _ in range(2)] for _ in range(2))
    k, v = normal(1, 1, 2, 3, size), normal(2, 1, 2, 3, size)
    positions = np.array([[3, 1]], np.int32)
    cpu.write_kv(*got, k, v, positions)
    ref.write_kv(*want, k, v, positions)
    for ours, theirs in zip(got, want, strict=True):
        assert np.array_equal(words(ours), words(theirs))


def tolerance(kv_type: str, tokens: int, isa: str) -> float:
    """Of the largest result, with leave to round: float32's, or bfloat16's where the second way works in pairs."""
    return 1e-2 if tokens > 8 and kv_type != "fp32" and "BF16" in isa else 3e-6


def check(kv_type: str, isa: str, R: int, G: int, D: int, S: int, positions: npt.NDArray[np.int32]) -> None:
    B, T = positions.shape
    q, k, v = normal(1, B, T, R * G, D), filled(kv_type, normal(2, B, S, G, D)), filled(kv_type, normal(3, B, S, G, D))
    want = ref.attention(q.astype(np.float64), k, v, positions)
    largest = max(float(np.max(np.abs(want))), 1e-30)
    for bf16, most in ((False, 3e-6), (True, tolerance(kv_type, T, isa))):
        got = cpu.attention(q, k, v, positions, bf16)
        assert got.dtype == np.float32
        assert float(np.max(np.abs(got - want))) <= most * largest
        assert not got[positions < 0].any()


@pytest.mark.parametrize("kv_type", TYPES)
@pytest.mark.parametrize(("R", "G"), [(1, 1), (1, 3), (2, 2), (3, 1), (4, 2), (5, 2), (8, 1)])
@pytest.mark.parametrize("size", [32, 48, 64, 160])
def test_attention(kv_type: str, isa: str, R: int, G: int, size: int) -> None:
    size = size // 32 * 32 if kv_type == "q8_0" else size
    for S, positions in (
        (23, [[22]]),
        (150, [[147, 148, 149], [-1, 3, 4]]),
        (71, [[-1, *range(10, 19), 70]]),
        (40, [[0, 1, 2, 3, -1, 4, 5, 6, 7, 8, 9], [*range(28, 39)]]),
    ):
        check(kv_type, isa, R, G, size, S, np.array(positions, np.int32))


@pytest.mark.parametrize("kv_type", TYPES)
@pytest.mark.parametrize("tokens", [1, 2, 8, 9, 70])
def test_attention_over_long_contexts(kv_type: str, isa: str, tokens: int) -> None:
    """Past every block of keys, with one sequence short and one row of padding."""
    positions = np.stack([np.arange(1100 - tokens, 1100), np.arange(tokens) + 500]).astype(np.int32)
    positions[1, 0] = -1
    check(kv_type, isa, 3, 2, 32, 1100, positions)


@given(
    kv_type=st.sampled_from(TYPES),
    T=st.integers(1, 30),
    past=st.integers(0, 200),
    R=st.integers(1, 5),
    G=st.integers(1, 3),
    D=st.integers(1, 70),
    pad=st.integers(0, 3),
)
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_attention_any_shape(isa: str, kv_type: str, T: int, past: int, R: int, G: int, D: int, pad: int) -> None:
    D = -(-D // 32) * 32 if kv_type == "q8_0" else D
    positions = np.tile(np.arange(past, past + T, dtype=np.int32), (2, 1))
    positions[0, : min(pad, T)] = -1
    check(kv_type, isa, R, G, D, past + T, positions)


@pytest.mark.parametrize("kv_type", TYPES)
@pytest.mark.parametrize("R", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_token_does_not_depend_on_who_shares_the_call(bf16: bool, kv_type: str, R: int) -> None:
    """Bit for bit: alone or among up to 8 of its sequence, in any batch; and among any larger number."""
    B, S, G, D, T = 3, 700, 2, 64, 120
    q = normal(1, B, T, R * G, D)
    k, v = (filled(kv_type, normal(seed, B, S, G, D)) for seed in (2, 3))
    positions = np.stack([np.arange(T) + start for start in (0, 460, 580)]).astype(np.int32)

    def part(b: slice, t: slice) -> F32:
        def of(cache: Cache) -> Cache:
            data = np.ascontiguousarray(words(cache)[b])
            if isinstance(cache, Packed):
                return Packed("Q8_0", (len(data), *cache.shape[1:]), data)
            return BF16(data) if isinstance(cache, BF16) else data

        return cpu.attention(np.ascontiguousarray(q[b, t]), of(k), of(v), np.ascontiguousarray(positions[b, t]), bf16)

    every = slice(None)
    for small in (True, False):
        lengths = (1, 2, 3, 5, 8) if small else (9, 17, 50, 120)
        wanted = np.concatenate([part(every, slice(t, t + 1)) for t in range(T)], 1) if small else part(every, every)
        for length in lengths:
            for start in (0, T - length) if not small else (0, 51, T - length):
                got = part(every, slice(start, start + length))
                assert np.array_equal(got, wanted[:, start : start + length]), (small, length, start)
        for b in range(B):
            length = lengths[-2]
            alone = part(slice(b, b + 1), slice(T - length, T))
            assert np.array_equal(alone[0], wanted[b, T - length :])


@pytest.mark.parametrize("kv_type", TYPES)
def test_what_no_token_may_see_is_not_read(kv_type: str) -> None:
    for tokens in (1, 2, 30):
        positions = np.full((1, tokens), -1, np.int32)
        positions[0, -1] = 3
        q, values = normal(1, 1, tokens, 2, 32), normal(2, 1, 40, 1, 32)
        want = cpu.attention(q, filled(kv_type, values), filled(kv_type, values), positions, True)
        values[:, 4:] = np.nan
        got = cpu.attention(q, filled(kv_type, values), filled(kv_type, values), positions, True)
        assert np.array_equal(got, want)
        assert not got[0, :-1].any()


def test_other_caches_are_refused() -> None:
    q, positions = normal(1, 1, 1, 2, 32), np.zeros((1, 1), np.int32)
    k = empty_cache("fp16", (1, 4, 1, 32))
    with pytest.raises(TypeError, match="keys and values must be of one type"):
        cpu.attention(q, k, empty_cache("bf16", (1, 4, 1, 32)), positions)
    for raw in (
        np.zeros((1, 4, 1, 34), np.uint8),
        np.zeros((1, 4, 1, 32), np.uint16),
        np.zeros((1, 4, 1, 32), np.int8),
    ):
        with pytest.raises(TypeError, match="Packed Q8_0, not"):
            cpu.attention(q, raw, raw, positions)
    with pytest.raises(TypeError, match="float64"):
        cpu.attention(q, np.zeros((1, 4, 1, 32)), np.zeros((1, 4, 1, 32)), positions)
    other = Packed("Q4_0", (1, 4, 1, 32), np.zeros((1, 4, 1, 18), np.uint8))
    with pytest.raises(TypeError, match="not Q4_0"):
        cpu.attention(q, other, other, positions)
    eight = empty_cache("q8_0", (1, 4, 1, 64))
    with pytest.raises(ValueError, match="attention"):
        cpu.attention(q, eight, eight, positions)
    with pytest.raises(ValueError, match="write_kv"):
        cpu.write_kv(eight, eight, q[:, :, :1], q[:, :, :1], positions)
    with pytest.raises(ValueError, match="whole number of Q8_0 blocks"):
        empty_cache("q8_0", (1, 4, 1, 48))
    with pytest.raises(ValueError, match="unknown type"):
        empty_cache("fp8", (1, 4, 1, 48))
