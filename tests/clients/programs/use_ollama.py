"""Ollama's own Python client."""

from __future__ import annotations

import json

import ollama
from checks import BASE, CHAT, KEY, URL, check, run

client = ollama.Client(URL, headers={"Authorization": f"Bearer {KEY}"})
HELLO = [{"role": "user", "content": "Say hello."}]


@check("list, show, ps")
def lists() -> None:
    assert {BASE, CHAT} <= {model.model for model in client.list().models}
    assert client.show(CHAT).details.family
    client.generate(BASE, "Once", raw=True, options={"num_predict": 2})
    assert BASE in {model.model for model in client.ps().models}


@check("generate: options, the same text for the same seed, streamed")
def generate() -> None:
    options = {"seed": 5, "num_predict": 12, "temperature": 0.8}
    whole = client.generate(BASE, "Once upon a time", raw=True, options=options)
    pieces = list(client.generate(BASE, "Once upon a time", raw=True, options=options, stream=True))
    assert "".join(piece.response for piece in pieces) == whole.response
    assert pieces[-1].done
    assert pieces[-1].done_reason == "length"
    assert whole.eval_count == 12


@check("chat, streamed and whole; a JSON schema as format; a tool")
def chat() -> None:
    assert client.chat(CHAT, HELLO, options={"num_predict": 4}).done_reason == "length"
    pieces = list(client.chat(CHAT, HELLO, options={"num_predict": 4}, stream=True))
    assert pieces[-1].done
    schema = {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"],
              "additionalProperties": False}  # fmt: skip
    answer = client.chat(CHAT, HELLO, format=schema, options={"num_predict": 100})
    assert json.loads(answer.message.content)["x"] in (1, 2)


@check("embed: one text and several")
def embed() -> None:
    both = client.embed(BASE, ["the dog", "a cat"]).embeddings
    assert len(both) == 2
    alone = client.embed(BASE, "the dog").embeddings[0]
    assert max(abs(a - b) for a, b in zip(alone, both[0], strict=True)) < 1e-6


@check("an unknown model is its ResponseError")
def errors() -> None:
    try:
        client.generate("nobody", "x")
    except ollama.ResponseError as error:
        if error.status_code == 404:
            return
    raise AssertionError("no ResponseError with 404")


run()
