"""One URL into one file: resumed where it stopped, hashed as it arrives, refused if it grows past its size.

What it is: the download loop that the hub (`hub.py`) and Meta's signed links (`meta_link.py`) share, and the count of
how far a pull of several files is.
What it is not: a cache, or a policy: the caller names the part file, knows the checksum and decides what a refusal by
the server means.
What is surprising: huggingface_hub has such a loop, but (2.4) it throws the partial file away when the process ends,
so an interrupted pull of a 16 GB shard would begin again. This one keeps the part file and asks for the rest by
`Range`; a server that ignores `Range`, or a file that changed in between, makes it begin again rather than join two
different files, and the checksum over the whole has the last word.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from puna.errors import HubError, UnreachableError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path
    from typing import BinaryIO

    import httpx2

RETRIES = 5
"""How often in a row a transfer may fail without a new byte arriving before it is given up."""

RETRY_SECONDS = 1.0
"""The wait before the first retry; it doubles from one to the next."""

_CHUNK = 1 << 20  # bytes
_TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a pull is. Bytes and files count those that were already here.

    `file` is the one that moved last. `checking` is True while a file that is already here is being hashed.
    """

    file: str
    checking: bool
    bytes_done: int
    bytes_total: int
    files_done: int
    files_total: int


class Meter:
    """Adds up what several threads do, and tells it to one callback, one call at a time."""

    def __init__(self, bytes_total: int, files_total: int, tell: Callable[[Progress], None] | None) -> None:
        self._lock = threading.Lock()
        self._tell = tell
        self._bytes_total, self._files_total = bytes_total, files_total
        self._bytes_done = self._files_done = 0

    def advance(self, file: str, change: int, *, checking: bool = False, finished: bool = False) -> None:
        with self._lock:
            self._bytes_done += change
            self._files_done += finished
            if self._tell is not None:
                self._tell(
                    Progress(file, checking, self._bytes_done, self._bytes_total, self._files_done, self._files_total)
                )


class Digest(Protocol):
    """What hashlib's objects do."""

    def update(self, data: bytes, /) -> None: ...

    def hexdigest(self) -> str: ...


class Stopped(Exception):  # noqa: N818 - a request that was heard, not an error
    """The transfer ended because `stop` was set. The part file stays for the next time."""


def free_space(folder: Path) -> int:
    """Bytes free on the disk of an absolute folder; one that is not there yet counts as the first above it that is.

    Raises:
        OSError: there is none such (a drive that is not there), or it cannot be looked at.
    """
    there = next((place for place in (folder, *folder.parents) if place.exists()), folder)
    return shutil.disk_usage(there).free


def git_blob_sha1(size: int) -> Digest:
    """The hash git names a file of `size` bytes by: SHA-1 over `blob <size>\\0` and the content (Pro Git, ch. 10.2)."""
    return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)


def hash_file(path: Path, digest: Digest, *, stop: threading.Event, advance: Callable[[int], None]) -> str:
    """The hexadecimal digest of a file on disk; `advance` hears how many bytes were read.

    Raises:
        Stopped: `stop` was set.
    """
    with path.open("rb") as file:
        _feed(file, digest, stop, advance)
    return digest.hexdigest()


def fetch(
    client: httpx2.Client,
    url: str,
    part: Path,
    *,
    new_digest: Callable[[], Digest],
    size: int | None,
    refuse: Callable[[httpx2.Response], None],
    stop: threading.Event,
    advance: Callable[[int], None],
    headers: Mapping[str, str] | None = None,
    timeout: float = 30.0,
) -> str:
    """GET `url` into `part`, after whatever `part` already holds, and return the digest of the whole.

    Args:
        size: bytes the whole file has, if known; the answer's own Content-Length is taken otherwise.
        refuse: hears an answer that is neither content nor worth a retry, and raises what it means.
        stop: when set, the transfer ends at the next chunk with `Stopped`.
        advance: hears every change of the bytes at hand: those already in `part` first, then each chunk; a negative
            number when bytes had to be thrown away.
        timeout: seconds without a byte after which a connection counts as broken.

    Raises:
        UnreachableError: the server sends more than `size` bytes, or keeps ending early.
        HubError: its answer is one that `refuse` lets pass.
        httpx2.TransportError: the connection failed RETRIES times in a row with no new byte.
        OSError: the file cannot be written.
    """
    import httpx2

    digest = new_digest()
    failures = 0
    with part.open("a+b") as file:
        file.seek(0)
        have = _feed(file, digest, stop, advance)
        if size is not None and have > size:
            have, digest = _empty(file, have, advance), new_digest()
        most = have  # bytes that were ever at hand: refetching the same ones again and again is no progress
        while size is None or have < size:
            problem: httpx2.TransportError | str = "the server ended the file early"
            ask = {**(headers or {}), "Accept-Encoding": "identity"}
            if have:
                ask["Range"] = f"bytes={have}-"
            try:
                with client.stream("GET", url, headers=ask, follow_redirects=True, timeout=timeout) as response:
                    status = response.status_code
                    if status == 416 and have:
                        # There is nothing after what we have: it is all of it, or the beginning of another file.
                        if size is None and _total(response) == have:
                            break
                        have, digest = _empty(file, have, advance), new_digest()
                        problem = "the server has no such range"
                    elif status in _TRANSIENT:
                        problem = f"the server answers {status}"
                        if failures == RETRIES:
                            refuse(response)
                    elif status == 206 and _start(response) != have:
                        have, digest = _empty(file, have, advance), new_digest()
                        problem = "the server sends another range than the one asked for"
                    elif status in (200, 206):
                        if status == 200 and have:
                            have, digest = _empty(file, have, advance), new_digest()
                        if size is None:
                            size = _size(response, have)
                        for chunk in response.iter_bytes(_CHUNK):
                            if stop.is_set():
                                raise Stopped
                            if size is not None and have + len(chunk) > size:
                                raise UnreachableError(
                                    f"{_shown(url)} sends more than the {size} bytes the file should have.",
                                    remedy="Pull again; if it happens again, the server is at fault.",
                                )
                            file.write(chunk)
                            digest.update(chunk)
                            have += len(chunk)
                            advance(len(chunk))
                        if size is None:
                            break
                    else:
                        refuse(response)
                        raise HubError(f"{_shown(url)} answers {status}.", remedy="Try again later.")
            except httpx2.TransportError as error:
                problem = error
            if size is not None and have == size:
                break
            failures, most = (1, have) if have > most else (failures + 1, most)
            if failures > RETRIES:
                if isinstance(problem, httpx2.TransportError):
                    raise problem
                raise UnreachableError(
                    f"{_shown(url)} could not be fetched whole: {problem} ({have} of {size} bytes are here).",
                    remedy="Pull again: it continues where it stopped.",
                )
            if stop.wait(RETRY_SECONDS * 2 ** (failures - 1)):
                raise Stopped
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _feed(file: BinaryIO, digest: Digest, stop: threading.Event, advance: Callable[[int], None]) -> int:
    """Hash the rest of an open file; the number of bytes."""
    total = 0
    while chunk := file.read(_CHUNK):
        if stop.is_set():
            raise Stopped
        digest.update(chunk)
        advance(len(chunk))
        total += len(chunk)
    return total


def _empty(file: BinaryIO, have: int, advance: Callable[[int], None]) -> int:
    """Throw away what was fetched so far; the number of bytes now at hand, which is none."""
    file.truncate(0)
    advance(-have)
    return 0


def _shown(url: str) -> str:
    """The URL without its query, which in a signed link is a secret."""
    return url.split("?", 1)[0]


def _start(response: httpx2.Response) -> int | None:
    """The first byte of a partial answer, from `Content-Range: bytes 10-19/20`."""
    unit, _, span = response.headers.get("Content-Range", "").partition(" ")
    first = span.partition("-")[0]
    return int(first) if unit == "bytes" and first.isdecimal() else None


def _total(response: httpx2.Response) -> int | None:
    """The size of the whole file, from `Content-Range: bytes */20`."""
    total = response.headers.get("Content-Range", "").rpartition("/")[2]
    return int(total) if total.isdecimal() else None


def _size(response: httpx2.Response, have: int) -> int | None:
    """The size of the whole file, from the length of what is still to come."""
    length = response.headers.get("Content-Length", "")
    return have + int(length) if length.isdecimal() and "Content-Encoding" not in response.headers else None
