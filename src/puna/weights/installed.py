"""What was pulled onto this machine: one small JSON record a model under `PUNA_HOME/models`.

What it is: the record of a pull (which commit, which files, their sizes and SHA-256), written before the first byte
and finished after the last check, and the list that `puna list` shows.
What it is not: the files themselves. A hub model's files lie in the hub's cache, shared with every other program; the
record pins the commit, so that a later move of the branch changes nothing until the next pull.
What is surprising: a record may outlive its files, because other programs may empty that cache. Every answer here is
about what is on the disk now.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from puna.catalog import models as catalog
from puna.errors import HubError, StorageError
from puna.settings import puna_home
from puna.weights.embedded import EMBEDDED, embedded_folder

_FORMAT = 1
_MAX_RECORD = 16 << 20  # bytes; a record takes about 200 a file


@dataclass(frozen=True, slots=True)
class PulledFile:
    """One file of a pulled model.

    `path` is relative to the record's folder, `size` in bytes. `checksum` is what the publisher states
    (`sha256:…` for large files, `git-sha1:…` for small ones on the hub, `md5:…` from Meta); `sha256` was computed
    here. `mtime_ns` is the file's modification time when it was checked: while size and time stay the same, the file
    is not hashed again.
    """

    path: str
    size: int
    checksum: str
    sha256: str
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Record:
    """What is known of one pull.

    `folder` holds the files. `commits` are all the commits fetched so far, newest last.
    """

    name: str
    source: Literal["hub", "meta"]
    folder: str
    revision: str
    commit: str
    pulled: str
    complete: bool
    commits: tuple[str, ...] = ()
    files: tuple[PulledFile, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class InstalledModel:
    """One row of `puna list`.

    `name` is a hub id, the name of a model that came from Meta, or `cria`; `short_name` is the catalog's, or empty.
    `size_bytes` is what lies on the disk now; `complete` says whether that is every file. `commit`, `revision` and
    `pulled` (UTC) are empty or None for the embedded model.
    """

    name: str
    short_name: str
    source: Literal["hub", "meta", "embedded"]
    folder: Path
    size_bytes: int
    complete: bool
    revision: str
    commit: str
    pulled: datetime | None


def now() -> str:
    """The present moment as records write it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_record(name: str) -> Record | None:
    """The record of the model called `name` (a hub id, or the name a Meta pull was recorded by), or None.

    Raises:
        HubError: the record cannot be understood.
    """
    path = _path(name)
    return _load(path) if path.is_file() else None


def write_record(record: Record) -> None:
    """Write a record, whole or not at all.

    Raises:
        StorageError: it cannot be written.
    """
    path = _path(record.name)
    text = json.dumps({"format": _FORMAT, **asdict(record)}, indent=1) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise StorageError(
            f"The record {path} cannot be written: {error.strerror or error}.",
            remedy="Make room there, or set PUNA_HOME to a folder that can be written.",
        ) from error


def delete_record(name: str) -> None:
    """Forget a model; nothing happens if it is not known."""
    _path(name).unlink(missing_ok=True)


def records() -> list[Record]:
    """Every record, by name.

    Raises:
        HubError: one of them cannot be understood.
    """
    folder = puna_home() / "models"
    found = [_load(path) for path in folder.glob("*.json")] if folder.is_dir() else []
    return sorted(found, key=lambda record: record.name.lower())


def installed() -> list[InstalledModel]:
    """The embedded model, then every model that was pulled, by name.

    Raises:
        HubError: a record cannot be understood.
    """
    rows = []
    embedded = embedded_folder()
    if embedded.is_dir():
        size = sum(path.stat().st_size for path in embedded.rglob("*") if path.is_file())
        rows.append(InstalledModel(EMBEDDED, EMBEDDED, "embedded", embedded, size, True, "", "", None))
    for record in records():
        entry = catalog.find(record.name)
        rows.append(
            InstalledModel(
                name=record.name,
                short_name=entry.short_name if entry else "",
                source=record.source,
                folder=Path(record.folder),
                size_bytes=sum(size for size in map(_size_on_disk, paths(record)) if size is not None),
                complete=is_whole(record),
                revision=record.revision,
                commit=record.commit,
                pulled=datetime.fromisoformat(record.pulled),
            )
        )
    return rows


def paths(record: Record) -> list[Path]:
    """Where the files of a record lie."""
    return [Path(record.folder) / file.path for file in record.files]


def is_whole(record: Record) -> bool:
    """Whether the pull was finished and every file still has its size."""
    return record.complete and all(
        _size_on_disk(path) == file.size for path, file in zip(paths(record), record.files, strict=True)
    )


def unchanged(path: Path, file: PulledFile) -> bool:
    """Whether the file at `path` is the one that was checked when `file` was recorded, by size and time."""
    try:
        stat = path.stat()
    except OSError:
        return False
    return (stat.st_size, stat.st_mtime_ns) == (file.size, file.mtime_ns)


def with_commit(record: Record | None, begun: Record) -> Record:
    """The record to keep while `begun` is being fetched.

    A finished earlier pull stays usable until the new one is finished, but remembers the new commit too, so that
    removing the model later removes both.
    """
    if record is None or not record.complete:
        return replace(begun, commits=_merged(record.commits if record else (), begun.commit))
    return replace(record, commits=_merged(record.commits, begun.commit))


def _merged(commits: tuple[str, ...], commit: str) -> tuple[str, ...]:
    return (*(known for known in commits if known != commit), commit)


def _size_on_disk(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _path(name: str) -> Path:
    # "--" for the slash, as the hub's cache does; `hub_id_of` and the catalog let no other separator through.
    return puna_home() / "models" / f"{name.replace('/', '--').replace(':', '--')}.json"


def _load(path: Path) -> Record:
    try:
        if path.stat().st_size > _MAX_RECORD:
            raise ValueError(f"it is larger than {_MAX_RECORD} bytes")
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or data.pop("format", None) != _FORMAT:
            raise ValueError("it is of another format")
        files = tuple(PulledFile(**_typed(PulledFile, file)) for file in data.pop("files"))
        commits = tuple(str(commit) for commit in data.pop("commits"))
        record = Record(**_typed(Record, data), files=files, commits=commits)
        datetime.fromisoformat(record.pulled)
        if record.source not in ("hub", "meta"):
            raise ValueError(f"source is {record.source!r}")
        if any(Path(file.path).is_absolute() or ".." in Path(file.path).parts for file in files):
            raise ValueError("a file lies outside its folder")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise HubError(
            f"The record {path} cannot be understood: {error}.",
            remedy="Delete that file and pull the model again; files already in the hub's cache are not fetched twice.",
        ) from error
    return record


def _typed(kind: type[Record] | type[PulledFile], data: Any) -> dict[str, Any]:
    """`data` as keyword arguments for `kind`, each scalar of the annotated type."""
    if not isinstance(data, dict):
        raise ValueError("an object is missing")
    for name, annotation in kind.__annotations__.items():
        expected = {"str": str, "int": int, "bool": bool, "Literal['hub', 'meta']": str}.get(annotation)
        if expected is not None and type(data.get(name)) is not expected:
            raise ValueError(f"{name} is not of type {expected.__name__}")
    return data
