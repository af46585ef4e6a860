"""`/v1/moderations`: refused, until a guard model is served.

What it is: the route, so that a client is told why in OpenAI's words.
What it is not: a judgement: a model that was not trained to judge would only look like one.
What is surprising: nothing.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends
from starlette.responses import Response

from puna.server.bodies import RequestBody
from puna.server.caller import Caller, needs
from puna.server.openai_parts import RESPONSES
from puna.server.problems import RequestError

router = APIRouter()


class ModerationBody(RequestBody):
    """A request, after https://platform.openai.com/docs/api-reference/moderations."""

    input: str | list[Any]
    model: str = ""


@router.post("/v1/moderations", responses=RESPONSES, tags=["OpenAI"])
async def moderations(body: ModerationBody, caller: Annotated[Caller, Depends(needs("infer"))]) -> Response:
    """Judge texts."""
    raise RequestError(
        "No guard model is served here, so nothing can be judged.",
        remedy="Ask again where one is: GET /v1/models lists what is served.",
        code="no_guard_model",
        param="model",
    )
