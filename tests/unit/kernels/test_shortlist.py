"""The lists and sums that sampling stands on, and masked rows, per instruction set, against the reference and NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from puna.kernels import reference as ref

cpu = pytest.importorskip("puna.kernels.cpu", reason="the C++ extension is not built here")

TABLES = [(index, reason) for index, (_, runs, reason) in enumerate(cpu._cpu.tables()) if runs]


@pytest.fixture(params=TABLES, ids=[reason.removeprefix("cpuid: ") for _, reason in TABLES], autouse=True)
def isa(request: pytest.FixtureRequest) -> Any:
    """Every test of this file runs once an instruction set."""
    cpu._cpu.use(request.param[0])
    yield request.param[1]
    cpu.use()


def some(rows: int, n: int) -> list[np.ndarray]:
    x = np.random.default_rng(n).normal(0, 4, (rows, n)).astype(np.float32)
    x[-1, n // 3 :] = -np.inf
    x[-1, 0] = 1
    return list(x)


SIZES = [1, 2, 15, 64, 511, 512, 513, 3000, 32003]


@pytest.mark.parametrize("n", SIZES)
def test_lists_and_sums_equal_numpy(n: int) -> None:
    rows, scales = some(4, n), np.array([1, 0.5, 3, 1 / 0.7], np.float32)
    k = min(n, 40)
    ids, values, sums = cpu.shortlist(rows, scales, k)
    for row, scale, its_ids, its_values, its_sums in zip(rows, scales, ids, values, sums, strict=True):
        order = np.argsort(-row, kind="stable")[:k]
        assert np.array_equal(its_ids, order)
        assert np.array_equal(its_values, row[order])
        with np.errstate(over="ignore"):
            weights = np.exp((row.astype(np.float64) - row.max()) * scale)
        wanted = [weights[at : at + ref.SUM_PART].sum() for at in range(0, n, ref.SUM_PART)]
        np.testing.assert_allclose(its_sums, wanted, rtol=3e-6, atol=1e-30)
    for ours, theirs in zip(ref.shortlist(rows, scales, k), (ids, values, sums), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("n", SIZES)
def test_sums_above_a_bound(n: int) -> None:
    rows, scales = some(4, n), np.array([1, 0.5, 3, 1 / 0.7], np.float32)
    tops = np.array([row.max() for row in rows])
    bounds = np.array([np.sort(row)[n // 2] for row in rows])
    sums = cpu.above(rows, scales, tops, bounds)
    for row, scale, bound, its in zip(rows, scales, bounds, sums, strict=True):
        with np.errstate(over="ignore"):
            weights = np.where(row > bound, np.exp((row.astype(np.float64) - row.max()) * scale), 0)
        assert float(its.sum()) == pytest.approx(weights.sum(), rel=3e-6)
    np.testing.assert_allclose(ref.above(rows, scales, tops, bounds), sums, rtol=1e-5, atol=1e-30)


def test_a_row_alone_gives_the_same_bits() -> None:
    rows, scales = some(9, 20011), np.full(9, 0.7, np.float32)
    together = cpu.shortlist(rows, scales, 30)
    for i in range(9):
        for ours, theirs in zip(together, cpu.shortlist(rows[i : i + 1], scales[:1], 30), strict=True):
            assert np.array_equal(ours[i], theirs[0])


@pytest.mark.parametrize("scale", [1e-37, 1e30])
def test_the_ends_of_scales(scale: float) -> None:
    row = np.array([3, -np.inf, 2, 3], np.float32)
    [sums] = cpu.shortlist([row], np.array([scale], np.float32), 1)[2]
    assert sums == pytest.approx(3 if scale < 1 else 2)


@pytest.mark.parametrize("n", [1, 31, 32, 33, 100, 4001])
def test_masks(n: int) -> None:
    rng = np.random.default_rng(n)
    rows = some(3, n)
    bits = rng.integers(0, 2, (3, n)).astype(bool)
    words = np.zeros((3, -(-n // 32)), np.uint32)
    for row, token in zip(*np.nonzero(bits), strict=True):
        words[row, token // 32] |= np.uint32(1) << np.uint32(token % 32)
    out = cpu.allowed(rows, list(words))
    assert np.array_equal(out, np.where(bits, np.stack(rows), -np.inf))
    assert np.array_equal(out, ref.allowed(rows, list(words)))


@pytest.mark.parametrize("k", [-1, 0, 6])
def test_another_k_is_refused(k: int) -> None:
    for serving in (cpu, ref):
        with pytest.raises(ValueError, match="k = "):
            serving.shortlist([np.zeros(5, np.float32)], np.ones(1, np.float32), k)


def test_what_does_not_fit_is_refused() -> None:
    row, one = np.zeros(40, np.float32), np.ones(1, np.float32)
    with pytest.raises(ValueError, match="no rows"):
        cpu.shortlist([], one, 1)
    with pytest.raises(ValueError, match="rows"):
        cpu.shortlist([row, row[:39]], np.ones(2, np.float32), 1)
    with pytest.raises(ValueError, match="scales"):
        cpu.shortlist([row], np.ones(2, np.float32), 1)
    with pytest.raises(TypeError, match="float32, not float64"):
        cpu.shortlist([np.zeros(4)], one, 1)
    with pytest.raises(ValueError, match="contiguous"):
        cpu.shortlist([row[::2]], one, 1)
    with pytest.raises(ValueError, match="one scale, top and bound"):
        cpu.above([row], one, one, np.ones(2, np.float32))
    for serving in (cpu, ref):
        with pytest.raises(ValueError, match="mask"):
            serving.allowed([row], [np.zeros(1, np.uint32)])
    with pytest.raises(TypeError, match="uint32"):
        cpu.allowed([row], [np.zeros(2, np.int32)])
