"""What every route of Ollama's protocol has in common.

What it is: names, times, and who may say how long a model stays.
What it is not: a route. That a body is JSON whatever its type says is the door's doing (`door.UNTYPED_PREFIX`).
What is surprising: a model may be called with `:latest`, which Ollama's clients add to a name without a tag.
"""

from __future__ import annotations

from datetime import UTC, datetime

from puna.server.caller import Caller
from puna.server.ollama_bodies import KeepAlive, seconds
from puna.server.problems import RequestError


def plain(model: str) -> str:
    """A model's name here: Ollama's clients add `:latest` to one without a tag."""
    return model.removesuffix(":latest")


def stamp(when: float | None = None) -> str:
    """A time (seconds since 1970, None: now) as Ollama writes it, to the microsecond, in UTC."""
    moment = datetime.now(UTC) if when is None else datetime.fromtimestamp(when, UTC)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def kept_for(keep_alive: KeepAlive, caller: Caller) -> float | None:
    """How long a model stays, in seconds. Raises RequestError for no duration, and for a caller who may not manage
    models and would have it unloaded or kept for good."""
    time = seconds(keep_alive)
    if time is not None and time <= 0 and "manage" not in caller.scopes:
        raise RequestError(
            "This key may not unload a model, nor keep one for good: it lacks the scope manage.",
            remedy="Leave keep_alive out, or give a time.",
            status=403,
            code="missing_scope",
            param="keep_alive",
        )
    return time
