"""The torch form of every op: forward against the NumPy definition, backward against finite differences in float64.

What is surprising: in bfloat16 and float16 the tolerance is a few units of that type's last place, because torch
computes in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from puna.kernels import reference as ref
from puna.kernels.layouts import BF16, PageTable, page_table

torch = pytest.importorskip("torch", reason="needs the extra `torch`")

from puna.kernels import torch_ops as ops  # noqa: E402  (it imports torch)

TYPES = ("float64", "float32", "bfloat16", "float16")
TOLERANCE = {"float64": 1e-12, "float32": 2e-6, "bfloat16": 2e-2, "float16": 2.5e-3}


@pytest.fixture(params=TYPES)
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def normal(seed: int, dtype: str, *shape: int) -> tuple[Any, Any]:
    """A random tensor of a type, and the same numbers as a float64 array."""
    values = np.random.default_rng(seed).standard_normal(shape)
    tensor = torch.as_tensor(values).to(getattr(torch, dtype))
    return tensor, tensor.double().numpy()


def assert_close(got: Any, want: Any, dtype: str) -> None:
    """Same type, same shape, and the largest difference small beside the largest number."""
    assert got.dtype == getattr(torch, dtype)
    assert tuple(got.shape) == want.shape
    difference = np.max(np.abs(got.double().numpy() - want))
    assert difference <= TOLERANCE[dtype] * max(1.0, float(np.max(np.abs(want))))


def as_weight(tensor: Any) -> Any:
    """What the reference takes for the same weight: NumPy has no bfloat16."""
    if tensor.dtype == torch.bfloat16:
        return BF16(tensor.view(torch.int16).numpy().view(np.uint16))
    return tensor.numpy()


def test_embedding(dtype: str) -> None:
    table, _ = normal(1, dtype, 7, 5)
    ids = np.array([[0, 6], [3, 3]], np.int32)
    got = ops.embedding(table, torch.as_tensor(ids))
    assert got.dtype == table.dtype
    assert np.array_equal(got.float().numpy(), ref.embedding(as_weight(table), ids))


def test_rms_norm(dtype: str) -> None:
    (x, x64), (w, w64) = normal(1, dtype, 2, 3, 10), normal(2, dtype, 10)
    mean = np.mean(np.square(x64), axis=-1, keepdims=True)
    want = x64 / np.sqrt(mean + 1e-2) * w64
    assert_close(ops.rms_norm(x, w, 1e-2), want, dtype)


@pytest.mark.parametrize("bias", [False, True])
def test_linear(dtype: str, bias: bool) -> None:
    (x, x64), (w, w64), (b, b64) = normal(1, dtype, 2, 3, 10), normal(2, dtype, 4, 10), normal(3, dtype, 4)
    want = x64 @ w64.T + (b64 if bias else 0)
    assert_close(ops.linear(x, w, b if bias else None), want, dtype)


def test_rope_table() -> None:
    positions = np.array([[0, 1, 100_000]], np.int32)
    inv_freq = (500000.0 ** -np.linspace(0, 1, 8)).astype(np.float32)
    for got, want in zip(
        ops.rope_table(torch.as_tensor(positions), torch.as_tensor(inv_freq)),
        ref.rope_table(positions, inv_freq),
        strict=True,
    ):
        assert got.dtype == torch.float32
        assert np.allclose(got.numpy(), want, atol=1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope(dtype: str, interleaved: bool) -> None:
    x, x64 = normal(1, dtype, 2, 3, 4, 10)
    cos, sin = ref.rope_table(np.arange(6, dtype=np.int32).reshape(2, 3), np.ones(5, np.float32))
    got = ops.rope(x, torch.as_tensor(cos), torch.as_tensor(sin), interleaved)
    assert_close(got, ref.rope(x64, cos.astype(np.float64), sin.astype(np.float64), interleaved), dtype)


def test_write_kv(dtype: str) -> None:
    (k, k64), (v, v64) = normal(1, dtype, 5, 2, 5), normal(2, dtype, 5, 2, 5)
    table = page_table([3, 0], [2, 3], [[0, 4], [2, 1]])
    cache_k, cache_v = torch.zeros(5, 4, 2, 5, dtype=k.dtype), torch.ones(5, 4, 2, 5, dtype=k.dtype)
    want_k, want_v = cache_k.double().numpy(), cache_v.double().numpy()
    ref.write_kv(want_k, want_v, k64, v64, table)
    ops.write_kv(cache_k, cache_v, k, v, on_torch(table))
    assert np.array_equal(cache_k.double().numpy(), want_k)
    assert np.array_equal(cache_v.double().numpy(), want_v)
    assert np.array_equal(want_k[0, 3], k64[0])
    assert np.array_equal(want_k[4, 0], k64[1])
    assert np.array_equal(want_k[2, :3], k64[2:])


def test_attention_over_pages(dtype: str) -> None:
    """Of shuffled numbers and any size, one shared; what no token sees is NaN."""
    first, counts = [2, 0, 7], [1, 5, 2]
    table = page_table(first, counts, [[3, 5, -9], [0, 2, -9], [3, 1, 6]])
    (q, q64), (k, k64), (v, v64) = (
        normal(i, dtype, *shape) for i, shape in ((1, (8, 6, 6)), (2, (7, 3, 2, 6)), (3, (7, 3, 2, 6)))
    )
    for cache, cache64 in ((k, k64), (v, v64)):
        cache[4:6], cache64[4:6] = torch.nan, np.nan
    got = ops.attention(q, k, v, on_torch(table))
    want = ref.attention(q64, k64, v64, table)
    assert np.all(np.isfinite(want))
    assert_close(got, want, dtype)


def test_attention_of_whole_stretches(dtype: str) -> None:
    (q, q64), (k, k64), (v, v64) = (normal(i, dtype, 2, 5, h, 6) for i, h in ((1, 6), (2, 2), (3, 2)))
    assert_close(ops.attention(q, k, v, None), ref.attention(q64, k64, v64, None), dtype)


def test_positions() -> None:
    got = ops.positions(torch.zeros(2, 3, dtype=torch.int32))
    assert got.dtype == torch.int32
    assert got.tolist() == ref.positions(np.zeros((2, 3), np.int32)).tolist() == [[0, 1, 2]] * 2


def test_swiglu(dtype: str) -> None:
    (gate, gate64), (up, up64) = normal(1, dtype, 3, 10), normal(2, dtype, 3, 10)
    assert_close(ops.swiglu(gate, up), ref.swiglu(gate64, up64), dtype)


def test_argmax(dtype: str) -> None:
    logits, logits64 = normal(1, dtype, 3, 10)
    got = ops.argmax(logits)
    assert got.dtype == torch.int32
    assert np.array_equal(got.numpy(), ref.argmax(logits64))


def on_torch(table: PageTable) -> PageTable:
    return PageTable(*(torch.from_numpy(array) for array in table))


def leaf(seed: int, *shape: int) -> Any:
    return normal(seed, "float64", *shape)[0].requires_grad_()


def test_gradients() -> None:
    """torch.autograd.gradcheck compares each with central differences; inputs are float64."""
    ids = torch.tensor([[0, 2, 2]])
    cos, sin = (
        torch.as_tensor(a).double() for a in ref.rope_table(np.arange(3, dtype=np.int32), np.ones(2, np.float32))
    )
    cases: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "embedding": (lambda table: ops.embedding(table, ids), (leaf(1, 3, 4),)),
        "rms_norm": (lambda x, w: ops.rms_norm(x, w, 1e-5), (leaf(1, 2, 4), leaf(2, 4))),
        "linear": (ops.linear, (leaf(1, 2, 4), leaf(2, 3, 4), leaf(3, 3))),
        "rope halves": (lambda x: ops.rope(x, cos, sin, False), (leaf(1, 3, 2, 4),)),
        "rope neighbours": (lambda x: ops.rope(x, cos, sin, True), (leaf(1, 3, 2, 4),)),
        "attention": (
            lambda q, k, v: ops.attention(q, k, v, None),
            (leaf(1, 1, 3, 4, 2), leaf(2, 1, 3, 2, 2), leaf(3, 1, 3, 2, 2)),
        ),
        "swiglu": (ops.swiglu, (leaf(1, 2, 3), leaf(2, 2, 3))),
    }
    for name, (op, inputs) in cases.items():
        assert torch.autograd.gradcheck(op, inputs, atol=1e-7), name


def test_layer_norm(dtype: str) -> None:
    x, wide = normal(31, dtype, 3, 7, 12)
    weight, bias = weights(32, dtype, 12), weights(33, dtype, 12)
    assert_close(ops.layer_norm(x, weight, bias, 1e-5), ref.layer_norm(wide, *doubles(weight, bias), 1e-5), dtype)


def test_gelu(dtype: str) -> None:
    x, wide = normal(34, dtype, 5, 9)
    assert_close(ops.gelu(x), ref.gelu(wide), dtype)


def test_attend(dtype: str) -> None:
    q, wide_q = normal(35, dtype, 2, 7, 6, 8)
    (k, wide_k), (v, wide_v) = normal(36, dtype, 2, 5, 3, 8), normal(37, dtype, 2, 5, 3, 8)
    want = ref.attend(wide_q, wide_k, wide_v)
    assert_close(ops.attend(q, k, v), want, dtype)
    assert_close(ops.attend(q[1], k[1], v[1]), want[1], dtype)


def test_gated_concat_and_pad(dtype: str) -> None:
    x, wide = normal(38, dtype, 2, 3, 4)
    gate, row = weights(39, dtype, 1), weights(40, dtype, 4)
    assert_close(ops.gated(x, gate), ref.gated(wide, *doubles(gate)), dtype)
    joined = ops.concat([row, x, row])
    assert_close(joined, ref.concat([*doubles(row), wide, *doubles(row)]), dtype)
    assert_close(ops.pad(x, 5), ref.pad(wide, 5), dtype)


def weights(seed: int, dtype: str, size: int) -> Any:
    """A random vector of numbers that float32 has, which is what the reference takes weights for."""
    return normal(seed, "float32", size)[0].to(getattr(torch, dtype))


def doubles(*tensors: Any) -> list[Any]:
    return [tensor.double().numpy() for tensor in tensors]
