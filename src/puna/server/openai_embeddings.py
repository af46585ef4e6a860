"""`/v1/embeddings`: a vector for each text.

What it is: OpenAI's body and answer, after https://platform.openai.com/docs/api-reference/embeddings. Vectors have
length 1, as OpenAI's have; `pooling` and `normalize` are Puna's own fields.
What it is not: a judge of whether a model was trained for this; the vectors are its pooled hidden states.
What is surprising: `dimensions` must be the model's own: cutting a vector is honest only where a model was trained for
that.
"""

from __future__ import annotations

import base64
import struct
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse
from pydantic import Field
from starlette.responses import Response

from puna.server.bodies import RequestBody
from puna.server.caller import Caller, needs
from puna.server.fields import COUNT, TEXT, answer, several, shape
from puna.server.limits import MAX_INPUTS, MAX_MODEL_NAME
from puna.server.openai_parts import RESPONSES
from puna.server.problems import RequestError
from puna.server.service import Call, Service, new_id, service_of
from puna.server.streams import answered
from puna.types import Pooling

router = APIRouter()


class EmbeddingBody(RequestBody):
    """A request. `user` only labels it."""

    input: str | list[str] | list[int] | list[list[int]]
    model: str = Field(default="", max_length=MAX_MODEL_NAME)
    dimensions: int | None = None
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = None
    pooling: Pooling | None = None
    normalize: bool | None = None


_VECTOR = shape(
    object={"const": "embedding"}, index=COUNT, embedding={"type": ["array", "string"], "items": {"type": "number"}}
)
_ANSWER = shape(
    object={"const": "list"}, data=several(_VECTOR), model=TEXT, usage=shape(prompt_tokens=COUNT, total_tokens=COUNT)
)


@router.post("/v1/embeddings", responses={**RESPONSES, **answer(_ANSWER)}, response_class=JSONResponse, tags=["OpenAI"])
async def embeddings(
    body: EmbeddingBody,
    http: HttpRequest,
    caller: Annotated[Caller, Depends(needs("infer"))],
    service: Annotated[Service, Depends(service_of)],
) -> Response:
    """A vector for each text."""
    return JSONResponse(await answered(http, complete(service, caller, body)))


async def complete(service: Service, caller: Caller, body: EmbeddingBody, priority: int = 0) -> dict[str, Any]:
    """The whole answer, as OpenAI's object."""
    given = body.input
    texts: list[str | tuple[int, ...]]
    if isinstance(given, str):
        texts = [given]
    elif given and isinstance(given[0], int):
        texts = [tuple(given)]
    else:
        texts = [each if isinstance(each, str) else tuple(each) for each in given]  # type: ignore[arg-type]
    if not 1 <= len(texts) <= MAX_INPUTS or not all(texts):
        raise RequestError(
            f"input must be from 1 to {MAX_INPUTS} texts, none of them empty.", code="invalid_value", param="input"
        )
    for text in texts:
        if isinstance(text, tuple) and any(not 0 <= token < 1 << 31 for token in text):
            raise RequestError("input has a number that is no token id.", code="invalid_value", param="input")
    async with service.use(caller, body.model) as backend:
        size = backend.card.embedding_length
        if body.dimensions is not None and body.dimensions != size:
            raise RequestError(
                f"dimensions must be {size}, those of {backend.card.name}: its vectors cannot be cut.",
                remedy="Leave it out.",
                code="unsupported_parameter",
                param="dimensions",
            )
        call = Call(new_id("embd-"), caller, "embeddings", backend.card.name)
        made = await service.embed(
            call,
            backend,
            texts,
            pooling=body.pooling or "mean",
            normalize=body.normalize is not False,
            priority=priority,
        )
        packed = body.encoding_format == "base64"
        return {
            "object": "list",
            "data": [
                {"object": "embedding", "index": i, "embedding": _packed(vector) if packed else list(vector)}
                for i, vector in enumerate(made.vectors)
            ],
            "model": body.model or backend.card.name,
            "usage": {"prompt_tokens": made.prompt_tokens, "total_tokens": made.prompt_tokens},
        }


def _packed(vector: tuple[float, ...]) -> str:
    """Little-endian float32 in base64, which OpenAI's client asks for and unpacks."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
