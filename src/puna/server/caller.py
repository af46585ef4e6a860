"""Who asks, and what they may do.

What it is: the record that the door makes of a key, and the dependency by which a route says what it takes.
What it is not: keys, or limits (`door.py`).
What is surprising: the door lets in who has a key; what the key is good for is asked by the route. A test walks every
route and fails on one that names no scope.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

from starlette.requests import Request

from puna.server.problems import RequestError

Scope = Literal["infer", "batch", "manage", "observe"]
"""Answers, embeddings, tokens and lists of models; files and batches; loading, unloading and pulling models; metrics
and the live view of the engine."""

SCOPES: tuple[Scope, ...] = ("infer", "batch", "manage", "observe")


@dataclass(frozen=True)
class Caller:
    """Who asks. `key` is their key's id ("" where none is needed), `name` what its owner calls it; `models` those that
    they may use, None for all; `namespace` keeps what is remembered of their prompts apart; a larger `priority` goes
    first."""

    key: str = ""
    name: str = ""
    scopes: frozenset[Scope] = frozenset(SCOPES)
    models: frozenset[str] | None = None
    namespace: str = ""
    priority: int = 0

    def may_use(self, model: str) -> bool:
        """Whether they may use a model of this name."""
        return self.models is None or model in self.models


def needs(scope: Scope) -> Callable[[Request], Awaitable[Caller]]:
    """The dependency of a route that takes this scope: gives who asks, whom the door has let in.

    Raises RequestError 403 for a key without the scope.
    """

    async def caller(request: Request) -> Caller:  # FastAPI would send one that is not async to a thread
        who: Caller = request.state.caller
        if scope not in who.scopes:
            raise RequestError(
                f"This key may not do that: it lacks the scope {scope}.",
                remedy="Use a key that has it.",
                status=403,
                code="missing_scope",
            )
        return who

    caller.scope = scope  # type: ignore[attr-defined]
    return caller
