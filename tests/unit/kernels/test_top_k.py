"""The k largest logits, per instruction set, against NumPy's stable sort: ties, NaN, infinities, every k."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from puna.kernels import reference as ref
from puna.kernels import torch_ops

cpu = pytest.importorskip("puna.kernels.cpu", reason="the C++ extension is not built here")
pytestmark = pytest.mark.usefixtures("isa")


def check(logits: Any, k: int) -> None:
    ids, values = cpu.top_k(logits, k)
    assert (ids.dtype, values.dtype) == (np.int32, np.float32)
    want = np.argsort(-logits, axis=-1, kind="stable")[..., :k]  # no NaN: NumPy's order is the definition
    assert np.array_equal(ids, want)
    assert np.array_equal(values, np.take_along_axis(logits, want, -1))


@pytest.mark.parametrize("n", [1, 2, 15, 64, 65, 1000, 32003])
def test_every_k(n: int) -> None:
    x = np.random.default_rng(n).standard_normal((3, n), dtype=np.float32)
    ties = np.round(x, 1)
    for k in sorted({1, 2, 7, 40, n // 64, n // 64 + 2, n // 2, n - 1, n}):
        if 1 <= k <= n:
            check(x, k)
            check(ties, k)
            check(x[0], k)


def test_the_ends() -> None:
    x = np.array([0.0, -0.0, -np.inf, np.inf, 1e-42, -1e-42, 0.0, -np.inf, 3e38], np.float32)
    for k in range(1, 10):
        check(x, k)
    check(np.full(1000, -np.inf, np.float32), 999)
    check(np.full(130, 7.0, np.float32), 100)


@pytest.mark.parametrize("k", [1, 3, 5, 130])
def test_nan_is_larger_than_any_number(k: int) -> None:
    x = np.random.default_rng(0).standard_normal((2, 130), dtype=np.float32)
    x[0, [100, 7, 60]] = np.nan
    x[0, 8] = np.inf
    ids, values = cpu.top_k(x, k)
    assert ids[0].tolist()[:4] == [7, 60, 100, 8][:k]
    want_ids, want_values = ref.top_k(x, k)
    assert np.array_equal(ids, want_ids)
    assert np.array_equal(values, want_values, equal_nan=True)


def test_torch_says_the_same() -> None:
    x = np.round(np.random.default_rng(0).standard_normal((4, 300), dtype=np.float32), 1)
    for k in (1, 50, 300):
        for ours, theirs in zip(cpu.top_k(x, k), torch_ops.top_k(torch.from_numpy(x), k), strict=True):
            assert np.array_equal(ours, theirs.numpy())


@pytest.mark.parametrize("k", [-1, 0, 6])
def test_another_k_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match="top_k"):
        cpu.top_k(np.zeros((2, 5), np.float32), k)
    with pytest.raises(ValueError, match="top_k"):
        ref.top_k(np.zeros((2, 5), np.float32), k)


def test_other_types_are_refused() -> None:
    with pytest.raises(TypeError, match="logits must be float32, not float64"):
        cpu.top_k(np.zeros(5), 1)
