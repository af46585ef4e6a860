"""Completions, embeddings and moderations through OpenAI's own client, over a socket."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

import httpx2
import numpy as np
import pytest
from fastapi import FastAPI
from openai import BadRequestError, OpenAI
from openai.types import Completion, CreateEmbeddingResponse

from puna import LLM
from puna.gateway.local import LocalBackend
from puna.gateway.scripted import encoded
from puna.server.app import create_app
from puna.types import Event, Request, TokenLogprob, Usage


def looking(request: Request) -> AsyncGenerator[Event]:
    """Says its prompt backwards; the log probability of a prompt's token is -its place, of an answer's -0.5."""

    async def script() -> AsyncGenerator[Event]:
        prompt, sampling = encoded(request.prompt), request.sampling
        if sampling.prompt_logprobs is not None:
            told = tuple(TokenLogprob(token, -float(i), ((65, -0.1),)) for i, token in enumerate(prompt) if i)
            yield Event(prompt_logprobs=told, prefilled=len(prompt))
        answer = prompt[::-1][: sampling.max_tokens]
        for choice in range(sampling.n):
            for token in answer:
                logprobs = () if sampling.logprobs is None else (TokenLogprob(token, -0.5, ((65, -0.1),)),)
                yield Event(choice, bytes([token]).decode(), (token,), logprobs)
            usage = Usage(len(prompt), 1, sampling.n * len(answer)) if choice == sampling.n - 1 else None
            yield Event(choice, finish="length", usage=usage)

    return script()


def test_a_completion(talk: Any, strictly: Any) -> None:
    client, backend = talk()
    raw = client.completions.with_raw_response.create(model="scripted", prompt="Once")
    strictly(Completion, json.loads(raw.content))
    answer = raw.parse()
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("Hello there.", "stop")
    assert answer.usage.total_tokens == 4 + 12
    request = backend.requests[0]
    assert (request.prompt, request.raw) == ("Once", True)
    assert (request.sampling.max_tokens, request.sampling.temperature, request.sampling.top_p) == (16, 1.0, 1.0)


def test_several_prompts_of_every_kind_are_answered_in_order(talk: Any) -> None:
    client, backend = talk(looking)
    answer = client.completions.create(model="scripted", prompt=["abc", "de"], n=2)
    assert [(one.index, one.text) for one in answer.choices] == [(0, "cba"), (1, "cba"), (2, "ed"), (3, "ed")]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 10)
    assert answer.usage.prompt_tokens_details.cached_tokens == 2
    answer = client.completions.create(model="scripted", prompt=[[97, 98], [99]])
    assert [one.text for one in answer.choices] == ["ba", "c"]
    answer = client.completions.create(model="scripted", prompt=[97, 98])
    assert [one.text for one in answer.choices] == ["ba"]
    assert backend.requests[-1].prompt == (97, 98)


def test_prompts_of_one_request_are_under_way_together(talk: Any) -> None:
    met = asyncio.Barrier(2)

    async def script(request: Request) -> AsyncGenerator[Event]:
        await met.wait()
        yield Event(text=str(request.prompt), finish="stop", usage=Usage(1, 0, 1))

    client, _ = talk(script)
    answer = client.completions.create(model="scripted", prompt=["a", "b"])
    assert [one.text for one in answer.choices] == ["a", "b"]


def test_echo_with_log_probabilities_as_evaluation_asks_for_them(talk: Any) -> None:
    client, backend = talk(looking)
    for prompt in ("xyz", [120, 121, 122]):
        (one,) = client.completions.create(model="scripted", prompt=prompt, echo=True, logprobs=1, max_tokens=1).choices
        assert one.text == "xyzz"
        assert one.logprobs.tokens == ["x", "y", "z", "z"]
        assert one.logprobs.token_logprobs == [None, -1.0, -2.0, -0.5]
        assert one.logprobs.top_logprobs == [
            None,
            {"A": -0.1, "y": -1.0},
            {"A": -0.1, "z": -2.0},
            {"A": -0.1, "z": -0.5},
        ]
        assert one.logprobs.text_offset == [0, 1, 2, 3]
        assert backend.requests[-1].prompt == (120, 121, 122)
        (one,) = (
            answer := client.completions.create(model="scripted", prompt=prompt, echo=True, logprobs=1, max_tokens=0)
        ).choices
        assert (one.text, one.logprobs.token_logprobs, one.finish_reason) == ("xyz", [None, -1.0, -2.0], "length")
        assert answer.usage.completion_tokens == 0
    (one,) = client.completions.create(model="scripted", prompt="xyz", echo=True, max_tokens=1).choices
    assert (one.text, one.logprobs) == ("xyzz", None)


def test_tokens_that_are_no_characters_have_names_of_their_own(talk: Any) -> None:
    parts = [TokenLogprob(byte, -1.0, ((0xC3, -0.5), (0xC2, -0.7))) for byte in "é".encode()]

    async def script(request: Request) -> AsyncGenerator[Event]:
        yield Event(text="é!", logprobs=(*parts, TokenLogprob(33, -0.0)))
        yield Event(finish="stop", usage=Usage(1, 0, 3))

    client, _ = talk(script)
    told = client.completions.create(model="scripted", prompt="x", logprobs=2).choices[0].logprobs
    assert told.tokens == ["bytes:\\xc3", "bytes:\\xa9", "!"]
    assert told.text_offset == [0, 0, 1]
    assert told.top_logprobs[0] == {"bytes:\\xc3": -0.5, "bytes:\\xc2": -0.7}


def test_streams(talk: Any) -> None:
    client, _ = talk(looking)
    texts: dict[int, str] = {}
    ends: dict[int, str] = {}
    told: dict[int, list[Any]] = {}
    usage = None
    for chunk in client.completions.create(
        model="scripted",
        prompt=["abc", "de"],
        n=2,
        stream=True,
        echo=True,
        logprobs=0,
        stream_options={"include_usage": True},
    ):
        usage = chunk.usage or usage
        for one in chunk.choices:
            texts[one.index] = texts.get(one.index, "") + one.text
            told[one.index] = told.get(one.index, []) + one.logprobs.token_logprobs
            if one.finish_reason:
                ends[one.index] = one.finish_reason
    assert texts == {0: "abccba", 1: "abccba", 2: "deed", 3: "deed"}
    assert told[0] == [None, -1.0, -2.0, -0.5, -0.5, -0.5]
    assert told[3] == [None, -1.0, -0.5, -0.5]
    assert set(ends.values()) == {"length"}
    assert (usage.prompt_tokens, usage.completion_tokens) == (5, 10)
    with httpx2.stream(
        "POST", f"{client.base_url}completions", json={"prompt": "ab", "stream": True, "echo": True, "max_tokens": 0}
    ) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    assert "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1]) == "ab"
    assert json.loads(lines[-2])["choices"][0]["finish_reason"] == "length"


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"suffix": "x"}, "suffix"),
    ({"best_of": 2, "stream": True}, "best_of"),
    ({"best_of": 17}, "best_of"),
    ({"n": 2, "best_of": 1}, "best_of"),
    ({"logprobs": 21}, "logprobs"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": ["x"] * 2049}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"stream_options": {}}, "stream_options"),
    ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "text", "json_schema": {"name": "x", "schema": {}}}}, "response_format.json_schema"),
    ({"response_format": {"type": "regex"}}, "response_format.type"),
    ({"nonsense": 1}, "nonsense"),
    ({"messages": []}, "messages"),
]


def test_what_is_not_honoured_is_refused_by_its_name(talk: Any) -> None:
    client, backend = talk()
    with httpx2.Client(base_url=str(client.base_url)) as http:
        for fields, name in REFUSED:
            response = http.post("completions", json={"prompt": "x", **fields})
            assert response.status_code == 400, (fields, response.text)
            assert response.json()["error"]["param"].startswith(name), (fields, response.text)
        for fields, name in (
            ({"input": []}, "input"),
            ({"input": [""]}, "input"),
            ({"input": [[-1]]}, "input"),
            ({"dimensions": 7}, "dimensions"),
            ({"encoding_format": "int8"}, "encoding_format"),
        ):
            response = http.post("embeddings", json={"input": "x", **fields})
            assert response.status_code == 400, (fields, response.text)
            assert response.json()["error"]["param"].startswith(name), (fields, response.text)
    assert backend.requests == []


def test_best_of_and_stops_arrive(talk: Any) -> None:
    client, backend = talk(looking)
    client.completions.create(model="scripted", prompt="x", best_of=3, stop="a", extra_body={"typical_p": 0.5})
    sampling = backend.requests[0].sampling
    assert (sampling.n, sampling.best_of, sampling.stop, sampling.typical_p) == (1, 3, ("a",), 0.5)


def test_embeddings(talk: Any, strictly: Any) -> None:
    client, _ = talk()
    raw = client.embeddings.with_raw_response.create(model="scripted", input="aab", encoding_format="float")
    strictly(CreateEmbeddingResponse, json.loads(raw.content))
    want = [0.0, 2 / math.sqrt(5), 1 / math.sqrt(5), 0.0, 0.0, 0.0, 0.0, 0.0]
    assert raw.parse().data[0].embedding == want
    made = client.embeddings.create(model="scripted", input=["aab", "c"], dimensions=8)  # in base64, unseen
    assert [one.index for one in made.data] == [0, 1]
    np.testing.assert_allclose(made.data[0].embedding, want, rtol=1e-6)
    assert made.usage.prompt_tokens == made.usage.total_tokens == 4
    assert len(client.embeddings.create(model="scripted", input=[[97], [98]]).data) == 2
    assert len(client.embeddings.create(model="scripted", input=[97, 98]).data) == 1


def test_moderations_say_why_not(talk: Any) -> None:
    client, _ = talk()
    with pytest.raises(BadRequestError, match="No guard model"):
        client.moderations.create(input="x")


@pytest.fixture(scope="module")
def cria(serve_module: Callable[[FastAPI], str]) -> Iterator[tuple[OpenAI, LLM]]:
    """A client of the embedded model, and the same model beside it."""
    with OpenAI(
        base_url=f"{serve_module(create_app(LocalBackend(LLM('cria'))))}/v1", api_key="x", max_retries=0
    ) as client:
        yield client, LLM("cria")


def test_a_real_model_says_what_it_says_alone(cria: tuple[OpenAI, LLM]) -> None:
    client, llm = cria
    prompts = ["Once upon a time", "The dog"]
    want = [llm.generate(prompt, temperature=0, max_tokens=20).text for prompt in prompts]
    made = client.completions.create(model="cria", prompt=prompts, temperature=0, max_tokens=20)
    assert [one.text for one in made.choices] == want
    texts = ["", ""]
    for chunk in client.completions.create(model="cria", prompt=prompts, temperature=0, max_tokens=20, stream=True):
        for one in chunk.choices:
            texts[one.index] += one.text
    assert texts == want
    drawn = llm.generate(prompts[0], temperature=0.9, top_p=1.0, seed=7, max_tokens=12).text
    made = client.completions.create(model="cria", prompt=prompts[0], temperature=0.9, seed=7, max_tokens=12)
    assert made.choices[0].text == drawn


def test_a_real_model_continues_in_a_form(cria: tuple[OpenAI, LLM]) -> None:
    client, _ = cria
    schema = {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    made = client.completions.create(
        model="cria", prompt="Once", max_tokens=60, n=2, extra_body={"response_format": form}
    )
    assert {json.loads(one.text)["x"] for one in made.choices} <= {1, 2}
    made = client.completions.create(
        model="cria", prompt="Once", max_tokens=200, seed=1, extra_body={"response_format": {"type": "json_object"}}
    )
    assert made.choices[0].text.lstrip().startswith("{")


def test_a_real_models_echo_scores_as_the_model_does(cria: tuple[OpenAI, LLM]) -> None:
    client, llm = cria
    prompt, answer = "Once upon a time", ", there was a dog"
    ids, whole = llm.encode(prompt), llm.encode(prompt + answer)
    assert whole[: len(ids)] == ids
    (score,) = llm.score(ids, [tuple(whole[len(ids) :])])
    for given in (whole, prompt + answer):
        (one,) = client.completions.create(
            model="cria", prompt=given, echo=True, logprobs=1, max_tokens=0, temperature=0
        ).choices
        told = one.logprobs.token_logprobs[len(ids) :]
        # A prompt computed in other chunks differs in the third digit.
        np.testing.assert_allclose(told, [token.logprob for token in score.tokens], atol=5e-3)
        tops = one.logprobs.top_logprobs[len(ids) :]
        assert score.greedy == all(value == max(top.values()) for value, top in zip(told, tops, strict=True))
        assert one.text == prompt + answer
        assert len(one.logprobs.tokens) == len(whole)
        offsets = one.logprobs.text_offset
        for i, token in enumerate(one.logprobs.tokens[2:], 2):
            assert one.text[offsets[i] :].startswith(token)


def test_a_real_models_embeddings(cria: tuple[OpenAI, LLM]) -> None:
    client, llm = cria
    texts = ["Once upon a time", "The dog"]
    made = client.embeddings.create(model="cria", input=texts)
    np.testing.assert_allclose([one.embedding for one in made.data], llm.embed(texts), atol=1e-6)


def test_a_base_model_refuses_a_conversation(cria: tuple[OpenAI, LLM]) -> None:
    with pytest.raises(BadRequestError, match="no chat format") as caught:
        cria[0].chat.completions.create(model="cria", messages=[{"role": "user", "content": "Hi"}])
    assert caught.value.code == "invalid_messages"
