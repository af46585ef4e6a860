"""What a client is told when something goes wrong: one record, and how each protocol words it.

What it is: the map from errors to HTTP statuses and codes, and the three shapes of an error's JSON.
What it is not: a place where errors are found.
What is surprising: an error that Puna did not raise on purpose tells a client nothing but the request's id; what it
was stands in the log under that id.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from puna.errors import (
    AdapterError,
    ChatFormatError,
    ContextError,
    GrammarError,
    NoRoomError,
    PunaError,
    QueueFullError,
    StoppedError,
    UnknownModelError,
    UserError,
    VerdictError,
)

Protocol = Literal["openai", "anthropic", "ollama"]
"""Whose clients a route is for."""


class RequestError(PunaError):
    """A request that HTTP itself, a limit, or a protocol forbids; `status` is HTTP's, `code` OpenAI's, `param` the
    field that is at fault, `retry_after` seconds."""

    def __init__(
        self,
        message: str,
        *,
        remedy: str = "",
        status: int = 400,
        code: str = "",
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message, remedy=remedy)
        self.status, self.code, self.param, self.retry_after = status, code, param, retry_after


@dataclass(frozen=True)
class Problem:
    """An error as it leaves the house. `code` is OpenAI's machine-readable word."""

    status: int
    message: str
    code: str = ""
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)


_STATUS: tuple[tuple[type[PunaError], int, str], ...] = (
    (UnknownModelError, 404, "model_not_found"),
    (ContextError, 400, "context_length_exceeded"),
    (ChatFormatError, 400, "invalid_messages"),
    (GrammarError, 400, "invalid_schema"),
    (AdapterError, 400, "invalid_adapter"),
    (NoRoomError, 503, "model_does_not_fit"),
    (VerdictError, 503, "guard_failed"),
    (QueueFullError, 429, "queue_full"),
    (StoppedError, 503, "engine_stopped"),
    (UserError, 400, "invalid_value"),
)


def problem_of(error: BaseException, request_id: str = "") -> Problem:
    """What a client is told of an error."""
    if isinstance(error, RequestError):
        headers = {} if error.retry_after is None else {"Retry-After": str(max(1, round(error.retry_after)))}
        if error.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return Problem(error.status, _words(error), error.code, error.param, headers)
    for kind, status, code in _STATUS:
        if isinstance(error, kind):
            headers = {"Retry-After": "1"} if status in (429, 503) else {}
            words = _words(error)
            return Problem(status, without_folders(words) if kind is UserError else words, code, None, headers)
    about = f" Its log has the reason under the request id {request_id}." if request_id else ""
    return Problem(500, f"The server failed.{about}", "server_error")


_FOLDERS = re.compile(r"(?<![\w.~/-])/(?:[^\s/'\"]+/)+(?=[^\s/'\"])")


def without_folders(text: str) -> str:
    """A text about files, which are told by their names alone: where they lie is nobody's business but the owner's."""
    return _FOLDERS.sub("", text)


def _words(error: PunaError) -> str:
    return f"{error.message} {error.remedy}".strip()


_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_ANTHROPIC_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error", 529: "overloaded_error",
}  # fmt: skip


def shaped(problem: Problem, protocol: Protocol) -> dict[str, Any]:
    """The problem as JSON of a protocol: https://platform.openai.com/docs/guides/error-codes,
    https://docs.anthropic.com/en/api/errors, and Ollama's `{"error": "..."}`."""
    if protocol == "ollama":
        return {"error": problem.message}
    client = problem.status < 500
    if protocol == "anthropic":
        kind = _ANTHROPIC_TYPES.get(problem.status, "invalid_request_error" if client else "api_error")
        return {"type": "error", "error": {"type": kind, "message": problem.message}}
    kind = _OPENAI_TYPES.get(problem.status, "invalid_request_error" if client else "server_error")
    return {"error": {"message": problem.message, "type": kind, "param": problem.param, "code": problem.code or None}}


def protocol_of(path: str) -> Protocol:
    """Whose shape an error takes under a path."""
    if path.startswith("/v1/messages"):
        return "anthropic"
    return "ollama" if path.startswith("/api/") else "openai"
