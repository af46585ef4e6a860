"""Packed weights in C++: panels, embedding rows and products, per type and instruction set, against `gguf`'s decoder.

What is surprising: a product is compared twice. With activations rounded to 8 bits in NumPy the way the kernels do it,
the result must agree to float32's precision: all that is left is the order of sums. With the activations as they are it
must agree within the error that 8 bits make.
"""

from __future__ import annotations

import re
import shutil
import subprocess

import numpy as np
import numpy.typing as npt
import pytest

from puna.kernels import blocks, ops
from puna.kernels.blocks import TYPES
from puna.kernels.layouts import Packed, Panels, to_bf16

cpu = pytest.importorskip("puna.kernels.cpu", reason="the C++ extension is not built here")
gguf = pytest.importorskip("gguf", reason="decoding is compared with the gguf package's, which is not installed here")
pytestmark = pytest.mark.usefixtures("isa")

F32 = npt.NDArray[np.float32]
HALVES = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82], "Q3_K": [108],
    "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0],
}  # fmt: skip
"""Where the float16 scales of a block are: they must be numbers, the other bytes may be anything."""


def packed(kind: str, out: int, inner: int, seed: int = 0, scale: float | None = None) -> Packed:
    """Random blocks, with scales around 0.02, or all `scale`."""
    rng = np.random.default_rng(seed)
    row = rng.integers(0, 256, (out, inner // TYPES[kind].block, TYPES[kind].size), dtype=np.uint8)
    for at in HALVES[kind]:
        values = rng.standard_normal(row.shape[:2]) * 0.02 if scale is None else np.full(row.shape[:2], scale)
        row[:, :, at : at + 2] = values.astype(np.float16)[..., None].view(np.uint8)
    return Packed(kind, (out, inner), row.reshape(out, -1))


def values(weight: Packed) -> F32:
    with np.errstate(all="ignore"):
        decoded: F32 = gguf.quants.dequantize(weight.data, gguf.GGMLQuantizationType[weight.kind])
    return decoded


def normal(seed: int, *shape: int) -> F32:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def rounded(x: F32, kind: str) -> npt.NDArray[np.float64]:
    """Activations in 8 bits: blocks of 256 beside types of 256, else of 32, scaled by the largest."""
    groups = x.reshape(len(x), -1, TYPES[kind].block)
    most = np.max(np.abs(groups), axis=-1, keepdims=True)
    inverse = np.divide(np.float32(127), most, out=np.zeros_like(most), where=most >= 1e-30)
    scale = np.where(most >= 1e-30, most / np.float32(127), np.float32(0))
    return (np.rint(groups * inverse).astype(np.float64) * scale).reshape(x.shape)


def shapes(kind: str) -> list[tuple[int, int]]:
    return [(1, 256), (37, 768), (48, 2304)] if TYPES[kind].block == 256 else [(1, 32), (37, 96), (48, 544), (17, 1312)]


@pytest.mark.parametrize("kind", HALVES)
def test_embedding_is_what_gguf_decodes_bit_for_bit(kind: str) -> None:
    for out, inner in shapes(kind):
        weight = packed(kind, out, inner)
        ids = np.arange(out - 1, -1, -1, dtype=np.int32).reshape(1, -1)
        want = values(weight)[ids]
        for stored in (weight, cpu.prepare(weight)):
            np.testing.assert_array_equal(cpu.embedding(stored, ids), want)


@pytest.mark.parametrize("kind", HALVES)
def test_linear_is_the_integer_product(kind: str) -> None:
    """Every number of rows gives each row the same bits, from panels and from blocks as in a file."""
    for out, inner in shapes(kind):
        weight, x, bias = packed(kind, out, inner), normal(1, 61, inner), normal(2, out)
        x[5] = 0
        x[6], x[7] = 1, np.sign(x[7])  # sums as large as they can be
        panels, dense = cpu.prepare(weight), values(weight).astype(np.float64)
        exact = rounded(x, kind)
        got = cpu.linear(x, panels, bias)
        scale = np.max(np.abs(exact) @ np.abs(dense).T)
        assert np.max(np.abs(got - (exact @ dense.T + bias))) <= 2e-7 * scale
        error = np.abs(got - (x.astype(np.float64) @ dense.T + bias))
        assert np.max(error) <= 0.02 * np.max(np.abs(x) @ np.abs(dense).T)
        for rows in (1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 24, 25, 36, 40):
            for stored in (weight, panels):
                np.testing.assert_array_equal(cpu.linear(x[:rows], stored, bias), got[:rows])
        for row in (5, 30, 60):
            np.testing.assert_array_equal(cpu.linear(x[row : row + 1], panels, bias), got[row : row + 1])


@pytest.mark.parametrize("kind", ["Q4_K", "Q8_0"])
def test_linear_of_more_rows_than_are_quantized_at_once(kind: str) -> None:
    weight, x = cpu.prepare(packed(kind, 20, 1280)), normal(1, 600, 1280)
    got = cpu.linear(x, weight)
    for row in (0, 515, 516, 599):
        np.testing.assert_array_equal(cpu.linear(x[row : row + 1], weight), got[row : row + 1])


@pytest.mark.parametrize("kind", ["Q4_0", "Q6_K"])
def test_linear_large_enough_for_threads(kind: str) -> None:
    weight = packed(kind, 1031, 2048)
    x, dense = normal(1, 9, 2048), values(weight).astype(np.float64)
    for stored in (weight, cpu.prepare(weight)):
        want = rounded(x, kind) @ dense.T
        assert np.max(np.abs(cpu.linear(x, stored) - want)) <= 1e-6 * np.max(np.abs(want))


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("scale", [0.0, 65504.0, 6e-8, np.inf, np.nan])
def test_extreme_scales(kind: str, scale: float) -> None:
    weight = packed(kind, 5, 256, scale=scale)
    x, dense = normal(1, 3, 256), values(weight)
    got = cpu.linear(x, cpu.prepare(weight))
    np.testing.assert_array_equal(cpu.embedding(weight, np.arange(5, dtype=np.int32)), dense)
    if np.isfinite(scale):
        want = rounded(x, kind) @ dense.astype(np.float64).T
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * float(np.max(np.abs(want))) + 1e-30)
    else:
        assert not np.any(np.isfinite(got))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "Q6_K", "Q8_0"])
def test_extreme_activations(kind: str) -> None:
    """Not numbers stay so, in their row only; tiny ones are zero; huge ones keep their size."""
    weight = cpu.prepare(packed(kind, 7, 512))
    x = np.repeat(normal(1, 1, 512), 5, axis=0)
    want = cpu.linear(x, weight)
    x[1, 100], x[2, 300], x[3], x[4] = np.inf, np.nan, 1e-38, x[4] * np.float32(2.0**100)
    got = cpu.linear(x, weight)
    np.testing.assert_array_equal(got[0], want[0])
    assert not np.any(np.isfinite(got[1:3]))
    np.testing.assert_array_equal(got[3], np.zeros(7))
    np.testing.assert_allclose(got[4], want[4] * 2.0**100, rtol=1e-5)


def _order(kind: str) -> list[int]:
    """The words of a block as a product reads them first, by their numbers in ggml's order."""
    if kind == "Q2_K":
        return [20, *range(20)]
    if kind == "Q3_K":  # scales; lower bits of the first half, upper bits, lower bits of the second
        return [24, 25, 26, *(w for q in range(8) for w in (8 + q, q, 16 + q))]
    if kind == "Q5_K":  # scales; upper bits, then lower bits of the four quarters
        return [*range(4), *(w for q in range(8) for w in (4 + q, *range(12 + q, 44, 8)))]
    if kind == "Q6_K":  # scales; of each half: lower bits and upper bits in turn, the other lower bits
        halves = (
            [*(w for q in range(8) for w in (n * 16 + q, 32 + n * 8 + q)), *range(n * 16 + 8, n * 16 + 16)]
            for n in (0, 1)
        )
        return [48, 49, 50, 51, *(w for half in halves for w in half)]
    return list(range(TYPES[kind].size // 4))


def panels_by_numpy(weight: Packed) -> npt.NDArray[np.uint8]:
    """The definition of panels (kernels.h) in NumPy, for whole panels and types of 256."""
    kind, (out, inner) = TYPES[weight.kind], weight.shape
    rows = weight.data.reshape(out // 16, 16, inner // 256, kind.size)
    halves = HALVES[weight.kind][0] if kind.size % 4 else None
    words = rows if halves is None else rows[..., :halves]
    words = words.reshape(*words.shape[:3], -1, 4)[..., _order(weight.kind), :]
    side = words.transpose(0, 2, 3, 1, 4).reshape(out // 16, inner // 256, -1)
    if halves is not None:
        scales = rows[..., halves:].transpose(0, 2, 1, 3).reshape(out // 16, inner // 256, 32)
        side = np.concatenate([scales, np.zeros_like(scales), side], axis=-1)
    return side.reshape(-1)


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"])
def test_panels_are_the_words_of_16_rows_side_by_side(kind: str) -> None:
    weight = packed(kind, 48, 768)
    panels = cpu.prepare(weight)
    np.testing.assert_array_equal(panels.data, panels_by_numpy(weight))
    assert panels.data.ctypes.data % 64 == 0
    assert panels.nbytes <= 1.02 * weight.nbytes


def test_a_type_without_a_kernel_becomes_int8_with_a_scale_for_16_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    integers = rng.integers(-128, 128, (21, 512)).astype(np.int8)
    scales = rng.standard_normal((21, 32)).astype(np.float32)
    weight = Packed("IQ2_S", (21, 512), np.zeros((21, 2 * TYPES["IQ2_S"].size), np.uint8))
    monkeypatch.setattr(blocks, "exact_int8", lambda kind, data: (integers, scales), raising=False)
    dense = integers * np.repeat(scales, 16, axis=1)
    x = normal(1, 30, 512)
    want = rounded(x, "Q8_0") @ dense.astype(np.float64).T
    for keep in (False, True):
        panels = cpu.prepare(weight, keep=keep)
        assert panels.kind == "I8"
        np.testing.assert_array_equal(cpu.embedding(panels, np.arange(21, dtype=np.int32)), dense)
        got = cpu.linear(x, panels)
        assert np.max(np.abs(got - want)) <= 1e-6 * np.max(np.abs(want))
        for rows in (1, 8, 13):
            np.testing.assert_array_equal(cpu.linear(x[:rows], panels), got[:rows])
    with pytest.raises(TypeError, match="prepare"):
        cpu.linear(x, weight)


def test_prepare_keeps_what_it_may() -> None:
    ops.select("auto")  # whatever an earlier test left
    weight = packed("Q4_K", 16, 256)
    dense = [normal(1, 4, 4), normal(1, 4, 4).astype(np.float16), to_bf16(normal(1, 4, 4))]
    for other in dense:
        assert cpu.prepare(other) is other
    assert cpu.prepare(weight, keep=True) is weight
    assert isinstance(ops.prepare(weight), Panels)
    assert ops.prepare(weight, keep=True) is weight
    ops.select("reference")
    try:
        assert ops.prepare(weight) is weight
    finally:
        ops.select("auto")


@pytest.mark.parametrize("kind", ["Q4_0", "Q6_K"])
def test_a_wrong_size_is_refused(kind: str) -> None:
    panels, x = cpu.prepare(packed(kind, 20, 512)), normal(1, 1, 512)
    ids = np.zeros(1, np.int32)
    memory = np.zeros(panels.nbytes + 128, np.uint8)
    start = -memory.ctypes.data % 64
    for data, match in (
        (panels.data[:-1], "bytes"),
        (memory, "bytes"),
        (memory[start + 1 : start + 1 + panels.nbytes], "aligned"),
    ):
        wrong = Panels(kind, (20, 512), data)
        with pytest.raises(ValueError, match=match):
            cpu.linear(x, wrong)
        with pytest.raises(ValueError, match=match):
            cpu.embedding(wrong, ids)
    with pytest.raises(ValueError, match="no matrix"):
        cpu.linear(normal(1, 1, 500), Panels(kind, (20, 500), panels.data))
    with pytest.raises(ValueError, match="no matrix"):
        cpu.embedding(Panels(kind, (1 << 40, 512), panels.data), ids)
    with pytest.raises(ValueError, match="do not fit"):
        cpu.linear(normal(1, 1, 256), panels)
    with pytest.raises(TypeError, match="uint8"):
        cpu.linear(x, Panels(kind, (20, 512), panels.data.view(np.int8)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not in a table"):
        cpu.embedding(panels, np.full(1, 20, np.int32))


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump to read the code that was compiled")
def test_hot_loops_keep_their_sums_in_registers() -> None:
    """gcc 12 once wrote every sum to the stack after every product, at half the speed."""
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", cpu._cpu.__file__], capture_output=True, text=True, check=True
    ).stdout
    lines = re.findall(r"^ *([0-9a-f]+):\t(.*)$", listing, re.MULTILINE)
    targets = {target for _, text in lines for target in re.findall(r"^j\w+ +([0-9a-f]+)", text)}
    loops = 0
    products = spills = 0
    for address, text in [*lines, ("", "")]:
        if address in targets or not address:
            if products >= 32:
                loops += 1
                assert spills * 10 <= products, f"the loop before {address} spills"
            products = spills = 0
        products += "vpdpbusd" in text and "zmm" in text
        spills += re.match(r"vmov\w+ +%zmm\d+,-?(0x[0-9a-f]+)?\(%r[sb]p", text) is not None
    if any("VNNI" in reason for _, _, reason in cpu._cpu.tables()):
        assert loops > 20
