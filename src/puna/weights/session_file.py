"""Saved sessions: the tokens of a text and the pages of keys and values computed for them, in a file.

What it is: `write_session`, `open_session` with its `pages`, and `model_identity`, which says whose pages they are.
What it is not: a place where anything is believed. The head proves itself by its SHA-256 and names the SHA-256 of each
page; a page that is not what was written, and all after it, are not handed out. Whoever made a file on purpose could
make sums that fit: then wrong numbers come out of the model, and nothing worse.
What is surprising: the file is not synced to the disk. After a power cut its sums tell what arrived.

    offset  size
    0       8          "PUNASESS"
    8       4          version, 1 (numbers are little-endian)
    12      4          bytes H of the header, at most 64 KiB
    16      H          the header, JSON: identity (an object of texts), page, page_bytes, tokens N, pages P <= N / page;
                       local_page_bytes and local_pages too where layers see one chunk only
    ...     4 N        token ids
    ...     32 P       SHA-256 of each page
    ...     32         SHA-256 of all that stands before it
    ...                pages, each from a multiple of 64 bytes on; the file ends with the last of them. The last
                       local_pages of them have local_page_bytes more each
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from puna.errors import CheckpointError, UsageError
from puna.weights.checkpoint import Checkpoint
from puna.weights.files import parse_json, raw, unreadable
from puna.weights.whole import appearing

MAGIC, VERSION = b"PUNASESS", 1
LARGEST_HEADER = 64 << 10
ALIGN = 64
THREADS = 2
"""Threads that compute sums: SHA-256 runs at 1.8 GB/s in each, where the processor has instructions for it."""
AHEAD = 4
"""Pages in memory at a time."""
SAMPLES, SAMPLE = 3, 4096
"""Pieces of each tensor that identify a model, and their bytes."""

_START = struct.Struct("<8sII")
_SUM = hashlib.sha256().digest_size


@dataclass(frozen=True)
class SavedSession:
    """A session file whose head is whole. `tokens` are all of the text's; `page_count` pages of them were saved."""

    path: Path
    identity: Mapping[str, str]
    tokens: tuple[int, ...]
    page: int
    page_bytes: int
    page_count: int
    local_page_bytes: int
    local_pages: int
    _sums: bytes
    _start: int

    def pages(self) -> Iterator[memoryview]:
        """The pages in order, up to the first that is not what was written. Each is valid until the next is asked for.

        Raises CheckpointError where the file is not there any more.
        """
        sizes = _sizes(self.page_count, self.page_bytes, self.local_pages, self.local_page_bytes)
        starts = _starts(self._start, sizes)
        with ExitStack() as stack:
            try:
                files = [stack.enter_context(self.path.open("rb", buffering=0)) for _ in range(AHEAD)]
            except OSError as error:
                raise unreadable(self.path, error) from error
            buffers = [memoryview(bytearray(max(sizes))) for _ in range(min(AHEAD, self.page_count))]

            def page(i: int) -> memoryview:
                return buffers[i % AHEAD][: sizes[i]]

            def fill(i: int) -> bool:
                file, rest = files[i % AHEAD], page(i)
                try:
                    file.seek(starts[i])
                    while rest:
                        if not (got := file.readinto(rest)):
                            return False
                        rest = rest[got:]
                except OSError:  # a page on a part of the disk that fails is a page that is not good
                    return False
                return _sum(page(i)) == self._sums[i * _SUM : (i + 1) * _SUM]

            pool = stack.enter_context(ThreadPoolExecutor(THREADS, "puna-session"))
            filling = deque(pool.submit(fill, i) for i in range(min(AHEAD, self.page_count)))
            for i in range(self.page_count):
                if not filling.popleft().result():
                    return
                yield page(i)
                if i + AHEAD < self.page_count:
                    filling.append(pool.submit(fill, i + AHEAD))


def write_session(
    path: Path,
    identity: Mapping[str, str],
    tokens: Sequence[int],
    pages: Iterable[bytes],
    *,
    count: int,
    page: int,
    page_bytes: int,
    local_pages: int = 0,
    local_page_bytes: int = 0,
) -> None:
    """Write `count` pages of `page` tokens each, and the whole text they begin; all of the file appears, or nothing.

    Each has `page_bytes`, the last `local_pages` of them `local_page_bytes` more (0: the model has no such pages).
    An older session is replaced, no other file is. A page in memory at a time, and one whose sum is being computed.
    Raises UsageError where another file is there, PunaError where the disk has no room.
    """
    if path.exists() and not _recognised(path):
        raise UsageError(f"{path}: is there, and no saved session.", remedy="Name another file.")
    said = {"identity": dict(identity), "page": page, "page_bytes": page_bytes, "tokens": len(tokens), "pages": count}
    if local_page_bytes:
        said |= {"local_page_bytes": local_page_bytes, "local_pages": local_pages}
    header = json.dumps(said).encode()
    head = _START.pack(MAGIC, VERSION, len(header)) + header + np.array(tokens, "<i4").tobytes()
    start = _aligned(len(head) + (count + 1) * _SUM)
    starts = _starts(start, _sizes(count, page_bytes, local_pages, local_page_bytes))
    with (
        appearing(path, starts[-1], replace=True) as unfinished,
        unfinished.open("xb", buffering=0) as file,
        ThreadPoolExecutor(THREADS, "puna-session") as pool,
    ):
        sums: list[bytes] = []
        adding: deque[Future[bytes]] = deque()
        for i, data in enumerate(pages):
            adding.append(pool.submit(_sum, data))
            file.seek(starts[i])
            _write(file, data)
            if len(adding) == THREADS:
                sums.append(adding.popleft().result())
        head += b"".join([*sums, *(each.result() for each in adding)])
        if len(head) + _SUM > start:
            raise ValueError(f"there are more than {count} pages")
        file.seek(0)
        _write(file, head + hashlib.sha256(head).digest())


def open_session(path: Path, vocab_size: int) -> SavedSession:
    """The session in a file of anybody's, its head checked; ids of the text lie in the vocabulary.

    Raises CheckpointError where there is no such file, or it is none of this format or not whole in its head.
    """

    def need(fits: bool, what: str) -> None:
        if not fits:
            raise CheckpointError(f"{path}: {what}.", remedy="It is no saved session, or damaged: save it anew.")

    try:
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file.", remedy="Name one that was saved.")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            first = file.read(_START.size)
            need(len(first) == _START.size and first.startswith(MAGIC), "not a saved session")
            _, version, length = _START.unpack(first)
            need(version == VERSION, f"a saved session of version {version}, and this Puna reads {VERSION}")
            need(length <= min(LARGEST_HEADER, size), "its header is longer than a header is")
            header = file.read(length)
            said = parse_json(header, str(path))
            names = ("page", "page_bytes", "tokens", "pages")
            more = ("local_page_bytes", "local_pages") if "local_pages" in said else ()
            need(said.keys() == {"identity", *names, *more}, "its header has other keys")
            identity: Any = said["identity"]
            need(
                isinstance(identity, dict) and all(isinstance(value, str) for value in identity.values()),
                "its identity is not an object of texts",
            )
            need(
                all(type(said[name]) is int and 0 <= said[name] <= size for name in (*names, *more)),
                "its numbers do not fit it",
            )
            page, page_bytes, count, pages = (said[name] for name in names)
            local_page_bytes, local_pages = (said[name] for name in more) if more else (0, 0)
            need(page > 0 and page_bytes > 0 and pages * page <= count, "its numbers do not fit each other")
            need(local_pages <= pages and (not more or local_page_bytes > 0), "its numbers do not fit each other")
            end = _START.size + length + 4 * count + pages * _SUM
            need(end + _SUM <= size, "it is cut short in its head")
            rest = file.read(4 * count + pages * _SUM)
            need(hashlib.sha256(first + header + rest).digest() == file.read(_SUM), "its head is damaged")
    except OSError as error:
        raise unreadable(path, error) from error
    start = _aligned(end + _SUM)
    sizes = _sizes(pages, page_bytes, local_pages, local_page_bytes)
    need(size <= (_starts(start, sizes)[-2] + sizes[-1] if pages else end + _SUM), "it is longer than its head says")
    tokens = np.frombuffer(rest, "<i4", count)
    need(not count or (tokens.min() >= 0 and tokens.max() < vocab_size), "its tokens are outside the vocabulary")
    sums = rest[4 * count :]
    return SavedSession(
        path, identity, tuple(tokens.tolist()), page, page_bytes, pages, local_page_bytes, local_pages, sums, start
    )


def model_identity(checkpoint: Checkpoint, *options: str) -> str:
    """A hash that tells models apart without reading gigabytes: the config, and of each tensor its name, type, shape
    and `SAMPLES` pieces of `SAMPLE` bytes, spread evenly from its beginning to its end; and the `options` it was loaded
    with.

    Training changes nearly every number of the tensors it touches, so it is seen; a file in which somebody changed a
    few numbers between the pieces is not. The name and the date of a file do not count: a copy is the same model.
    """
    found = hashlib.sha256(repr((checkpoint.config, options)).encode())
    for name, tensor in sorted(checkpoint.tensors.items()):
        found.update(repr((name, tensor.dtype, tensor.shape)).encode())
        weight = tensor.read()
        numbers = raw(weight)
        numbers = numbers.reshape(-1) if numbers.flags.c_contiguous else np.ascontiguousarray(numbers).reshape(-1)
        data = numbers.view(np.uint8)
        for i in range(SAMPLES):
            begin = (len(data) - SAMPLE) * i // (SAMPLES - 1) if len(data) > SAMPLE else 0
            found.update(data[begin : begin + SAMPLE].tobytes())
    return found.hexdigest()


def _sizes(pages: int, page_bytes: int, local_pages: int, local_page_bytes: int) -> list[int]:
    """Bytes of each page."""
    return [page_bytes] * (pages - local_pages) + [page_bytes + local_page_bytes] * local_pages


def _starts(start: int, sizes: list[int]) -> list[int]:
    """Where in the file each page begins, and where the next would."""
    return list(accumulate(map(_aligned, sizes), initial=start))


def _sum(data: bytes | memoryview) -> bytes:
    return hashlib.sha256(data).digest()


def _write(file: Any, data: bytes) -> None:
    rest = memoryview(data)
    while rest:  # a raw file may take less than it is given
        rest = rest[file.write(rest) :]


def _recognised(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:  # a folder, or not ours to read: not ours to replace either
        return False


def _aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN
