"""What requests' bodies have in common: a field is known and of its type, or the request is refused by its name.

What it is: the base of every body's model, and the words for what pydantic finds wrong in one.
What it is not: a protocol's fields; each protocol has its own beside its routes.
What is surprising: nothing is converted: "1" is no number, and 1.0 no whole one. Clients that rely on such kindness
elsewhere are told here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, model_validator

from puna.server.limits import MAX_BODY
from puna.server.problems import RequestError


def _fail_fast(schema: Any) -> None:
    """Have each list of a schema of pydantic's stop at its first fault."""
    if isinstance(schema, dict):
        if schema.get("type") == "list":
            schema["fail_fast"] = True
        for part in schema.values():
            _fail_fast(part)
    elif isinstance(schema, list | tuple):
        for part in schema:
            _fail_fast(part)


class Body(BaseModel):
    """A JSON object of a request."""

    # A text with a length is looked at by its characters, and half a surrogate pair, which JSON can spell, is none.
    model_config = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=False, str_max_length=MAX_BODY)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> Any:
        """The first wrong entry of a list is enough: only one fault is told, and a million of them take minutes."""
        schema = handler(source)
        _fail_fast(schema)
        return schema


class RequestBody(Body):
    """The whole body of a request: what Python's JSON reader takes and JSON cannot say is refused, wherever it is."""

    @model_validator(mode="before")
    @classmethod
    def _sayable(cls, data: Any) -> Any:
        if isinstance(data, dict):
            try:
                json.dumps(data, ensure_ascii=False, allow_nan=False).encode()
            except UnicodeEncodeError as error:
                why = "A text has half of a surrogate pair, which is no character."
                raise RequestError(why, code="invalid_json") from error
            except (ValueError, RecursionError) as error:
                why = "NaN and Infinity are no JSON, nor are objects within one another without end."
                raise RequestError(why, code="invalid_json") from error
        return data


_PLACES = ("body", "query", "path", "header")
"""Where a value was, which an error names first; a field may be called so too."""

_TYPES = ("str", "int", "float", "bool")
"""Which type was tried, which stands in an error's place without being the name of a field."""


def refusal(errors: Sequence[Any]) -> RequestError:
    """What a client is told of a body (a query, a path) that does not fit: the first thing that is wrong with it."""
    # Unknown names before wrong values; where a field may be of several types, the one that came furthest.
    first = min(errors, key=lambda error: (error["type"] != "extra_forbidden", -len(error["loc"])))
    loc = list(first["loc"])
    if loc and loc[0] in _PLACES:
        del loc[0]
    where = [str(part) for part in loc if part not in _TYPES and "[" not in str(part)]
    name = ".".join(where)[:200]
    if first["type"] == "extra_forbidden":
        return RequestError(
            f"The field {name} is not honoured here.",
            remedy="Leave it out; nothing is ignored in silence.",
            code="unsupported_parameter",
            param=name,
        )
    if first["type"] == "json_invalid":
        return RequestError(
            "The body is not valid JSON.", remedy=str(first.get("ctx", {}).get("error", "")), code="invalid_json"
        )
    what = f"{name}: {first['msg']}." if name else f"{first['msg']}."
    return RequestError(what, status=400, code="invalid_value", param=name or None)
