"""What /openapi.json says of every route beside what the route itself says.

What it is: FastAPI's description with the answers of the door in it, and without those that no route gives.
What it is not: a route's own answers; those stand beside the route.
What is surprising: FastAPI writes a 422 to every route that takes anything; here a body that does not fit is a 400. And
it is made when it is first asked for, in a thread: it takes most of a second, and answers under way go on.
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from puna.server.problems import Problem, protocol_of, shaped

_DOOR = {
    400: "The request is malformed, or cannot be honoured as it is.",
    401: "No key, or a wrong one.",
    403: "The key, or the origin of a web page, may not do that.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    414: "The path is too long.",
    415: "The body is no JSON by its Content-Type, or is compressed.",
    421: "The server does not go by the name in Host.",
    429: "A limit of the key, or the queue, is full; `Retry-After` says how long.",
    431: "The headers are too large.",
    500: "The server failed; its log has the reason under the request id.",
    503: "The model cannot answer now, or the server is shutting down.",
}
"""What the door answers under any path."""


def describe(app: FastAPI) -> None:
    """Have the application describe itself so, at /openapi.json."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            _complete(plain())  # which the application keeps
        assert app.openapi_schema is not None
        return app.openapi_schema

    async def told(_: Request) -> Response:
        return JSONResponse(await asyncio.to_thread(openapi))

    app.openapi = openapi  # type: ignore[method-assign]
    app.add_route("/openapi.json", told, include_in_schema=False)


def _complete(schema: dict[str, Any]) -> None:
    for path, operations in schema["paths"].items():
        error = {"application/json": {"schema": _like(shaped(Problem(500, "", "x", "x"), protocol_of(path)))}}
        for operation in operations.values():
            answers = operation["responses"]
            answers.pop("422", None)
            for status, why in _DOOR.items():
                answers.setdefault(str(status), {"description": why, "content": error})
    models = schema.get("components", {}).get("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        models.pop(name, None)


def _like(value: object) -> dict[str, Any]:
    """The schema of an error like this one: every field is there; the machine's words may be null."""
    if not isinstance(value, dict):
        return {"type": "string"}
    return {
        "type": "object",
        "required": list(value),
        "properties": {
            name: {"type": ["string", "null"]} if name in ("param", "code") else _like(each)
            for name, each in value.items()
        },
    }
