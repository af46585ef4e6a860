"""Reads GGUF files, whole or split, and trusts nothing in them.

What it is: a reader of our own for versions 2 and 3 of the format (ggml, docs/gguf.md): little-endian, a header of
typed metadata, a table of tensors, then their bytes, each tensor beginning at a multiple of the alignment.
What it is not: a place that knows Llama (`models.config_gguf` gives the metadata its meaning, `checkpoint` the tensors
theirs), or a decoder of packed blocks: a tensor is a view of the mapped file.
What is surprising: opening decodes almost nothing. The walk over the header notes where each value lies, and a value
is decoded when it is asked for; the 400,000 strings of a vocabulary are found in windows of the file with NumPy,
because their lengths chain them together and a loop over them would take longer than the rest of the start.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from puna.errors import CheckpointError
from puna.kernels.blocks import TYPES
from puna.text.words import Words
from puna.weights.files import LazyTensor, MappedFile, listed, shown

MAGIC = b"GGUF"

DEFAULT_ALIGNMENT = 32
LARGEST_ALIGNMENT = 1 << 20

MOST_VALUES = 4096
MOST_TENSORS = 16_384
"""Entries of metadata and tensors that one file may have. Real ones have some fifty, and 1,138 (the 405B)."""

MOST_STRINGS = 1 << 22
"""Strings of one array; Llama 3 has 280,147 merges, Llama 4 440,000."""

LONGEST_STRING = 1 << 20
"""Bytes of one string that is decoded: a template, a licence."""

LONGEST_NAME = 512
"""Bytes of a key or a tensor's name; ggml itself allows 63 for a tensor."""

PART_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")

FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS",
    21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S",
    29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0",
}  # fmt: skip
"""`general.file_type`: the mix of types that the quantizer was asked for (llama.h, `llama_ftype`)."""

DTYPES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
"""The types that are no blocks, as Puna calls them."""

_KINDS = {kind.ggml_id: kind.name for kind in TYPES.values()}

# GGUF's value types (gguf.h): how NumPy reads a number, and the two that are no numbers.
_NUMBERS: dict[int, np.dtype[Any]] = {
    i: np.dtype(f"<{code}")
    for i, code in enumerate(("u1", "i1", "u2", "i2", "u4", "i4", "f4", "?", "", "", "u8", "i8", "f8"))
    if code
}
_BOOL, _STRING, _ARRAY = 7, 8, 9

_DAMAGED = "The file is cut short, damaged, or not what its name says: fetch it again."


@dataclass(frozen=True, slots=True)
class _Value:
    """Where one metadata value lies: `at` is the first byte of a number or of a string's text, or of an array's items.

    `kind` is the type of the value or of the items, `count` None for a single one; `starts` are the beginnings of an
    array's strings (of their eight bytes of length), and the end of the last.
    """

    kind: int
    at: int
    length: int = 0
    count: int | None = None
    starts: npt.NDArray[np.int64] | None = None


class Metadata(Mapping[str, Any]):
    """The metadata of one file: key → value, decoded when asked for.

    Numbers are Python's (a float32 the shortest decimal that stands for it, so that 1e-5 is 1e-5), strings `str`,
    arrays of numbers read-only NumPy views, arrays of strings `Words`. Raises CheckpointError naming file and key for
    text that is not UTF-8 or too long to be read.
    """

    def __init__(self, file: MappedFile, values: dict[str, _Value]) -> None:
        self._file, self._values = file, values

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        if value.count is not None:
            return self._array(key, value)
        if value.kind == _STRING:
            return self._text(key, value)
        number = np.frombuffer(self._file.bytes, _NUMBERS[value.kind], 1, value.at)[0]
        if value.kind == _BOOL:
            byte = self._file.bytes[value.at]
            if byte > 1:
                raise self._fault(key, f"is a bool of the value {byte}")
            return byte == 1
        return float(str(number)) if number.dtype == np.float32 else number.item()

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def count(self, key: str) -> int:
        """How many items the array under a key has; 0 where it is missing or no array. Nothing is decoded."""
        return (self._values[key].count or 0) if key in self._values else 0

    def _array(self, key: str, value: _Value) -> npt.NDArray[Any] | Words:
        assert value.count is not None
        if value.starts is None:
            return np.frombuffer(self._file.bytes, _NUMBERS[value.kind], value.count, value.at)
        begin, end = int(value.starts[0]), int(value.starts[-1])
        held = np.frombuffer(self._file.bytes, np.uint8, end - begin, begin)
        kept = np.ones(end - begin, np.bool_)
        for i in range(8):
            kept[value.starts[:-1] - begin + i] = False
        ends = value.starts[1:] - begin - 8 * np.arange(1, value.count + 1)
        return Words(held[kept].tobytes(), ends)

    def _text(self, key: str, value: _Value) -> str:
        if value.length > LONGEST_STRING:
            raise self._fault(key, f"is a text of {value.length} bytes, more than the {LONGEST_STRING} that are read")
        try:
            return self._file.bytes[value.at : value.at + value.length].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._fault(key, f"is not UTF-8 ({error})") from error

    def _fault(self, key: str, what: str) -> CheckpointError:
        return CheckpointError(f"{self._file.path}: {shown(key)!r} {what}.", remedy=_DAMAGED)


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor: `kind` is a name of `blocks.TYPES`, `shape` has the rows first, `offset` is from the file's start."""

    file: MappedFile
    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def lazy(self) -> LazyTensor:
        """The same as a tensor of a checkpoint."""
        dtype = DTYPES.get(self.kind, self.kind)
        load = self.file.weight if self.kind in DTYPES else self.file.packed
        read = partial(load, dtype, self.shape, self.offset)
        return LazyTensor(self.name, self.shape, dtype, read, (str(self.file.path), self.offset))


@dataclass(frozen=True)
class GGUF:
    """A model's whole GGUF: the metadata (of the first part, where it is split) and the tensors of all parts."""

    version: int
    metadata: Metadata
    tensors: Mapping[str, Tensor]
    files: tuple[MappedFile, ...]

    @property
    def path(self) -> Path:
        """The file, or the first of its parts."""
        return self.files[0].path


class _Walk:
    """A position in the header of one file, which only moves forward, and never past the end."""

    def __init__(self, file: MappedFile) -> None:
        self.file, self.at, self.where = file, len(MAGIC), "its header"

    def fault(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.file.path}: {what}.", remedy=_DAMAGED)

    def take(self, count: int) -> int:
        """Step over `count` bytes; gives where they began."""
        begin = self.at
        if count > self.file.size - begin:
            raise self.fault(f"it ends within {self.where} ({count} bytes at {begin} of {self.file.size})")
        self.at += count
        return begin

    def u32(self) -> int:
        return int.from_bytes(self.file.bytes[self.take(4) : self.at], "little")

    def u64(self) -> int:
        return int.from_bytes(self.file.bytes[self.take(8) : self.at], "little")

    def name(self, of: str) -> str:
        """A key or a tensor's name."""
        length = self.u64()
        if not 0 < length <= LONGEST_NAME:
            raise self.fault(f"{of} has a name of {length} bytes; from 1 to {LONGEST_NAME} are allowed")
        begin = self.take(length)
        try:
            return self.file.bytes[begin : self.at].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fault(f"{of} has a name that is not UTF-8 ({error})") from error

    def value(self) -> _Value:
        """Step over one metadata value."""
        kind = self.u32()
        if kind in _NUMBERS:
            return _Value(kind, self.take(_NUMBERS[kind].itemsize))
        if kind == _STRING:
            length = self.u64()
            return _Value(kind, self.take(length), length)
        if kind != _ARRAY:
            raise self.fault(f"{self.where} has the type {kind}, which the format does not know")
        kind, count = self.u32(), self.u64()
        if kind in _NUMBERS:
            return _Value(kind, self.take(_NUMBERS[kind].itemsize * count), count=count)
        if kind == _ARRAY:
            raise self.fault(f"{self.where} is an array of arrays, which no Llama has and Puna does not read")
        if kind != _STRING:
            raise self.fault(f"{self.where} is an array of the type {kind}, which the format does not know")
        if count > min(MOST_STRINGS, (self.file.size - self.at) // 8):
            raise self.fault(
                f"{self.where} claims {count} strings; {self.file.size - self.at} bytes follow, and at most "
                f"{MOST_STRINGS} strings are read"
            )
        starts = self._strings(count)
        return _Value(kind, self.at, count=count, starts=starts)

    def _strings(self, count: int) -> npt.NDArray[np.int64]:
        """Step over an array of `count` strings; gives where each begins, and where the last one ends."""
        starts = np.empty(count + 1, np.int64)
        done = windows = 0
        while done < count:
            starts[done] = self.at
            length = self.u64()
            # A window is worth its time where a length is one byte, unless windows have given little so far.
            if 0 < length < 256 and windows <= 16 + done // 1024:
                found = _chained(self.file, self.at - 8, count - done)
                windows += 1
                starts[done : done + found.size] = found
                done += found.size - 1
                self.at = int(found[-1])
                length = self.u64()
            self.take(length)
            done += 1
        starts[count] = self.at
        return starts


_WINDOW = 1 << 20


def _chained(file: MappedFile, at: int, most: int) -> npt.NDArray[np.int64]:
    """Where the next strings of an array begin, `most` of them at the most, as far as a window of the file shows it.

    A length below 256 is one byte and seven zeros, and text has no zeros, so those eight bytes are seen without
    walking. Each is then held against the one before it: a place counts only if the chain of lengths from `at`, where
    there is such a length, leads there. That one is the first of those given.
    """
    window = np.frombuffer(file.bytes, np.uint8, min(_WINDOW, file.size - at, 256 * most + 8), at)
    zero = window == 0
    two = zero[:-1] & zero[1:]
    four = two[:-2] & two[2:]
    seven = four[:-3] & four[3:]  # [i]: bytes i to i + 6 are zero
    begins = np.flatnonzero(seven[1:] & ~zero[: max(seven.size - 1, 0)])[:most]
    leads = begins + 8 + window[begins]
    broken = np.flatnonzero(leads[:-1] != begins[1:])
    return begins[: int(broken[0]) + 1 if broken.size else begins.size] + at


def read(path: Path) -> GGUF:
    """A file and, where it is one part of several, all the others beside it.

    Raises CheckpointError naming the file, the key or the tensor for anything irregular, and every part that is
    missing.
    """
    first = _read_one(MappedFile(path))
    named = PART_NAME.fullmatch(path.name)
    count = _split(first, "split.count", 1)
    if not named and count <= 1:
        return _checked(first)
    if not named:
        raise CheckpointError(
            f"{path}: one of {count} parts, and its name does not say which.",
            remedy=f"Give the parts their names: {shown(path.stem)}-00001-of-{count:05d}.gguf and so on.",
        )
    total = int(named["count"])
    if count != total:
        raise CheckpointError(
            f"{path}: its name says that there are {total} parts, and split.count in it says {count}.",
            remedy="Rename it as it was, or fetch all parts again.",
        )
    places = [path.with_name(f"{named['stem']}-{i + 1:05d}-of-{total:05d}.gguf") for i in range(total)]
    if absent := [place.name for place in places if not place.is_file()]:
        raise CheckpointError(
            f"{path}: {len(absent)} of its {total} parts missing: {listed(absent)}.",
            remedy="Fetch them into that folder.",
        )
    parts = [first if place == path else _read_one(MappedFile(place)) for place in places]
    tensors: dict[str, Tensor] = {}
    for i, part in enumerate(parts):
        if (_split(part, "split.no", -1), _split(part, "split.count", 1)) != (i, total):
            raise CheckpointError(
                f"{part.path}: it says that it is part {_split(part, 'split.no', -1) + 1} of "
                f"{_split(part, 'split.count', 1)}, against its name.",
                remedy="Parts of different models lie here: fetch them again.",
            )
        if twice := tensors.keys() & part.tensors.keys():
            raise CheckpointError(f"{part.path}: an earlier part has {listed(twice)} too.", remedy=_DAMAGED)
        tensors |= part.tensors
    said = _split(parts[0], "split.tensors.count", len(tensors))
    if said != len(tensors):
        raise CheckpointError(
            f"{parts[0].path}: it says that the parts hold {said} tensors, and they hold {len(tensors)}.",
            remedy="Parts of different models lie here: fetch them again.",
        )
    return _checked(GGUF(first.version, parts[0].metadata, tensors, tuple(part.files[0] for part in parts)))


def _checked(whole: GGUF) -> GGUF:
    if not isinstance(whole.metadata.get("general.architecture"), str):
        raise CheckpointError(f"{whole.path}: general.architecture is missing.", remedy=_DAMAGED)
    return whole


def _split(part: GGUF, key: str, default: int) -> int:
    value = part.metadata.get(key, default)
    if type(value) is not int or not -1 <= value < 100_000:
        raise CheckpointError(f"{part.path}: {key!r} is {value!r:.80}, not a count.", remedy=_DAMAGED)
    return value


def _read_one(file: MappedFile) -> GGUF:
    """One file: its metadata, and its tensors, all checked against its size."""
    if file.bytes[: len(MAGIC)] != MAGIC:
        raise CheckpointError(f"{file.path}: not a GGUF file.", remedy=_DAMAGED)
    walk = _Walk(file)
    version = walk.u32()
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        raise CheckpointError(
            f"{file.path}: "
            + (
                f"a big-endian GGUF file (version {swapped}); Puna reads little-endian ones."
                if swapped in (1, 2, 3)
                else f"GGUF version {version}; Puna reads versions 2 and 3."
            ),
            remedy="Fetch the model from where it is kept in that form; every current program writes it.",
        )
    tensor_count, value_count = walk.u64(), walk.u64()
    for what, count, most, least in (
        ("entries of metadata", value_count, MOST_VALUES, 13),
        ("tensors", tensor_count, MOST_TENSORS, 33),
    ):
        if count > min(most, (file.size - walk.at) // least):
            raise walk.fault(f"it claims {count} {what}; {file.size - walk.at} bytes follow, and {most} are the limit")
    values: dict[str, _Value] = {}
    for i in range(value_count):
        walk.where = f"entry {i + 1} of its metadata"
        key = walk.name(walk.where)
        walk.where = repr(shown(key))
        if key in values:
            raise walk.fault(f"the key {shown(key)!r} stands there twice")
        values[key] = walk.value()
    metadata = Metadata(file, values)
    table = [_table_entry(walk, i) for i in range(tensor_count)]
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 8 <= alignment <= LARGEST_ALIGNMENT or alignment & (alignment - 1):
        raise walk.fault(
            f"'general.alignment' is {alignment!r:.80}; it must be a power of two from 8 to {LARGEST_ALIGNMENT}"
        )
    begin = -(-walk.at // alignment) * alignment
    return GGUF(version, metadata, _placed(walk, table, begin, alignment), (file,))


def _table_entry(walk: _Walk, i: int) -> Tensor:
    """One line of the table of tensors; the offset is still counted from the first tensor's byte."""
    walk.where = f"entry {i + 1} of its table of tensors"
    name = walk.name(walk.where)
    walk.where = where = repr(shown(name))
    dimensions = walk.u32()
    if not 1 <= dimensions <= 4:
        raise walk.fault(f"{where} has {dimensions} dimensions; from 1 to 4 are allowed")
    sizes = struct.unpack_from(f"<{dimensions}Q", walk.file.bytes, walk.take(8 * dimensions))
    number, offset = walk.u32(), walk.u64()
    if number not in _KINDS:
        raise CheckpointError(
            f"{walk.file.path}: {where} is of ggml's type {number}, which Puna does not read.",
            remedy=f"Fetch the model in another quantization. Puna reads {', '.join(TYPES)}.",
        )
    kind = TYPES[_KINDS[number]]
    if not all(sizes) or math.prod(sizes) >= 1 << 62:
        raise walk.fault(f"{where} has the shape {list(sizes)[::-1]}, which no tensor can have")
    if sizes[0] % kind.block:
        raise walk.fault(f"{where} has rows of {sizes[0]}, and {kind.name} packs {kind.block} numbers at a time")
    nbytes = math.prod(sizes) // kind.block * kind.size
    return Tensor(walk.file, name, kind.name, sizes[::-1], offset, nbytes)


def _placed(walk: _Walk, table: list[Tensor], begin: int, alignment: int) -> dict[str, Tensor]:
    """The tensors by name, their offsets counted from the file's first byte, once none overlaps another or the end."""
    tensors: dict[str, Tensor] = {}
    reached, before = begin, "the header"
    for entry in sorted(table, key=lambda tensor: tensor.offset):
        where, at = repr(shown(entry.name)), begin + entry.offset
        if entry.name in tensors:
            raise walk.fault(f"the tensor {where} stands there twice")
        if entry.offset % alignment:
            raise walk.fault(f"{where} begins at byte {entry.offset}, which is no multiple of {alignment}")
        if at < reached:
            raise walk.fault(f"{where} begins at byte {at} of the file, within {before}")
        if entry.nbytes > walk.file.size - at:
            raise walk.fault(f"{where} takes {entry.nbytes} bytes at {at}, and the file ends at {walk.file.size}")
        reached, before = at + entry.nbytes, where
        tensors[entry.name] = Tensor(entry.file, entry.name, entry.kind, entry.shape, at, entry.nbytes)
    return {entry.name: tensors[entry.name] for entry in table}
