"""Writes tensors into the two formats Puna writes: safetensors, and a PyTorch file in Meta's layout.

What it is: writers that take lazy tensors and hold one at a time. The PyTorch file is a zip archive and a pickle
written here, byte by byte as torch.save lays them out, and `torch.load(weights_only=True)` reads it.
What it is not: a place for configs or names; `convert` brings those.
What is surprising: checksums of the archive are known only after the numbers are written, so each entry's header is
written again.
"""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from puna.weights.files import LazyTensor, raw, release
from puna.weights.safetensors import DTYPES, INDEX_NAME, SINGLE_NAME

LARGEST_SHARD = 5_000_000_000
"""Bytes of tensors in one safetensors file, as the hub's own tools split them."""

Progress = Callable[[int], None]
"""Called with the number of bytes just written."""

_BLOCK = 1 << 25
_SAFETENSORS_NAMES = {ours: theirs for theirs, ours in DTYPES.items()}
_STORAGES = {"fp32": "FloatStorage", "bf16": "BFloat16Storage", "fp16": "HalfStorage"}


def write_safetensors(
    folder: Path, tensors: Sequence[LazyTensor], progress: Progress, *, largest_shard: int = LARGEST_SHARD
) -> list[str]:
    """Write tensors, under the names they have, to one file or to shards with an index; gives the files' names."""
    shards: list[list[LazyTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > largest_shard:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    if len(shards) == 1:
        _write_shard(folder / SINGLE_NAME, shards[0], progress)
        return [SINGLE_NAME]
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(files, shards, strict=True):
        _write_shard(folder / name, shard, progress)
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)},
        "weight_map": {tensor.name: name for name, shard in zip(files, shards, strict=True) for tensor in shard},
    }
    write_json(folder / INDEX_NAME, index)
    return [*files, INDEX_NAME]


def _write_shard(path: Path, tensors: Sequence[LazyTensor], progress: Progress) -> None:
    """One file. Wider types first, so that every tensor begins at a multiple of its item size and can be mapped."""
    ordered = sorted(tensors, key=lambda tensor: tensor.dtype != "fp32")
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
    at = 0
    for tensor in ordered:
        offsets = [at, at + tensor.nbytes]
        header[tensor.name] = {
            "dtype": _SAFETENSORS_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
        at = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered:
            for block in blocks(tensor):
                file.write(block)
                progress(len(block))
        sync(file)


def blocks(tensor: LazyTensor) -> Iterator[memoryview]:
    """The bytes of a tensor in row-major order, some at a time."""
    for weight in (tensor.read(),) if tensor.pieces is None else tensor.pieces():
        view = np.ascontiguousarray(raw(weight)).reshape(-1).view(np.uint8).data
        for at in range(0, len(view), _BLOCK):
            yield view[at : at + _BLOCK]
        release(weight)


def write_json(path: Path, value: object) -> None:
    """A JSON file, as people read it."""
    with path.open("wb") as file:
        file.write(json.dumps(value, indent=2).encode() + b"\n")
        sync(file)


def sync(file: BinaryIO) -> None:
    """Make sure that what was written is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def write_torch(path: Path, tensors: Sequence[LazyTensor], same: Mapping[str, str], progress: Progress) -> None:
    """Write a state dict as torch.save does. `same` maps a further name to the tensor it shares its numbers with."""
    keys = {tensor.name: str(i) for i, tensor in enumerate(tensors)}
    by_name = {tensor.name: tensor for tensor in tensors}
    items = [(tensor.name, tensor, keys[tensor.name]) for tensor in tensors]
    items += [(name, by_name[other], keys[other]) for name, other in same.items()]
    with path.open("wb") as file:
        archive = _Archive(file, path.stem)
        archive.add("data.pkl", [memoryview(_pickle(items))])
        archive.add("byteorder", [memoryview(b"little")])
        for tensor in tensors:
            archive.add(f"data/{keys[tensor.name]}", blocks(tensor), progress)
        archive.add("version", [memoryview(b"3\n")])
        archive.close()
        sync(file)


def _pickle(items: Sequence[tuple[str, LazyTensor, str]]) -> bytes:
    """An ordered dictionary of tensors, protocol 2, in the opcodes of Python's pickletools."""

    def word(text: str) -> bytes:
        return b"X" + struct.pack("<I", len(text.encode())) + text.encode()

    def whole(value: int) -> bytes:
        if value < 1 << 31:
            return b"J" + struct.pack("<i", value)
        return b"\x8a\x08" + struct.pack("<q", value)

    def sizes(values: Sequence[int]) -> bytes:
        return b"(" + b"".join(whole(value) for value in values) + b"t"

    empty = b"ccollections\nOrderedDict\n)R"
    out = [b"\x80\x02", empty, b"("]
    for name, tensor, key in items:
        strides = [math.prod(tensor.shape[i + 1 :]) for i in range(len(tensor.shape))]
        storage = b"(" + word("storage") + f"ctorch\n{_STORAGES[tensor.dtype]}\n".encode()
        storage += word(key) + word("cpu") + whole(math.prod(tensor.shape)) + b"tQ"
        out += [word(name), b"ctorch._utils\n_rebuild_tensor_v2\n(", storage, whole(0)]
        out += [sizes(tensor.shape), sizes(strides), b"\x89", empty, b"tR"]
    return b"".join([*out, b"u."])


_LOCAL = struct.Struct("<4s HHHHH III HH")
_ENTRY = struct.Struct("<4s HHHHHH III HHHHH II")
_ZIP_VERSION = 45  # the first with zip64
_FIRST_OF_JANUARY_1980 = 0x21
_IN_ZIP64 = 0xFFFFFFFF


class _Archive:
    """A zip archive of stored entries (PKWARE APPNOTE 6.3), each beginning at a multiple of 64 bytes as torch's do."""

    def __init__(self, file: BinaryIO, root: str) -> None:
        self.file, self.root = file, root
        self.entries: list[tuple[bytes, int, int, int]] = []

    def add(self, name: str, parts: Iterable[memoryview], progress: Progress = lambda _: None) -> None:
        path = f"{self.root}/{name}".encode()
        header = self.file.tell()
        # After the name: the zip64 field (20 bytes), and a padding field up to the next multiple of 64.
        size_of_header = _LOCAL.size + len(path) + 20 + 4
        padding = -(header + size_of_header) % 64
        self.file.write(b"\0" * (size_of_header + padding))
        size = crc = 0
        for part in parts:
            self.file.write(part)
            size += len(part)
            crc = zlib.crc32(part, crc)
            progress(len(part))
        end = self.file.tell()
        extra = struct.pack("<HHQQ", 1, 16, size, size) + struct.pack("<HH", 0x4246, padding) + b"Z" * padding
        sizes = (crc, _IN_ZIP64, _IN_ZIP64)
        self.file.seek(header)
        self.file.write(
            _LOCAL.pack(b"PK\3\4", _ZIP_VERSION, 0, 0, 0, _FIRST_OF_JANUARY_1980, *sizes, len(path), len(extra))
        )
        self.file.write(path + extra)
        self.file.seek(end)
        self.entries.append((path, header, size, crc))

    def close(self) -> None:
        start, version, date = self.file.tell(), _ZIP_VERSION, _FIRST_OF_JANUARY_1980
        for path, header, size, crc in self.entries:
            extra = struct.pack("<HHQQQ", 1, 24, size, size, header)
            sizes = (crc, _IN_ZIP64, _IN_ZIP64)
            lengths = (len(path), len(extra), 0)
            self.file.write(
                _ENTRY.pack(b"PK\1\2", version, version, 0, 0, 0, date, *sizes, *lengths, 0, 0, 0, _IN_ZIP64)
            )
            self.file.write(path + extra)
        end, count = self.file.tell(), len(self.entries)
        self.file.write(
            struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, version, version, 0, 0, count, count, end - start, start)
        )
        self.file.write(struct.pack("<4sIQI", b"PK\6\7", 0, end, 1))
        self.file.write(struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, _IN_ZIP64, _IN_ZIP64, 0))
