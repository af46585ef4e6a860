"""Pictures in the bodies of three protocols: what the backend is asked, and what is refused by name."""

from __future__ import annotations

import asyncio
import base64
from dataclasses import replace
from typing import Any

import httpx
import pytest
from openai.types.responses import ResponseInputMessageItem

from puna.gateway.one import OneModel
from puna.gateway.scripted import CARD, ScriptedBackend, encoded
from puna.server.app import create_app
from puna.server.exchange import Exchange
from puna.server.observe import Observatory
from puna.types import Message, Picture

A, B = b"\x89PNG one", b"\x89PNG two"
A64, B64 = (base64.b64encode(each).decode() for each in (A, B))
URL = f"data:image/png;base64,{A64}"


def post(path: str, body: dict[str, Any], *, sees: bool = True) -> tuple[int, dict[str, Any], tuple[Message, ...]]:
    """Status, answer, and the messages that the backend was asked with."""
    backend = ScriptedBackend(card=replace(CARD, sees=sees))

    async def main() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(OneModel(backend)))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.post(path, json={"model": "scripted", "stream": False, **body})

    response = asyncio.run(main())
    asked: Any = backend.requests[0].prompt if backend.requests else ()
    return response.status_code, response.json(), asked


def openai(*parts: Any, role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": list(parts)}]}


def image(url: str = URL, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **more}}


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


CHAT = "/v1/chat/completions"


def test_openai_pictures_stand_where_their_parts_do() -> None:
    status, answer, asked = post(
        CHAT, openai(text("What"), image(), text(" is it?"), image(f"DATA:image/gif;base64,{B64}"))
    )
    assert status == 200, answer
    assert asked == (Message("user", "What is it?", pictures=((4, Picture(A)), (11, Picture(B)))),)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (openai(image("https://example.org/a.png")), "messages.0.content.0.image_url.url"),
        (openai(image("file:///etc/passwd")), "messages.0.content.0.image_url.url"),
        (openai(image("data:image/svg+xml;base64,AAAA")), "messages.0.content.0.image_url.url"),
        (openai(image("data:image/png,AAAA")), "messages.0.content.0.image_url.url"),
        (openai(image("data:image/png;base64,A A=")), "messages.0.content.0.image_url.url"),
        (openai(image("data:image/png;base64,")), "messages.0.content.0.image_url.url"),
        (openai(text("x"), image(URL, detail="low")), "messages.0.content.1.image_url.detail"),
        (openai(image(), role="system"), "messages.0.content.0.type"),
        (openai(*[image()] * 17), "messages"),
    ],
)
def test_openai_refuses_by_name(body: dict[str, Any], param: str) -> None:
    status, answer, asked = post(CHAT, body)
    assert (status, answer["error"]["param"], asked) == (400, param, ())


def responds(*parts: Any, role: str = "user", **more: Any) -> dict[str, Any]:
    return {"input": [{"role": role, "content": list(parts)}], **more}


def shown(url: str = URL, **more: Any) -> dict[str, Any]:
    return {"type": "input_image", "image_url": url, "detail": "auto", **more}


def said(text: str) -> dict[str, Any]:
    return {"type": "input_text", "text": text}


def test_responses_keep_pictures_where_they_stand_and_go_on_from_them() -> None:
    backend = ScriptedBackend(card=replace(CARD, sees=True))

    async def main() -> Any:
        transport = httpx.ASGITransport(create_app(OneModel(backend)))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            first = responds(said("What"), said(" of"), shown(), said(" this?"), shown(f"data:image/gif;base64,{B64}"))
            answer = (await client.post("/v1/responses", json=first)).json()
            items = (await client.get(f"/v1/responses/{answer['id']}/input_items")).json()["data"]
            more = {"input": "And now?", "previous_response_id": answer["id"]}
            assert (await client.post("/v1/responses", json=more)).status_code == 200
            many = responds(*[shown()] * 15, previous_response_id=answer["id"])
            refused = (await client.post("/v1/responses", json=many)).json()
            return items, refused

    items, refused = asyncio.run(main())
    asked = Message("user", "What of this?", pictures=((7, Picture(A)), (13, Picture(B))))
    assert [request.prompt for request in backend.requests] == [
        (asked,), (asked, Message("assistant", "Hello there."), Message("user", "And now?")),
    ]  # fmt: skip
    content = ResponseInputMessageItem.model_validate(items[0], strict=True).content
    assert [part.type for part in content] == ["input_text", "input_image", "input_text", "input_image"]
    assert "17 pictures" in refused["error"]["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (responds(shown("http://example.org/a.png")), "input.0.content.0.image_url"),
        (responds(shown("https://example.org/a.png")), "input.0.content.0.image_url"),
        (responds(said("x"), shown("data:image/png;base64,?")), "input.0.content.1.image_url"),
        (responds(shown(detail="low")), "input.0.content.0.detail"),
        (responds(shown(file_id="file-1")), "input.0.content.0.file_id"),
        (responds({"type": "input_image"}), "input.0.content.0.image_url"),
        (responds(shown(text="x")), "input.0.content.0.text"),
        (responds({**said("x"), "image_url": URL}), "input.0.content.0.image_url"),
        (responds(shown(), role="system"), "input.0.content.0.type"),
        (
            {"input": [{"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
                       {"type": "function_call_output", "call_id": "1", "output": [shown()]}]},
            "input.1.output.0.type",
        ),
    ],
)  # fmt: skip
def test_responses_refuse_by_name(body: dict[str, Any], param: str) -> None:
    status, answer, asked = post("/v1/responses", body)
    assert (status, answer["error"]["param"], asked) == (400, param, ())


def test_logs_say_where_a_picture_was() -> None:
    picture = Picture(A)
    message = Message("user", "One and two.", pictures=((0, picture), (4, picture), (12, picture)))
    assert message.marked == "[picture]One [picture]and two.[picture]"
    assert Message("user", "plain").marked == "plain"
    prompt = bytes(encoded((message,))).decode()
    assert prompt == "user: [picture]One [picture]and two.[picture]\n"
    backend = ScriptedBackend(card=replace(CARD, sees=True))
    seen: list[str] = []

    class Looks(Observatory):
        def exchanged(self, exchange: Exchange) -> None:
            seen.extend(exchange.prompts)

    async def main() -> None:
        transport = httpx.ASGITransport(create_app(OneModel(backend), observatory=Looks(log_prompts=True)))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            await client.post(CHAT, json={"model": "scripted", **openai(text("See "), image(), text(" this"))})

    asyncio.run(main())
    assert seen == ["user: See [picture] this"]


def claude(*blocks: Any) -> dict[str, Any]:
    return {"max_tokens": 5, "messages": [{"role": "user", "content": list(blocks)}]}


def block(data: str, **more: Any) -> dict[str, Any]:
    return {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data, **more}}


def test_anthropics_blocks_are_joined_with_their_pictures() -> None:
    status, answer, asked = post("/v1/messages", claude(block(A64), text("one"), block(B64), text("two")))
    assert status == 200, answer
    assert asked == (Message("user", "one\ntwo", pictures=((0, Picture(A)), (3, Picture(B)))),)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            claude({"type": "image", "source": {"type": "url", "url": "https://example.org/a"}}),
            "messages.0.content.0.source",
        ),
        (claude(block("?")), "messages.0.content.0.source.data"),
        (claude(block(A64, media_type="image/tiff")), "media_type"),
        ({**claude(text("x"), block(A64)), "system": [block(A64)]}, "system.blocks.0"),
    ],
)
def test_anthropic_refuses_by_name(body: dict[str, Any], said: str) -> None:
    status, answer, asked = post("/v1/messages", body)
    assert (status, asked) == (400, ())
    assert said in answer["error"]["message"]


def test_ollamas_images_stand_before_the_text() -> None:
    told = {"messages": [{"role": "user", "content": "What?", "images": [A64, B64]}]}
    status, answer, asked = post("/api/chat", told)
    assert status == 200, answer
    assert asked == (Message("user", "What?", pictures=((0, Picture(A)), (0, Picture(B)))),)
    status, answer, asked = post("/api/generate", {"prompt": "What?", "images": [A64]})
    assert status == 200, answer
    assert asked == (Message("user", "What?", pictures=((0, Picture(A)),)),)
    for path, body, said in (
        ("/api/generate", {"prompt": "What?", "images": ["?"]}, "images.0"),
        ("/api/generate", {"prompt": "What?", "images": [A64], "raw": True}, "raw prompt"),
        ("/api/chat", {"messages": [{"role": "user", "content": "x", "images": ["?"]}]}, "messages.0.images.0"),
    ):
        status, answer, asked = post(path, body)
        assert (status, asked) == (400, ())
        assert said in answer["error"]


def test_a_model_that_does_not_see_says_so() -> None:
    for path, body in (
        (CHAT, openai(image())),
        ("/v1/responses", responds(shown())),
        ("/v1/messages", claude(block(A64))),
        ("/api/chat", {"messages": [{"role": "user", "content": "x", "images": [A64]}]}),
        ("/api/generate", {"prompt": "x", "images": [A64]}),
    ):
        status, answer, asked = post(path, body, sees=False)
        assert (status, asked) == (400, ()), answer
        assert "scripted does not see" in str(answer["error"])


def test_an_answer_that_was_begun_cannot_go_on_after_a_picture() -> None:
    body = {"messages": [*claude(block(A64))["messages"], {"role": "assistant", "content": "It is"}], "max_tokens": 5}
    status, answer, asked = post("/v1/messages", body)
    assert (status, asked) == (400, ())
    assert "after a picture" in answer["error"]["message"]
