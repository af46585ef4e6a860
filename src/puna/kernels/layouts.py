"""How a weight's numbers lie in memory, and how to turn them back into float32.

What it is: the types that may stand for a dense weight on the host. A `numpy.ndarray` of float32 or float16 stands for
itself; NumPy has no bfloat16, so `BF16` wraps the raw 16-bit words.
What it is not: arithmetic (see `ops`), or file formats (see `puna.weights`).
What is surprising: nothing here copies unless its name says so; the words usually lie in a mapped file.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]


class BF16:
    """A bfloat16 array: `bits` is uint16 of the same shape, the upper half of each float32.

    Raises TypeError when `bits` is not uint16.
    """

    __slots__ = ("bits",)

    def __init__(self, bits: npt.NDArray[np.uint16]) -> None:
        if bits.dtype != np.uint16:
            raise TypeError(f"BF16 wraps uint16 words, not {bits.dtype}")
        self.bits = bits

    @property
    def shape(self) -> tuple[int, ...]:
        return self.bits.shape

    @property
    def nbytes(self) -> int:
        return self.bits.nbytes

    def __getitem__(self, index: Any) -> BF16:
        return BF16(self.bits[index])

    def __repr__(self) -> str:
        return f"BF16{self.shape}"


Weight = npt.NDArray[np.float32] | npt.NDArray[np.float16] | BF16
"""What `ops.linear` and `ops.embedding` accept as a weight on the host."""


def dtype_name(weight: Weight) -> str:
    """`"bf16"`, `"fp16"` or `"fp32"`. Raises TypeError for any other array."""
    if isinstance(weight, BF16):
        return "bf16"
    name = {"float32": "fp32", "float16": "fp16"}.get(weight.dtype.name)
    if name is None:
        raise TypeError(f"no kernel reads weights of type {weight.dtype}")
    return name


def to_float32(weight: Weight) -> F32:
    """The weight as float32, exactly (all three types are subsets of float32); copies unless it is float32 already."""
    if isinstance(weight, BF16):
        return (weight.bits.astype(np.uint32) << 16).view(np.float32)
    return weight.astype(np.float32, copy=False)


def to_bf16(values: F32) -> BF16:
    """Round float32 to bfloat16, to nearest, ties to even; NaN stays a quiet NaN, overflow becomes infinity."""
    words = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (words + 0x7FFF + ((words >> 16) & 1)) >> 16
    quiet_nan = (words >> 16) | 0x40
    return BF16(np.where(np.isnan(values), quiet_nan, rounded).astype(np.uint16))


def convert(weight: Weight, dtype: str) -> Weight:
    """The weight in another type (`"fp32"`, `"bf16"`, `"fp16"`); the same object when it already has it.

    Raises ValueError for another name, and OverflowError when a finite value does not fit fp16 (|x| > 65504).
    """
    if dtype_name(weight) == dtype:
        return weight
    values = to_float32(weight)
    if dtype == "fp32":
        return values
    if dtype == "bf16":
        return to_bf16(values)
    if dtype == "fp16":
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if bool(np.any(np.isinf(half) & np.isfinite(values))):
            raise OverflowError("a weight is larger than fp16 can hold (65504)")
        return half
    raise ValueError(f"unknown type {dtype!r}; one of fp32, bf16, fp16")
