"""What the server keeps for its clients: files, batches and stored responses, in SQLite.

What it is: one database (`state.sqlite3` in the server's folder of state, else in memory), and every statement on it.
What it is not: keys and their limits, which the door keeps; or a folder of clients' files: contents are rows of pieces,
so that no name from a client ever reaches the file system, and a file is there whole or not at all.
What is surprising: everything has an owner, the id of a key, and is asked for with it: what is another's is not there.
Methods block: call them through `asyncio.to_thread`. The SQL is what PostgreSQL understands too.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from starlette.requests import Request

from puna.server.problems import RequestError

PIECE_BYTES = 1 << 20
"""A file's content is kept in pieces of so many bytes."""

MAX_STORED_BYTES = 2 << 30
"""What one key may keep, files and responses together."""

MAX_BATCHES = 64
"""Batches of one key that are not over: each takes as much room as its file, up to a body's size."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, name TEXT NOT NULL, purpose TEXT NOT NULL, size BIGINT NOT NULL,
    created BIGINT NOT NULL, expires BIGINT);
CREATE INDEX IF NOT EXISTS files_of ON files (owner, created);
CREATE TABLE IF NOT EXISTS pieces (
    file TEXT NOT NULL, number BIGINT NOT NULL, data BLOB NOT NULL, PRIMARY KEY (file, number));
CREATE TABLE IF NOT EXISTS batches (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, caller TEXT NOT NULL, status TEXT NOT NULL, created BIGINT NOT NULL,
    about TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS batches_of ON batches (owner, created);
CREATE TABLE IF NOT EXISTS lines (
    batch TEXT NOT NULL, number BIGINT NOT NULL, request TEXT NOT NULL, state TEXT NOT NULL, answer TEXT,
    PRIMARY KEY (batch, number));
CREATE TABLE IF NOT EXISTS responses (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, created BIGINT NOT NULL, size BIGINT NOT NULL, about TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS responses_of ON responses (owner, created);
"""


@dataclass(frozen=True)
class File:
    """A file. Times are seconds since 1970, `size` bytes."""

    id: str
    name: str
    purpose: str
    size: int
    created: int
    expires: int | None = None


@dataclass(frozen=True)
class Batch:
    """A batch: `caller` says for whom it is worked on, `about` is what OpenAI's object has beside id and status."""

    id: str
    owner: str
    caller: dict[str, Any]
    status: str
    created: int
    about: dict[str, Any]


@dataclass(frozen=True)
class Line:
    """A line of a batch: its request, and once it is over ("done" or "failed") its answer, both as JSON."""

    number: int
    request: str
    state: str = "waiting"
    answer: str | None = None


UNFINISHED = ("validating", "in_progress", "finalizing", "cancelling")
"""The states of a batch that is worked on."""


class Store:
    """The database."""

    def __init__(self, folder: Path | None = None) -> None:
        """In `folder`, made where it is not there; without one in memory."""
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = ":memory:" if folder is None else str(folder / "state.sqlite3")
        if folder is not None:  # for its owner's eyes, whatever the folder's mode; SQLite's other files get the same
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        self._database = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=30)
        self._lock = threading.Lock()
        # A commit is on the disk before it is told: a batch's finished line survives the machine's power too.
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            self._database.execute(f"PRAGMA {pragma}")
        self._database.executescript(_SCHEMA)

    def close(self) -> None:
        """Close it. A second close does nothing."""
        with self._lock:
            self._database.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
            except BaseException:
                self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")

    def _rows(self, query: str, values: Iterable[Any]) -> list[Any]:
        with self._lock:
            return self._database.execute(query, tuple(values)).fetchall()

    def add_file(
        self, owner: str, name: str, purpose: str, number: str, pieces: Iterable[bytes], expires: int | None = None
    ) -> File:
        """Keep a file. Raises RequestError where the owner keeps too much already."""
        with self._transaction() as database:
            return _add_file(database, owner, name, purpose, number, pieces, expires)

    def file(self, owner: str, number: str) -> File | None:
        """A file of this owner."""
        rows = self._rows(
            "SELECT id, name, purpose, size, created, expires FROM files"
            " WHERE id = ? AND owner = ? AND (expires IS NULL OR expires > ?)",
            (number, owner, int(time.time())),
        )
        return File(*rows[0]) if rows else None

    def files(self, owner: str, *, purpose: str | None, after: str | None, limit: int, newest: bool) -> list[File]:
        """So many of an owner's files, in the order of their making, those after a given one."""
        where, values = "owner = ? AND (expires IS NULL OR expires > ?)", [owner, int(time.time())]
        if purpose is not None:
            where, values = f"{where} AND purpose = ?", [*values, purpose]
        rows = self._page("id, name, purpose, size, created, expires", "files", where, values, after, limit, newest)
        return [File(*row) for row in rows]

    def _page(
        self, what: str, table: str, where: str, values: list[Any], after: str | None, limit: int, newest: bool
    ) -> list[Any]:
        sign, order = ("<", "DESC") if newest else (">", "ASC")
        if after is not None:
            where += f" AND (created, id) {sign} (SELECT created, id FROM {table} WHERE id = ?)"
            values = [*values, after]
        query = f"SELECT {what} FROM {table} WHERE {where} ORDER BY created {order}, id {order} LIMIT ?"
        return self._rows(query, (*values, limit))

    def piece(self, file: str, number: int) -> bytes | None:
        """A piece of a file's content, None after the last."""
        rows = self._rows("SELECT data FROM pieces WHERE file = ? AND number = ?", (file, number))
        return bytes(rows[0][0]) if rows else None

    def delete_file(self, owner: str, number: str) -> bool:
        """Forget a file; whether there was one."""
        with self._transaction() as database:
            gone = database.execute("DELETE FROM files WHERE id = ? AND owner = ?", (number, owner)).rowcount
            if gone:
                database.execute("DELETE FROM pieces WHERE file = ?", (number,))
        return bool(gone)

    def sweep(self) -> None:
        """Forget the files whose time is over."""
        with self._transaction() as database:
            over = "SELECT id FROM files WHERE expires <= ?"
            now = int(time.time())
            database.execute(f"DELETE FROM pieces WHERE file IN ({over})", (now,))
            database.execute("DELETE FROM files WHERE expires <= ?", (now,))

    def add_batch(self, batch: Batch) -> None:
        """Keep a batch. Raises RequestError where its owner has too many that are not over: each has a copy of its
        file's lines."""
        with self._transaction() as database:
            marks = ", ".join("?" * len(UNFINISHED))
            query = f"SELECT COUNT(*) FROM batches WHERE owner = ? AND status IN ({marks})"
            if database.execute(query, (batch.owner, *UNFINISHED)).fetchone()[0] >= MAX_BATCHES:
                raise RequestError(
                    f"This key has {MAX_BATCHES} batches that are not over.",
                    remedy="Wait for one, or cancel one.",
                    status=429,
                    code="too_many_batches",
                    retry_after=60,
                )
            values = (batch.id, batch.owner, json.dumps(batch.caller), batch.status, batch.created)
            database.execute("INSERT INTO batches VALUES (?, ?, ?, ?, ?, ?)", (*values, json.dumps(batch.about)))

    def batch(self, number: str, owner: str | None = None) -> Batch | None:
        """A batch, of this owner where one is given."""
        where, values = "id = ?", [number]
        if owner is not None:
            where, values = f"{where} AND owner = ?", [number, owner]
        rows = self._rows(f"SELECT {_BATCH} FROM batches WHERE {where}", values)
        return _batch(rows[0]) if rows else None

    def batches(self, owner: str, *, after: str | None, limit: int) -> list[Batch]:
        """So many of an owner's batches, the newest first, those after a given one."""
        return [_batch(row) for row in self._page(_BATCH, "batches", "owner = ?", [owner], after, limit, True)]

    def unfinished(self) -> list[Batch]:
        """The batches that are to be worked on, the oldest first."""
        marks = ", ".join("?" * len(UNFINISHED))
        query = f"SELECT {_BATCH} FROM batches WHERE status IN ({marks}) ORDER BY created, id"
        return [_batch(row) for row in self._rows(query, UNFINISHED)]

    def turn(self, number: str, status: str, was: tuple[str, ...] = UNFINISHED, **about: Any) -> Batch:
        """Put a batch into another state, if it is in one of `was`, and say more about it; returns it as it is then."""
        with self._transaction() as database:
            row = database.execute(f"SELECT {_BATCH} FROM batches WHERE id = ?", (number,)).fetchone()
            return _turn(database, _batch(row), status, was, about)

    def begin(self, number: str, lines: Iterable[str], **about: Any) -> None:
        """Keep the lines of a batch that has been looked through, and let it be worked on, unless it was cancelled."""
        with self._transaction() as database:
            row = database.execute(f"SELECT {_BATCH} FROM batches WHERE id = ?", (number,)).fetchone()
            if _turn(database, _batch(row), "in_progress", ("validating",), about).status == "in_progress":
                database.executemany(
                    "INSERT INTO lines VALUES (?, ?, ?, 'waiting', NULL)",
                    ((number, i, line) for i, line in enumerate(lines)),
                )

    def waiting(self, batch: str, after: int, limit: int) -> list[Line]:
        """Lines with a larger number that have no answer yet, in order."""
        rows = self._rows(
            "SELECT number, request FROM lines WHERE batch = ? AND state = 'waiting' AND number > ?"
            " ORDER BY number LIMIT ?",
            (batch, after, limit),
        )
        return [Line(*row) for row in rows]

    def answer(self, batch: str, number: int, state: str, answer: str) -> bool:
        """Keep the answer of a line, once: whether it had none yet."""
        with self._transaction() as database:
            return bool(
                database.execute(
                    "UPDATE lines SET state = ?, answer = ? WHERE batch = ? AND number = ? AND state = 'waiting'",
                    (state, answer, batch, number),
                ).rowcount
            )

    def counts(self, batch: str) -> dict[str, int]:
        """How many lines are in each state."""
        rows = self._rows("SELECT state, COUNT(*) FROM lines WHERE batch = ? GROUP BY state", (batch,))
        return dict(rows)

    def finish(
        self, number: str, status: str, files: dict[str, tuple[str, str]], expires: int | None, **about: Any
    ) -> None:
        """End a batch: its answers become files, in one transaction with the new state.

        `files` has for each state of lines the key of OpenAI's object and the id of the file; no file is made of none.
        """
        with self._transaction() as database:
            batch = _batch(database.execute(f"SELECT {_BATCH} FROM batches WHERE id = ?", (number,)).fetchone())
            if batch.status not in UNFINISHED:
                return
            for state, (key, file) in files.items():
                lines = database.execute(
                    "SELECT answer FROM lines WHERE batch = ? AND state = ? ORDER BY number", (number, state)
                )
                pieces = _pieces(line.encode() + b"\n" for (line,) in lines)
                if first := next(pieces, None):
                    name = f"{number}_{'output' if state == 'done' else 'error'}.jsonl"
                    every = chain([first], pieces)
                    _add_file(database, batch.owner, name, "batch_output", file, every, expires, bounded=False)
                    about[key] = file
            counted = "SELECT state, COUNT(*) FROM lines WHERE batch = ? GROUP BY state"
            about["counts"] = dict(database.execute(counted, (number,)).fetchall())
            database.execute("DELETE FROM lines WHERE batch = ?", (number,))
            _turn(database, batch, status, UNFINISHED, about)

    def give_up(self, number: str, answer: Callable[[str], str]) -> None:
        """Let the lines of a batch that have no answer fail, with what `answer` says of their request."""
        with self._transaction() as database:
            query = "SELECT number, request FROM lines WHERE batch = ? AND state = 'waiting'"
            left = database.execute(query, (number,)).fetchall()
            database.executemany(
                "UPDATE lines SET state = 'failed', answer = ? WHERE batch = ? AND number = ?",
                ((answer(request), number, i) for i, request in left),
            )

    def add_response(self, owner: str, number: str, created: int, about: dict[str, Any]) -> None:
        """Keep a response. Raises RequestError where the owner keeps too much already."""
        text = json.dumps(about)
        with self._transaction() as database:
            _room(database, owner, len(text))
            database.execute("INSERT INTO responses VALUES (?, ?, ?, ?, ?)", (number, owner, created, len(text), text))

    def response(self, owner: str, number: str) -> dict[str, Any] | None:
        """A response of this owner."""
        rows = self._rows("SELECT about FROM responses WHERE id = ? AND owner = ?", (number, owner))
        return json.loads(rows[0][0]) if rows else None

    def delete_response(self, owner: str, number: str) -> bool:
        """Forget a response; whether there was one."""
        with self._transaction() as database:
            gone = database.execute("DELETE FROM responses WHERE id = ? AND owner = ?", (number, owner)).rowcount
        return bool(gone)


_BATCH = "id, owner, caller, status, created, about"


def _batch(row: Any) -> Batch:
    number, owner, caller, status, created, about = row
    return Batch(number, owner, json.loads(caller), status, created, json.loads(about))


def _turn(
    database: sqlite3.Connection, batch: Batch, status: str, was: tuple[str, ...], about: dict[str, Any]
) -> Batch:
    if batch.status not in was:
        return batch
    said = {**batch.about, **about}
    database.execute("UPDATE batches SET status = ?, about = ? WHERE id = ?", (status, json.dumps(said), batch.id))
    return Batch(batch.id, batch.owner, batch.caller, status, batch.created, said)


def _pieces(data: Iterable[bytes]) -> Iterator[bytes]:
    held: list[bytes] = []
    size = 0
    for some in data:
        held.append(some)
        size += len(some)
        if size >= PIECE_BYTES:
            yield b"".join(held)
            held, size = [], 0
    if held:
        yield b"".join(held)


def _add_file(
    database: sqlite3.Connection,
    owner: str,
    name: str,
    purpose: str,
    number: str,
    pieces: Iterable[bytes],
    expires: int | None,
    bounded: bool = True,
) -> File:
    size = 0
    for i, piece in enumerate(pieces):
        size += len(piece)
        if bounded:
            _room(database, owner, size)
        database.execute("INSERT INTO pieces VALUES (?, ?, ?)", (number, i, piece))
    made = File(number, name, purpose, size, int(time.time()), expires)
    database.execute(
        "INSERT INTO files VALUES (?, ?, ?, ?, ?, ?, ?)", (number, owner, name, purpose, size, made.created, expires)
    )
    return made


def _room(database: sqlite3.Connection, owner: str, more: int) -> None:
    kept = 0
    for table in ("files", "responses"):
        kept += database.execute(f"SELECT COALESCE(SUM(size), 0) FROM {table} WHERE owner = ?", (owner,)).fetchone()[0]
    if kept + more > MAX_STORED_BYTES:
        raise RequestError(
            f"This key keeps {kept} bytes; {more} more are above the {MAX_STORED_BYTES} allowed.",
            remedy="Delete some.",
            status=413,
            code="storage_full",
        )


async def store_of(request: Request) -> Store:
    """The dependency that gives a route the store."""
    store: Store = request.app.state.store
    return store
