"""Fields of bodies that the protocols share: what is refused by name, and JSON inside of JSON.

What it is: the words for a field that is known and cannot be honoured, and the check of schemas and arguments.
What it is not: the base of bodies (`bodies.py`), which refuses what is unknown.
What is surprising: a refused field is taken where its value asks for nothing, since clients write out their defaults.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from puna.server.limits import MAX_SCHEMA_BYTES
from puna.server.problems import Protocol, RequestError
from puna.types import Backend, Tool


def refused(name: str, why: str) -> RequestError:
    """The error for a field that cannot be honoured."""
    return RequestError(
        f"The field {name} is not honoured here: {why}.",
        remedy="Leave it out; nothing is ignored in silence.",
        code="unsupported_parameter",
        param=name,
    )


_NOTHING: tuple[object, ...] = (False, [], {}, "")


def asks_for_nothing(value: object) -> bool:
    """Whether a field's value is as good as none: null, false, or empty."""
    return value is None or value is False or value == [] or value == {} or value == ""


def told_refused(*reasons: Mapping[str, str | tuple[tuple[object, ...], str]]) -> Callable[[dict[str, Any]], None]:
    """What a body's model does to its description (pydantic's `json_schema_extra`): its refused fields may have only
    the values that ask for nothing. Of each is said why, with those values where they are not null, false and empty."""

    def tell(schema: dict[str, Any]) -> None:
        for refusals in reasons:
            for name, reason in refusals.items():
                harmless, why = reason if isinstance(reason, tuple) else (_NOTHING, reason)
                schema["properties"][name] = {"enum": [None, *harmless], "description": f"Not honoured: {why}."}

    return tell


TEXT: dict[str, Any] = {"type": "string"}
COUNT: dict[str, Any] = {"type": "integer", "minimum": 0}


def shape(**fields: dict[str, Any]) -> dict[str, Any]:
    """The schema of an object that has these fields, and perhaps more."""
    return {"type": "object", "required": list(fields), "properties": fields}


def several(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of a list of such values."""
    return {"type": "array", "items": schema}


def answer(schema: dict[str, Any], stream: str = "") -> dict[int | str, dict[str, Any]]:
    """A route's answer for its description; `stream` is the type of what is sent piece by piece where that is asked:
    events, whose schema OpenAPI has as that of one event, or lines."""
    content: dict[str, Any] = {"application/json": {"schema": schema}}
    if stream:
        content[stream] = {"schema": shape(data=TEXT) if stream == "text/event-stream" else TEXT}
    return {
        200: {"description": "The answer, whole or piece by piece." if stream else "The answer.", "content": content}
    }


def refuse(body: BaseModel, reasons: Mapping[str, str], prefix: str = "") -> None:
    """Raise RequestError for the first of these fields that asks for something; `reasons` says of each why not."""
    for name, why in reasons.items():
        if not asks_for_nothing(getattr(body, name)):
            raise refused(prefix + name, why)


def json_text(value: object, name: str) -> str:
    """A value of a body as JSON text again. Raises RequestError for one that is no text of Unicode, or too large."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise RequestError(
            f"{name} holds half a surrogate pair, which is no character.", code="invalid_value", param=name
        ) from None
    if size > MAX_SCHEMA_BYTES:
        raise RequestError(
            f"{name} has {size:,} bytes; {MAX_SCHEMA_BYTES:,} are allowed.", code="invalid_value", param=name
        )
    return text


def check_tools(backend: Backend, tools: Sequence[Tool]) -> None:
    """Raise RequestError for tools that the model cannot be told about."""
    if tools and not backend.card.tools:
        raise RequestError(
            f"{backend.card.name} has no form for tools.",
            remedy="Leave tools out, or use a model that was trained to call them.",
            code="unsupported_parameter",
            param="tools",
        )


def errors(protocol: Protocol, *statuses: int) -> dict[int | str, dict[str, Any]]:
    """The errors that a route may answer, for its description: those that every route has, and these."""
    text = {"type": "string"}
    error: dict[str, Any] = {"type": "object", "required": ["error"], "properties": {"error": text}}
    if protocol != "ollama":
        inner = {"type": "object", "required": ["type", "message"], "properties": {"type": text, "message": text}}
        error["properties"] = {"error": inner}
    said = {400: "The request cannot be honoured", 401: "No valid key", 403: "The key may not do that",
            404: "No such model", 413: "The body is too large", 429: "A limit is reached", 500: "The server failed",
            405: "Not done here", 502: "The hub cannot be reached", 503: "The model cannot answer now",
            507: "No room on the disk"}  # fmt: skip
    every = sorted({400, 401, 403, 404, 413, 429, 500, 503, *statuses})
    return {
        status: {"description": f"{said[status]}.", "content": {"application/json": {"schema": error}}}
        for status in every
    }
