"""Models from the Hugging Face hub: fetch them, find them again, remove them.

What it is: `pull` (only the files Puna reads, resumed, checked against the hub's checksums, pinned to a commit),
`resolve` (a name to a folder, without network) and `remove`, over huggingface_hub.
What it is not: a cache of its own. Files lie where huggingface_hub puts them, so that what another program fetched is
found, and what Puna fetched is found by others; `HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME`, `HF_HUB_CACHE` and
`HF_HUB_OFFLINE` are read by huggingface_hub. The record that pins a pull is Puna's (`installed.py`).
What is surprising: the bytes travel through `fetch.py`, because huggingface_hub (2.4) forgets half a file when the
process ends and does not look at checksums. A blob enters the cache under its final name only after its checksum was
found right; huggingface_hub then lays the snapshot over it. Plain HTTP is used even where the hub offers Xet, except
for files over the 50 GB that the hub serves by Xet alone (original 405B shards), which huggingface_hub fetches whole.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puna import __version__
from puna.catalog import models as catalog
from puna.errors import HubError
from puna.weights import installed as books
from puna.weights.fetch import Digest, Stopped, fetch, git_blob_sha1, hash_file
from puna.weights.find import EMBEDDED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import httpx2

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_REVISION = re.compile(r"[\w][\w.+-]*(/[\w][\w.+-]*)*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")

# What Puna reads beside the weights. Licences travel with the weights, as Meta's agreements ask.
_BESIDE = re.compile(
    r"config\.json|generation_config\.json|tokenizer\.json|tokenizer_config\.json|tokenizer\.model"
    r"|special_tokens_map\.json|added_tokens\.json|chat_template\.(jinja|json)|adapter_config\.json"
    r"|adapter_model\.safetensors|(LICENSE|USE_POLICY|NOTICE)[\w.-]{0,16}",
    re.ASCII,
)
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors", re.ASCII)
_INDEX = "model.safetensors.index.json"
_SAFETENSORS = re.compile(r"[\w][\w.-]*\.safetensors", re.ASCII)
_ORIGINAL = re.compile(r"(original/)?(params\.json|tokenizer\.model|consolidated\.\d\d\.pth|checklist\.chk)", re.ASCII)

_WORKERS = 4  # files at once: one connection seldom fills a fast line, and more than a few are throttled
_MAX_FILES = 10_000  # entries of a listing; the largest real repository has some hundreds
_MAX_INDEX = 64 << 20  # bytes
_API_SECONDS = 30.0
_LOCK_SECONDS = 0.5  # how long Ctrl-C may wait for another program's lock


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


@dataclass(frozen=True, slots=True)
class Pulled:
    """A finished pull: `folder` is what a loader opens; `bytes_fetched` counts what came over the network."""

    name: str
    folder: Path
    revision: str
    commit: str
    files: tuple[books.PulledFile, ...]
    bytes_total: int
    bytes_fetched: int


@dataclass(frozen=True, slots=True)
class _RemoteFile:
    """A file as the hub lists it: LFS files have a `sha256`, the others only git's name for them."""

    path: str
    size: int
    sha256: str
    git_sha1: str

    @property
    def blob(self) -> str:
        """Its name in the cache's `blobs` folder, which is the ETag the hub gives it."""
        return self.sha256 or self.git_sha1

    @property
    def checksum(self) -> str:
        return f"sha256:{self.sha256}" if self.sha256 else f"git-sha1:{self.git_sha1}"

    def new_digest(self) -> Digest:
        return hashlib.sha256() if self.sha256 else git_blob_sha1(self.size)


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


def hub_id_of(name: str) -> str:
    """The hub id that `name` (a short name of the catalog, or itself `org/name`) stands for.

    Raises:
        HubError: it is neither.
    """
    entry = catalog.find(name)
    if entry is not None:
        return entry.hub_id
    if "/" not in name:
        return catalog.lookup(name).hub_id  # raises, with what may have been meant
    if not _HUB_ID.fullmatch(name) or ".." in name or "--" in name:
        raise HubError(f"{name!r} is not a hub id.", remedy="A hub id has the form org/name.")
    return name


def pull(
    name: str,
    *,
    revision: str | None = None,
    original: bool = False,
    endpoint: str | None = None,
    cache_dir: Path | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Pulled:
    """Fetch a model into the hub's cache and pin it.

    Fetched are the configuration, the tokenizer, the chat template, the licence, and the safetensors with their index;
    never pickles or code. What is already in the cache is checked, not fetched; what an earlier pull checked and
    nothing has touched since is not even read.

    Args:
        name: a short name of the catalog (`llama3.2:1b`) or a hub id (`org/name`).
        revision: a branch, tag or commit; None is the default branch.
        original: fetch Meta's own files (`consolidated.NN.pth`, `params.json`, `tokenizer.model`) in place of the
            safetensors.
        endpoint: the hub's address; None is `HF_ENDPOINT`, or the public hub.
        cache_dir: the cache's folder; None is where huggingface_hub keeps it.
        progress: hears of every chunk, from several threads but never from two at once.

    Raises:
        HubError: no such model or revision, a gated or refused one, no connection, no room, a checksum that is wrong
            (the file is named, and removed so that the next pull fetches it again). A pull that was cut short, also by
            Ctrl-C, continues when it is asked for again.
    """
    hub_id = hub_id_of(name)
    asked = revision or "main"
    if not _REVISION.fullmatch(asked) or ".." in asked:
        raise HubError(f"{asked!r} is not a revision.", remedy="A revision is a branch, a tag or a commit.")
    from huggingface_hub import constants

    address = (endpoint or constants.ENDPOINT).rstrip("/")
    cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser().absolute()
    with _explained(hub_id, asked, address):
        commit, files = _list(hub_id, asked, address, original)
        job = _Job(hub_id, commit, address, cache, files, progress)
        begun = books.Record(
            name=hub_id,
            source="hub",
            folder=str(job.snapshot),
            revision=asked,
            commit=commit,
            pulled=books.now(),
            complete=False,
            files=tuple(books.PulledFile(file.path, file.size, file.checksum, "", 0) for file in files),
        )
        earlier = books.read_record(hub_id)
        begun_record = books.with_commit(earlier, begun)
        job.make_room()
        books.write_record(begun_record)
        try:
            pulled = job.run(earlier)
        except BaseException:
            if earlier is None and not job.has_bytes():
                # Refused at the door: there is nothing to continue, to list or to remove.
                books.delete_record(hub_id)
            raise
        if asked != commit:
            _write_ref(job.repository, asked, commit)
        books.write_record(
            replace(begun, files=pulled, complete=True, commits=begun_record.commits, pulled=books.now())
        )
    return Pulled(
        name=hub_id,
        folder=_loadable(job.snapshot, pulled),
        revision=asked,
        commit=commit,
        files=pulled,
        bytes_total=sum(file.size for file in pulled),
        bytes_fetched=job.bytes_fetched,
    )


def resolve(name: str, *, cache_dir: Path | None = None) -> Path:
    """The folder of a model that is on this machine, without network.

    `name` is a short name or a hub id (`find.find_model` knows paths and the embedded model). A pulled model is the
    commit that was pinned; one that another program left in the hub's cache is what that cache calls `main`.

    Raises:
        HubError: it is not here, or not whole; the remedy is the command that fetches it.
    """
    hub_id = hub_id_of(name)
    for record in _records_of(name, hub_id):
        if books.is_whole(record):
            return _loadable(Path(record.folder), record.files)
    cached = _cached_by_others(hub_id, cache_dir)
    if cached is not None:
        return cached
    begun = books.read_record(hub_id)
    if begun is not None and not begun.complete:
        raise HubError(
            f"The pull of {hub_id} was not finished.", remedy=f"`puna pull {name}` continues where it stopped."
        )
    if begun is not None:
        raise HubError(
            f"{hub_id} was pulled, but some of its files are no longer in {begun.folder}.",
            remedy=f"`puna pull {name}` fetches what is missing.",
        )
    raise HubError(f"{hub_id} is not on this machine.", remedy=f"`puna pull {name}` fetches it.")


def remove(name: str) -> int:
    """Remove a pulled model; the number of bytes freed.

    Of the hub's cache the commits that Puna pulled are removed, by huggingface_hub's own strategy: blobs that another
    commit or program still needs stay.

    Raises:
        HubError: it is the embedded model, it was not pulled by Puna, or its files cannot be removed.
    """
    if name == EMBEDDED:
        raise HubError(
            f"{EMBEDDED} is part of the package and cannot be removed.", remedy="Uninstall Puna to remove it."
        )
    hub_id = hub_id_of(name)
    found = _records_of(name, hub_id)
    if not found:
        raise HubError(
            f"{hub_id} was not pulled by Puna.",
            remedy="`puna list` shows what was. What other programs left in the hub's cache, `hf cache rm` removes.",
        )
    freed = 0
    for record in found:
        try:
            freed += _remove_from_cache(record) if record.source == "hub" else _remove_folder(record)
        except OSError as error:
            raise HubError(
                f"{record.name} cannot be removed from {record.folder}: {error.strerror or error}.",
                remedy="Close the programs that use it, see that the folder can be written, and try again.",
            ) from error
        books.delete_record(record.name)
    return freed


class _Job:
    """One pull's files on their way into the cache."""

    def __init__(
        self,
        hub_id: str,
        commit: str,
        endpoint: str,
        cache: Path,
        files: list[_RemoteFile],
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
            HubError: the disk is too full.
        """
        missing = 0
        for file in self.files:
            if not (self.snapshot / file.path).exists() and not (self.repository / "blobs" / file.blob).exists():
                part = self._part(file)
                missing += file.size - min(file.size, part.stat().st_size if part.exists() else 0)
        place = self.cache
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free
        if missing > free:
            raise HubError(
                f"{self.hub_id} needs {missing / 1e9:.1f} GB more in {self.cache}, where {free / 1e9:.1f} GB are free.",
                remedy="Make room (`puna list` shows what was pulled, `puna rm NAME` removes it), "
                "or set HF_HUB_CACHE to a folder on a larger disk.",
            )

    def has_bytes(self) -> bool:
        """Whether any of the repository's bytes are in the cache."""
        return any(path.stat().st_size > 0 for path in self.repository.glob("blobs/*"))

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

    def _obtain(self, file: _RemoteFile, known: books.PulledFile | None) -> books.PulledFile:
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

    def _obtain_blob(self, file: _RemoteFile) -> None:
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

    def _lay_snapshot(self, file: _RemoteFile) -> None:
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

    def _check(self, file: _RemoteFile, path: Path, *, count: bool = True) -> None:
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

    def _part(self, file: _RemoteFile) -> Path:
        return self.repository / "blobs" / f"{file.blob}.incomplete"

    def _counter(self, file: _RemoteFile, part: Path) -> Callable[[int], None]:
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


def _list(hub_id: str, revision: str, endpoint: str, original: bool) -> tuple[str, list[_RemoteFile]]:
    """The commit a revision is at, and those of its files that Puna fetches.

    Raises:
        HubError: the answer is not a hub's, or the repository has no weights that Puna reads.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi(endpoint=endpoint, library_name="puna", library_version=__version__)
    listed: dict[str, _RemoteFile] = {}
    folders: list[str | None] = [None]
    try:
        commit = api.model_info(hub_id, revision=revision, timeout=_API_SECONDS).sha
        if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
            raise ValueError(f"the commit is {commit!r}")
        while folders:
            for item in api.list_repo_tree(hub_id, folders.pop(), revision=commit):
                if hasattr(item, "blob_id"):
                    listed[item.path] = _remote_file(item)
                elif original and item.path == "original":
                    folders.append(item.path)
                if len(listed) > _MAX_FILES:
                    raise ValueError(f"it lists more than {_MAX_FILES} files")
    except (HfHubHTTPError, HFValidationError):
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise HubError(
            f"{endpoint} does not answer as a hub does: {error}.",
            remedy="See what HF_ENDPOINT is set to; a proxy's log-in page answers like this too.",
        ) from error
    return commit, _wanted(hub_id, listed, original)


def _remote_file(item: Any) -> _RemoteFile:
    sha256 = item.lfs.sha256 if item.lfs is not None else ""
    size = item.lfs.size if item.lfs is not None else item.size
    if sha256 and not _SHA256.fullmatch(sha256):
        raise ValueError(f"the checksum of {item.path} is {sha256!r}")
    if not _COMMIT.fullmatch(item.blob_id):
        raise ValueError(f"the blob id of {item.path} is {item.blob_id!r}")
    if type(size) is not int or size < 0:
        raise ValueError(f"the size of {item.path} is {size!r}")
    return _RemoteFile(item.path, size, sha256, item.blob_id)


def _wanted(hub_id: str, listed: dict[str, _RemoteFile], original: bool) -> list[_RemoteFile]:
    """The files to fetch.

    Raises:
        HubError: there are no weights of a kind that Puna fetches; says what there is instead.
    """
    names = {path for path in listed if _BESIDE.fullmatch(path)}
    if original:
        weights = {path for path in listed if _ORIGINAL.fullmatch(path)}
        if any(path.startswith("original/") for path in weights):
            weights = {path for path in weights if path.startswith("original/")}
        if not any(path.endswith(".pth") for path in weights):
            raise HubError(
                f"{hub_id} has none of Meta's original files (consolidated.NN.pth).", remedy="Pull it without them."
            )
    elif "model.safetensors" in listed:
        weights = {"model.safetensors"}
    elif _INDEX in listed:
        weights = {_INDEX, *(path for path in listed if _SHARD.fullmatch(path))}
    else:
        weights = {path for path in listed if _SAFETENSORS.fullmatch(path)}
    if not weights:
        others = sorted(path for path in listed if path.endswith((".bin", ".pt", ".pth", ".gguf")))
        instead = f"; it has {', '.join(others[:3])}" if others else ""
        remedy = "Pull a repository with safetensors"
        if any(_ORIGINAL.fullmatch(path) and path.endswith(".pth") for path in listed):
            remedy += ", or this one's original files"
        raise HubError(f"{hub_id} has no safetensors weights{instead}.", remedy=f"{remedy}.")
    return [listed[path] for path in sorted(names | weights)]


def _loadable(folder: Path, files: tuple[books.PulledFile, ...]) -> Path:
    """The folder that a loader opens: a snapshot's `original` where only that has weights."""
    paths = [file.path for file in files]
    only_original = any(path.startswith("original/") for path in paths) and not any(
        path.endswith(".safetensors") for path in paths
    )
    return folder / "original" if only_original else folder


def _records_of(name: str, hub_id: str) -> list[books.Record]:
    """The records that `name` may mean: the hub's, then one that came from Meta under the short name."""
    entry = catalog.find(name)
    names = [hub_id] if entry is None else [hub_id, entry.short_name]
    return [record for record in map(books.read_record, names) if record is not None]


def _cached_by_others(hub_id: str, cache_dir: Path | None) -> Path | None:
    """The snapshot that the hub's cache calls `main`, if it is a whole model; another program may have fetched it.

    Raises:
        HubError: it is there, and not whole.
    """
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(hub_id, "config.json", cache_dir=cache_dir)
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    if (folder / "model.safetensors").exists():
        return folder
    index = folder / _INDEX
    if not index.exists():
        return folder if any(folder.glob("*.safetensors")) else None
    try:
        if index.stat().st_size > _MAX_INDEX:
            raise ValueError(f"it is larger than {_MAX_INDEX} bytes")
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        missing = [shard for shard in shards if not (folder / Path(shard).name).exists()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise HubError(
            f"{index} cannot be read: {error}.", remedy=f"`puna pull {hub_id}` checks it and fetches it again."
        ) from error
    return None if missing else folder


def _write_ref(repository: Path, revision: str, commit: str) -> None:
    """Tell the cache which commit a branch or tag is at, as huggingface_hub does for a download by that name."""
    ref = repository / "refs" / revision
    ref.parent.mkdir(parents=True, exist_ok=True)
    temporary = ref.with_name(f".{ref.name}.{os.getpid()}")
    temporary.write_text(commit, encoding="utf-8")
    os.replace(temporary, ref)


def _remove_from_cache(record: books.Record) -> int:
    """Remove a hub record's commits from the cache; the bytes freed."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    repository = Path(record.folder).parent.parent
    if not repository.is_dir():
        return 0
    freed = 0
    for file in record.files:
        part = repository / "blobs" / f"{file.checksum.partition(':')[2]}.incomplete"
        if part.is_file():
            freed += part.stat().st_size
            part.unlink()
    try:
        scan = scan_cache_dir(repository.parent)
    except CacheNotFound:
        return freed
    cached = {
        revision.commit_hash
        for repo in scan.repos
        if repo.repo_path == repository.resolve()
        for revision in repo.revisions
    }
    ours = [commit for commit in record.commits if commit in cached]
    if ours:
        strategy = scan.delete_revisions(*ours)
        freed += strategy.expected_freed_size
        strategy.execute()
    left = [commit for commit in ours if (repository / "snapshots" / commit).exists()]
    if left:
        # The strategy logs what it could not delete and goes on; a person who asked for room must hear of it.
        raise OSError(errno.EACCES, f"snapshot {left[0]} is still there")
    if not cached and not any(repository.glob("snapshots/*")):
        # Nothing but what an interrupted pull left behind.
        freed += sum(path.stat().st_size for path in repository.glob("blobs/*"))
        shutil.rmtree(repository)
    return freed


def _remove_folder(record: books.Record) -> int:
    """Remove the files that came from Meta, and their folder if nothing else is in it; the bytes freed."""
    freed = 0
    for path in books.paths(record):
        for present in (path, path.with_name(f"{path.name}.part")):
            if present.is_file():
                freed += present.stat().st_size
                present.unlink()
    folder = Path(record.folder)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
    return freed


def _http_limit() -> int:
    """The size in bytes above which the hub serves a file by Xet only."""
    from huggingface_hub import constants

    return int(constants.MAX_HTTP_DOWNLOAD_SIZE)


def _refused(response: httpx2.Response) -> None:
    """Raise what a hub's refusal means, in huggingface_hub's terms."""
    from huggingface_hub import hf_raise_for_status

    hf_raise_for_status(response)


def _corrupted(hub_id: str, file: _RemoteFile, what: str) -> HubError:
    return HubError(
        f"{file.path} of {hub_id} is damaged: {what} does not have the hub's checksum {file.checksum}.",
        remedy="It was removed. Pull again to fetch it anew.",
    )


@contextmanager
def _explained(hub_id: str, revision: str, endpoint: str) -> Iterator[None]:
    """Turn what huggingface_hub, the connection and the disk raise into a `HubError` with the next step."""
    import httpx2
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except (OSError, httpx2.HTTPError, HFValidationError) as error:
        # Most of huggingface_hub's errors are an OSError too.
        raise _explain(error, hub_id, revision, endpoint) from error


def _explain(error: BaseException, hub_id: str, revision: str, endpoint: str) -> HubError:
    """The `HubError` for an error on the way to a model."""
    from huggingface_hub import errors, get_token

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        # huggingface_hub's "not in the cache either"; why it asked the cache at all is the cause.
        return _explain(error.__cause__, hub_id, revision, endpoint)
    entry = catalog.find(hub_id)
    page = entry.licence_page if entry else f"{catalog.HUB_PAGE}/{hub_id}"
    log_in = "log in with `hf auth login`, or set HF_TOKEN to a token from https://huggingface.co/settings/tokens"
    if isinstance(error, errors.GatedRepoError):
        licence = f" under the {entry.licence_name}" if entry else ""
        if get_token():
            return HubError(
                f"{hub_id} is gated{licence}, and the account of your token has no access to it.",
                remedy=f"Accept the licence at {page} with that account and wait until access is granted, then pull "
                "again. A fine-grained token also needs the right to read gated repositories.",
            )
        return HubError(
            f"{hub_id} is gated{licence}: its publisher gives it to those who accept the licence.",
            remedy=f"Accept the licence at {page}, then {log_in}; pull again after that.",
        )
    if isinstance(error, errors.DisabledRepoError):
        return HubError(f"{hub_id} was disabled by the hub.", remedy=f"See {page}.")
    if isinstance(error, errors.RepositoryNotFoundError):
        hidden = "" if get_token() else f" If it is private, {log_in}."
        return HubError(
            f"There is no model {hub_id} on {endpoint}, or it is private.",
            remedy=f"See that the name is right.{hidden}",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(
            f"{hub_id} has no revision {revision!r}.", remedy=f"{page}/tree/main shows its branches and tags."
        )
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return HubError(
            f"A file that {hub_id} lists at {revision} is not there.",
            remedy="The repository may just have changed: pull again.",
        )
    if isinstance(error, errors.HFValidationError):
        return HubError(f"{hub_id!r} is not a hub id: {error}", remedy="A hub id has the form org/name.")
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status == 401:
            return HubError(
                "The hub does not accept your token.",
                remedy="It may have expired or been revoked: `hf auth login` stores a new one (HF_TOKEN, where it is "
                "set, goes before the stored one).",
            )
        if status == 403:
            return HubError(
                f"The hub forbids access to {hub_id} ({error.server_message or '403'}).",
                remedy=f"See {page}; a fine-grained token needs the right to read this repository.",
            )
        if status == 429:
            return HubError(
                f"{endpoint} asks to wait: too many requests.",
                remedy=f"Pull again in some minutes{'' if get_token() else f', or {log_in}'}.",
            )
        if status >= 500:
            return HubError(
                f"{endpoint} has trouble of its own (it answers {status}).",
                remedy="Pull again later: it continues where it stopped.",
            )
        return HubError(f"{endpoint} refuses {hub_id} (it answers {status}).", remedy=f"See {page}.")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return HubError(
            f"{hub_id} cannot be pulled: HF_HUB_OFFLINE is set.",
            remedy="Unset it to pull. A model that is already on this machine runs without it.",
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return HubError(
            f"The disk is full ({error.filename or 'in the hub cache'}).",
            remedy="Make room, or set HF_HUB_CACHE to a folder on a larger disk, and pull again: "
            "it continues where it stopped.",
        )
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return HubError(
            f"{error.filename or 'The hub cache'} cannot be written: {error.strerror}.",
            remedy="See that the folder is yours, or set HF_HUB_CACHE to one that is.",
        )
    return HubError(
        f"{hub_id} could not be fetched from {endpoint}: {error or type(error).__name__}.",
        remedy="See that the machine is online (and what HF_ENDPOINT and the proxy variables are set to), and pull "
        "again: it continues where it stopped.",
    )
