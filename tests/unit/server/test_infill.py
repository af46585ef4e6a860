"""Filling in the middle: the protocols of editors, over a script; a model that was not trained for it is refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import httpx2
import pytest
from openai import OpenAI

from puna.gateway.scripted import CARD, ScriptedBackend, saying
from puna.server.app import create_app
from puna.server.infill import SNIPPET, Lines
from puna.types import Event, Infill, Request

FILLS = replace(CARD, infills=True)


@pytest.fixture(scope="module")
def url(serve_module: Any) -> str:
    return str(serve_module(create_app(ScriptedBackend())))


LLAMA: Any = {
    "input_prefix": "def f(", "input_suffix": "\n",
    "input_extra": [{"filename": "a.py", "text": "x", "time": [1, 2]}], "prompt": "a",
    "n_predict": 128, "n_indent": 0, "top_k": 40, "top_p": 0.99, "stream": False, "cache_prompt": True, "stop": [],
    "samplers": ["top_k", "top_p", "infill"], "t_max_prompt_ms": 500, "t_max_predict_ms": 1000, "id_slot": 0,
    "response_fields": ["content", "timings/prompt_n", "timings/nothing", "truncated"],
}  # fmt: skip
MISTRAL: Any = {
    "model": "scripted", "prompt": "def f(", "suffix": "return", "max_tokens": 64, "temperature": 0.2, "top_p": 1,
    "min_tokens": 1, "stop": ["\n\n"], "random_seed": 1,
}  # fmt: skip


@pytest.mark.parametrize(("path", "body"), [("infill", LLAMA), ("v1/fim/completions", MISTRAL)])
def test_what_clients_send_is_read_and_refused(url: str, path: str, body: Any) -> None:
    response = httpx2.post(f"{url}/{path}", json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_model", "model")
    assert "cannot fill in the middle" in error["message"]
    assert httpx2.post(f"{url}/{path}", json=body | {"model": "nothing"}).status_code == 404
    for field, value in {"unheard_of": 1, "prompt": 5, "temperature": "hot"}.items():
        wrong = httpx2.post(f"{url}/{path}", json=body | {field: value})
        assert wrong.status_code == 400
        assert wrong.json()["error"]["param"] == field
    needed = "input_prefix" if "input_prefix" in body else "prompt"
    less = {name: value for name, value in body.items() if name != needed}
    assert httpx2.post(f"{url}/{path}", json=less).json()["error"]["param"] == needed


@pytest.mark.parametrize(("path", "body"), [("v1/completions", {"prompt": "a"}), ("api/generate", {"prompt": "a"})])
def test_a_suffix_is_refused_by_a_model_that_fills_no_gap(url: str, path: str, body: Any) -> None:
    response = httpx2.post(f"{url}/{path}", json=body | {"model": "scripted", "suffix": "b", "stream": False})
    assert response.status_code == 400
    assert "was not trained to fill in the middle" in response.text
    assert httpx2.post(f"{url}/{path}", json=body | {"model": "scripted", "suffix": ""}).status_code == 200


def test_llama_servers_protocol(serve: Any) -> None:
    backend = ScriptedBackend(saying("x: int", ") -> int:\n", "    return x"), FILLS)
    at = serve(create_app(backend))
    told = httpx2.post(f"{at}/infill", json=LLAMA).json()
    prompt = len(SNIPPET + "x" + "def f(" + "a" + "\n")
    assert told == {"content": "x: int) -> int:\n    return x", "timings/prompt_n": prompt, "truncated": False}
    asked = backend.requests[-1]
    assert asked.prompt == Infill(SNIPPET + "xdef f(a", "\n")
    sampling = asked.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0, 40, 0.99, 0)
    plain = {"input_prefix": "a", "input_suffix": "b"}
    whole = httpx2.post(f"{at}/infill", json=plain).json()
    assert (whole["stop_type"], whole["stop"], whole["has_new_line"], whole["tokens_predicted"]) == (
        "eos",
        True,
        True,
        28,
    )
    sampling = backend.requests[-1].sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.8, 40, 0.95, 0.05)
    assert sampling.max_tokens is None
    nothing = httpx2.post(f"{at}/infill", json=plain | {"n_predict": 0}).json()
    assert (nothing["content"], nothing["tokens_predicted"], nothing["stop_type"]) == ("", 0, "limit")
    short = httpx2.post(f"{at}/infill", json=plain | {"n_predict": 3}).json()
    assert (short["content"], short["stop_type"]) == ("x: ", "limit")
    assert (
        httpx2.post(f"{at}/infill", json=plain | {"n_indent": 4}).json()["content"] == "x: int) -> int:\n    return x"
    )
    for field, value in {"n_probs": 3, "cache_prompt": False, "samplers": ["mirostat"], "n_indent": -1}.items():
        wrong = httpx2.post(f"{at}/infill", json=plain | {field: value})
        assert (wrong.status_code, wrong.json()["error"]["param"].split(".")[0]) == (400, field)


def test_llama_servers_stream(serve: Any) -> None:
    at = serve(create_app(ScriptedBackend(saying("one", " two"), FILLS)))
    body = {"input_prefix": "a", "input_suffix": "b", "stream": True}
    with httpx2.stream("POST", f"{at}/infill", json=body) as response:
        events = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: ")]
    assert "".join(event["content"] for event in events) == "one two"
    assert [event["stop"] for event in events] == [False] * (len(events) - 1) + [True]


def test_a_line_that_comes_late_ends_the_answer(serve: Any) -> None:
    async def script(request: Request) -> AsyncGenerator[Event]:
        yield Event(text="a", token_ids=(1,), prefilled=2)
        await asyncio.sleep(0.01)
        yield Event(text="b\n", token_ids=(2,))
        await asyncio.Event().wait()

    backend = ScriptedBackend(script, FILLS)
    at = serve(create_app(backend))
    body = {"input_prefix": "a", "input_suffix": "b", "t_max_predict_ms": 5}
    told = httpx2.post(f"{at}/infill", json=body).json()
    assert (told["content"], told["stop_type"], told["tokens_predicted"]) == ("ab\n", "limit", 2)
    assert backend.running == 0


def test_lines() -> None:
    for pieces in (["a\n    b\n  c"], [*"a\n    b\n  c"]):
        lines = Lines(4)
        assert "".join(lines.push(piece) for piece in pieces) == "a\n    b\n  "
        assert lines.ended
    assert Lines(1).push("x\n\ny") == "x\n"
    assert Lines(0).push("x\ny") == "x\ny"


def test_mistrals_protocol(serve: Any) -> None:
    backend = ScriptedBackend(saying("x", "):"), FILLS)
    at = serve(create_app(backend))
    told = httpx2.post(f"{at}/v1/fim/completions", json=MISTRAL).json()
    assert told["object"] == "chat.completion"
    assert told["choices"][0]["message"] == {"role": "assistant", "content": "x):"}
    assert (told["choices"][0]["finish_reason"], told["usage"]["completion_tokens"]) == ("stop", 3)
    assert backend.requests[-1].prompt == Infill("def f(", "return")
    with httpx2.stream("POST", f"{at}/v1/fim/completions", json=MISTRAL | {"stream": True}) as response:
        lines = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line)["choices"][0] for line in lines[:-1]]
    assert "".join(chunk["delta"]["content"] for chunk in chunks) == "x):"
    assert [chunk["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]


def test_openais_and_ollamas_suffix(serve: Any) -> None:
    backend = ScriptedBackend(saying("middle"), FILLS)
    at = serve(create_app(backend))
    with OpenAI(base_url=f"{at}/v1", api_key="none", max_retries=0) as client:
        answer = client.completions.create(model="scripted", prompt="a", suffix="b")
        assert answer.choices[0].text == "middle"
        assert backend.requests[-1].prompt == Infill("a", "b")
    for wrong, param in (({"echo": True}, "echo"), ({"prompt": [1, 2]}, "prompt")):
        refused = httpx2.post(f"{at}/v1/completions", json={"prompt": "a", "suffix": "b"} | wrong)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
    body = {"model": "scripted", "prompt": "c", "suffix": "d", "stream": False}
    assert httpx2.post(f"{at}/api/generate", json=body).json()["response"] == "middle"
    assert backend.requests[-1].prompt == Infill("c", "d")
    refused = httpx2.post(f"{at}/api/generate", json=body | {"system": "Be brief."})
    assert (refused.status_code, "suffix takes the prompt as it is" in refused.text) == (400, True)
    assert httpx2.post(f"{at}/api/chat", json={"model": "scripted", "suffix": "x"}).status_code == 400
    shown = httpx2.post(f"{at}/api/show", json={"model": "scripted"}).json()
    assert shown["capabilities"] == ["completion", "tools", "insert"]


@pytest.mark.parametrize("path", ["infill", "v1/fim/completions"])
def test_a_stream_that_fails_in_the_middle_says_so(serve: Any, path: str) -> None:
    async def script(request: Request) -> AsyncGenerator[Event]:
        yield Event(text="a", token_ids=(1,))
        raise RuntimeError("no word of this")

    at = serve(create_app(ScriptedBackend(script, FILLS)))
    body = {"input_prefix": "a", "input_suffix": "b"} if path == "infill" else {"prompt": "a"}
    with httpx2.stream("POST", f"{at}/{path}", json=body | {"stream": True}) as response:
        events = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: ")]
    assert events[-1]["error"]["type"] == "server_error"
    assert "no word" not in json.dumps(events)
