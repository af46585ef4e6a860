"""Rankings: by the likelihood of the query after the document, and by embeddings."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

import httpx2
import pytest

from puna.errors import ContextError
from puna.gateway.scripted import ScriptedBackend, encoded
from puna.server.app import create_app
from puna.server.rerank import AT_ONCE
from puna.types import Embeddings, Prompt, Score, TokenLogprob

PATHS = ("rerank", "v1/rerank", "v2/rerank")


class Ranking(ScriptedBackend):
    """Finds a query's byte likely after a document that has it; vectors say which of a, b, c a text has."""

    at_once = most = 0
    texts: Sequence[Any] = ()

    async def score(
        self, prompt: Prompt, continuations: Sequence[str | tuple[int, ...]], **options: Any
    ) -> tuple[Score, ...]:
        assert isinstance(prompt, tuple)
        document = bytes(token for token in prompt if isinstance(token, int)).decode()
        assert document.startswith("Document: ")
        assert document.endswith("\n\nQuery:")
        if "long" in document:
            raise ContextError("The document exceeds the context.")
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        await asyncio.sleep(0)
        self.at_once -= 1
        (query,) = continuations
        assert isinstance(query, str)
        assert query.startswith(" ")
        told = tuple(TokenLogprob(byte, -1.0 if chr(byte) in document[10:-8] else -3.0) for byte in encoded(query))
        return (Score(math.fsum(one.logprob for one in told), False, told),)

    async def embed(self, texts: Sequence[str | tuple[int, ...]], **options: Any) -> Embeddings:
        assert options["normalize"] is True
        self.texts = texts
        found = [[float(letter in str(text)) for letter in "abc"] for text in texts]
        return Embeddings(tuple(tuple(x / (math.hypot(*v) or 1) for x in v) for v in found), 7)


@pytest.fixture(scope="module")
def backend() -> Ranking:
    return Ranking()


@pytest.fixture(scope="module")
def url(serve_module: Any, backend: Ranking) -> str:
    return str(serve_module(create_app(backend)))


def test_by_likelihood(url: str) -> None:
    body = {"model": "scripted", "query": "abc", "documents": ["xyz", {"text": "a b c"}, "a c", "xyz"]}
    answers = [httpx2.post(f"{url}/{path}", json=body).json() for path in PATHS]
    for answer in answers:
        assert answer["method"] == "likelihood"
        assert (answer["model"], answer["object"]) == ("scripted", "list")
        want = {1: math.exp(-1), 2: math.exp(-1.5), 0: math.exp(-3), 3: math.exp(-3)}
        got = {one["index"]: one["relevance_score"] for one in answer["results"]}
        assert list(got) == [1, 2, 0, 3]
        assert got == pytest.approx(want)
        frame = len("Document: \n\nQuery:")
        assert answer["usage"]["total_tokens"] == 4 * (frame + 4) + len("xyza b ca cxyz")


def test_by_embeddings(url: str, backend: Ranking) -> None:
    body = {"query": "ab", "documents": ["c", "a", "ab"], "method": "embeddings", "return_documents": True, "top_n": 2}
    answer = httpx2.post(f"{url}/rerank", json=body).json()
    assert answer["method"] == "embeddings"
    assert answer["model"] == "scripted"
    assert list(backend.texts) == ["ab", "c", "a", "ab"]
    first, second = answer["results"]
    assert (first["index"], first["document"]) == (2, {"text": "ab"})
    assert first["relevance_score"] == pytest.approx(1)
    assert (second["index"], second["relevance_score"]) == (1, pytest.approx(2**-0.5))
    assert answer["usage"] == {"prompt_tokens": 7, "total_tokens": 7}


def test_many_documents_are_read_a_few_at_a_time(url: str, backend: Ranking) -> None:
    answer = httpx2.post(f"{url}/rerank", json={"query": "a", "documents": ["a", "b"] * 30}).json()
    assert [one["index"] for one in answer["results"]] == [*range(0, 60, 2), *range(1, 60, 2)]
    assert 1 < backend.most <= AT_ONCE


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"query": ""}, "query"),
        ({"documents": []}, "documents"),
        ({"documents": ["a"] * 1001}, "documents"),
        ({"top_n": 0}, "top_n"),
        ({"method": "magic"}, "method"),
        ({"max_tokens_per_doc": 10}, "max_tokens_per_doc"),
        ({"max_chunks_per_doc": 10}, "max_chunks_per_doc"),
        ({"truncate_prompt_tokens": 10}, "truncate_prompt_tokens"),
        ({"rank_fields": ["a"]}, "rank_fields"),
        ({"unheard_of": 1}, "unheard_of"),
    ],
)
def test_refusals_name_their_field(url: str, fields: dict[str, Any], param: str) -> None:
    response = httpx2.post(f"{url}/rerank", json={"query": "a", "documents": ["b"], **fields})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_a_document_that_is_too_long_is_an_error(url: str) -> None:
    response = httpx2.post(f"{url}/rerank", json={"query": "a", "documents": ["b", "long", "c"]})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert httpx2.post(f"{url}/rerank", json={"model": "no", "query": "a", "documents": ["b"]}).status_code == 404
