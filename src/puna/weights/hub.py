"""Models from the Hugging Face hub: fetch them, find them again, remove them.

What it is: `pull` (only the files Puna reads, resumed, checked against the hub's checksums, pinned to a commit),
`resolve` (a name to a folder or a GGUF, without network) and `remove`, over huggingface_hub. Which files a repository
has is asked by `hub_listing.py`, which of several GGUFs is meant by `hub_gguf.py`, `hub_job.py` fetches them,
`hub_errors.py` says what went wrong.
What it is not: a cache of its own. Files lie where huggingface_hub puts them, so that what another program fetched is
found, and what Puna fetched is found by others; `HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME`, `HF_HUB_CACHE` and
`HF_HUB_OFFLINE` are read by huggingface_hub. The record that pins a pull is Puna's (`installed.py`).
What is surprising: `resolve` and `remove` know models that came from Meta by a signed link too, by their short names.
Each GGUF of a repository is a model of its own, called `org/name:Q4_K_M`, though they share a snapshot.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from puna.catalog import models as catalog
from puna.errors import HubError
from puna.weights import installed as books
from puna.weights.embedded import EMBEDDED
from puna.weights.hub_errors import explained
from puna.weights.hub_gguf import TAG, choose, is_called, models_of
from puna.weights.hub_job import Job
from puna.weights.hub_listing import INDEX, list_files

if TYPE_CHECKING:
    from collections.abc import Callable

    from puna.weights.fetch import Progress

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_REVISION = re.compile(r"[\w][\w.+-]*(/[\w][\w.+-]*)*", re.ASCII)
_MAX_INDEX = 64 << 20  # bytes


@dataclass(frozen=True, slots=True)
class Pulled:
    """A finished pull: `path` is what a loader opens; `bytes_fetched` counts what came over the network."""

    name: str
    path: Path
    revision: str
    commit: str
    files: tuple[books.PulledFile, ...]
    bytes_total: int
    bytes_fetched: int

    @property
    def folder(self) -> Path:
        """Where the files lie."""
        return self.path.parent if self.path.suffix == ".gguf" else self.path


def hub_id_of(name: str) -> str:
    """The hub id that `name` (a short name of the catalog, `org/name`, or `org/name:TAG`) stands for.

    Raises:
        HubError: it is neither.
    """
    return _asked(name)[0]


def _asked(name: str) -> tuple[str, str | None]:
    """The hub id that `name` stands for, and which of its GGUFs."""
    entry = catalog.find(name)
    if entry is not None:
        return entry.hub_id, None
    if "/" not in name:
        return catalog.lookup(name).hub_id, None  # raises, with what may have been meant
    hub_id, colon, tag = name.partition(":")
    if not _HUB_ID.fullmatch(hub_id) or ".." in hub_id or "--" in hub_id or (colon and not TAG.fullmatch(tag)):
        raise HubError(
            f"{name!r} is not a hub id.", remedy="A hub id has the form org/name; of GGUFs one is org/name:Q4_K_M."
        )
    return hub_id, tag if colon else None


def pull(
    name: str,
    *,
    revision: str | None = None,
    original: bool = False,
    endpoint: str | None = None,
    cache_dir: Path | None = None,
    progress: Callable[[Progress], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> Pulled:
    """Fetch a model into the hub's cache and pin it.

    Fetched are the configuration, the tokenizer, the chat template, the licence, and the safetensors with their index,
    or one GGUF, all its parts, and the licence; never pickles (but Meta's own, with `original`) or code. What is
    already in the cache is checked, not fetched; what an earlier pull checked and nothing has touched since is not even
    read.

    Args:
        name: a short name of the catalog (`llama3.2:1b`), a hub id (`org/name`), or one with a GGUF of it: its type
            (`org/name:Q4_K_M`) or its file. Where there are no safetensors and several GGUFs, a hub id alone means
            Q4_K_M.
        revision: a branch, tag or commit; None is the default branch.
        original: fetch Meta's own files (`consolidated.NN.pth`, `params.json`, `tokenizer.model`) in place of the
            safetensors.
        endpoint: the hub's address; None is `HF_ENDPOINT`, or the public hub.
        cache_dir: the cache's folder; None is where huggingface_hub keeps it.
        progress: hears of every chunk, from several threads but never from two at once.
        say: hears before the first byte which of several GGUFs was taken where none was named.

    Raises:
        HubError: no such model or revision, several GGUFs of which none is named nor is Q4_K_M, a gated or refused one,
            a checksum that is wrong (the file is named, and removed so that the next pull fetches it again). A pull
            that was cut short, also by Ctrl-C, continues when it is asked for again.
        UnreachableError: no connection, or a hub in trouble.
        StorageError: no room, or a cache that cannot be written.
    """
    hub_id, tag = _asked(name)
    if tag is not None and original:
        raise HubError(f"{name} names a GGUF, and Meta's original files are none.", remedy="Leave one of the two out.")
    asked = revision or "main"
    if not _REVISION.fullmatch(asked) or ".." in asked:
        raise HubError(f"{asked!r} is not a revision.", remedy="A revision is a branch, a tag or a commit.")
    from huggingface_hub import constants

    address = (endpoint or constants.ENDPOINT).rstrip("/")
    cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser().absolute()
    with explained(hub_id, asked, address):
        listing = list_files(hub_id, tag, asked, address, original)
        commit, files = listing.commit, listing.files
        name = hub_id if listing.gguf is None else f"{hub_id}:{listing.gguf.label}"
        if listing.passed_over and say is not None:
            say(f"{hub_id} has several GGUF models: {name} is fetched, not {', '.join(listing.passed_over)}.")
        job = Job(hub_id, commit, address, cache, files, progress)
        begun = books.Record(
            name=name,
            source="hub",
            folder=str(job.snapshot),
            revision=asked,
            commit=commit,
            pulled=books.now(),
            complete=False,
            files=tuple(books.PulledFile(file.path, file.size, file.checksum, "", 0) for file in files),
        )
        earlier = books.read_record(name)
        begun_record = books.with_commit(earlier, begun)
        job.make_room()
        books.write_record(begun_record)
        try:
            pulled = job.run(earlier)
        except BaseException:
            if earlier is None and not job.has_bytes():
                # Refused at the door: there is nothing to continue, to list or to remove.
                books.delete_record(name)
            raise
        if asked != commit:
            _write_ref(job.repository, asked, commit)
        books.write_record(
            replace(begun, files=pulled, complete=True, commits=begun_record.commits, pulled=books.now())
        )
    return Pulled(
        name=name,
        path=_loadable(job.snapshot, pulled),
        revision=asked,
        commit=commit,
        files=pulled,
        bytes_total=sum(file.size for file in pulled),
        bytes_fetched=job.bytes_fetched,
    )


def resolve(name: str, *, cache_dir: Path | None = None) -> Path:
    """The folder of a model that is on this machine, or its GGUF (the first part), without network.

    `name` is a short name, a hub id or a hub id with a GGUF's tag (`find.find_model` knows paths and the embedded
    model). A pulled model is the commit that was pinned; one that another program left in the hub's cache is what that
    cache calls `main`.

    Raises:
        HubError: it is not here, or not whole; the remedy is the command that fetches it. Or it may be several.
    """
    hub_id, tag = _asked(name)
    records = _records_of(name)
    whole = [record for record in records if books.is_whole(record)]
    if whole:
        return _loadable(Path(_only(name, whole).folder), _only(name, whole).files)
    cached = _cached_by_others(hub_id, cache_dir) if tag is None else None
    cached = cached or _cached_gguf(hub_id, tag, cache_dir)
    if cached is not None:
        return cached
    for begun in records:
        if begun.source != "hub":
            continue
        if not begun.complete:
            raise HubError(
                f"The pull of {begun.name} was not finished.", remedy=f"`puna pull {name}` continues where it stopped."
            )
        raise HubError(
            f"{begun.name} was pulled, but some of its files are no longer in {begun.folder}.",
            remedy=f"`puna pull {name}` fetches what is missing.",
        )
    asked = hub_id if tag is None else f"{hub_id}:{tag}"
    raise HubError(f"{asked} is not on this machine.", remedy=f"`puna pull {name}` fetches it.")


def remove(name: str) -> int:
    """Remove a pulled model; the number of bytes freed.

    Of the hub's cache the commits that Puna pulled are removed, by huggingface_hub's own strategy: blobs that another
    commit or program still needs stay.

    Raises:
        HubError: it is the embedded model, it was not pulled by Puna, or its files cannot be removed.
    """
    freed = 0
    for record in removable(name):
        try:
            freed += _remove_from_cache(record) if record.source == "hub" else _remove_folder(record)
        except OSError as error:
            raise HubError(
                f"{record.name} cannot be removed from {record.folder}: {error.strerror or error}.",
                remedy="Close the programs that use it, see that the folder can be written, and try again.",
            ) from error
        books.delete_record(record.name)
    return freed


def removable(name: str) -> list[books.Record]:
    """The records of the pulled model that `remove` would remove: one, or two where it came from Meta too.

    Raises:
        HubError: it is the embedded model, or it was not pulled by Puna.
    """
    if name == EMBEDDED:
        raise HubError(
            f"{EMBEDDED} is part of the package and cannot be removed.", remedy="Uninstall Puna to remove it."
        )
    try:
        hub_id, tag = _asked(name)
    except HubError as error:
        # That the name is none of the catalog's is beside the point here.
        raise HubError(f"{name!r} was not pulled.", remedy="`puna list` shows what was.") from error
    found = _records_of(name)
    if found and ":" in found[0].name and found[0].source == "hub":
        return [_only(name, found)]
    if not found:
        raise HubError(
            f"{hub_id if tag is None else name} was not pulled by Puna.",
            remedy="`puna list` shows what was. What other programs left in the hub's cache, `hf cache rm` removes.",
        )
    return found


def _loadable(folder: Path, files: tuple[books.PulledFile, ...]) -> Path:
    """What a loader opens: the folder, its `original` where only that has weights, or a GGUF's first part."""
    paths = [file.path for file in files]
    if any(path.endswith(".safetensors") for path in paths):
        return folder
    gguf = [path for path in paths if path.endswith(".gguf")]
    if gguf:
        return folder / gguf[0]  # the parts are in order
    return folder / "original" if any(path.startswith("original/") for path in paths) else folder


def _records_of(name: str) -> list[books.Record]:
    """The records that `name` may mean: the hub's, then one that came from Meta under the short name.

    A hub id alone may mean any of its GGUFs that were pulled, where it was not itself pulled.
    """
    hub_id, tag = _asked(name)
    entry = catalog.find(name)
    names = [hub_id] if entry is None else [hub_id, entry.short_name]
    found = [] if tag is not None else [record for record in map(books.read_record, names) if record is not None]
    if found or entry is not None:
        return found
    return [
        record
        for record in books.records()
        if record.source == "hub"
        and record.name.startswith(f"{hub_id}:")
        and (tag is None or is_called(record.name.partition(":")[2], (file.path for file in record.files), tag))
    ]


def _only(name: str, records: list[books.Record]) -> books.Record:
    """The record that `name` means.

    Raises:
        HubError: these are several GGUFs of the hub id.
    """
    if len(records) > 1 and ":" in records[0].name and records[0].source == "hub":
        names = [record.name for record in records]
        raise HubError(f"{name} is here {len(names)} times: {', '.join(names)}.", remedy=f"Name one: {names[0]}")
    return records[0]


def _cached_gguf(hub_id: str, tag: str | None, cache_dir: Path | None) -> Path | None:
    """A GGUF in the snapshot that the hub's cache calls `main`; another program may have fetched it.

    Raises:
        HubError: there are several, and none is named.
    """
    from huggingface_hub import constants

    repository = Path(cache_dir or constants.HF_HUB_CACHE).expanduser() / f"models--{hub_id.replace('/', '--')}"
    ref = repository / "refs" / "main"
    if not ref.is_file():
        return None
    snapshot = repository / "snapshots" / ref.read_text(encoding="utf-8", errors="replace")[:64].strip()
    if snapshot.parent != repository / "snapshots" or not snapshot.is_dir():
        return None
    files = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*.gguf") if path.is_file()]
    if not files:
        return None
    models = models_of(hub_id, files)
    if tag is not None and not any(is_called(model.label, model.files, tag) for model in models):
        return None
    return snapshot / choose(hub_id, models, tag).files[0] if models else None


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
    index = folder / INDEX
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
    # Other GGUFs of the repository are models of their own: what they need of a commit stays.
    others = [
        other
        for other in books.records()
        if other.name != record.name and Path(other.folder).parent.parent == repository
    ]
    needed = {commit for other in others for commit in other.commits}
    freed += _remove_files(repository, record, others, [commit for commit in record.commits if commit in needed])
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
    ours = [commit for commit in record.commits if commit in cached and commit not in needed]
    if ours:
        strategy = scan.delete_revisions(*ours)
        freed += strategy.expected_freed_size
        strategy.execute()
    left = [commit for commit in ours if (repository / "snapshots" / commit).exists()]
    if left:
        # The strategy logs what it could not delete and goes on; a person who asked for room must hear of it.
        raise OSError(errno.EACCES, f"snapshot {left[0]} is still there")
    if not cached and not others and not any(repository.glob("snapshots/*")):
        # Nothing but what an interrupted pull left behind.
        freed += sum(path.stat().st_size for path in repository.glob("blobs/*"))
        shutil.rmtree(repository)
    return freed


def _remove_files(repository: Path, record: books.Record, others: list[books.Record], commits: list[str]) -> int:
    """Remove from these snapshots the files that only `record` has; the bytes freed."""
    kept = {file.path for other in others for file in other.files}
    pointers = [
        repository / "snapshots" / commit / file.path
        for commit in commits
        for file in record.files
        if file.path not in kept
    ]
    pointers = [pointer for pointer in pointers if pointer.is_file()]
    blobs = {pointer.resolve() for pointer in pointers}
    for pointer in pointers:
        pointer.unlink()
        if not any(pointer.parent.iterdir()):
            pointer.parent.rmdir()
    blobs -= {path.resolve() for path in repository.glob("snapshots/**/*") if path.is_file()}
    freed = 0
    for blob in blobs:
        if blob.is_file() and repository.resolve() in blob.parents:
            freed += blob.stat().st_size
            blob.unlink()
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
