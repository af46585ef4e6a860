"""Packs a stored weight into a block type, some rows at a time.

What it is: the walk over a tensor's rows that writing a file and packing on load share.
What it is not: a choice of types (`mixes`), or the packing itself (`ops.encode`).
What is surprising: a weight that already has the type asked for gives its own bytes, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from puna.errors import CheckpointError
from puna.kernels import ops
from puna.kernels.blocks import TYPES
from puna.kernels.layouts import Packed, Panels, Weight, dtype_name, to_float32
from puna.weights.files import raw, release

U8 = npt.NDArray[np.uint8]

KINDS = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
"""The block type of a weight that is not packed, by Puna's name for it."""

_NUMBERS_AT_A_TIME = 1 << 22


def kind_of(dtype: str) -> str:
    """The block type of a tensor's numbers as stored; packed ones are called by it already."""
    return KINDS.get(dtype, dtype)


def packed_rows(path: Path, name: str, weight: Weight, kind: str) -> Iterator[U8]:
    """The rows of a weight [*, columns] as blocks of `kind`: uint8 [some rows, bytes of a row], one after the other.

    Raises CheckpointError naming file and tensor for numbers that the type cannot hold.
    """
    columns = weight.shape[-1]
    if isinstance(weight, Packed):
        if weight.kind == kind:
            yield from _slices(weight.data.reshape(-1, weight.data.shape[-1]))
            return
    elif kind_of(dtype_name(weight)) == kind:
        yield from _slices(np.ascontiguousarray(raw(weight)).reshape(-1, columns).view(np.uint8))
        return
    assert not isinstance(weight, Panels)  # which only `ops.prepare` makes, of what is loaded
    step = max(1, _NUMBERS_AT_A_TIME // columns)
    for at in range(0, weight.shape[0], step) if len(weight.shape) > 1 else (0,):
        values = to_float32(weight[at : at + step] if len(weight.shape) > 1 else weight).reshape(-1, columns)
        try:
            yield ops.encode(kind, values)
        except (ValueError, OverflowError) as error:
            raise CheckpointError(
                f"{path}: {name}: {error}.", remedy="Use BF16 or F32, which hold every finite number."
            ) from error


def _slices(rows: U8) -> Iterator[U8]:
    step = max(1, (1 << 25) // max(1, rows.shape[1]))
    for at in range(0, len(rows), step):
        yield rows[at : at + step]


def packed(path: Path, name: str, weight: Weight, kind: str) -> Packed:
    """A matrix as blocks of `kind`, in memory of its own; a mapped original is released. Errors as `packed_rows`."""
    data = np.empty((weight.shape[0], TYPES[kind].row_bytes(weight.shape[1])), np.uint8)
    at = 0
    for rows in packed_rows(path, name, weight, kind):
        data[at : at + len(rows)] = rows
        at += len(rows)
    release(weight)
    return Packed(kind, tuple(weight.shape), data)
