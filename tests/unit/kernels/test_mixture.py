"""The ops of a mixture of experts, the temperature of queries and the norm without weights, in C++ and torch against
the reference; and what a row's bits may depend on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from puna.kernels import ops
from puna.kernels import reference as ref
from puna.kernels.encode import quantize
from puna.kernels.layouts import Packed, to_bf16

F32 = npt.NDArray[np.float32]
E, DIM, HIDDEN = 5, 64, 96


def normal(seed: int, *shape: int) -> F32:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def expert(seed: int, kind: str) -> tuple[Any, Any, Any]:
    matrices = []
    for i, shape in enumerate(((HIDDEN, DIM), (HIDDEN, DIM), (DIM, HIDDEN))):
        values = normal(10 * seed + i, *shape) * np.float32(0.2)
        matrices.append(
            values
            if kind == "fp32"
            else to_bf16(values)
            if kind == "bf16"
            else Packed(kind, shape, quantize(kind, values))
        )
    return tuple(matrices)  # type: ignore[return-value]


@pytest.fixture(params=["fp32", "bf16", "Q8_0"])
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(params=["reference", "auto"])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    ops.select(request.param)
    yield request.param
    ops.select("auto")


def wanted(x: F32, ids: Any, scores: F32, parts: Any, shared: Any) -> npt.NDArray[np.float64]:
    """The sum written out, token by token, in float64."""

    def one(row: Any, matrices: Any) -> Any:
        gate, up, down = (np.float64(ref.linear(np.eye(m.shape[1], dtype=np.float64), m).T) for m in matrices)
        inner = gate @ row
        return down @ (inner / (1 + np.exp(-inner)) * (up @ row))

    rows = []
    for row, chosen, score in zip(x.astype(np.float64), ids, scores, strict=True):
        rows.append(one(row, shared) + sum(one(row * s, parts[e]) for e, s in zip(chosen, score, strict=True)))
    return np.stack(rows)


@pytest.mark.parametrize("k", [1, 2])
def test_experts(kernels: str, kind: str, k: int) -> None:
    x, parts, shared = normal(1, 9, DIM), [expert(e, kind) for e in range(E)], expert(9, kind)
    ids, scores = ops.route(normal(2, 9, E), k)
    assert len(set(ids.ravel().tolist())) > 2
    got = ops.experts(x, ids, scores, lambda e: parts[e], shared)
    want = wanted(x, ids, scores, parts, shared)
    limit = 2e-2 if kind == "Q8_0" else 2e-2 if kind == "bf16" else 1e-5
    assert np.abs(got - want).max() < limit * np.abs(want).max()
    stretches = ops.experts(
        x.reshape(3, 3, DIM), ids.reshape(3, 3, k), scores.reshape(3, 3, k), lambda e: parts[e], shared
    )
    assert np.array_equal(stretches.reshape(9, DIM), got)


def test_only_chosen_experts_are_asked_for(kernels: str) -> None:
    asked: list[int] = []

    def part(e: int) -> tuple[Any, Any, Any]:
        asked.append(e)
        return expert(e, "fp32")

    ids = np.array([[3], [1], [3]], np.int32)
    ops.experts(normal(1, 3, DIM), ids, np.ones((3, 1), np.float32), part, expert(9, "fp32"))
    assert asked == [1, 3]


@pytest.mark.parametrize("packed", ["Q8_0", "Q4_0", "Q6_K"])
def test_a_row_has_the_same_bits_whoever_is_beside_it(packed: str) -> None:
    pytest.importorskip("puna.kernels.cpu", reason="the C++ extension is not built here")
    ops.select("auto")
    dim, hidden = 256, 512
    shapes = ((hidden, dim), (hidden, dim), (dim, hidden))

    def packed_expert(seed: int) -> Any:
        return tuple(
            ops.prepare(Packed(packed, s, quantize(packed, normal(seed + i, *s)))) for i, s in enumerate(shapes)
        )

    parts, shared, x = [packed_expert(10 * e) for e in range(3)], packed_expert(90), normal(1, 40, dim)
    ids, scores = ops.route(normal(2, 40, 3), 1)
    whole = ops.experts(x, ids, scores, lambda e: parts[e], shared)
    for rows in (slice(0, 1), slice(7, 8), slice(3, 12), slice(20, 40)):
        got = ops.experts(x[rows].copy(), ids[rows].copy(), scores[rows].copy(), lambda e: parts[e], shared)
        assert np.array_equal(got, whole[rows])


def test_route(kernels: str) -> None:
    logits = np.array([[0.5, -2, 3, 3], [-90, -80, -100, -95]], np.float32)
    ids, scores = ops.route(logits, 2)
    assert ids.tolist() == [[2, 3], [1, 0]]
    np.testing.assert_allclose(scores, 1 / (1 + np.exp(-np.float64([[3, 3], [-80, -90]]))), rtol=1e-6, atol=1e-38)
    with pytest.raises(ValueError, match="k = 5"):
        ops.route(logits, 5)


def test_what_does_not_fit_is_refused() -> None:
    cpu = pytest.importorskip("puna.kernels.cpu", reason="the C++ extension is not built here")
    x, one = normal(1, 2, DIM), expert(1, "fp32")
    ids, scores = np.array([[0], [4]], np.int32), np.ones((2, 1), np.float32)
    with pytest.raises(IndexError):
        cpu.experts(x, ids, scores, lambda e: [one][e], one)
    with pytest.raises(ValueError, match="do not fit"):
        cpu.experts(x, ids, scores, lambda e: (one[0], one[2], one[1]), one)
    with pytest.raises(TypeError):
        cpu.experts(x, ids.astype(np.int64), scores, lambda e: one, one)


def test_temperature_is_one_below_the_floor(kernels: str) -> None:
    q, positions = normal(1, 5, 3, 8), np.array([0, 6, 7, 15, 8191], np.int32)
    got = ops.temperature(q, positions, 8, 0.1)
    assert np.array_equal(got[:2], q[:2])
    factors = 1 + 0.1 * np.log(np.float64([2, 3, 1025]))
    np.testing.assert_allclose(got[2:], q[2:] * factors[:, None, None], rtol=1e-6)


def test_a_norm_without_weights_has_ones(kernels: str) -> None:
    x = normal(1, 4, 3, 10)
    assert np.array_equal(ops.rms_norm(x, None, 1e-5), ops.rms_norm(x, np.ones(10, np.float32), 1e-5))


def test_torch_agrees() -> None:
    torch = pytest.importorskip("torch")
    x, parts, shared = normal(1, 9, DIM), [expert(e, "fp32") for e in range(E)], expert(9, "fp32")
    logits, q, positions = normal(2, 9, E), normal(3, 9, 2, 8), np.arange(9, dtype=np.int32)

    def tensors(part: Any) -> Any:
        return tuple(map(torch.from_numpy, part))

    ids, scores = ref.route(logits, 2)
    found = ops.route(torch.from_numpy(logits), 2)
    assert np.array_equal(found[0].numpy(), ids)
    np.testing.assert_allclose(found[1].numpy(), scores, rtol=1e-6)
    got = ops.experts(torch.from_numpy(x), *found, lambda e: tensors(parts[e]), tensors(shared))
    np.testing.assert_allclose(
        got.numpy(), ref.experts(x, ids, scores, lambda e: parts[e], shared), rtol=1e-4, atol=1e-4
    )
    longer = ops.temperature(torch.from_numpy(q), torch.from_numpy(positions), 3, 0.2)
    np.testing.assert_allclose(longer.numpy(), ref.temperature(q, positions, 3, 0.2), rtol=1e-6)
