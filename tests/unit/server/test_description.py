"""What /openapi.json says, held to what routes do; schemathesis takes it at its word in `tests/clients`."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx2

from puna.gateway.scripted import ScriptedBackend
from puna.server.app import create_app

METHODS = {"get", "post", "delete"}


def operations() -> list[tuple[str, str, dict[str, Any]]]:
    paths = create_app(ScriptedBackend()).openapi()["paths"]
    return [(path, method, told) for path, methods in paths.items() for method, told in methods.items()]


def test_every_route_says_what_the_door_may_answer_and_none_a_422() -> None:
    every = operations()
    assert len(every) > 40
    for path, method, told in every:
        assert method in METHODS
        assert {"400", "401", "403", "413", "415", "429", "500", "503"} <= told["responses"].keys(), path
        assert "422" not in told["responses"], path
    schemas = create_app(ScriptedBackend()).openapi()["components"]["schemas"]
    assert "HTTPValidationError" not in schemas
    error = dict(every[0][2]["responses"]["415"]["content"]["application/json"]["schema"])
    assert error["required"] == ["error"]


def test_streams_are_described() -> None:
    streams = {
        path: [kind for kind in told["responses"].get("200", {}).get("content", {}) if kind != "application/json"]
        for path, _, told in operations()
    }
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"):
        assert streams[path] == ["text/event-stream"]
    for path in ("/api/chat", "/api/generate", "/api/pull"):
        assert streams[path] == ["application/x-ndjson"]


def test_what_is_refused_may_only_have_the_values_that_ask_for_nothing() -> None:
    schemas = create_app(ScriptedBackend()).openapi()["components"]["schemas"]
    assert schemas["ResponseBody"]["properties"]["truncation"]["enum"] == [None, "disabled"]
    assert schemas["MessagesBody"]["properties"]["container"]["enum"] == [None, False, [], {}, ""]
    assert schemas["RerankBody"]["properties"]["rank_fields"]["description"].startswith("Not honoured: ")


def test_a_body_that_cannot_be_read_is_said_to_be_no_json() -> None:
    async def main() -> None:
        transport = httpx2.ASGITransport(create_app(ScriptedBackend()))
        async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
            for body in (b"\xff", b'{"n": ' + b"1" * 5000 + b"}", b'{"messages": '):
                for path in ("/v1/chat/completions", "/v1/messages", "/api/chat"):
                    answer = await http.post(path, content=body, headers={"content-type": "application/json"})
                    assert answer.status_code == 400
                    assert "The body is not valid JSON" in answer.text

    asyncio.run(main())
