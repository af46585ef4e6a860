"""`/rerank`, `/v1/rerank` and `/v2/rerank`: documents in the order of their worth for a query.

What it is: the shape that Cohere's and Jina's clients speak (https://docs.cohere.com/reference/rerank,
https://jina.ai/reranker), as llama-server and vLLM answer it too. `method` is Puna's own field, and the answer says it
again: "likelihood" (the default) or "embeddings".
What it is not: a model that was trained to rank. "likelihood" is query-likelihood ranking (Ponte and Croft 1998; by a
language model: Sachan et al. 2022, arXiv:2204.07496): the document is read, and the score is the geometric mean of the
probabilities that the model gives the query's tokens after it, from 0 to 1. "embeddings" is the cosine of the two
texts' vectors, from -1 to 1. Scores of two methods, two models or two queries do not compare.
What is surprising: documents are read as plain text, also by a model with a chat format, and never cut: one that is
longer than the context is an error.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import ConfigDict, Field

from puna.server.bodies import Body
from puna.server.caller import Caller, needs
from puna.server.fields import refuse, told_refused
from puna.server.limits import MAX_DOCUMENTS, MAX_MODEL_NAME
from puna.server.openai_parts import RESPONSES
from puna.server.service import Call, Service, new_id, service_of
from puna.server.streams import answered, together
from puna.types import Backend, Usage

router = APIRouter(tags=["Rerank"])

AT_ONCE = 16
"""Documents that are read at once: a ranking of a thousand must not fill the queue."""


class DocumentIn(Body):
    """A document."""

    text: str


_REFUSED = {
    "max_tokens_per_doc": "no document is cut",
    "max_chunks_per_doc": "no document is cut",
    "truncate_prompt_tokens": "no document is cut",
    "rank_fields": "a document is its text",
}


class RerankBody(Body):
    """The body."""

    model_config = ConfigDict(json_schema_extra=told_refused(_REFUSED))

    query: str = Field(min_length=1)
    documents: list[str | DocumentIn] = Field(min_length=1, max_length=MAX_DOCUMENTS)
    model: str = Field(default="", max_length=MAX_MODEL_NAME)
    top_n: int | None = Field(default=None, ge=1)
    return_documents: bool | None = None
    method: Literal["likelihood", "embeddings"] | None = None
    max_tokens_per_doc: Any = None
    max_chunks_per_doc: Any = None
    truncate_prompt_tokens: Any = None
    rank_fields: Any = None


@router.post("/rerank", responses=RESPONSES)
@router.post("/v1/rerank", responses=RESPONSES)
@router.post("/v2/rerank", responses=RESPONSES)
async def rerank(
    body: RerankBody,
    request: Request,
    caller: Annotated[Caller, Depends(needs("infer"))],
    service: Annotated[Service, Depends(service_of)],
) -> dict[str, Any]:
    """The documents' scores, the largest first, equals as they came."""
    refuse(body, _REFUSED)
    texts = [each if isinstance(each, str) else each.text for each in body.documents]
    call = Call(new_id("rerank-"), caller, "rerank", body.model)
    method = body.method or "likelihood"
    rank = _by_likelihood if method == "likelihood" else _by_embeddings

    async def ranked() -> tuple[list[float], int, str]:
        async with service.use(caller, body.model) as backend:
            return (*await rank(service, call, backend, body.query, texts), backend.card.name)

    scores, tokens, name = await answered(request, ranked())
    order = sorted(range(len(texts)), key=lambda i: -scores[i])[: body.top_n]
    results: list[dict[str, Any]] = [{"index": i, "relevance_score": scores[i]} for i in order]
    if body.return_documents:
        for result in results:
            result["document"] = {"text": texts[result["index"]]}
    return {
        "id": call.id,
        "object": "list",
        "model": body.model or name,
        "method": method,
        "results": results,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


async def _by_likelihood(
    service: Service, call: Call, backend: Backend, query: str, texts: list[str]
) -> tuple[list[float], int]:
    """Scores, and the tokens that were read."""
    await service.ledger.admit(call.caller)
    watch = service.observer.begin(call)
    tokens, failed = 0, None

    async def score(text: str) -> float:
        nonlocal tokens
        prompt = await backend.encode(f"Document: {text}\n\nQuery:", raw=True)
        (made,) = await backend.score(
            prompt, [f" {query}"], namespace=call.caller.namespace, priority=call.caller.priority
        )
        tokens += len(prompt) + len(made.tokens)
        return math.exp(made.logprob / len(made.tokens))

    try:
        scores: list[float] = []
        for start in range(0, len(texts), AT_ONCE):
            scores += await together([score(text) for text in texts[start : start + AT_ONCE]])
        return scores, tokens
    except BaseException as error:
        failed = error
        raise
    finally:
        usage = Usage(tokens, 0, 0)
        watch.end(usage, failed)
        await service.ledger.spent(call, usage)


async def _by_embeddings(
    service: Service, call: Call, backend: Backend, query: str, texts: list[str]
) -> tuple[list[float], int]:
    made = await service.embed(call, backend, [query, *texts])
    asked, *vectors = made.vectors
    return [math.fsum(a * b for a, b in zip(asked, vector, strict=True)) for vector in vectors], made.prompt_tokens
