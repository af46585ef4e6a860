"""One HTTP request as those see it who look on: the door opens it, calls of a model add to it, the log is its end.

What it is: a record that is filled in on the way, found by whoever is in the same task (or one made from it).
What it is not: the request; no prompt, no answer, no header but the trace's stands in it.
What is surprising: one request may hold several calls (a list of prompts): their tokens add up.
"""

from __future__ import annotations

import time
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass
class Exchange:
    """`route` is the template that matched ("" for none), never the path a client sent. Times are in seconds."""

    id: str = ""
    method: str = ""
    path: str = ""
    route: str = ""
    status: int = 0
    key: str = ""
    name: str = ""
    address: str = ""
    refused: str = ""
    """The code of the door's own refusal."""
    traceparent: str = ""
    tracestate: str = ""
    began: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    operation: str = ""
    model: str = ""
    prompt_tokens: int = 0
    reused_tokens: int = 0
    completion_tokens: int = 0
    first_token: float | None = None
    finish: str = ""
    error: str = ""
    guard: list[str] = field(default_factory=list)
    """What a guard found, in its order: "before: safe", "after: unsafe S1"."""
    prompts: list[str] = field(default_factory=list)
    """Only where an operator asked for prompts in the log."""


CURRENT: ContextVar[Exchange | None] = ContextVar("exchange", default=None)
"""The exchange of the task that runs."""
