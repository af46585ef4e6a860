"""Text and tokens over HTTP, in llama-server's shapes and vLLM's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import httpx2
import pytest

from puna.gateway.scripted import CARD, ScriptedBackend, encoded
from puna.server.app import create_app
from puna.types import Message, Prompt, Tool

BOS = 256
CHAT: Any = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hé"}]
TOOL: Any = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


class WithBos(ScriptedBackend):
    """A backend whose texts begin with a token that stands for nothing."""

    tools: Sequence[Tool] = ()

    async def encode(self, prompt: Prompt, *, raw: bool = False, tools: Sequence[Tool] = ()) -> tuple[int, ...]:
        self.tools = tools
        return (BOS, *encoded(prompt))

    async def render(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> str:
        self.tools = tools
        return await super().render(messages, tools)


class Stage:
    def __init__(self, backend: WithBos, url: str) -> None:
        self.backend, self.url = backend, url

    def post(self, path: str, **fields: Any) -> Any:
        response = httpx2.post(f"{self.url}/{path}", json=fields)
        assert response.status_code == 200, response.text
        return response.json()

    def refused(self, path: str, **fields: Any) -> Any:
        response = httpx2.post(f"{self.url}/{path}", json=fields)
        assert response.status_code == 400, response.text
        return response.json()["error"]


@pytest.fixture(scope="module")
def stage(serve_module: Any) -> Stage:
    backend = WithBos(card=replace(CARD, template="{{ t }}", bos_token="<s>", eos_token="</s>"))
    return Stage(backend, serve_module(create_app(backend)))


def test_llama_servers_shape(stage: Stage) -> None:
    assert stage.post("tokenize", content="Hé") == {"tokens": [72, 195, 169]}
    assert stage.post("tokenize", content="H", add_special=True, parse_special=False) == {"tokens": [BOS, 72]}
    assert stage.post("tokenize", content="Hé", with_pieces=True, add_special=True) == {
        "tokens": [
            {"id": BOS, "piece": ""}, {"id": 72, "piece": "H"}, {"id": 195, "piece": [195]},
            {"id": 169, "piece": [169]},
        ]
    }  # fmt: skip
    assert stage.post("tokenize", content="") == {"tokens": []}
    assert stage.post("detokenize", tokens=[72, 195, 169, BOS])["content"] == "Hé"
    assert stage.post("apply-template", messages=CHAT, tools=[TOOL]) == {"prompt": "system: S\nuser: Hé\n"}
    assert stage.backend.tools == (Tool("weather", parameters='{"type": "object"}'),)


def test_vllms_shape(stage: Stage) -> None:
    assert stage.post("tokenize", model="scripted", prompt="Hé") == {
        "count": 4, "max_model_len": 4096, "tokens": [BOS, 72, 195, 169], "token_strs": None,
    }  # fmt: skip
    told = stage.post("tokenize", prompt="Hé", add_special_tokens=False, return_token_strs=True)
    assert (told["tokens"], told["token_strs"]) == ([72, 195, 169], ["H", "\ufffd", "\ufffd"])
    chat = stage.post("tokenize", messages=CHAT, tools=[TOOL])
    assert bytes(chat["tokens"][1:]).decode() == "system: S\nuser: Hé\n"
    assert stage.backend.tools[0].name == "weather"
    begun = [*CHAT, {"role": "assistant", "content": "Yes"}]
    told = stage.post("tokenize", messages=begun, add_generation_prompt=False, continue_final_message=True)
    assert bytes(told["tokens"][1:]).decode() == "system: S\nuser: Hé\nYes"
    assert stage.post("detokenize", model="scripted", tokens=[72])["prompt"] == "H"


def test_what_evaluation_asks_of_a_tokenizer_elsewhere(stage: Stage) -> None:
    info = httpx2.get(f"{stage.url}/tokenizer_info", params={"model": "scripted"}).json()
    assert info == {
        "bos_token": "<s>", "eos_token": "</s>", "pad_token": None, "chat_template": "{{ t }}",
        "model_max_length": 4096, "vocab_size": 257,
    }  # fmt: skip
    assert httpx2.get(f"{stage.url}/tokenizer_info?model=nothing").status_code == 404


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"content": "a", "prompt": "b"}, "prompt"),
        ({"content": "a", "parse_special": True}, "parse_special"),
        ({"content": "a", "add_special_tokens": True}, "add_special_tokens"),
        ({"prompt": "a", "with_pieces": True}, "with_pieces"),
        ({"prompt": "a", "tools": [TOOL]}, "tools"),
        ({"messages": CHAT, "add_special_tokens": True}, "add_special_tokens"),
        ({"messages": CHAT, "chat_template": "{{ x }}"}, "chat_template"),
        ({"messages": CHAT, "chat_template_kwargs": {"a": 1}}, "chat_template_kwargs"),
        ({"messages": CHAT, "add_generation_prompt": False}, "add_generation_prompt"),
        ({"messages": CHAT, "continue_final_message": True}, "add_generation_prompt"),
        ({"messages": CHAT, "continue_final_message": True, "add_generation_prompt": False}, "continue_final_message"),
        ({"content": ["a", 5]}, "content"),
        ({"content": "a", "unheard_of": 1}, "unheard_of"),
    ],
)
def test_refusals_name_their_field(stage: Stage, fields: dict[str, Any], param: str) -> None:
    assert stage.refused("tokenize", **fields)["param"] == param


def test_ids_and_templates_that_are_none(stage: Stage) -> None:
    for wrong in ([-1], [1 << 40], [257], ["a"], [True], "abc", None):
        assert "tokens" in str(stage.refused("detokenize", tokens=wrong)) or wrong == [257]
    assert (
        stage.refused("apply-template", messages=CHAT, add_generation_prompt=False)["param"] == "add_generation_prompt"
    )
    assert stage.refused("apply-template", messages=[])["param"] == "messages"
    stage.backend._card = replace(stage.backend.card, tools=False)
    for path in ("tokenize", "apply-template"):
        assert "no form for tools" in stage.refused(path, messages=CHAT, tools=[TOOL])["message"]


def test_half_a_surrogate_pair_is_refused_everywhere(stage: Stage) -> None:
    half: Any = "\ud800"
    said = [{"role": "user", "content": half}]
    call = {"type": "tool_use", "id": "a", "name": "b", "input": {"x": half}}
    bodies = {
        "tokenize": {"prompt": half}, "rerank": {"query": half, "documents": ["a"]},
        "api/embed": {"model": half, "input": "a"},
        "api/generate": {"model": "scripted", "prompt": half}, "api/chat": {"model": "scripted", "messages": said},
        "v1/messages": {"model": "scripted", "max_tokens": 1, "messages": [{"role": "assistant", "content": [call]}]},
    }  # fmt: skip
    for path, body in bodies.items():
        response = httpx2.post(
            f"{stage.url}/{path}", content=json.dumps(body), headers={"content-type": "application/json"}
        )
        assert response.status_code == 400, (path, response.text)
