"""Files of strangers, opened so that nothing they claim is believed: mapped bytes, views of them, and strict JSON.

What it is: the few functions every reader in this room stands on. A view is checked against the file before it exists.
What it is not: a format. What lies where is each reader's business.
What is surprising: a view lives in the mapped file: it costs no memory until it is read, and the kernel may drop its
pages again. Writing to it is an error.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from puna.errors import CheckpointError
from puna.kernels.blocks import TYPES
from puna.kernels.layouts import BF16, Packed, Panels, Weight, mapping

LARGEST_JSON = 8 << 20
"""Bytes of JSON read at most. The largest real header (1,138 tensors of the 405B) is a sixtieth of this, and parsed
JSON can take twenty times its text in memory."""

ITEM_SIZE = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of one number of each type a weight may have."""

_STORED: dict[str, np.dtype[Any]] = {"fp32": np.dtype("<f4"), "bf16": np.dtype("<u2"), "fp16": np.dtype("<f2")}


@dataclass(frozen=True)
class LazyTensor:
    """One parameter of a checkpoint, not read yet.

    `name` is canonical (a key of `decoder.shapes`), `dtype` one of `"fp32"`, `"bf16"`, `"fp16"`, or a block type of
    `kernels.blocks.TYPES` (`"Q4_K"`: `read()` gives a `Packed`). `read()` gives the weight as stored: a read-only view
    of the mapped file where the file allows it, else a copy (a tensor split over shards, or one whose bytes are not
    contiguous or not aligned). `at` says which bytes, so that two names for one
    tensor are known without reading either. `check()` verifies the checksum of formats that have one.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Weight]
    at: tuple[str, int] | None = None
    check: Callable[[], None] = lambda: None
    pieces: Callable[[], Iterator[Weight]] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes it takes as stored."""
        if self.dtype in TYPES:
            return math.prod(self.shape[:-1]) * TYPES[self.dtype].row_bytes(self.shape[-1])
        return math.prod(self.shape) * ITEM_SIZE[self.dtype]


def unreadable(path: object, error: OSError) -> CheckpointError:
    """The error for a file the system does not let us read."""
    return CheckpointError(
        f"{path}: cannot be read ({error.strerror or error}).",
        remedy="Check that it is there and that you may read it; if the disk is at fault, fetch it again.",
    )


class MappedFile:
    """A whole file mapped for reading. Raises CheckpointError when it cannot be opened, is no file, or is empty."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for whoever writes to it
                raise CheckpointError(f"{path}: not a regular file, so it cannot be read.", remedy="Fetch it again.")
            with path.open("rb") as file:
                self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:
            raise CheckpointError(f"{path}: the file is empty.", remedy="Fetch it again.") from error
        except OSError as error:
            raise unreadable(path, error) from error
        self.size = len(self.bytes)

    def touch(self, begin: int, end: int) -> None:
        """Have the bytes from `begin` to `end` read and mapped, so that using them does not wait for it.

        Other threads run meanwhile. Linux maps 64 KiB around a page that is missed.
        """
        np.frombuffer(self.bytes, np.uint8)[begin : end : 64 << 10].max(initial=0)

    def weight(self, dtype: str, shape: tuple[int, ...], offset: int) -> Weight:
        """The weight of `shape` that starts at byte `offset`: a read-only view.

        The view may be unaligned (older safetensors files do not pad their header); the kernels read such weights.
        A file that another program cuts short while it is mapped ends this one by SIGBUS, as with any mapped file.
        Raises CheckpointError when it does not lie inside the file.
        """
        array = self._view(_STORED[dtype], shape, offset)
        return BF16(array) if dtype == "bf16" else array

    def packed(self, kind: str, shape: tuple[int, ...], offset: int) -> Packed:
        """The matrix of `shape` in blocks of the type `kind` that starts at byte `offset`: a read-only view.

        Raises CheckpointError when it does not lie inside the file, ValueError when a row is no whole number of blocks.
        """
        row = TYPES[kind].row_bytes(shape[-1])
        return Packed(kind, shape, self._view(np.dtype(np.uint8), (*shape[:-1], row), offset))

    def _view(self, stored: np.dtype[Any], shape: tuple[int, ...], offset: int) -> np.ndarray[Any, Any]:
        count = math.prod(shape)
        if offset < 0 or count < 0 or offset + count * stored.itemsize > self.size:
            raise CheckpointError(
                f"{self.path}: a tensor of {count * stored.itemsize} bytes at offset {offset} reaches past the end.",
                remedy="The file is cut short or damaged: fetch it again.",
            )
        if not count:
            return np.zeros(shape, stored)
        return np.frombuffer(self.bytes, stored, count, offset).reshape(shape)


def raw(weight: Weight) -> np.ndarray[Any, Any]:
    """The array behind a weight: itself, the words of a BF16, or the bytes of what is packed."""
    if isinstance(weight, BF16):
        return weight.bits
    return weight.data if isinstance(weight, Packed | Panels) else weight


def wrap(array: np.ndarray[Any, Any]) -> Weight:
    """The opposite of `raw`: uint16 words are a BF16."""
    return BF16(array) if array.dtype == np.uint16 else array


def release(weight: Weight) -> None:
    """Let the system have back the memory of a mapped weight's pages, for a weight that was copied and is done with.

    Reading it again is correct and comes from the disk. Nothing happens where the weight is no view of a mapped file,
    or the platform has no madvise. Without this, a model that is copied on load would count twice.
    """
    array, base = raw(weight), mapping(weight)
    if base is None or not hasattr(mmap, "MADV_DONTNEED") or not array.flags.c_contiguous:
        return
    start = array.ctypes.data - np.frombuffer(base, np.uint8).ctypes.data
    first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, (start + array.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if first < last:  # pages shared with a neighbour stay
        base.madvise(mmap.MADV_DONTNEED, first, last - first)


def same_bits(one: Weight, other: Weight) -> bool:
    """Whether two weights have one type, one shape and the same bits; stops at the first block that differs."""
    a, b = raw(one), raw(other)
    if getattr(one, "kind", None) != getattr(other, "kind", None) or a.dtype != b.dtype or a.shape != b.shape:
        return False
    a_words, b_words = (x.reshape(-1).view(f"<u{x.itemsize}") for x in (a, b))
    block = 1 << 16
    return all(np.array_equal(a_words[i : i + block], b_words[i : i + block]) for i in range(0, a_words.size, block))


def parse_json(text: bytes, source: str) -> Mapping[str, Any]:
    """A JSON object from bytes that may be anything: UTF-8, no key twice, no NaN.

    Raises CheckpointError naming `source`.
    """

    def damaged(what: str) -> CheckpointError:
        return CheckpointError(
            f"{source}: {what}.", remedy="The file is damaged or is not what its name says: fetch it again."
        )

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise damaged(f"the key {twice[:120]!r} stands there twice")
        return found

    def constant(name: str) -> Any:
        raise damaged(f"{name} is not JSON")

    if len(text) > LARGEST_JSON:
        raise damaged(f"{len(text)} bytes of JSON, more than the {LARGEST_JSON} allowed")
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise damaged(f"not valid JSON ({str(error)[:120]})") from error
    if not isinstance(value, dict):
        raise damaged(f"a JSON object was expected, not {type(value).__name__}")
    return value


def read_json(path: Path) -> Mapping[str, Any]:
    """The JSON object in a file, under `parse_json`'s rules. Raises CheckpointError."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            text = file.read(min(size, LARGEST_JSON) + 1)
    except OSError as error:
        raise unreadable(path, error) from error
    return parse_json(text, str(path))


def listed(names: Iterable[str]) -> str:
    """Names for an error message: the first eight, and how many more."""
    every = sorted(names)
    first = ", ".join(shown(name) for name in every[:8])
    return first if len(every) <= 8 else f"{first} and {len(every) - 8} more"


def shown(name: object) -> str:
    """A word from a file as a message may print it: not too long, and nothing a terminal would obey."""
    text = str(name)[:120]
    return text if text.isprintable() else repr(text)
