"""Writes GGUF files, version 3: typed metadata, a table of tensors, then the tensors, some at a time.

What it is: the container of ggml's docs/gguf.md, little-endian, every tensor at a multiple of 32 bytes.
What it is not: a place that knows Llama (`gguf_metadata` names the keys), or one that packs numbers.
What is surprising: all sizes are known before the first number is read, so the header is written once and nothing is
ever written twice.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from puna.kernels.blocks import TYPES

ALIGNMENT = 32
"""The format's default, so that no key needs to say it."""

Value = bool | int | float | str | Sequence[str] | npt.NDArray[Any]
"""A metadata value: bool, uint32 or float32 (or the 64-bit type that holds it), string, array of strings or numbers."""

Progress = Callable[[int], None]
"""Called with the number of bytes just written."""


@dataclass(frozen=True)
class Outgoing:
    """One tensor: its name in the file, its shape (rows first), its block type, and its bytes when they are asked for.

    `pieces` gives them row after row, a multiple of whole rows at a time.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    pieces: Callable[[], Iterator[memoryview]]

    @property
    def nbytes(self) -> int:
        """Bytes it takes in the file, without what pads it."""
        return math.prod(self.shape[:-1]) * TYPES[self.kind].row_bytes(self.shape[-1])


def size(metadata: Mapping[str, Value], tensors: Iterable[Outgoing]) -> int:
    """Bytes of the whole file."""
    listed = list(tensors)
    return len(_header(metadata, listed)) + sum(_padded(tensor.nbytes) for tensor in listed)


def write(file: BinaryIO, metadata: Mapping[str, Value], tensors: Sequence[Outgoing], progress: Progress) -> None:
    """Write everything, reading one tensor at a time. Raises OSError where the disk fails."""
    file.write(_header(metadata, tensors))
    for tensor in tensors:
        written = 0
        for piece in tensor.pieces():
            file.write(piece)
            written += len(piece)
            progress(len(piece))
        assert written == tensor.nbytes, tensor.name
        file.write(b"\0" * (_padded(written) - written))


def _padded(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


def _header(metadata: Mapping[str, Value], tensors: Sequence[Outgoing]) -> bytes:
    out = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
    for key, value in metadata.items():
        out += _text(key) + _value(value)
    offset = 0
    for tensor in tensors:
        sizes = tensor.shape[::-1]  # ggml counts the columns first
        out += _text(tensor.name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
        out += struct.pack("<IQ", TYPES[tensor.kind].ggml_id, offset)
        offset += _padded(tensor.nbytes)
    out += b"\0" * (_padded(len(out)) - len(out))
    return bytes(out)


# GGUF's value types (gguf.h).
_NUMBERS = {
    name: i
    for i, name in enumerate(
        ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "bool", "", "", "uint64", "int64", "float64")
    )
    if name
}
_UINT32, _FLOAT32, _BOOL, _STRING, _ARRAY, _UINT64, _INT64, _FLOAT64 = 4, 6, 7, 8, 9, 10, 11, 12


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Value) -> bytes:
    if isinstance(value, bool):  # before int, which it is
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        kind, form = (_UINT32, "I") if 0 <= value < 1 << 32 else (_UINT64, "Q") if value > 0 else (_INT64, "q")
        return struct.pack(f"<I{form}", kind, value)
    if isinstance(value, float):
        try:
            return struct.pack("<If", _FLOAT32, value)
        except OverflowError:  # a float64 of another file, which float32 does not hold
            return struct.pack("<Id", _FLOAT64, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, np.ndarray):
        kind = _NUMBERS[value.dtype.name]
        data = value.astype(value.dtype.newbyteorder("<"), copy=False).tobytes()
        return struct.pack("<IIQ", _ARRAY, kind, len(value)) + data
    return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_text, value))
