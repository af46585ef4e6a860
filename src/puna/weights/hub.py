"""Models from the Hugging Face hub: fetch them, find them again, remove them.

What it is: `pull` (only the files Puna reads, resumed, checked against the hub's checksums, pinned to a commit),
`resolve` (a name to a folder, without network) and `remove`, over huggingface_hub. Which files a repository has is
asked by `hub_listing.py`, `hub_job.py` fetches them, `hub_errors.py` says what went wrong.
What it is not: a cache of its own. Files lie where huggingface_hub puts them, so that what another program fetched is
found, and what Puna fetched is found by others; `HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME`, `HF_HUB_CACHE` and
`HF_HUB_OFFLINE` are read by huggingface_hub. The record that pins a pull is Puna's (`installed.py`).
What is surprising: `resolve` and `remove` know models that came from Meta by a signed link too, by their short names.
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
    """A finished pull: `folder` is what a loader opens; `bytes_fetched` counts what came over the network."""

    name: str
    folder: Path
    revision: str
    commit: str
    files: tuple[books.PulledFile, ...]
    bytes_total: int
    bytes_fetched: int


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
    never pickles (but Meta's own, with `original`) or code. What is already in the cache is checked, not fetched; what
    an earlier pull checked and nothing has touched since is not even read.

    Args:
        name: a short name of the catalog (`llama3.2:1b`) or a hub id (`org/name`).
        revision: a branch, tag or commit; None is the default branch.
        original: fetch Meta's own files (`consolidated.NN.pth`, `params.json`, `tokenizer.model`) in place of the
            safetensors.
        endpoint: the hub's address; None is `HF_ENDPOINT`, or the public hub.
        cache_dir: the cache's folder; None is where huggingface_hub keeps it.
        progress: hears of every chunk, from several threads but never from two at once.

    Raises:
        HubError: no such model or revision, a gated or refused one, a checksum that is wrong (the file is named, and
            removed so that the next pull fetches it again). A pull that was cut short, also by Ctrl-C, continues when
            it is asked for again.
        UnreachableError: no connection, or a hub in trouble.
        StorageError: no room, or a cache that cannot be written.
    """
    hub_id = hub_id_of(name)
    asked = revision or "main"
    if not _REVISION.fullmatch(asked) or ".." in asked:
        raise HubError(f"{asked!r} is not a revision.", remedy="A revision is a branch, a tag or a commit.")
    from huggingface_hub import constants

    address = (endpoint or constants.ENDPOINT).rstrip("/")
    cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser().absolute()
    with explained(hub_id, asked, address):
        commit, files = list_files(hub_id, asked, address, original)
        job = Job(hub_id, commit, address, cache, files, progress)
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
        hub_id = hub_id_of(name)
    except HubError as error:
        # That the name is none of the catalog's is beside the point here.
        raise HubError(f"{name!r} was not pulled.", remedy="`puna list` shows what was.") from error
    found = _records_of(name, hub_id)
    if not found:
        raise HubError(
            f"{hub_id} was not pulled by Puna.",
            remedy="`puna list` shows what was. What other programs left in the hub's cache, `hf cache rm` removes.",
        )
    return found


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
