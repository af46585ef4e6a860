"""How a weight's numbers lie in memory, and how to turn them back into float32.

What it is: the types that may stand for a weight on the host. A `numpy.ndarray` of float32 or float16 stands for
itself; NumPy has no bfloat16, so `BF16` wraps the raw 16-bit words; `Packed` and `Panels` hold blocks of a GGML type.
What it is not: arithmetic (see `ops`), what the bytes of a block mean (see `blocks`), or file formats (see
`puna.weights`).
What is surprising: nothing here copies unless its name says so; the words usually lie in a mapped file.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from puna.kernels.blocks import TYPES, bf16_to_float32, dequantize

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


class Packed:
    """A matrix [out, in] in blocks of a GGML type, row after row as a GGUF file has it.

    `kind` is a name of `blocks.TYPES`, `data` uint8 [out, bytes of a row], usually a view of the mapped file. Raises
    TypeError when `data` is not uint8 or its last dimension is not the bytes of a row.
    """

    __slots__ = ("data", "kind", "shape")

    def __init__(self, kind: str, shape: tuple[int, ...], data: npt.NDArray[np.uint8]) -> None:
        row = TYPES[kind].row_bytes(shape[-1])
        if data.dtype != np.uint8 or data.shape != (*shape[:-1], row):
            raise TypeError(
                f"{kind} {list(shape)} takes uint8 {[*shape[:-1], row]}, not {data.dtype} {list(data.shape)}"
            )
        self.kind, self.shape, self.data = kind, shape, data

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def __getitem__(self, index: Any) -> Packed:
        """Whole rows: an index over the leading dimensions. Raises TypeError for one that cuts rows."""
        data = self.data[index]
        return Packed(self.kind, (*data.shape[:-1], self.shape[-1]), data)

    def row_chunks(self) -> Iterator[slice]:
        """Slices over the first dimension of a matrix that dequantize to 4 MB each, or to one row."""
        step = max(1, (1 << 20) // max(1, self.shape[-1]))
        return (slice(start, start + step) for start in range(0, self.shape[0], step))

    def __repr__(self) -> str:
        return f"Packed({self.kind}, {self.shape})"


class Mapped(Packed):
    """A packed matrix whose `data` is a view of a mapped file, and which is to be regrouped when there is time.

    Until then it computes as any `Packed` does: the same bits, slower. Made for types that have a kernel of their own.
    """

    __slots__ = ()


class Panels:
    """The same matrix [out, in] as the C++ kernels read it fastest: 16 rows side by side, regrouped once.

    `data` is uint8 [bytes], aligned to 64. Made by `ops.prepare` and `ops.prepare_mapped`, never read from a file.
    """

    __slots__ = ("data", "kind", "shape")

    def __init__(self, kind: str, shape: tuple[int, int], data: npt.NDArray[np.uint8]) -> None:
        self.kind, self.shape, self.data = kind, shape, data

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def __repr__(self) -> str:
        return f"Panels({self.kind}, {self.shape})"


class AdapterRows(NamedTuple):
    """A low-rank addition to a matrix for some rows of x: down [r, in] and up [out, r], the scale in `up`."""

    rows: slice
    down: Any
    up: Any


class Adapted(NamedTuple):
    """A matrix, and what LoRA adapters (Hu et al. 2021) add to it for some of the rows of one batch, a part an adapter.

    For a row of x in a part: y = x · baseᵀ + (x · downᵀ) · upᵀ.
    """

    base: Any
    parts: tuple[AdapterRows, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)


Weight = npt.NDArray[np.float32] | npt.NDArray[np.float16] | BF16 | Packed | Panels
"""What `ops.linear` and `ops.embedding` accept as a weight on the host."""

Cache = npt.NDArray[np.float32] | npt.NDArray[np.float16] | BF16 | Packed
"""Keys or values on the host, [pages, page, G, D]; `Packed` is Q8_0, its blocks running along D."""


class PageTable(NamedTuple):
    """Where the N tokens of a step stand: B sequences one after another, without padding, and the pages of each.

    A cache is [pages, page, G, D]: position p of sequence b is row p % page of page pages[b, p // page]. Sequences may
    share pages that none of them writes to. All three arrays are int32, on the host or on the model's device.
    """

    positions: Any
    """[N]: of each token in its sequence, ascending by one within a sequence."""
    starts: Any
    """[B + 1]: tokens starts[b] to starts[b + 1] are sequence b's, at least one."""
    pages: Any
    """[B, P]: entries that no position needs are not read."""

    @property
    def local(self) -> Any:
        """None, or the pages [B, P] of layers that see one chunk only, where those have their own: `ChunkedTable`."""
        return None


class ChunkedTable(PageTable):
    """A table with other pages for layers that see one chunk only, whose caches have their own number of pages.

    `local` [B, P] int32: position p of sequence b is row p % page of their page local[b, p // page]. -1 stands where a
    page lies before the chunk of the sequence's first token in the step: nobody sees it, and it is not read.
    Where the table is taken as a tuple it is that of the other layers.
    """

    _local: Any = None

    def __new__(cls, positions: Any, starts: Any, pages: Any, local: Any) -> ChunkedTable:
        self = super().__new__(cls, positions, starts, pages)
        self._local = local
        return self

    @property
    def local(self) -> Any:
        """See the class."""
        return self._local


class Pixels(NamedTuple):
    """A picture as a vision encoder takes it; `puna.text.pictures` makes it."""

    tiles: Any
    """float32 [tiles, 3, S, S]: those of the canvas row by row, then the whole picture in one where the model asks."""
    ratio: tuple[int, int]
    """Rows and columns of the canvas, in tiles."""
    tokens: int
    """How many token ids it takes in a prompt."""


def page_table(first: Sequence[int], counts: Sequence[int], pages: npt.ArrayLike) -> PageTable:
    """The table of sequences whose next `counts[b]` tokens stand at first[b], first[b] + 1, …, in pages [B, P]."""
    positions = [np.arange(at, at + count, dtype=np.int32) for at, count in zip(first, counts, strict=True)]
    starts = np.cumsum([0, *counts], dtype=np.int32)
    return PageTable(np.concatenate(positions), starts, np.ascontiguousarray(pages, np.int32))


def empty_cache(kv_type: str, shape: tuple[int, ...]) -> Cache:
    """A KV cache of zeros: `kv_type` is `fp32`, `bf16`, `fp16` or `q8_0`.

    Memory is taken when it is written to. Raises ValueError for another name, and where q8_0 does not divide a head.
    """
    if kv_type == "q8_0":
        size = TYPES["Q8_0"].row_bytes(shape[-1])
        return Packed("Q8_0", shape, np.zeros((*shape[:-1], size), np.uint8))
    if kv_type == "bf16":
        return BF16(np.zeros(shape, np.uint16))
    if kv_type not in ("fp32", "fp16"):
        raise ValueError(f"unknown type of KV cache {kv_type!r}")
    return np.zeros(shape, np.float32) if kv_type == "fp32" else np.zeros(shape, np.float16)


def words(weight: Weight) -> npt.NDArray[Any]:
    """The plain array that holds the numbers: itself, or what `BF16`, `Packed` and `Panels` wrap."""
    return weight.bits if isinstance(weight, BF16) else weight.data if isinstance(weight, Packed | Panels) else weight


def mapping(weight: Weight) -> mmap.mmap | None:
    """The mapped file that a weight is a view of, or None: memory that can be given back and read again."""
    base: Any = words(weight)
    while isinstance(base, np.ndarray | memoryview):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    if not isinstance(base, mmap.mmap):
        return None
    try:
        base.size()
    except OSError:  # anonymous: there is no file
        return None
    return base


def is_packed(weight: object) -> bool:
    """Whether a weight is blocks of integers, so that its products round what they are given to 8 bits."""
    return isinstance(weight.base if isinstance(weight, Adapted) else weight, Packed | Panels)


def dtype_name(weight: Weight) -> str:
    """`"bf16"`, `"fp16"`, `"fp32"`, or the kind of blocks (`"Q4_K"`). Raises TypeError for any other array."""
    if isinstance(weight, BF16):
        return "bf16"
    if isinstance(weight, (Packed, Panels)):
        return weight.kind
    name = {"float32": "fp32", "float16": "fp16"}.get(weight.dtype.name)
    if name is None:
        raise TypeError(f"no kernel reads weights of type {weight.dtype}")
    return name


def to_float32(weight: Weight) -> F32:
    """The weight as float32, exactly (every type is a subset of float32); copies unless it is float32 already.

    Raises TypeError for `Panels`, which only C++ reads.
    """
    if isinstance(weight, BF16):
        return bf16_to_float32(weight.bits)
    if isinstance(weight, Packed):
        return dequantize(weight.kind, weight.data)
    if isinstance(weight, Panels):
        raise TypeError(f"{weight!r} is laid out for the C++ kernels and is not turned back")
    return weight.astype(np.float32, copy=False)


def to_bf16(values: F32) -> BF16:
    """Round float32 to bfloat16, to nearest, ties to even; NaN stays a quiet NaN, overflow becomes infinity."""
    words = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (words + 0x7FFF + ((words >> 16) & 1)) >> 16
    quiet_nan = (words >> 16) | 0x40
    return BF16(np.where(np.isnan(values), quiet_nan, rounded).astype(np.uint16))


def convert(weight: Weight, dtype: str) -> Weight:
    """The weight in another type (`"fp32"`, `"bf16"`, `"fp16"`); the same object when it already has it.

    Raises ValueError for another name, OverflowError when a finite value does not fit fp16 (|x| > 65504), and TypeError
    for `Panels`.
    """
    if dtype_name(weight) == dtype:
        return weight
    if dtype == "fp32":
        return to_float32(weight)
    if dtype == "bf16":
        return BF16(_by_rows(weight, np.uint16, lambda values: to_bf16(values).bits))
    if dtype == "fp16":
        half: npt.NDArray[np.float16] = _by_rows(weight, np.float16, _to_fp16)
        return half
    raise ValueError(f"unknown type {dtype!r}; one of fp32, bf16, fp16")


def _to_fp16(values: F32) -> npt.NDArray[np.float16]:
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if bool(np.any(np.isinf(half) & np.isfinite(values))):
        raise OverflowError("a weight is larger than fp16 can hold (65504)")
    return half


def _by_rows(weight: Weight, word: type[np.generic], narrow: Callable[[F32], Any]) -> Any:
    """`narrow` of the weight's values; a Packed one some rows at a time, for as float32 it may not fit in memory."""
    if not isinstance(weight, Packed):
        return narrow(to_float32(weight))
    rows = math.prod(weight.shape[:-1])
    flat = Packed(weight.kind, (rows, weight.shape[-1]), weight.data.reshape(rows, weight.data.shape[-1]))
    out = np.empty(flat.shape, word)
    for part in flat.row_chunks():
        out[part] = narrow(to_float32(flat[part]))
    return out.reshape(weight.shape)
