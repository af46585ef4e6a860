"""The ops of the vision encoders on NumPy arrays: against formulas written down here, and against torch's own.

What is surprising: `gelu` and `attend` are what the host computes with, so blocks and odd sizes are walked here.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from puna.errors import DeviceError
from puna.kernels import host, ops
from puna.kernels import reference as ref
from puna.kernels.layouts import to_bf16

RANDOM = np.random.default_rng(6)


def normal(*shape: int, dtype: str = "float32") -> Any:
    return RANDOM.standard_normal(shape).astype(dtype)


def test_layer_norm_of_numbers_worked_out_by_hand() -> None:
    x = np.array([[1.0, 2.0, 3.0, 6.0]])  # mean 3, variance 3.5
    got = ref.layer_norm(x, np.array([1.0, 2.0, 1.0, 1.0]), np.array([0.0, 0.0, 5.0, 1.0]), 0.5)
    assert got == pytest.approx(np.array([[-1.0, -1.0, 5.0, 2.5]]))


def test_layer_norm_reads_bfloat16_weights_and_takes_large_means() -> None:
    x, weight, bias = normal(3, 5, 24) + np.float32(1000), normal(24), normal(24)
    got = ref.layer_norm(x, to_bf16(weight), to_bf16(bias), 1e-5)
    wide = x.astype(np.float64)
    by_hand = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5)
    want = by_hand * ref.to_float32(to_bf16(weight)) + ref.to_float32(to_bf16(bias))
    assert got.dtype == np.float32
    assert np.max(np.abs(got - want)) < 5e-4  # float32 has steps of 6e-5 at 1000


def test_gelu_is_the_exact_one() -> None:
    x = np.array([-3.0, -1.0, 0.0, 0.5, 2.0])
    assert ref.gelu(x) == pytest.approx([-0.00404969, -0.15865525, 0.0, 0.34573123, 1.95449974], abs=1e-8)


@pytest.mark.parametrize("form", [ref.gelu, host.gelu])
def test_gelu_in_float32_rounds_as_float32_does(form: Any) -> None:
    x = np.concatenate([np.linspace(-9, 9, 70_001), [-1e30, -40.0, 40.0, 1e30, np.inf]]).astype(np.float32)
    want = np.array([0.5 * v * math.erfc(-v / math.sqrt(2)) for v in x.astype(np.float64)])
    got = form(x.reshape(2, -1)).reshape(-1)
    assert got.dtype == np.float32
    assert np.max(np.abs(got[:-2] - want[:-2]) / np.maximum(1, np.abs(want[:-2]))) < 3e-7
    assert got[-2:].tolist() == [np.float32(1e30), np.inf]
    assert got[-5:-3] == pytest.approx([0, 0], abs=1e-12)


def test_the_fitted_polynomial_is_as_good_as_it_says() -> None:
    x = np.linspace(-8, 8, 20_001)
    half = np.array([math.erf(v / math.sqrt(2)) for v in x])
    fitted = (host.gelu(x) / np.where(x == 0, 1, x) - 0.5) * 2
    inside = (np.abs(x) < host.EDGE * math.sqrt(2)) & (x != 0)
    assert np.max(np.abs(fitted - half)[inside]) < 1e-9
    assert np.max(np.abs(fitted - half)[x != 0]) < 2e-8


def plain_attention(q: Any, k: Any, v: Any) -> Any:
    """One query, one head at a time, in float64: [Tq, H, D] over [Tk, G, D]."""
    out = np.empty(q.shape)
    for t in range(q.shape[0]):
        for h in range(q.shape[1]):
            g = h // (q.shape[1] // k.shape[1])
            weights = np.exp(k[:, g].astype(np.float64) @ q[t, h].astype(np.float64) / math.sqrt(q.shape[2]))
            out[t, h] = weights / weights.sum() @ v[:, g]
    return out


@pytest.mark.parametrize(("tokens", "seen", "H", "G", "D"), [(1, 1, 1, 1, 4), (7, 11, 6, 2, 5), (13, 3, 4, 4, 8)])
def test_attend_sees_every_key(tokens: int, seen: int, H: int, G: int, D: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = normal(2, tokens, H, D), normal(2, seen, G, D), normal(2, seen, G, D)
    want = np.stack([plain_attention(*one) for one in zip(q, k, v, strict=True)])
    for scores in (ref.SCORES, 1, 5 * seen * (H // G)):  # all at once, a query at a time, five
        monkeypatch.setattr(ref, "SCORES", scores)
        got = ref.attend(q, k, v)
        assert got.dtype == np.float32
        assert np.max(np.abs(got - want)) < 2e-6
    assert np.array_equal(ref.attend(q[0], k[0], v[0]), got[0])  # without leading dimensions


def test_attend_of_scores_past_what_exp_holds() -> None:
    q, k = np.full((1, 1, 1), 1000, np.float32), np.array([[[1.0]], [[-1.0]], [[1.0]]], np.float32)
    assert ref.attend(q, k, np.array([[[2.0]], [[7.0]], [[4.0]]], np.float32)).tolist() == [[[3.0]]]


def test_gates_rows_and_padding() -> None:
    x = normal(2, 3, 4)
    assert np.array_equal(ops.gated(x, to_bf16(np.array([0.5], np.float32))), x * np.tanh(np.float32(0.5)))
    row = to_bf16(np.array([1, 2, 3, 4], np.float32))
    joined = ops.concat([row, x, normal(1, 2, 4)])
    assert joined.shape == (2, 6, 4)
    assert joined[:, 0].tolist() == [[1, 2, 3, 4]] * 2
    assert np.array_equal(joined[:, 1:4], x)
    assert np.array_equal(joined[0, 4:], joined[1, 4:])
    padded = ops.pad(x, 5)
    assert np.array_equal(padded[:, :3], x)
    assert padded.shape == (2, 5, 4)
    assert not padded[:, 3:].any()


def test_the_table_names_what_serves_them() -> None:
    ops.select("reference")
    try:
        assert {row.implementation for row in ops.table()} == {"NumPy reference"}
        x = normal(4)
        assert np.array_equal(ops.gelu(x), ref.gelu(x))
    finally:
        ops.select("auto")
    assert next(row for row in ops.table() if row.op == "gelu").implementation == "NumPy"


def test_where_bits_may_not_depend_on_the_others_they_do_not() -> None:
    try:
        ops.select("auto", invariant=True)
    except DeviceError:
        pytest.skip("the C++ extension is not built here")
    try:
        q, k, v = normal(2, 21, 6, 8), normal(2, 37, 3, 8), normal(2, 37, 3, 8)
        got = ops.attend(q, k, v)
        assert np.max(np.abs(got - ref.attend(q, k, v))) < 2e-6
        for t in range(21):
            assert np.array_equal(ops.attend(q[:, t : t + 1], k, v)[:, 0], got[:, t])
        assert next(row for row in ops.table() if row.op == "attend").reason == "asked for: invariant"
    finally:
        ops.select("auto")
