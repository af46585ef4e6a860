"""The server's state on disk: SQLite in one file, or PostgreSQL where a URL names one.

What it is: one connection, a lock, and the same few SQL statements for both.
What it is not: an object mapper, or a place for what a table means; whoever has a table brings its schema.
What is surprising: every method blocks. On an event loop they go to `asyncio.to_thread`. Statements are written with
`?` for values, which PostgreSQL's driver wants as `%s`; so no statement has a question mark or a percent of its own.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from puna.errors import DeviceError, PunaError

PATIENCE = 60.0
"""Seconds to wait for another process that writes at the same time."""

Row = tuple[Any, ...]
Run = Callable[..., list[Row]]
"""Runs a statement with its values; gives the rows, none for a statement that has none."""


class _Engine(Protocol):
    begin: str
    """The statements that begin a transaction that writes, ..."""
    alone: str
    """... and, within one, have it to oneself until its end."""

    def run(self, statement: str, values: Sequence[object]) -> list[Row]: ...

    def close(self) -> None: ...


class Database:
    """A path is SQLite's file, made where it is not there, for its owner's eyes; `postgresql://…` is a server's.

    `schema` is run at the first use, so it says IF NOT EXISTS. Raises PunaError for whatever the database refuses.
    """

    def __init__(self, where: Path | str, schema: Sequence[str]) -> None:
        self.where = where
        self._schema = tuple(schema)
        self._lock = threading.RLock()
        self._engine: _Engine | None = None

    def read(self, statement: str, *values: object) -> list[Row]:
        """The rows of a query."""
        with self._lock, self._told():
            return self._opened().run(statement, values)

    @contextmanager
    def change(self) -> Iterator[Run]:
        """A transaction: all of it or, where anything raises, none."""
        with self._lock, self._told():
            engine = self._opened()
            with _transaction(engine):
                yield lambda statement, *values: engine.run(statement, values)

    def close(self) -> None:
        """Close the connection; the next use opens it again."""
        with self._lock:
            engine, self._engine = self._engine, None
            if engine is not None:
                engine.close()

    def _opened(self) -> _Engine:
        if self._engine is None:
            where = self.where
            postgres = isinstance(where, str) and where.startswith(("postgresql://", "postgres://"))
            engine = _Postgres(str(where)) if postgres else _Sqlite(Path(where))
            with _transaction(engine):  # several processes may begin at once, and IF NOT EXISTS is no lock
                for statement in (engine.alone, *self._schema):
                    engine.run(statement, ())
            self._engine = engine
        return self._engine

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except PunaError:
            raise
        except Exception as error:
            if not isinstance(error, OSError | sqlite3.Error) and type(error).__module__.split(".")[0] != "psycopg":
                raise
            try:
                self.close()  # a connection that was lost is opened anew by the next use
            except Exception as second:  # it was broken: what counts is the first error
                error.add_note(f"and closing it: {second}")
            raise PunaError(
                f"The server's state cannot be used: {str(error).strip()}.",
                remedy=f"It lies in {self.where}." if isinstance(self.where, Path) else "Is PostgreSQL running?",
            ) from error


@contextmanager
def _transaction(engine: _Engine) -> Iterator[None]:
    engine.run(engine.begin, ())
    try:
        yield
    except BaseException:
        engine.run("ROLLBACK", ())
        raise
    engine.run("COMMIT", ())


class _Sqlite:
    begin = "BEGIN IMMEDIATE"
    alone = "SELECT 1"

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))  # SQLite gives its other files the mode of this one
        self._connection = sqlite3.connect(path, timeout=PATIENCE, isolation_level=None, check_same_thread=False)
        end = time.monotonic() + PATIENCE
        while True:
            try:  # readers and one writer do not wait for each other; two that turn to it at once are not made to wait
                self._connection.execute("PRAGMA journal_mode = WAL")
                break
            except sqlite3.OperationalError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.01)

    def run(self, statement: str, values: Sequence[object]) -> list[Row]:
        return self._connection.execute(statement, values).fetchall()

    def close(self) -> None:
        self._connection.close()


class _Postgres:
    begin = "BEGIN"
    alone = "SELECT pg_advisory_xact_lock(7078497)"  # any number that others leave alone

    def __init__(self, url: str) -> None:
        try:
            import psycopg
        except ImportError as error:
            raise DeviceError("PostgreSQL needs psycopg.", remedy="pip install 'puna[postgres]'") from error
        self._connection = psycopg.connect(url, autocommit=True, connect_timeout=int(PATIENCE))

    def run(self, statement: str, values: Sequence[object]) -> list[Row]:
        cursor = self._connection.execute(statement.replace("?", "%s").encode(), values)
        return cursor.fetchall() if cursor.description else []

    def close(self) -> None:
        self._connection.close()
