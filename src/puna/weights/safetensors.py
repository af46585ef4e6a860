"""Reads safetensors files, single and sharded, and trusts nothing in them.

What it is: a reader of our own for the format of https://github.com/huggingface/safetensors (README, "Format"): an
8-byte little-endian header length, a JSON header, then the tensors' bytes without a hole. The safetensors library gives
bfloat16 only through torch, or as a copy; these are views of the mapped file.
What it is not: a place that knows Llama. It finds tensors by the names the file gives them.
What is surprising: the header is checked completely before anything is read (every type, shape and offset, and that the
tensors cover the file exactly once), so a tensor that can be named can be read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from puna.errors import CheckpointError
from puna.weights.files import LARGEST_JSON, LazyTensor, MappedFile, listed, parse_json, read_json

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
"""Bits of one number of every type the format has."""

DTYPES = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
"""The types a weight may have, as Puna calls them."""

_SHARD_NAME = re.compile(r"[A-Za-z0-9._-]{1,200}\.safetensors")


@dataclass(frozen=True)
class Entry:
    """One stored tensor: where its bytes begin in which file, and what they are. `dtype` is the format's word."""

    file: MappedFile
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def lazy(self) -> LazyTensor:
        """The same as a tensor; a type that no weight may have keeps the format's word for it."""
        dtype = DTYPES.get(self.dtype, self.dtype)
        read = partial(self.file.weight, dtype, self.shape, self.offset)
        return LazyTensor(self.name, self.shape, dtype, read, (str(self.file.path), self.offset))


def read_header(file: MappedFile) -> dict[str, Entry]:
    """The tensors of one file by name. Raises CheckpointError naming the file and the key for anything irregular."""

    def damaged(what: str) -> CheckpointError:
        return CheckpointError(
            f"{file.path}: {what}.", remedy="The file is cut short, damaged or not safetensors: fetch it again."
        )

    if file.size < 10:
        raise damaged(f"{file.size} bytes are too few for a safetensors file")
    length = int.from_bytes(file.bytes[:8], "little")
    if length > file.size - 8:
        raise damaged(f"it claims a header of {length} bytes, and {file.size - 8} follow")
    if length > LARGEST_JSON:
        raise damaged(f"it claims a header of {length} bytes, more than the {LARGEST_JSON} Puna reads")
    text = file.bytes[8 : 8 + length]
    if not text.startswith(b"{"):
        raise damaged("its header does not begin with {")
    entries: dict[str, Entry] = {}
    spans: list[tuple[int, int, str]] = []
    for name, value in parse_json(text, f"{file.path}: header").items():
        if name == "__metadata__":
            if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
                raise damaged("__metadata__ must map words to words")
            continue
        dtype, shape, (begin, end) = _checked(name, value, damaged)
        spans.append((begin, end, name))
        entries[name] = Entry(file, name, dtype, shape, 8 + length + begin)
    reached = 0
    for begin, end, name in sorted(spans):
        if begin != reached:
            raise damaged(f"{name[:120]!r} begins at byte {begin} of the data; the tensor before it ends at {reached}")
        reached = end
    if reached != file.size - 8 - length:
        raise damaged(f"its tensors take {reached} bytes, and {file.size - 8 - length} follow the header")
    return entries


def _checked(name: str, value: Any, damaged: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    """Type, shape and data offsets of one header entry, each checked against the others."""
    where = repr(name[:120])
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise damaged(f"{where} must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise damaged(f"{where} has the dtype {str(dtype)[:40]!r}, which the format does not know")
    if not _naturals(shape) or len(shape) > 32:
        raise damaged(f"{where} has a shape that is not a list of whole numbers")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise damaged(f"{where} has data_offsets that are not a beginning and an end")
    bits = math.prod(shape) * BITS[dtype]
    if bits % 8 or bits // 8 != offsets[1] - offsets[0]:
        raise damaged(f"{where} is {dtype} {shape}, which is {bits // 8} bytes, and has {offsets[1] - offsets[0]}")
    return dtype, tuple(shape), (offsets[0], offsets[1])


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 62 for v in value)


def read_sharded(index: Path) -> dict[str, Entry]:
    """The tensors of every shard that an index names, the index and the shards compared both ways.

    Raises CheckpointError when a shard is missing, a tensor is in another shard than the index says, in two, or in
    none, or when the sizes do not add up.
    """
    content = read_json(index)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise CheckpointError(f"{index}: 'weight_map' is missing or empty.", remedy="Fetch the index again.")
    shards: dict[str, set[str]] = {}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
            raise CheckpointError(
                f"{index}: {tensor[:120]!r} is said to lie in {str(shard)[:120]!r}, which is no safetensors file name.",
                remedy="Shards lie beside their index. Do not use this index.",
            )
        shards.setdefault(shard, set()).add(tensor)
    if absent := [shard for shard in shards if not (index.parent / shard).is_file()]:
        raise CheckpointError(
            f"{index.parent}: {len(absent)} of {len(shards)} shards missing: {listed(absent)}.",
            remedy="Fetch the missing files into that folder.",
        )
    entries: dict[str, Entry] = {}
    for shard, promised in sorted(shards.items()):
        found = read_header(MappedFile(index.parent / shard))
        for names, what in ((promised - found.keys(), "lacks"), (found.keys() - promised, "also holds")):
            if names:
                raise CheckpointError(
                    f"{index.parent / shard}: {what} {listed(names)}, against the index {index.name}.",
                    remedy="Index and shards are not of one checkpoint: fetch them again.",
                )
        entries |= found
    metadata = content.get("metadata")
    said = metadata.get("total_size") if isinstance(metadata, Mapping) else None
    sizes = [math.prod(e.shape) * BITS[e.dtype] // 8 for e in entries.values()]
    # Some writers count a tied tensor twice and some once; further apart than that, it is another checkpoint's index.
    if said is not None and (type(said) not in (int, float) or not abs(said - sum(sizes)) <= max(sizes)):
        raise CheckpointError(
            f"{index}: 'total_size' is {str(said)[:40]}, and the shards hold {sum(sizes)} bytes.",
            remedy="Index and shards are not of one checkpoint: fetch them again.",
        )
    return entries
