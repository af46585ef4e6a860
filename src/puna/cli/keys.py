"""`puna keys`: make, list and revoke the API keys of a server.

What is surprising: a key is printed once, alone on stdout; nobody can show it again. Each change leaves a line in
`audit.jsonl`, with who made it and never the key.
"""

from __future__ import annotations

import getpass
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from puna.cli import terminal
from puna.errors import UsageError
from puna.settings import KeysSettings, audit_file, server_database

if TYPE_CHECKING:
    from puna.server.keys import Key, KeyStore

_OF_ADD = (
    "scopes", "models", "requests_per_minute", "tokens_per_minute", "tokens_per_day", "priority", "expires",
)  # fmt: skip


def main(settings: KeysSettings) -> int:
    """Run the command. Raises UsageError for what does not belong together."""
    from puna.server.keys import KeyStore

    if (settings.name is None) == (settings.action != "list"):
        raise UsageError(
            f"puna keys {settings.action} " + ("needs NAME." if settings.name is None else "takes no NAME."),
            remedy=f"puna keys {settings.action}{'' if settings.action == 'list' else ' alice'}",
        )
    if settings.action != "add":
        for name in _OF_ADD:
            if getattr(settings, name) is not None:
                flag = "--" + name.replace("_", "-")
                raise UsageError(f"{flag} is for puna keys add.", remedy="Revoke the key, and add one as it should be.")
    store = KeyStore(server_database(settings.database))
    try:
        return {"add": _add, "list": _list, "revoke": _revoke}[settings.action](settings, store)
    finally:
        store.close()


def _add(settings: KeysSettings, store: KeyStore) -> int:
    key, secret = store.add(
        settings.name or "",
        scopes=_listed("--scopes", settings.scopes) or ("infer",),
        models=_listed("--models", settings.models),
        requests_per_minute=settings.requests_per_minute,
        tokens_per_minute=settings.tokens_per_minute,
        tokens_per_day=settings.tokens_per_day,
        priority=settings.priority or 0,
        expires=_time(settings.expires),
    )
    _audit("key_added", key)
    if settings.json:
        terminal.document({"key": secret, **_shown(key, 0)})
        return 0
    terminal.say(secret + "\n")
    terminal.note(f"The key {key.name}. It is shown this once: keep it now.")
    return 0


def _list(settings: KeysSettings, store: KeyStore) -> int:
    from puna.server.keys import today

    used = store.used(today(time.time()))
    keys = store.every()
    if settings.json:
        terminal.document({"keys": [_shown(key, used.get(key.id, 0)) for key in keys]})
        return 0
    if not keys:
        terminal.note("There is no key. `puna keys add NAME` makes one.")
        return 0
    rows = [
        (
            key.name, key.id, key.state(time.time()), ",".join(sorted(key.scopes)),
            "all" if key.models is None else ",".join(sorted(key.models)), _limits(key),
            str(used.get(key.id, 0)), _date(key.created), _date(key.expires),
        )
        for key in keys
    ]  # fmt: skip
    terminal.table(("NAME", "ID", "STATE", "SCOPES", "MODELS", "LIMITS", "TOKENS TODAY", "MADE", "EXPIRES"), rows)
    return 0


def _revoke(settings: KeysSettings, store: KeyStore) -> int:
    key = store.revoke(settings.name or "")
    _audit("key_revoked", key)
    if settings.json:
        terminal.document({"revoked": key.name, "id": key.id})
    else:
        terminal.note(f"The key {key.name} ({key.id}) is revoked; servers know within a second.")
    return 0


def _listed(flag: str, text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    words = tuple(word.strip() for word in text.split(","))
    if "" in words:
        raise UsageError(f"{flag} has an empty name in it: {text!r:.80}.", remedy="Put single commas between names.")
    return words


def _time(text: str | None) -> float | None:
    """Seconds since 1970; a day means its beginning, a time without a zone UTC."""
    if text is None:
        return None
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(f"--expires {text!r:.80} is no date.", remedy="Write 2030-01-31.") from None
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


def _date(seconds: float | None) -> str:
    return "" if seconds is None else f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d}"


def _limits(key: Key) -> str:
    pairs = ((key.requests_per_minute, "requests/min"), (key.tokens_per_minute, "tokens/min"),
             (key.tokens_per_day, "tokens/day"))  # fmt: skip
    return ", ".join(f"{limit} {what}" for limit, what in pairs if limit is not None) or "none"


def _shown(key: Key, used: int) -> dict[str, Any]:
    def moment(seconds: float | None) -> str | None:
        return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat()

    return {
        "name": key.name,
        "id": key.id,
        "state": key.state(time.time()),
        "scopes": sorted(key.scopes),
        "models": None if key.models is None else sorted(key.models),
        "requests_per_minute": key.requests_per_minute,
        "tokens_per_minute": key.tokens_per_minute,
        "tokens_per_day": key.tokens_per_day,
        "tokens_today": used,
        "priority": key.priority,
        "created": moment(key.created),
        "expires": moment(key.expires),
        "revoked": moment(key.revoked),
    }


def _audit(event: str, key: Key) -> None:
    from puna.server import journal

    try:
        who = getpass.getuser()
    except (OSError, KeyError):  # a user id without a name, as containers have it
        who = ""
    record = {
        "time": journal.now(), "event": event, "key": key.id, "name": key.name, "scopes": sorted(key.scopes), "by": who,
    }  # fmt: skip
    try:
        journal.append(audit_file(), record)
    except OSError as error:
        terminal.note(f"The audit log could not be written: {error}")
