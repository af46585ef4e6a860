"""Schemas in the style of tool definitions: written by hand, and generated from a seed.

What it is: `handwritten()`, what people and libraries (pydantic, zod) send as the parameters of a tool, and
`generated(count, seed)`, random ones built of the same pieces.
What it is not: a list of what is supported: some of these are refused, and the tests say that they may be.
"""

from __future__ import annotations

import random
from typing import Any

Schema = dict[str, Any]


def handwritten() -> list[Schema]:
    text, whole, number, flag = ({"type": kind} for kind in ("string", "integer", "number", "boolean"))

    def tool(required: list[str] | None = None, **properties: Any) -> Schema:
        needed = list(properties) if required is None else required
        return {"type": "object", "properties": properties, "required": needed, "additionalProperties": False}

    weather = tool(location=text | {"description": "City, e.g. Oslo"}, unit={"type": "string", "enum": ["C", "F"]})
    point = tool(x=number, y=number)
    return [
        weather,
        tool(["location"], **weather["properties"]),
        {"type": "object", "properties": {}},
        {"type": "object", "properties": {}, "additionalProperties": False},
        tool(
            query=text | {"minLength": 1, "maxLength": 40}, limit=whole | {"minimum": 1, "maximum": 50, "default": 10}
        ),
        tool(path={"type": "string", "pattern": "^/[a-z]+(/[a-z]+)*$"}, recursive=flag),
        tool(
            to={"type": "array", "items": {"type": "string", "format": "email"}, "minItems": 1}, subject=text, body=text
        ),
        tool(start={"type": "string", "format": "date-time"}, end={"type": "string", "format": "date"}, all_day=flag),
        tool(id={"type": "string", "format": "uuid"}, at={"type": "string", "format": "time"}),
        tool(
            url={"type": "string", "format": "uri"}, method={"enum": ["GET", "POST"]}, timeout=number | {"minimum": 0}
        ),
        tool(host={"type": "string", "format": "hostname"}, ip={"type": "string", "format": "ipv4"}),
        tool(ip={"type": "string", "format": "ipv6"}, wait={"type": "string", "format": "duration"}),
        tool(a=point, b={"type": ["object", "null"], **{k: v for k, v in point.items() if k != "type"}}),
        tool(price=number | {"multipleOf": 0.01, "minimum": 0, "maximum": 999.99}, count=whole | {"multipleOf": 5}),
        tool(value={"anyOf": [text, number, {"type": "null"}], "title": "Value"}),
        tool(shape={"oneOf": [tool(kind={"const": "circle"}, r=number), tool(kind={"const": "box"}, w=number)]}),
        {"$ref": "#/$defs/P", "$defs": {"P": tool(p={"$ref": "#/$defs/Q"}), "Q": point}},
        {"$defs": {"N": tool(["v"], v=whole, next={"$ref": "#/$defs/N"})}, "$ref": "#/$defs/N"},
        {"definitions": {"T": tool(["name"], name=text, kids={"type": "array", "items": {"$ref": "#/definitions/T"}})}}
        | {"$ref": "#/definitions/T"},
        tool(tags={"type": "array", "items": {"type": "string", "enum": ["a", "b", "c"]}, "maxItems": 3}),
        tool(tags={"type": "array", "items": text, "uniqueItems": True}),
        tool(pair={"type": "array", "prefixItems": [text, whole], "items": False, "minItems": 2}),
        tool(pair={"type": "array", "items": [text, whole], "additionalItems": False})
        | {"$schema": "http://json-schema.org/draft-07/schema#"},
        tool(meta={"type": "object", "additionalProperties": text}),
        tool(meta={"type": "object", "additionalProperties": {"type": "number"}, "minProperties": 1}),
        tool(env={"type": "object", "patternProperties": {"^[A-Z_]+$": text}, "additionalProperties": False}),
        {"allOf": [{"type": "object", "properties": {"a": text}, "required": ["a"]}, {"properties": {"b": whole}}]},
        tool(
            level={"type": "integer", "enum": [1, 2, 3]}, ratio={"const": 0.5}, on={"const": True}, none={"const": None}
        ),
        tool(config={"const": {"a": [1, "x", None], "b": {"c": 2.5}}}),
        tool(code={"type": "string", "pattern": "^\\d{3}-\\w+$", "maxLength": 12}),
        tool(text={"type": "string", "pattern": "^(?!foo)"}),
        tool(x=number | {"exclusiveMinimum": 0, "exclusiveMaximum": 1}, y=whole | {"minimum": -5, "maximum": -1}),
        tool(**{"é": text, "a b": whole, 'quote"d': flag, "tab\t": number, "": text}),
        {"$schema": "http://json-schema.org/draft-07/schema#", "$id": "https://example.com/t.json", **weather},
        {"title": "Args", "type": "object", "properties": {"x": {"title": "X", "type": "integer"}}, "required": ["x"]},
        {"type": "array", "items": weather, "minItems": 1, "maxItems": 2},
        {"enum": ["red", "green", 3, None, True]},
        tool(n={"type": ["integer", "null"], "default": None}, s={"type": ["string", "number"]}),
        tool(payload={}),
        tool(payload=True),
        tool(a=text) | {"if": {"properties": {"a": {"const": "x"}}}, "then": {"required": ["b"]}},
        tool(a={"type": "string", "nullable": True}),
        tool(a={"type": "string", "format": "binary"}),
        tool(a=text, b=text) | {"dependentRequired": {"a": ["b"]}},
        tool(a={"not": {"type": "null"}}),
        tool(["a", "missing"], a=text) | {"additionalProperties": True},
    ]


def generated(count: int, seed: int = 0) -> list[Schema]:
    draw = random.Random(seed)
    return [_object(draw, 0) for _ in range(count)]


_NAMES = ("id", "name", "query", "value", "items", "start_date", "is_active", "maxResults", "größe", "a-b", "x", "type")


def _object(draw: random.Random, depth: int) -> Schema:
    names = draw.sample(_NAMES, draw.randrange(0 if depth else 1, 6))
    schema: Schema = {"type": "object", "properties": {name: _any(draw, depth + 1) for name in names}}
    if draw.random() < 0.8:
        schema["required"] = [name for name in names if draw.random() < 0.6]
    if draw.random() < 0.6:
        schema["additionalProperties"] = False
    elif draw.random() < 0.3:
        schema["additionalProperties"] = _any(draw, depth + 2)
    if draw.random() < 0.1:
        schema["patternProperties"] = {draw.choice(["^x-", "^i", "a"]): _any(draw, depth + 2)}
    if draw.random() < 0.1:
        schema["maxProperties"] = draw.randrange(1, 5)
    if draw.random() < 0.1:
        schema["minProperties"] = draw.randrange(0, 3)
    if draw.random() < 0.15 and depth < 3:
        schema["allOf"] = [_object(draw, depth + 1) for _ in range(draw.randrange(1, 3))]
    if draw.random() < 0.1:
        schema["description"] = "What it is."
    if draw.random() < 0.3:  # the order of keywords says in which order keys are written
        schema = dict(draw.sample(list(schema.items()), len(schema)))
    return schema


def _any(draw: random.Random, depth: int) -> Schema:
    kinds = [_text, _text, _number, _number, _flag, _choice]
    if depth < 4:
        kinds += [_object, _array, _union, _array]
    return draw.choice(kinds)(draw, depth)


def _text(draw: random.Random, depth: int) -> Schema:
    schema: Schema = {"type": "string"}
    if draw.random() < 0.3:
        schema["minLength"] = draw.randrange(3)
        schema["maxLength"] = draw.randrange(2, 9)
    if draw.random() < 0.2:
        schema["pattern"] = draw.choice(
            ["^[a-z]+$", "^\\d{4}$", "^(a|b)*c?$", "^[^\\s]{1,5}$", "\\.(png|jpe?g)$", "^.{2,4}$", "^\\u00e9+$"]
        )
    elif draw.random() < 0.2:
        schema["format"] = draw.choice(["date", "date-time", "time", "email", "uuid", "uri", "ipv4", "duration", "hex"])
    return schema


def _number(draw: random.Random, depth: int) -> Schema:
    schema: Schema = {"type": draw.choice(["integer", "number"])}
    whole = schema["type"] == "integer"
    low = draw.randrange(-200, 200) if whole else round(draw.uniform(-200, 200), draw.randrange(4))
    if draw.random() < 0.4:
        schema[draw.choice(["minimum", "exclusiveMinimum"])] = low
    if draw.random() < 0.4:
        schema[draw.choice(["maximum", "exclusiveMaximum"])] = low + (draw.randrange(1, 300) if whole else 12.5)
    if draw.random() < 0.15:
        schema["multipleOf"] = draw.choice([1, 2, 3, 10] if whole else [0.01, 0.1, 0.5, 0.25, 2])
    return schema


def _flag(draw: random.Random, depth: int) -> Schema:
    return {"type": draw.choice(["boolean", "boolean", "null"])}


def _choice(draw: random.Random, depth: int) -> Schema:
    values = ["low", "high", "größer", 'say "hi"', "a\nb", 1, -2, 2.5, True, None, [1, 2], {"k": "v"}, ""]
    if draw.random() < 0.3:
        return {"const": draw.choice(values)}
    return {"enum": draw.sample(values, draw.randrange(1, 5))}


def _array(draw: random.Random, depth: int) -> Schema:
    schema: Schema = {"type": "array", "items": _any(draw, depth + 1)}
    if draw.random() < 0.4:
        schema["minItems"] = draw.randrange(3)
    if draw.random() < 0.5:
        schema["maxItems"] = draw.randrange(2, 5)
    if draw.random() < 0.1:
        schema["prefixItems"] = [_any(draw, depth + 1)]
    if draw.random() < 0.1:
        schema["uniqueItems"] = True
    return schema


def _union(draw: random.Random, depth: int) -> Schema:
    key = draw.choice(["anyOf", "anyOf", "oneOf", "allOf"])
    branches: list[Schema] = [_any(draw, depth + 1) for _ in range(draw.randrange(1, 4))]
    return {key: branches}
