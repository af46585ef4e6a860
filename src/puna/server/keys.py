"""API keys: made, kept as hashes, found again, revoked, and what each has used.

What it is: the store of keys, and the copy of it that a server looks keys up in.
What it is not: the rules of a request (`door.py`), or the arithmetic of limits (`rates.py`).
What is surprising: a key is hashed once with plain SHA-256. Slow hashes are for passwords, which can be guessed; a key
is 32 random bytes, which cannot, and a slow hash at every request would let a stranger load the server. The first 12
digits of the hash are the key's id: it says which key is meant and nothing about it.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import re
import secrets
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from puna.errors import PunaError, UsageError
from puna.server.caller import SCOPES, Caller, Scope
from puna.server.database import Database, Row

LOG = logging.getLogger("puna.server")

FRESH_SECONDS = 0.5
"""A server looks this often, at most, whether another process has changed the keys."""

GENERATED = re.compile(r"puna-[A-Za-z0-9_-]{43}")
"""What a key that was made here looks like; nobody guesses one."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_MOST = 1 << 53  # counts stay exact in every JSON reader

_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS keys (id TEXT PRIMARY KEY, name TEXT NOT NULL, digest TEXT NOT NULL, "
    "scopes TEXT NOT NULL, models TEXT, requests_per_minute BIGINT, tokens_per_minute BIGINT, tokens_per_day BIGINT, "
    "priority BIGINT NOT NULL, expires DOUBLE PRECISION, created DOUBLE PRECISION NOT NULL, revoked DOUBLE PRECISION)",
    "CREATE UNIQUE INDEX IF NOT EXISTS keys_in_use ON keys (name) WHERE revoked IS NULL",
    "CREATE TABLE IF NOT EXISTS used (key TEXT NOT NULL, day TEXT NOT NULL, tokens BIGINT NOT NULL, "
    "PRIMARY KEY (key, day))",
    "CREATE TABLE IF NOT EXISTS changes (what TEXT PRIMARY KEY, count BIGINT NOT NULL)",
)
_COLUMNS = (
    "id, name, digest, scopes, models, requests_per_minute, tokens_per_minute, tokens_per_day, priority, expires, "
    "created, revoked"
)


@dataclass(frozen=True)
class Key:
    """A key as it is kept. `digest` is its SHA-256 in hexadecimal, times are seconds since 1970, limits None for none;
    `models` None for all."""

    id: str
    name: str
    digest: str
    scopes: frozenset[Scope] = frozenset(SCOPES)
    models: frozenset[str] | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None
    priority: int = 0
    expires: float | None = None
    created: float = 0.0
    revoked: float | None = None

    def caller(self) -> Caller:
        """Who uses it. What is remembered of their prompts is kept apart from everybody else's."""
        return Caller(self.id, self.name, self.scopes, self.models, namespace=self.id, priority=self.priority)

    def state(self, now: float) -> str:
        """active, revoked or expired."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and now >= self.expires else "active"


def new_secret() -> str:
    """A key that nobody guesses."""
    return "puna-" + secrets.token_urlsafe(32)


def digest_of(secret: str) -> str:
    """What is kept of a key: SHA-256, 64 hexadecimal digits."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def today(now: float) -> str:
    """The day of a time, in UTC: quotas of a day begin at its midnight."""
    return datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%d")


class KeyStore:
    """The keys in a database (`database.py`), and what each has used of its day. Every method blocks."""

    def __init__(self, where: Path | str) -> None:
        self._database = Database(where, _SCHEMA)

    def add(
        self,
        name: str,
        *,
        scopes: Collection[str] = ("infer",),
        models: Collection[str] | None = None,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        tokens_per_day: int | None = None,
        priority: int = 0,
        expires: float | None = None,
    ) -> tuple[Key, str]:
        """Make a key; gives its record and the key itself, which is kept nowhere.

        Raises UsageError for a name that is taken or none, an unknown scope, and a limit or time that is none.
        """
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"{name!r:.80} is no name for a key.",
                remedy="A name has up to 64 letters, digits and . _ @ -, and begins with a letter or digit.",
            )
        if unknown := sorted(set(scopes) - set(SCOPES)):
            raise UsageError(f"There is no scope {unknown[0]!r:.80}.", remedy=f"Scopes are {', '.join(SCOPES)}.")
        if not scopes:
            raise UsageError("A key without a scope may do nothing.", remedy=f"Scopes are {', '.join(SCOPES)}.")
        limits = {
            "requests_per_minute": requests_per_minute,
            "tokens_per_minute": tokens_per_minute,
            "tokens_per_day": tokens_per_day,
        }
        for what, limit in limits.items():
            if limit is not None and not 1 <= limit <= _MOST:
                raise UsageError(f"{what} must be 1 or more, not {limit}.", remedy="Leave it out for no limit.")
        if not -1000 <= priority <= 1000:
            raise UsageError(f"priority must be between -1000 and 1000, not {priority}.", remedy="0 is everybody's.")
        now = time.time()
        if expires is not None and expires <= now:
            raise UsageError("The key would have expired already.", remedy="Give a day to come.")
        secret = new_secret()
        digest = digest_of(secret)
        key = Key(
            digest[:12], name, digest, frozenset(scope for scope in SCOPES if scope in scopes),
            None if models is None else frozenset(models), requests_per_minute, tokens_per_minute, tokens_per_day,
            priority, expires, now,
        )  # fmt: skip
        with self._database.change() as run:
            if run("SELECT 1 FROM keys WHERE name = ? AND revoked IS NULL", name):
                raise UsageError(f"There is a key {name} already.", remedy=f"Revoke it first: puna keys revoke {name}")
            places = ", ".join("?" * 12)
            run(f"INSERT INTO keys ({_COLUMNS}) VALUES ({places})", *_row(key))
            _changed(run)
        return key, secret

    def revoke(self, name: str) -> Key:
        """Revoke the key of this name or id. Raises UsageError where there is none in use."""
        with self._database.change() as run:
            found = run(f"SELECT {_COLUMNS} FROM keys WHERE (name = ? OR id = ?) AND revoked IS NULL", name, name)
            if not found:
                raise UsageError(f"There is no key {name!r:.80} in use.", remedy="`puna keys list` shows them.")
            for row in found:
                run("UPDATE keys SET revoked = ? WHERE id = ?", time.time(), row[0])
            _changed(run)
        return _key(found[0])

    def every(self) -> list[Key]:
        """Every key there is or was, the oldest first."""
        return [_key(row) for row in self._database.read(f"SELECT {_COLUMNS} FROM keys ORDER BY created, id")]

    def version(self) -> int:
        """A number that grows with each change of the keys, in whatever process."""
        rows = self._database.read("SELECT count FROM changes WHERE what = ?", "keys")
        return int(rows[0][0]) if rows else 0

    def used(self, day: str) -> dict[str, int]:
        """Tokens that each key used on a day, by its id."""
        return {row[0]: int(row[1]) for row in self._database.read("SELECT key, tokens FROM used WHERE day = ?", day)}

    def spend(self, amounts: Mapping[tuple[str, str], int]) -> dict[tuple[str, str], int]:
        """Add tokens to what (a key, a day) has used; gives the sums, other processes' use included."""
        sums = {}
        with self._database.change() as run:
            for (key, day), tokens in amounts.items():
                rows = run(
                    "INSERT INTO used (key, day, tokens) VALUES (?, ?, ?) "
                    "ON CONFLICT (key, day) DO UPDATE SET tokens = used.tokens + excluded.tokens RETURNING tokens",
                    key, day, tokens,
                )  # fmt: skip
                sums[key, day] = int(rows[0][0])
        return sums

    def close(self) -> None:
        """Close the database."""
        self._database.close()


class KeyRing:
    """A server's copy of the keys: looked up in memory, brought up to date at most `FRESH_SECONDS` after a change.

    A database that fails leaves the copy as it was, and says so in the log: those who were let in stay in.
    """

    def __init__(self, store: KeyStore) -> None:
        self._store = store
        self._keys: dict[str, Key] = {}
        self._version = -1
        self._looked = -FRESH_SECONDS
        self._looking = asyncio.Lock()
        self._used: dict[tuple[str, str], int] = {}
        self._unwritten: dict[tuple[str, str], int] = {}
        self._writing: asyncio.Task[None] | None = None

    async def refresh(self) -> None:
        """Look whether the keys have changed, unless that was done just now."""
        if time.monotonic() - self._looked < FRESH_SECONDS:
            return
        async with self._looking:
            if time.monotonic() - self._looked < FRESH_SECONDS:
                return
            began = time.monotonic()
            try:
                found = await asyncio.to_thread(self._load, self._version)
            except PunaError as error:
                if self._version < 0:
                    raise  # nobody is let in before the keys were read once
                LOG.error("the keys could not be read again: %s", error)
                found = None
            self._looked = began
            if found is not None:
                self._version, keys, used = found
                self._keys = {key.id: key for key in keys}
                for key, tokens in used.items():
                    slot = (key, today(time.time()))
                    self._used[slot] = tokens + self._unwritten.get(slot, 0)

    def _load(self, known: int) -> tuple[int, list[Key], dict[str, int]] | None:
        version = self._store.version()
        return None if version == known else (version, self._store.every(), self._store.used(today(time.time())))

    def __len__(self) -> int:
        """Keys there are or were: a server whose keys have all been revoked is not open again."""
        return len(self._keys)

    def get(self, id: str) -> Key | None:
        """The key with this id."""
        return self._keys.get(id)

    def find(self, secret: str) -> Key | None:
        """The key that this is, revoked and expired ones too; None where it is none.

        The same is done whether there is such a key or not: one hash, one look-up by the hash, one comparison of
        constant time. The look-up's time depends on the hash, of which a caller who lacks the key chooses nothing.
        """
        digest = digest_of(secret)
        key = self._keys.get(digest[:12], _NOBODY)
        same = hmac.compare_digest(key.digest, digest)
        return key if same and key is not _NOBODY else None

    def used_today(self, key: str) -> int:
        """Tokens that a key has used since midnight (UTC), as far as this process knows."""
        return self._used.get((key, today(time.time())), 0)

    def spend(self, key: str, tokens: int) -> None:
        """Count tokens; they are written within `FRESH_SECONDS`, several answers' together."""
        slot = (key, today(time.time()))
        self._used[slot] = self._used.get(slot, 0) + tokens
        self._unwritten[slot] = self._unwritten.get(slot, 0) + tokens
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write_soon())

    async def _write_soon(self) -> None:
        while self._unwritten:
            await asyncio.sleep(FRESH_SECONDS)
            await self._write()

    async def _write(self) -> None:
        amounts, self._unwritten = self._unwritten, {}
        if not amounts:
            return
        try:
            sums = await asyncio.to_thread(self._store.spend, amounts)
        except PunaError as error:
            LOG.error("what keys have used could not be written yet: %s", error)
            for slot, tokens in amounts.items():
                self._unwritten[slot] = self._unwritten.get(slot, 0) + tokens
            return
        day = today(time.time())
        self._used = {slot: tokens for slot, tokens in self._used.items() if slot[1] == day}
        for slot, tokens in sums.items():
            if slot[1] == day:
                self._used[slot] = tokens + self._unwritten.get(slot, 0)

    async def close(self) -> None:
        """Write what is not written, and close the store."""
        if self._writing is not None:
            self._writing.cancel()
            await asyncio.wait([self._writing])
        await self._write()
        await asyncio.to_thread(self._store.close)


_NOBODY = Key("", "", digest_of(""))


def _changed(run: object) -> None:
    assert callable(run)
    run(
        "INSERT INTO changes (what, count) VALUES (?, 1) "
        "ON CONFLICT (what) DO UPDATE SET count = changes.count + 1", "keys",
    )  # fmt: skip


def _row(key: Key) -> Row:
    models = None if key.models is None else json.dumps(sorted(key.models))
    return (
        key.id, key.name, key.digest, ",".join(sorted(key.scopes)), models, key.requests_per_minute,
        key.tokens_per_minute, key.tokens_per_day, key.priority, key.expires, key.created, key.revoked,
    )  # fmt: skip


def _key(row: Row) -> Key:
    id, name, digest, scopes, models, *rest = row
    kept = frozenset(scope for scope in SCOPES if scope in scopes.split(","))
    return Key(id, name, digest, kept, None if models is None else frozenset(json.loads(models)), *rest)
