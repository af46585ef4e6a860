"""Opens what torch.save writes: the zip archive of PyTorch 1.6 and later, and the plain pickles before it.

What it is: the containers. A zip's directory is read by a parser of our own that accepts what torch writes (stored,
uncompressed, each entry whole and apart from the others) and nothing else; inside lies a pickle (`pickle_reader`) and a
file of numbers for each storage. Format: PKWARE APPNOTE 6.3, and torch/serialization.py for the rest.
What it is not: an unzipper. An entry is a span of the mapped file.
What is surprising: checksums are verified for the small entries only (the pickle); those of the numbers would mean
reading the whole file before the first answer. Converting reads it all anyway, and `TorchFile.check` serves there.
"""

from __future__ import annotations

import itertools
import math
import struct
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from puna.errors import CheckpointError
from puna.kernels.layouts import Weight
from puna.weights.files import ITEM_SIZE, LazyTensor, MappedFile, listed, raw, shown, wrap
from puna.weights.pickle_reader import ITEM_SIZES, LARGEST_PICKLE, Opaque, Storage, StoredTensor, read_pickle

DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
"""The types a weight may have, as Puna calls them."""

MOST_ENTRIES = 200_000
_BLOCK = 1 << 24
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


@dataclass(frozen=True)
class TorchFile:
    """An opened file: its pickled value, and where the numbers of each storage begin."""

    file: MappedFile
    value: Any
    offsets: dict[str, int]
    checksums: dict[str, int]

    def weight(self, tensor: StoredTensor) -> Weight:
        """The numbers of a tensor: a view where they are contiguous, else a copy.

        Raises CheckpointError for a type no weight has, or a tensor that repeats numbers to look larger.
        """
        dtype = self.dtype(tensor)
        begin, count = self.offsets[tensor.storage.key], math.prod(tensor.shape)
        if contiguous(tensor):
            return self.file.weight(dtype, tensor.shape, begin + tensor.offset * ITEM_SIZE[dtype])
        if count > tensor.storage.count:
            raise CheckpointError(
                f"{self.file.path}: a tensor of shape {list(tensor.shape)} stands on {tensor.storage.count} numbers.",
                remedy="Save the model with its tensors materialised (`tensor.contiguous()`).",
            )
        whole = raw(self.file.weight(dtype, (tensor.storage.count,), begin))
        strides = tuple(step * whole.itemsize for step in tensor.stride)
        view = np.lib.stride_tricks.as_strided(whole[tensor.offset :], tensor.shape, strides, writeable=False)
        return wrap(np.ascontiguousarray(view))

    def dtype(self, tensor: StoredTensor) -> str:
        """`"fp32"`, `"bf16"` or `"fp16"`. Raises CheckpointError for any other type."""
        if tensor.storage.dtype not in DTYPES:
            raise CheckpointError(
                f"{self.file.path}: a weight is stored as {tensor.storage.dtype}; Puna reads {listed(DTYPES)}.",
                remedy="Save the model in one of those types.",
            )
        return DTYPES[tensor.storage.dtype]

    def check(self, tensor: StoredTensor) -> None:
        """Verify the checksum of a tensor's storage, which reads it. Raises CheckpointError."""
        key, begin = tensor.storage.key, self.offsets[tensor.storage.key]
        expected, end = self.checksums.get(key, 0), begin + tensor.storage.count * ITEM_SIZES[tensor.storage.dtype]
        found = 0
        for at in range(begin, end if expected else begin, _BLOCK):
            found = zlib.crc32(memoryview(self.file.bytes)[at : min(at + _BLOCK, end)], found)
        if found != expected:
            raise CheckpointError(
                f"{self.file.path}: storage {key!r} is damaged: its checksum differs.", remedy="Fetch the file again."
            )

    def where(self, tensor: StoredTensor) -> tuple[str, int]:
        """Which bytes: the file and where in it the tensor begins."""
        begin = self.offsets[tensor.storage.key] + tensor.offset * ITEM_SIZES[tensor.storage.dtype]
        return str(self.file.path), begin


def contiguous(tensor: StoredTensor) -> bool:
    """Whether the tensor's numbers lie in order without gaps; strides of dimensions of size 1 mean nothing."""
    expected = 1
    for size, step in zip(reversed(tensor.shape), reversed(tensor.stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


def open_torch(path: Path) -> TorchFile:
    """Open a file of torch.save, either container. Raises CheckpointError for anything irregular."""
    file = MappedFile(path)
    return _open_zip(file) if file.bytes[:4] == b"PK\x03\x04" else _open_legacy(file)


def apart(state: Any) -> tuple[tuple[str, ...], Any]:
    """The `_extra_state` in a state dict (what Meta's libraries noted, files of bytes in memory) by name; the rest."""
    if not isinstance(state, dict):
        return (), state
    opaque = tuple(
        key
        for key, value in state.items()
        if isinstance(value, Opaque) and isinstance(key, str) and key.endswith("._extra_state")
    )
    found = set(opaque)
    return opaque, {key: value for key, value in state.items() if key not in found}


def state_tensors(file: TorchFile, state: Any) -> dict[str, LazyTensor]:
    """The tensors of a state dict by the names it gives them. Raises CheckpointError when it is none."""
    source = str(file.file.path)
    if not isinstance(state, dict) or not state:
        raise CheckpointError(f"{source}: it holds no state dict.", remedy="Save torch.save(model.state_dict()).")
    tensors: dict[str, LazyTensor] = {}
    for key, tensor in state.items():
        if not isinstance(key, str) or not isinstance(tensor, StoredTensor):
            what = "file of bytes" if isinstance(tensor, Opaque) else type(tensor).__name__
            raise CheckpointError(
                f"{source}: {shown(key)} is a {what} and not a tensor.",
                remedy="Save torch.save(model.state_dict()) alone.",
            )
        dtype = DTYPES.get(tensor.storage.dtype, tensor.storage.dtype)
        read, check = partial(file.weight, tensor), partial(file.check, tensor)
        tensors[key] = LazyTensor(key, tensor.shape, dtype, read, file.where(tensor), check)
    return tensors


@dataclass(frozen=True)
class _Span:
    name: str
    begin: int
    size: int
    crc: int


def _open_zip(file: MappedFile) -> TorchFile:
    spans = _directory(file)
    pickles = [name for name in spans if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError(
            f"{file.path}: a zip archive, but not one of PyTorch: it has {len(pickles)} entries data.pkl.",
            remedy="Name the checkpoint itself. TorchScript archives are code and are not read.",
        )
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in spans or any(name.startswith(f"{root}code/") for name in spans):
        raise CheckpointError(
            f"{file.path}: a TorchScript archive, which holds code.", remedy="Use a file of torch.save(state_dict)."
        )
    order = spans.get(f"{root}byteorder")
    if order is not None and _small(file, order) != b"little":
        raise CheckpointError(f"{file.path}: its numbers are big-endian.", remedy="Save it on a little-endian machine.")
    value, storages, _ = read_pickle(_small(file, spans[pickles[0]]), f"{file.path}: {pickles[0]}")
    offsets: dict[str, int] = {}
    checksums: dict[str, int] = {}
    for storage in storages.values():
        span = spans.get(f"{root}data/{storage.key}")
        size = storage.count * ITEM_SIZES[storage.dtype]
        if span is None or span.size != size:
            raise CheckpointError(
                f"{file.path}: storage {storage.key!r} should be {size} bytes, not {span.size if span else 'missing'}.",
                remedy="The file is damaged: fetch it again.",
            )
        offsets[storage.key], checksums[storage.key] = span.begin, span.crc
    return TorchFile(file, value, offsets, checksums)


def _small(file: MappedFile, span: _Span) -> bytes:
    """An entry read whole, its checksum verified (torch writes 0 where it was told to compute none)."""
    if span.size > LARGEST_PICKLE:
        raise CheckpointError(
            f"{file.path}: {span.name} claims {span.size} bytes; Puna reads at most {LARGEST_PICKLE}.",
            remedy="It is damaged, or holds more than tensors: save torch.save(model.state_dict()) alone.",
        )
    data = file.bytes[span.begin : span.begin + span.size]
    if span.crc not in (0, zlib.crc32(data)):
        raise CheckpointError(f"{file.path}: {span.name} is damaged: its checksum differs.", remedy="Fetch it again.")
    return data


def _directory(file: MappedFile) -> dict[str, _Span]:
    """The entries of a zip archive by name: stored, whole, inside the file and apart from each other."""

    def damaged(what: str) -> CheckpointError:
        return CheckpointError(
            f"{file.path}: {what}.", remedy="The file is cut short, damaged or not of torch.save: fetch it again."
        )

    def fields(layout: struct.Struct, at: int, signature: bytes, what: str) -> tuple[Any, ...]:
        if not 0 <= at <= file.size - layout.size or file.bytes[at : at + 4] != signature:
            raise damaged(f"its zip archive has no {what} at byte {at}")
        return layout.unpack_from(file.bytes, at)

    end = file.size - _END.size
    *_, count, size, start, comment = fields(_END, end, b"PK\5\6", "end of directory")
    if comment:
        raise damaged("its zip archive has a comment, which torch does not write")
    if file.bytes[max(0, end - 20) : max(0, end - 16)] == b"PK\6\7":
        (at,) = fields(_LOCATOR, end - 20, b"PK\6\7", "zip64 locator")
        count, size, start = fields(_END64, at, b"PK\6\6", "zip64 end of directory")
        end = at
    if count > MOST_ENTRIES or start + size > end:
        raise damaged(f"its zip archive claims a directory of {count} entries, {size} bytes at {start}")
    spans: dict[str, _Span] = {}
    taken: list[tuple[int, int]] = []
    at = start
    for _ in range(count):
        flags, method, crc, packed, full, n, extra, note, disk, header = fields(_ENTRY, at, b"PK\1\2", "entry")
        text = file.bytes[at + _ENTRY.size : at + _ENTRY.size + n]
        more = file.bytes[at + _ENTRY.size + n : at + _ENTRY.size + n + extra]
        at += _ENTRY.size + n + extra + note
        if at > start + size:
            raise damaged("its zip archive has a directory that ends too early")
        name = text.decode("utf-8", "backslashreplace")
        full, packed, header = _wide(more, full, packed, header)
        if method or packed != full or flags & 1 or disk not in (0, 0xFFFF):
            raise damaged(f"{name[:120]!r} is compressed, encrypted or split, which torch never writes")
        if name in spans:
            raise damaged(f"its zip archive has {name[:120]!r} twice")
        n_local, extra_local = fields(_LOCAL, header, b"PK\3\4", f"entry {name[:120]!r}")
        begin = header + _LOCAL.size + n_local + extra_local
        if file.bytes[header + _LOCAL.size : header + _LOCAL.size + n_local] != text or begin + full > start:
            raise damaged(f"its zip archive says that {name[:120]!r} lies where it does not")
        spans[name] = _Span(name, begin, full, crc)
        taken.append((header, begin + full))
    taken.sort()
    if any(one[1] > other[0] for one, other in itertools.pairwise(taken)):
        raise damaged("its zip archive has entries that overlap")
    return spans


def _wide(extra: bytes, full: int, packed: int, header: int) -> tuple[int, int, int]:
    """Sizes and offset, those that are all ones replaced in order by the 64-bit values of the zip64 field (id 1)."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            wide = iter(struct.unpack_from(f"<{min(length, len(extra) - at - 4) // 8}Q", extra, at + 4))
            full, packed, header = (next(wide, v) if v == 0xFFFFFFFF else v for v in (full, packed, header))
        at += 4 + length
    return full, packed, header


_LOCAL = struct.Struct("<4x 22x HH")
_ENTRY = struct.Struct("<4x 4x HH 4x III HHH H 6x I")
_END = struct.Struct("<4x 4x HHIIH")
_LOCATOR = struct.Struct("<4x 4x Q 4x")
_END64 = struct.Struct("<4x 28x QQQ")


def _open_legacy(file: MappedFile) -> TorchFile:
    """Five pickles in a row: magic number, protocol, machine, value, keys of storages; then each one's numbers."""
    source = str(file.path)
    at = 0
    parts: list[Any] = []
    storages: dict[str, Storage] = {}
    for _ in range(5):
        part, found, used = read_pickle(file.bytes[at : at + LARGEST_PICKLE], source)
        if not parts and part != _LEGACY_MAGIC:
            raise CheckpointError(
                f"{source}: a pickle, but not one of torch.save.",
                remedy="Save the model with torch.save or safetensors.",
            )
        at += used
        parts.append(part)
        storages |= found
    _, _, machine, value, keys = parts
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise CheckpointError(f"{source}: its numbers are big-endian.", remedy="Save it on a little-endian machine.")
    offsets: dict[str, int] = {}
    for key in keys if isinstance(keys, list) else ():
        storage = storages.get(key) if isinstance(key, str) else None
        size = storage.count * ITEM_SIZES[storage.dtype] if storage else 0
        count = int.from_bytes(file.bytes[at : at + 8], "little")
        if storage is None or storage.key in offsets or count != storage.count or at + 8 + size > file.size:
            raise CheckpointError(
                f"{source}: its list of storages does not match its tensors, or it is cut short.",
                remedy="Fetch it again.",
            )
        offsets[storage.key] = at + 8
        at += 8 + size
    if offsets.keys() != storages.keys() or at != file.size:
        raise CheckpointError(f"{source}: it lacks storages, or bytes follow the last.", remedy="Fetch it again.")
    return TorchFile(file, value, offsets, {})
