"""The C++ ops against their definition in NumPy (in float64), per instruction set, weight type and odd size.

What is surprising: activations are mostly drawn from the numbers that bfloat16 holds, because AVX-512 BF16 rounds them
to it beside bfloat16 weights; so one tight tolerance serves every instruction set.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import puna
from puna.errors import DeviceError
from puna.kernels import reference as ref
from puna.kernels.layouts import BF16, Weight, convert, page_table, to_bf16, to_float32

cpu = pytest.importorskip("puna.kernels.cpu", reason="the C++ extension is not built here")
pytestmark = pytest.mark.usefixtures("isa")

DTYPES = ("fp32", "fp16", "bf16")
F32 = npt.NDArray[np.float32]


def normal(seed: int, *shape: int) -> F32:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def assert_close(got: npt.NDArray[Any], want: npt.NDArray[Any], tolerance: float) -> None:
    """The largest difference is below `tolerance` times the largest wanted number."""
    assert got.shape == want.shape
    assert got.dtype == np.float32
    if want.size:
        scale = max(float(np.max(np.abs(want))), 1e-30)
        assert float(np.max(np.abs(got - want))) <= tolerance * scale


def check_linear(rows: int, inner: int, out: int, dtype: str, bias: bool = False) -> None:
    """Activations that bfloat16 holds exactly, so that every instruction set must give the same sums."""
    x, weight = to_float32(to_bf16(normal(1, rows, inner))), convert(normal(2, out, inner), dtype)
    addend = convert(normal(3, out), dtype) if bias else None
    want = ref.linear(x.astype(np.float64), weight, addend)
    assert_close(cpu.linear(x, weight, addend), want, 5e-6)


@pytest.mark.parametrize("rows", [1, 40])
def test_linear_of_bf16_rounds_activations_at_most_to_bf16(rows: int) -> None:
    x, weight = normal(1, rows, 300), to_bf16(normal(2, 40, 300))
    got = cpu.linear(x, weight)
    exact = ref.linear(x.astype(np.float64), weight)
    rounded = ref.linear(to_float32(to_bf16(x)).astype(np.float64), weight)
    scale = float(np.max(np.abs(exact)))
    error = min(float(np.max(np.abs(got - want))) for want in (exact, rounded))
    assert error <= 5e-6 * scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inner", [1, 3, 16, 31, 64, 200])
def test_linear_of_few_rows(dtype: str, inner: int) -> None:
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 12):
        check_linear(rows, inner, 13, dtype, bias=rows % 2 == 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "inner", "out"),
    [(13, 1, 1), (16, 5, 7), (17, 64, 9), (33, 31, 65), (48, 33, 70), (49, 200, 128), (100, 63, 130), (800, 6, 5)],
)
def test_linear_of_many_rows(dtype: str, rows: int, inner: int, out: int) -> None:
    check_linear(rows, inner, out, dtype, bias=rows % 2 == 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_in_parts_of_k(dtype: str) -> None:
    check_linear(50, 4103, 67, dtype, bias=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_large_enough_for_threads(dtype: str) -> None:
    for rows in (1, 3):
        check_linear(rows, 517, 1031, dtype)


@given(
    rows=st.integers(0, 70),
    inner=st.integers(1, 150),
    out=st.integers(0, 150),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_linear_any_shape(rows: int, inner: int, out: int, dtype: str, bias: bool) -> None:
    check_linear(rows, inner, out, dtype, bias)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_row_does_not_depend_on_its_neighbours(dtype: str) -> None:
    """Bit for bit, among calls of few rows and among calls of many."""
    x, weight = normal(1, 100, 77), convert(normal(2, 90, 77), dtype)
    alone = cpu.linear(x[:1], weight)
    for rows in (2, 3, 5, 8):
        assert np.array_equal(cpu.linear(x[:rows], weight)[:1], alone)
    many = cpu.linear(x[:20], weight)
    for rows in (33, 100):
        assert np.array_equal(cpu.linear(x[:rows], weight)[:20], many)


def test_linear_reads_unaligned_weights_and_nothing_beyond_them() -> None:
    """A tensor may start at any byte of a mapped file, and end at its last one; what follows must not matter."""
    for dtype in DTYPES:
        for rows in (1, 5, 20):
            weight = convert(normal(2, 9, 33), dtype)
            words = weight.bits if isinstance(weight, BF16) else weight
            raw = np.full(words.nbytes + 64, 0xFF, np.uint8)  # NaN in every type
            raw[1 : 1 + words.nbytes] = words.reshape(-1).view(np.uint8)
            shifted: Any = raw[1 : 1 + words.nbytes].view(words.dtype).reshape(words.shape)
            x = normal(1, rows, 33)
            moved = cpu.linear(x, BF16(shifted) if dtype == "bf16" else shifted)
            assert np.array_equal(moved, cpu.linear(x, weight))


def test_fp16_widens_exactly() -> None:
    """All 65,536 words: subnormals, infinities and NaN too."""
    every = np.arange(65536, dtype=np.uint16).view(np.float16).reshape(256, 256)
    got = cpu.embedding(every, np.arange(256, dtype=np.int32))
    assert np.array_equal(got, every.astype(np.float32), equal_nan=True)


def test_bf16_widens_exactly() -> None:
    every = BF16(np.arange(65536, dtype=np.uint16).reshape(256, 256))
    got = cpu.embedding(every, np.arange(256, dtype=np.int32))
    assert np.array_equal(got, to_float32(every), equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 7, 16, 33, 288])
def test_embedding(dtype: str, dim: int) -> None:
    table: Weight = convert(normal(1, 11, dim), dtype)
    ids = np.array([[0, 10, 3], [3, 1, 9]], np.int32)
    assert np.array_equal(cpu.embedding(table, ids), ref.embedding(table, ids))


@pytest.mark.parametrize("bad", [-1, 11, 2**31 - 1, -(2**31)])
def test_embedding_refuses_ids_outside(bad: int) -> None:
    with pytest.raises(ValueError, match=f"id {bad} is not in a table of 11 rows"):
        cpu.embedding(normal(1, 11, 4), np.array([0, bad], np.int32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 2, 64), (1, 1, 288), (5, 1000), (300, 130)])
def test_rms_norm(dtype: str, shape: tuple[int, ...]) -> None:
    x, weight = normal(1, *shape) * 30, convert(normal(2, shape[-1]), dtype)
    assert_close(cpu.rms_norm(x, weight, 1e-5), ref.rms_norm(x.astype(np.float64), weight, 1e-5), 1e-6)


def test_rms_norm_epsilon_counts() -> None:
    x = np.full((1, 8), 1e-3, np.float32)
    got = cpu.rms_norm(x, np.ones(8, np.float32), 1e-5)
    assert got[0, 0] == pytest.approx(1e-3 / np.sqrt(1e-6 + 1e-5), rel=1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("size", [2, 6, 8, 14, 32, 34, 64, 128])
def test_rope(interleaved: bool, size: int) -> None:
    x = normal(1, 2, 5, 3, size)
    positions = np.arange(10, dtype=np.int32).reshape(2, 5)
    cos, sin = ref.rope_table(positions, 10000.0 ** -np.linspace(0, 1, size // 2, dtype=np.float32))
    want = ref.rope(x.astype(np.float64), cos, sin, interleaved)
    assert_close(cpu.rope(x, cos, sin, interleaved), want, 5e-7)


def test_write_kv() -> None:
    cache_k, cache_v = np.zeros((4, 16, 2, 5), np.float32), np.ones((4, 16, 2, 5), np.float32)
    k, v = normal(1, 5, 2, 5), normal(2, 5, 2, 5)
    table = page_table([0, 15], [2, 3], [[2, 2], [3, 1]])
    want_k, want_v = cache_k.copy(), cache_v.copy()
    ref.write_kv(want_k, want_v, k, v, table)
    cpu.write_kv(cache_k, cache_v, k, v, table)
    assert np.array_equal(cache_k, want_k)
    assert np.array_equal(cache_v, want_v)
    assert np.array_equal(cache_k[2, :2], k[:2])
    assert np.array_equal(cache_k[3, 15], k[2])
    assert np.array_equal(cache_k[1, :2], k[3:])
    assert np.count_nonzero(cache_k) == k.size


@pytest.mark.parametrize("shape", [(1,), (5, 3), (2, 1, 100), (70000,)])
def test_swiglu(shape: tuple[int, ...]) -> None:
    gate, up = normal(1, *shape) * 10, normal(2, *shape)
    assert_close(cpu.swiglu(gate, up), ref.swiglu(gate.astype(np.float64), up), 5e-7)


def test_swiglu_at_the_ends() -> None:
    gate = np.array([-np.inf, -1e4, -100, -88, -20, 0, 20, 88, 100, 1e4, np.nan], np.float32)
    got = cpu.swiglu(gate, np.ones_like(gate))
    want = np.array([0, 0, 0, 0, -20 / (1 + np.exp(20.0)), 0, 20, 88, 100, 1e4, np.nan])
    assert np.allclose(got[1:], want[1:], rtol=1e-6, atol=1e-33, equal_nan=True)


@pytest.mark.parametrize("n", [1, 2, 15, 64, 65, 1000, 32003])
def test_argmax(n: int) -> None:
    x = np.round(normal(1, 3, n), 1)  # many equals: the first one counts
    assert np.array_equal(cpu.argmax(x), ref.argmax(x))
    for place in {0, n // 2, n - 1}:
        y = np.zeros(n, np.float32)
        y[place:] = 1
        assert cpu.argmax(y) == place
        y[place:] = np.nan
        assert cpu.argmax(y) == np.argmax(y)
    assert cpu.argmax(np.full(n, -np.inf, np.float32)) == 0


def test_other_types_are_refused() -> None:
    x, weight = normal(1, 2, 4), normal(2, 3, 4)
    with pytest.raises(TypeError, match="x must be float32, not float64"):
        cpu.linear(x.astype(np.float64), weight)
    with pytest.raises(TypeError, match="weight must be float32, float16 or BF16, not float64"):
        cpu.linear(x, weight.astype(np.float64))
    with pytest.raises(TypeError, match="weight must be float32, float16 or BF16, not uint16"):
        cpu.linear(x, weight.astype(np.uint16))
    with pytest.raises(TypeError, match="ids must be int32, not int64"):
        cpu.embedding(weight, np.array([1]))
    with pytest.raises(TypeError):
        cpu.linear(x, weight.astype(">f4"))


def test_other_shapes_are_refused() -> None:
    x, weight = normal(1, 2, 4), normal(2, 3, 4)
    four, cache = np.ones((1, 2, 2, 4), np.float32), np.ones((2, 16, 2, 4), np.float32)
    table = page_table([0], [2], [[1]])
    cos = np.ones((1, 2, 2), np.float32)
    refusals: list[tuple[Any, ...]] = [
        (cpu.linear, x[:, :3].copy(), weight),
        (cpu.linear, x, weight[0]),
        (cpu.linear, x, weight, np.ones(4, np.float32)),
        (cpu.linear, x.T, normal(1, 3, 2)),
        (cpu.linear, x, weight[:, ::2]),
        (cpu.rms_norm, x, np.ones(3, np.float32), 1e-5),
        (cpu.rope, four, cos[:, :1], cos, False),
        (cpu.rope, four, cos, cos[..., :1].copy(), False),
        (cpu.rope, four[..., :3].copy(), cos, cos, False),
        (cpu.write_kv, cache.copy(), cache.copy(), four[0], four[0, :1], table),
        (cpu.write_kv, cache[:, :, :1].copy(), cache.copy(), four[0], four[0], table),
        (cpu.write_kv, cache.copy(), cache[:1].copy(), four[0], four[0], table),
        (cpu.write_kv, cache.copy(), cache.copy(), four, four, table),
        (cpu.attention, four, four[:, :1].copy(), four[:, :1].copy(), None),
        (cpu.attention, four, cache, cache, table),
        (cpu.attention, four[0], cache, cache, None),
        (cpu.attention, four[0, :, :, :3].copy(), cache, cache, table),
        (cpu.attention, four, np.ones((1, 2, 3, 4), np.float32), np.ones((1, 2, 3, 4), np.float32), None),
        (cpu.swiglu, x, x[:1]),
        (cpu.argmax, np.ones((2, 0), np.float32)),
        (cpu.embedding, x[0], np.zeros(1, np.int32)),
    ]
    for op, *arguments in refusals:
        with pytest.raises(ValueError, match=op.__name__):
            op(*arguments)


def test_results_of_other_shapes_are_refused() -> None:
    """Also of those that begin like the right one: where a dimension of 0 follows, there is no memory."""
    x, q = normal(1, 2, 4), normal(2, 1, 2, 2, 4)
    for op, *arguments, shape in (
        (cpu._cpu.rms_norm, x, np.ones(4, np.float32), False, 1e-5, x.shape),
        (cpu._cpu.swiglu, x, x, x.shape),
        (cpu._cpu.rope, q[0], *[normal(1, 2, 2)] * 2, False, q[0].shape),
        (cpu._cpu.attention, q, q, q, 0, None, False, 0, q.shape),
    ):
        op(*arguments, np.empty(shape, np.float32))
        with pytest.raises(ValueError, match="do not fit"):
            op(*arguments, np.empty((*shape, 1), np.float32))


def test_read_only_weights_serve_and_read_only_caches_do_not() -> None:
    x, weight = normal(1, 2, 4), normal(2, 3, 4)
    want = cpu.linear(x, weight)
    weight.flags.writeable = False
    assert np.array_equal(cpu.linear(x, weight), want)
    cache = np.zeros((1, 16, 2, 4), np.float32)
    cache.flags.writeable = False
    with pytest.raises(TypeError):
        cpu.write_kv(cache, cache, *[np.ones((2, 2, 4), np.float32)] * 2, page_table([0], [2], [[0]]))


def test_nothing_in_nothing_out() -> None:
    assert cpu.linear(np.empty((0, 4), np.float32), normal(1, 3, 4)).shape == (0, 3)
    assert cpu.rms_norm(np.empty((0, 4), np.float32), np.ones(4, np.float32), 1e-5).shape == (0, 4)
    assert cpu.embedding(normal(1, 3, 4), np.empty((0,), np.int32)).shape == (0, 4)
    assert cpu.swiglu(np.empty(0, np.float32), np.empty(0, np.float32)).shape == (0,)


def test_use_names_what_serves_and_why() -> None:
    for isa in cpu.isas():
        name, reason = cpu.use(isa)
        assert name == isa
        assert reason
    assert cpu.use()[0] == cpu.isas()[0]
    with pytest.raises(DeviceError, match=r"--kernels vax: this build of Puna does not have it\."):
        cpu.use("vax")


FAULTS = """
import resource, sys
import numpy as np
from puna.kernels import cpu, ops
if sys.argv[1] == "keep":
    ops.select("auto")
x, w = np.ones((512, 16), np.float32), np.ones((8192, 16), np.float32)
def faults():
    held = [cpu.linear(x, w) for _ in range(6)]  # 16 MiB each, freed together at the end, as a layer's are
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
faults()
before = faults()
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_activations_reuse_memory_that_was_freed() -> None:
    """Settling the ops has the C library keep freed blocks: a second prefill touches no fresh page."""
    environment = os.environ | {"PYTHONPATH": str(Path(puna.__file__).resolve().parents[1])}

    def faults(how: str) -> int:
        command = [sys.executable, "-c", FAULTS, how]
        return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)

    assert faults("keep") < 20
    assert faults("as the C library would") > 20


def test_activations_must_be_aligned_to_their_numbers() -> None:
    """Weights may begin at any byte of a file; what the ops compute with may not."""
    x = np.frombuffer(bytes(4 * 8 + 1), np.float32, offset=1)
    with pytest.raises(ValueError, match="gate must be aligned"):
        cpu.swiglu(x, np.zeros(8, np.float32))
    table = np.frombuffer(bytes(4 * 8 + 1), np.float32, offset=1).reshape(2, 4)
    assert not np.any(cpu.embedding(table, np.zeros(1, np.int32)))
