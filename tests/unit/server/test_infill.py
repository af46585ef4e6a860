"""Filling in the middle is refused, and a wrong body before that."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest

from puna.gateway.scripted import ScriptedBackend
from puna.server.app import create_app


@pytest.fixture(scope="module")
def url(serve_module: Any) -> str:
    return str(serve_module(create_app(ScriptedBackend())))


LLAMA: Any = {
    "input_prefix": "def f(", "input_suffix": "\n", "input_extra": [{"filename": "a.py", "text": "x"}], "prompt": "a",
    "n_predict": 128, "n_indent": 0, "top_k": 40, "top_p": 0.99, "stream": False, "cache_prompt": True, "stop": [],
    "samplers": ["top_k", "top_p", "infill"], "t_max_prompt_ms": 500, "t_max_predict_ms": 1000, "id_slot": 0,
    "response_fields": ["content"],
}  # fmt: skip
MISTRAL: Any = {
    "model": "scripted", "prompt": "def f(", "suffix": "return", "max_tokens": 64, "temperature": 0.2, "top_p": 1,
    "min_tokens": 1, "stop": ["\n\n"], "stream": True, "random_seed": 1,
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
