"""Packing into GGML's block types: against the `gguf` package bit for bit where it packs, by error elsewhere; and the
C++ against the NumPy definition, byte for byte, on every instruction set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.kernels import encode, ops
from puna.kernels.blocks import TYPES
from puna.kernels.layouts import to_float32
from puna.weights.checkpoint import open_checkpoint
from puna.weights.embedded import embedded_folder

F32 = npt.NDArray[np.float32]

BLOCKS = [kind for kind in encode.KINDS if TYPES[kind].block > 1]
K_TYPES = [kind for kind in BLOCKS if TYPES[kind].block == 256]
SIMPLE = [kind for kind in encode.KINDS if kind not in K_TYPES]


def normal(rows: int, seed: int = 0) -> F32:
    return np.random.default_rng(seed).standard_normal((rows, 256), dtype=np.float32)


def trained() -> F32:
    """Matrices of the embedded model."""
    tensors = open_checkpoint(embedded_folder()).tensors
    return np.concatenate(
        [to_float32(tensors[f"layers.2.{part}.weight"].read()).reshape(-1, 256) for part in ("q", "v", "down")]
    )


def strange(seed: int = 1) -> F32:
    """Rows that have little in common with weights, all of which every type can hold."""
    rng = np.random.default_rng(seed)
    x = normal(8, seed)
    rows = [
        np.zeros((2, 256)), np.full((1, 256), -0.0), np.full((1, 256), 0.7), np.full((1, 256), -0.7), np.abs(x),
        -np.abs(x), np.where(rng.random((8, 256)) < 0.01, 3e4, x), x * 1e-7, x * 1e-30, np.sign(x) * 1e-45,
        x * (rng.random((8, 256)) < 0.1), rng.integers(-3, 4, (8, 256)), np.repeat(x[:, :16], 16, axis=1), x + 5,
        np.exp(2 * x), np.clip(rng.standard_cauchy((8, 256)), -9e4, 9e4),
    ]  # fmt: skip
    return np.concatenate(rows).astype(np.float32)


def unpacked(kind: str, data: npt.NDArray[np.uint8]) -> F32:
    """By the `gguf` package."""
    values: F32 = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    return values


def rms_error(kind: str, x: F32) -> float:
    error = unpacked(kind, encode.quantize(kind, x)).astype(np.float64) - x
    return float(np.sqrt(np.mean(error**2)))


@pytest.mark.parametrize("kind", SIMPLE)
def test_the_same_bytes_as_gguf(kind: str) -> None:
    positive_zero = strange() + np.float32(0)  # of 0 and -0, gguf's minimum may be either
    for x in (normal(70), trained()[:70], positive_zero):
        with np.errstate(all="ignore"):
            theirs = gguf.quants.quantize(x, gguf.GGMLQuantizationType[kind])
        ours = encode.quantize(kind, x)
        rest = np.ones(len(x), bool)
        if kind not in ("F32", "F16", "BF16"):
            # Beyond the reach of 1 / scale gguf's integers are whatever a cast of NaN gives; the scale is 0 there.
            rest = np.abs(x).max(axis=1) > 1e-37
            rest |= np.all(x == 0, axis=1)
        assert np.array_equal(ours[rest], np.ascontiguousarray(theirs).view(np.uint8).reshape(ours.shape)[rest])


# What `ggml_quantize_chunk` (ggml 0.25.3, no importance matrix) gives for these two; see the test of the peers.
GGML_ERRORS = {
    "Q2_K": (0.296758, 0.0295166), "Q3_K": (0.149806, 0.0150243), "Q4_K": (0.0710716, 0.0071094),
    "Q5_K": (0.0358802, 0.00359629), "Q6_K": (0.01763, 0.00176857),
}  # fmt: skip


@pytest.mark.parametrize("kind", K_TYPES)
def test_k_types_err_less_than_ggmls(kind: str) -> None:
    on_normal, on_trained = GGML_ERRORS[kind]
    assert 0.85 * on_normal < rms_error(kind, normal(512)) < 0.985 * on_normal
    assert 0.85 * on_trained < rms_error(kind, trained()) < 0.985 * on_trained


@pytest.mark.parametrize("kind", K_TYPES)
def test_what_a_k_type_can_hold_comes_back(kind: str) -> None:
    """Numbers on the grid of one scale: the steps of the type, from its least to its largest."""
    low, high = {"Q2_K": (0, 3), "Q3_K": (-4, 3), "Q4_K": (0, 15), "Q5_K": (0, 31), "Q6_K": (-32, 31)}[kind]
    q = np.random.default_rng(2).integers(low, high + 1, (20, 256))
    q[:, ::16], q[:, 1::16] = low, high
    x = (q * 0.375).astype(np.float32)
    assert np.abs(unpacked(kind, encode.quantize(kind, x)) - x).max() < 0.375 * high * 2**-10
    assert np.array_equal(unpacked(kind, encode.quantize(kind, np.zeros((3, 256), np.float32))), np.zeros((3, 256)))


@pytest.mark.parametrize("kind", BLOCKS)
def test_one_huge_number_and_very_small_ones(kind: str) -> None:
    x = normal(4)
    x[1, 7] = 3e4
    back = unpacked(kind, encode.quantize(kind, x))
    step = {"Q8_0": 127, "Q6_K": 32, "Q5_K": 31, "Q5_0": 16, "Q5_1": 31, "Q3_K": 4, "Q2_K": 3, "Q4_0": 8}.get(kind, 15)
    assert abs(back[1, 7] - 3e4) < 3e4 / step
    assert np.all(np.isfinite(back))
    tiny = unpacked(kind, encode.quantize(kind, x * np.float32(1e-42)))
    assert np.abs(tiny).max() < 1e-6


@pytest.mark.parametrize("kind", BLOCKS)
def test_numbers_that_do_not_fit(kind: str) -> None:
    for value in (np.inf, -np.inf, np.nan):
        x = normal(2)
        x[1, 200] = value
        with pytest.raises(ValueError, match="infinite or not a number"):
            ops.encode(kind, x)
    for value in (1e9, -3e38, 4e8):
        x[1, 200] = value
        for pack in (encode.quantize, ops.encode):
            with pytest.raises(OverflowError, match=f"larger than {kind} can hold"):
                pack(kind, x)


def test_types_and_rows_that_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match="IQ4_XS cannot be written; one of F32, F16"):
        ops.encode("IQ4_XS", normal(1))
    with pytest.raises(ValueError, match="not a whole number of Q4_K blocks"):
        ops.encode("Q4_K", normal(1)[:, :96])
    with pytest.raises(OverflowError, match="fp16"):
        ops.encode("F16", np.full((1, 4), 7e4, np.float32))
    assert ops.encode("Q8_0", np.empty((0, 64), np.float32)).shape == (0, 68)


def available() -> list[str]:
    """What can serve on this machine."""
    try:
        from puna.kernels import cpu
    except ImportError:
        return ["reference"]
    return ["reference", *cpu.isas()]


@pytest.fixture(params=available())
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    ops.select(request.param)
    yield request.param
    ops.select("auto")


@pytest.mark.parametrize("kind", BLOCKS)
def test_every_instruction_set_gives_the_same_bytes(kind: str, kernels: str) -> None:
    for x in (normal(3), strange(), trained()[:67].reshape(67, 2, 128) if kind not in K_TYPES else trained()[:67]):
        assert np.array_equal(ops.encode(kind, x), encode.quantize(kind, x))


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 40),
    exponent=st.floats(-44, 3),
    power=st.sampled_from([1, 3, 5]),
    kept=st.floats(0, 1),
    shift=st.floats(-3, 3),
)
def test_any_numbers_give_the_same_bytes(
    seed: int, rows: int, exponent: float, power: int, kept: float, shift: float
) -> None:
    rng: Any = np.random.default_rng(seed)
    x = (rng.standard_normal((rows, 256)) ** power + shift) * (rng.random((rows, 256)) < kept)
    x = np.clip(x * 10.0**exponent, -3e4, 3e4).astype(np.float32)
    for kind in BLOCKS:
        assert np.array_equal(ops.encode(kind, x), encode.quantize(kind, x)), kind
