"""The files of one pull on their way into huggingface_hub's cache, fetched and checked by a few threads.

What it is: `Job`, which `hub.pull` runs.
What it is not: a choice of files (`hub_listing.py`) or the record of a pull (`installed.py`).
What is surprising: the bytes travel through `fetch.py`, because huggingface_hub (2.4) forgets half a file when the
process ends and does not look at checksums. A blob enters the cache under its final name only after its checksum was
found right; huggingface_hub then lays the snapshot over it. Plain HTTP is used even where the hub offers Xet, except
for files over the 50 GB that the hub serves by Xet alone (original 405B shards), which huggingface_hub fetches whole.
"""

from __future__ import annotations

import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from puna import __version__
from puna.errors import HubError, StorageError
from puna.weights import installed as books
from puna.weights.fetch import Meter, Progress, Stopped, fetch, free_space, hash_file
from puna.weights.hub_listing import RemoteFile

if TYPE_CHECKING:
    from collections.abc import Callable

    import httpx2

_WORKERS = 4  # files at once: one connection seldom fills a fast line, and more than a few are throttled
_LOCK_SECONDS = 0.5  # how long Ctrl-C may wait for another program's lock


class Job:
    """One pull's files on their way into the cache."""

    def __init__(
        self,
        hub_id: str,
        commit: str,
        endpoint: str,
        cache: Path,
        files: list[RemoteFile],
        progress: Callable[[Progress], None] | None,
    ) -> None:
        from huggingface_hub import get_session
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        self.hub_id, self.commit, self.endpoint, self.cache = hub_id, commit, endpoint, cache
        # Small files first: a repository that turns out not to be what it seems costs little then.
        self.files = sorted(files, key=lambda file: file.size)
        self.repository = cache / f"models--{hub_id.replace('/', '--')}"
        self.snapshot = self.repository / "snapshots" / commit
        self.bytes_fetched = 0
        self._client: httpx2.Client = get_session()
        self._headers: dict[str, str] = build_hf_headers(library_name="puna", library_version=__version__)
        self._stop = threading.Event()
        self._meter = Meter(sum(file.size for file in files), len(files), progress)
        self._count = threading.Lock()

    def make_room(self) -> None:
        """Refuse to begin what cannot end: compare what is still to come with the free space.

        Raises:
            StorageError: the disk is too full.
        """
        missing = 0
        for file in self.files:
            if not (self.snapshot / file.path).exists() and not (self.repository / "blobs" / file.blob).exists():
                part = self._part(file)
                missing += file.size - min(file.size, part.stat().st_size if part.exists() else 0)
        free = free_space(self.cache)
        if missing > free:
            raise StorageError(
                f"{self.hub_id} needs {missing / 1e9:.1f} GB more in {self.cache}, where {free / 1e9:.1f} GB are free.",
                remedy="Make room (`puna list` shows what was pulled, `puna rm NAME` removes it), "
                "or set HF_HUB_CACHE to a folder on a larger disk.",
            )

    def has_bytes(self) -> bool:
        """Whether any bytes of these files are in the cache."""
        places = [place for file in self.files for place in (self.repository / "blobs" / file.blob, self._part(file))]
        return any(place.exists() and place.stat().st_size > 0 for place in places)

    def run(self, earlier: books.Record | None) -> tuple[books.PulledFile, ...]:
        """Fetch and check every file; the files in the order of their paths."""
        same_folder = earlier is not None and earlier.folder == str(self.snapshot)
        known = {file.path: file for file in earlier.files} if earlier is not None and same_folder else {}
        done: list[books.PulledFile] = []
        with ThreadPoolExecutor(_WORKERS, thread_name_prefix="puna-pull") as pool:
            try:
                pending = [pool.submit(self._obtain, file, known.get(file.path)) for file in self.files]
                done.extend(finished.result() for finished in as_completed(pending))
            except BaseException:
                # Also Ctrl-C: the threads stop at their next chunk, and the part files stay.
                self._stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        return tuple(sorted(done, key=lambda file: file.path))

    def _obtain(self, file: RemoteFile, known: books.PulledFile | None) -> books.PulledFile:
        """Have one file in the snapshot, checked."""
        if self._stop.is_set():
            raise Stopped
        pointer = self.snapshot / file.path
        if pointer.exists():
            if known and known.sha256 and known.checksum == file.checksum and books.unchanged(pointer, known):
                self._meter.advance(file.path, file.size, finished=True)
                return known
            self._check(file, pointer)
        else:
            if file.size <= _http_limit():
                self._obtain_blob(file)
            self._lay_snapshot(file)
            blob = self.repository / "blobs" / file.blob
            if not (blob.exists() and pointer.samefile(blob)):
                # It did not come from the blob that was checked: Xet, a server with other ETags, or a disk without
                # links, where huggingface_hub moves the blob to its place. Small price, rare case: check what is there.
                self._check(file, pointer, count=file.size > _http_limit())
            if file.size > _http_limit():
                with self._count:
                    self.bytes_fetched += file.size
        stat = pointer.stat()
        sha256 = file.sha256
        if not sha256:
            with pointer.open("rb") as opened:
                sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
        self._meter.advance(file.path, 0, finished=True)
        return books.PulledFile(file.path, stat.st_size, file.checksum, sha256, stat.st_mtime_ns)

    def _obtain_blob(self, file: RemoteFile) -> None:
        """Have the file's bytes in the cache's `blobs`, fetched if need be, and checked before they get their name."""
        from filelock import Timeout
        from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

        blob = self.repository / "blobs" / file.blob
        # The lock that huggingface_hub takes for the same blob, so that two programs do not fetch it twice.
        lock = self.cache / ".locks" / self.repository.name / f"{file.blob}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        blob.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as held:
            while True:
                if self._stop.is_set():
                    raise Stopped
                try:
                    held.enter_context(WeakFileLock(lock, timeout=_LOCK_SECONDS))
                    break
                except Timeout:
                    continue
            if blob.exists():
                self._check(file, blob)
                return
            part = self._part(file)
            found = fetch(
                self._client,
                f"{self.endpoint}/{self.hub_id}/resolve/{self.commit}/{file.path}",
                part,
                new_digest=file.new_digest,
                size=file.size,
                refuse=_refused,
                stop=self._stop,
                advance=self._counter(file, part),
                headers=self._headers,
            )
            if found != file.blob:
                part.unlink()
                raise _corrupted(self.hub_id, file, "what the server sent")
            os.replace(part, blob)

    def _lay_snapshot(self, file: RemoteFile) -> None:
        from huggingface_hub import hf_hub_download

        hf_hub_download(
            self.hub_id,
            file.path,
            revision=self.commit,
            cache_dir=self.cache,
            endpoint=self.endpoint,
            library_name="puna",
            library_version=__version__,
        )

    def _check(self, file: RemoteFile, path: Path, *, count: bool = True) -> None:
        """Compare a file on disk with the hub's checksum; a wrong one is removed.

        Raises:
            HubError: it is another file than the hub's.
        """

        def advance(change: int) -> None:
            if count:
                self._meter.advance(file.path, change, checking=True)

        if path.stat().st_size != file.size or (
            hash_file(path, file.new_digest(), stop=self._stop, advance=advance) != file.blob
        ):
            real = path.resolve()
            path.unlink()
            (self.repository / "blobs" / file.blob).unlink(missing_ok=True)
            if self.repository.resolve() in real.parents:
                real.unlink(missing_ok=True)
            raise _corrupted(self.hub_id, file, f"the copy in {self.repository}")

    def _part(self, file: RemoteFile) -> Path:
        return self.repository / "blobs" / f"{file.blob}.incomplete"

    def _counter(self, file: RemoteFile, part: Path) -> Callable[[int], None]:
        """Reports bytes; those beyond what the part file held at the start came over the network."""
        held = part.stat().st_size if part.exists() else 0

        def advance(change: int) -> None:
            nonlocal held
            checking = 0 < change <= held
            if checking:
                held -= change
            elif change > 0:
                with self._count:
                    self.bytes_fetched += change
            self._meter.advance(file.path, change, checking=checking)

        return advance


def _http_limit() -> int:
    """The size in bytes above which the hub serves a file by Xet only."""
    from huggingface_hub import constants

    return int(constants.MAX_HTTP_DOWNLOAD_SIZE)


def _refused(response: httpx2.Response) -> None:
    """Raise what a hub's refusal means, in huggingface_hub's terms."""
    from huggingface_hub import hf_raise_for_status

    hf_raise_for_status(response)


def _corrupted(hub_id: str, file: RemoteFile, what: str) -> HubError:
    return HubError(
        f"{file.path} of {hub_id} is damaged: {what} does not have the hub's checksum {file.checksum}.",
        remedy="It was removed. Pull again to fetch it anew.",
    )
