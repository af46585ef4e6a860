"""Keys as they are kept: SQLite always, PostgreSQL where `PUNA_TEST_POSTGRES` names a database to write in."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from puna.cli.main import main
from puna.errors import PunaError, UsageError
from puna.server import keys
from puna.server.caller import SCOPES
from puna.server.database import Database
from puna.server.keys import GENERATED, KeyRing, KeyStore, digest_of, new_secret, today
from puna.settings import audit_file, server_database

POSTGRES = os.environ.get("PUNA_TEST_POSTGRES")
WHERE = [
    "sqlite",
    pytest.param("postgres", marks=pytest.mark.skipif(not POSTGRES, reason="PUNA_TEST_POSTGRES names no database")),
]


@pytest.fixture(params=WHERE)
def where(request: pytest.FixtureRequest, tmp_path: Path) -> Path | str:
    """Where keys are kept; PostgreSQL's tables are made anew."""
    if request.param == "sqlite":
        return tmp_path / "folder" / "server.db"
    assert POSTGRES is not None
    database = Database(POSTGRES, ())
    with database.change() as run:
        for table in ("keys", "used", "changes"):
            run(f"DROP TABLE IF EXISTS {table}")
    database.close()
    return POSTGRES


@pytest.fixture
def store(where: Path | str) -> Iterator[KeyStore]:
    store = KeyStore(where)
    yield store
    store.close()


def test_a_key_is_kept_as_its_hash(store: KeyStore, where: Path | str) -> None:
    key, secret = store.add("alice")
    assert GENERATED.fullmatch(secret)
    assert len(secret) == 5 + 43  # 32 bytes, six bits a character
    assert (key.digest, key.id) == (digest_of(secret), digest_of(secret)[:12])
    assert store.every() == [key]
    if isinstance(where, Path):
        store.close()
        for file in where.parent.iterdir():
            assert secret.encode() not in file.read_bytes()
            assert file.stat().st_mode & 0o077 == 0
    assert digest_of("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1


def test_what_a_key_may_do_is_kept(store: KeyStore) -> None:
    ends = time.time() + 1000
    key, _ = store.add(
        "alice", scopes=("observe", "infer"), models=("llama3.2:1b", 'a "b", c'), requests_per_minute=1,
        tokens_per_minute=2, tokens_per_day=1 << 40, priority=-5, expires=ends,
    )  # fmt: skip
    [kept] = store.every()
    assert kept == key
    assert kept.scopes == {"infer", "observe"}
    assert kept.models == {"llama3.2:1b", 'a "b", c'}
    assert (kept.requests_per_minute, kept.tokens_per_minute, kept.tokens_per_day) == (1, 2, 1 << 40)
    assert (kept.priority, kept.expires) == (-5, ends)
    assert [kept.state(at) for at in (ends - 1, ends)] == ["active", "expired"]
    assert replace(kept, revoked=1.0).state(0) == "revoked"
    assert kept.caller().namespace == kept.id
    plain, _ = store.add("bob")
    assert (plain.scopes, plain.models, plain.tokens_per_day, plain.expires) == ({"infer"}, None, None, None)


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": ""}, {"name": "-x"}, {"name": "a b"}, {"name": "a\n"}, {"name": "a" * 65}, {"name": "é"},
        {"scopes": ("all",)}, {"scopes": ()}, {"requests_per_minute": 0}, {"tokens_per_minute": -1},
        {"tokens_per_day": 1 << 54}, {"priority": 1001}, {"expires": 1.0},
    ],
)  # fmt: skip
def test_keys_that_cannot_be(tmp_path: Path, wrong: dict[str, Any]) -> None:
    store = KeyStore(tmp_path / "server.db")
    with pytest.raises(UsageError):
        store.add(**({"name": "a"} | wrong))
    assert store.every() == []
    assert store.version() == 0
    store.close()


def test_a_name_is_taken_until_its_key_is_revoked(store: KeyStore) -> None:
    first, _ = store.add("alice")
    with pytest.raises(UsageError, match="already"):
        store.add("alice")
    version = store.version()
    assert store.revoke("alice").id == first.id
    assert store.version() == version + 1
    with pytest.raises(UsageError, match="no key 'alice' in use"):
        store.revoke("alice")
    second, _ = store.add("alice")
    store.revoke(second.id)
    assert [key.revoked is not None for key in store.every()] == [True, True]
    with pytest.raises(UsageError):
        store.revoke("x' OR '1'='1")


def test_what_was_used_adds_up_over_processes(store: KeyStore, where: Path | str) -> None:
    other = KeyStore(where)
    assert store.spend({("a", "2026-01-01"): 5, ("a", "2026-01-02"): 1}) == {
        ("a", "2026-01-01"): 5,
        ("a", "2026-01-02"): 1,
    }
    assert other.spend({("a", "2026-01-01"): 7}) == {("a", "2026-01-01"): 12}
    assert store.used("2026-01-01") == {"a": 12}
    assert store.used("2026-01-03") == {}
    other.close()


def test_many_threads_spend_at_once(store: KeyStore, where: Path | str) -> None:
    other = KeyStore(where)

    def spend(which: KeyStore) -> None:
        for _ in range(4):
            which.spend({("a", "2026-01-01"): 1})

    threads = [threading.Thread(target=spend, args=(which,)) for which in (store, other, store, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.used("2026-01-01") == {"a": 16}
    other.close()


def test_a_transaction_is_whole_or_not_there(store: KeyStore) -> None:
    def change() -> None:
        with store._database.change() as run:
            run("INSERT INTO used (key, day, tokens) VALUES (?, ?, ?)", "a", "d", 1)
            assert run("SELECT tokens FROM used WHERE day = ?", "d") == [(1,)]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        change()
    assert store.used("d") == {}


def test_a_days_use_begins_at_midnight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [today(at) for at in (0, 86399.9, 86400)] == ["1970-01-01", "1970-01-01", "1970-01-02"]
    store = KeyStore(tmp_path / "server.db")
    key, _ = store.add("a")

    async def work() -> list[int]:
        ring = KeyRing(store)
        await ring.refresh()
        now = [86399.0]
        monkeypatch.setattr(keys.time, "time", lambda: now[0])
        ring.spend(key.id, 10)
        used = [ring.used_today(key.id)]
        now[0] = 86400.0
        used.append(ring.used_today(key.id))
        ring.spend(key.id, 3)
        used.append(ring.used_today(key.id))
        await ring.close()
        return used

    assert asyncio.run(work()) == [10, 0, 3]
    assert [store.used(day) for day in ("1970-01-01", "1970-01-02")] == [{key.id: 10}, {key.id: 3}]
    store.close()


def test_a_database_that_fails_shuts_nobody_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = KeyStore(tmp_path / "server.db")
    key, secret = store.add("a")

    async def work() -> None:
        ring = KeyRing(store)
        await ring.refresh()
        healthy = store._database.read
        store._database.read = broken  # type: ignore[method-assign]
        ring._looked -= 10
        await ring.refresh()
        assert ring.find(secret) == key
        assert "could not be read again" in caplog.text
        store._database.read = healthy  # type: ignore[method-assign]
        await ring.close()
        other = KeyRing(store)  # but one that never read any lets nobody in
        store._database.read = broken  # type: ignore[method-assign]
        with pytest.raises(PunaError, match="disk"):
            await other.refresh()

    def broken(*_: object) -> list[Any]:
        raise PunaError("the disk is gone")

    asyncio.run(work())


def test_use_that_could_not_be_written_is_written_later(tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "server.db")
    key, _ = store.add("a")
    healthy, fails = store.spend, [True]

    def sometimes(amounts: Any) -> Any:
        if fails.pop() if fails else False:
            raise PunaError("locked")
        return healthy(amounts)

    async def work() -> None:
        ring = KeyRing(store)
        await ring.refresh()
        store.spend = sometimes  # type: ignore[method-assign]
        ring.spend(key.id, 10)
        await ring._write()
        assert ring.used_today(key.id) == 10
        ring.spend(key.id, 1)
        await ring.close()

    asyncio.run(work())
    assert store.used(today(time.time())) == {key.id: 11}


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "server.db").write_text("not a database, but long enough to look at" * 100)
    with pytest.raises(PunaError, match="cannot be used"):
        KeyStore(tmp_path / "server.db").every()
    with pytest.raises(PunaError, match="cannot be used"):
        KeyStore(tmp_path).every()


def test_postgres_that_is_not_there() -> None:
    with pytest.raises(PunaError, match="cannot be used") as error:
        KeyStore("postgresql://nobody@127.0.0.1:1/none").every()
    assert "PostgreSQL" in error.value.remedy


def test_sqlite_writes_ahead(tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "server.db")
    store.add("a")
    with sqlite3.connect(tmp_path / "server.db") as other:
        assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    store.close()


# -- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def puna(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Run `puna keys` with these arguments: (exit code, stdout, stderr)."""
    monkeypatch.setenv("PUNA_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PUNA_DATABASE", raising=False)

    def call(*arguments: str) -> tuple[int, str, str]:
        out, err = StringIO(), StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            code = main(["keys", *arguments])
        return code, out.getvalue(), err.getvalue()

    return call


def test_the_command(puna: Callable[..., tuple[int, str, str]]) -> None:
    status, secret, said = puna("add", "alice", "--scopes", "infer,batch", "--models", "a,b", "--expires", "2100-01-31")
    assert (status, GENERATED.fullmatch(secret.strip()) is not None) == (0, True)
    assert "this once" in said
    assert secret.strip() not in said
    status, out, _ = puna(
        "add", "bob", "--json", "--tokens-per-day", "5", "--requests-per-minute", "7", "--priority", "-2"
    )
    bob = json.loads(out)
    assert GENERATED.fullmatch(bob["key"])
    status, out, _ = puna("list", "--json")
    assert secret.strip() not in out
    alice, listed = json.loads(out)["keys"]
    assert (alice["name"], alice["scopes"], alice["models"]) == ("alice", ["batch", "infer"], ["a", "b"])
    assert (alice["expires"], alice["state"]) == ("2100-01-31T00:00:00+00:00", "active")
    assert (listed["tokens_per_day"], listed["requests_per_minute"], listed["priority"]) == (5, 7, -2)
    assert listed == {name: value for name, value in bob.items() if name != "key"}
    _, out, _ = puna("list")
    assert out.splitlines()[0].split()[:3] == ["NAME", "ID", "STATE"]
    assert "5 tokens/day" in out
    status, out, _ = puna("revoke", "alice", "--json")
    assert json.loads(out) == {"revoked": "alice", "id": alice["id"]}
    assert json.loads(puna("list", "--json")[1])["keys"][0]["state"] == "revoked"
    written = [json.loads(line) for line in audit_file().read_text().splitlines()]
    assert [(line["event"], line["name"]) for line in written] == [
        ("key_added", "alice"), ("key_added", "bob"), ("key_revoked", "alice"),
    ]  # fmt: skip
    assert secret.strip() not in audit_file().read_text()
    assert audit_file().stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("frob",), "must be one of add, list, revoke"),
        ((), "needs ACTION"),
        (("add",), "needs NAME"),
        (("list", "alice"), "takes no NAME"),
        (("revoke", "nobody"), "no key 'nobody' in use"),
        (("list", "--priority", "1"), "--priority is for puna keys add"),
        (("revoke", "a", "--models", "m"), "--models is for puna keys add"),
        (("add", "a", "--scopes", "infer,,batch"), "empty name"),
        (("add", "a", "--scopes", "root"), "no scope 'root'"),
        (("add", "a", "--expires", "soon"), "no date"),
        (("add", "a", "--expires", "2001-01-01"), "expired already"),
        (("add", "a", "--tokens-per-day", "0"), "1 or more"),
    ],
)
def test_the_command_refuses(puna: Callable[..., tuple[int, str, str]], arguments: tuple[str, ...], said: str) -> None:
    status, out, err = puna(*arguments)
    assert (status, out) == (2, "")
    assert said in err


def test_where_the_state_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PUNA_HOME", str(tmp_path))
    monkeypatch.delenv("PUNA_DATABASE", raising=False)
    assert server_database() == tmp_path / "server.db"
    monkeypatch.setenv("PUNA_DATABASE", "postgresql://a@b/c")
    assert server_database() == "postgresql://a@b/c"
    assert server_database(str(tmp_path / "x.db")) == tmp_path / "x.db"
    assert SCOPES == ("infer", "batch", "manage", "observe")


@pytest.mark.slow
def test_a_wrong_key_takes_as_long_as_one_that_is_nearly_right(tmp_path: Path) -> None:
    """Medians of interleaved runs; a comparison that stops at the first difference of the hash cannot be told apart
    either, since nobody chooses their hash: what this would find is other work for keys that exist."""
    store = KeyStore(tmp_path / "server.db")
    _, secret = store.add("a")
    ring = KeyRing(store)
    asyncio.run(ring.refresh())

    def seconds(given: str) -> float:
        began = time.perf_counter()
        for _ in range(200):
            ring.find(given)
        return time.perf_counter() - began

    pairs = [(seconds(secret[:-1] + "-"), seconds(new_secret())) for _ in range(300)]
    near, far = (statistics.median(column) for column in zip(*pairs, strict=True))
    assert abs(near - far) < 0.1 * far
