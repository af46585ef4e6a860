"""Filling in the middle: `/infill`, as llama.vscode and llama.vim call it, and `/v1/fim/completions`, as minuet and Zed.

What it is: llama-server's body (https://github.com/ggml-org/llama.cpp/tree/master/tools/server#post-infill-for-code-infilling)
and Mistral's (https://docs.mistral.ai/api/endpoint/fim), read and checked, and the refusal that follows.
What it is not: an answer. No model that can be loaded yet was trained to fill in the middle, and a model that was not
makes nonsense of such a prompt.
What is surprising: a body that is wrong is told so before the model is; who writes a client learns the most that way.
"""  # noqa: E501 - an address

from __future__ import annotations

from typing import Annotated, Any, NoReturn

from fastapi import APIRouter, Depends
from pydantic import Field

from puna.server.bodies import Body
from puna.server.caller import Caller, needs
from puna.server.limits import MAX_MODEL_NAME
from puna.server.openai_parts import RESPONSES
from puna.server.problems import RequestError
from puna.server.service import Service, service_of

router = APIRouter(tags=["Infill"])

Name = Annotated[str, Field(max_length=MAX_MODEL_NAME)]
Infers = Annotated[Caller, Depends(needs("infer"))]
Services = Annotated[Service, Depends(service_of)]


class ExtraFile(Body):
    """A file, or a piece of one, that stands before the one that is edited."""

    text: str
    filename: str | None = None


class InfillBody(Body):
    """The body of `/infill`: what stands before the cursor's line, after it, and on it."""

    input_prefix: str
    input_suffix: str
    input_extra: list[ExtraFile] | None = None
    prompt: str | None = None
    model: Name = ""
    n_predict: int | None = None
    n_indent: int | None = None
    n_probs: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: list[str] | None = None
    samplers: list[str] | None = None
    stream: bool | None = None
    cache_prompt: bool | None = None
    id_slot: int | None = None
    t_max_prompt_ms: float | None = None
    t_max_predict_ms: float | None = None
    response_fields: list[str] | None = None


class FimBody(Body):
    """The body of `/v1/fim/completions`: what stands before the cursor, and after it."""

    prompt: str
    suffix: str | None = None
    model: Name = ""
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = Field(default=None, ge=0)
    min_tokens: int | None = Field(default=None, ge=0)
    stream: bool | None = None
    stop: str | list[str] | None = None
    random_seed: int | None = None
    metadata: dict[str, Any] | None = None


@router.post("/infill", responses=RESPONSES)
async def infill(body: InfillBody, caller: Infers, service: Services) -> None:
    """Refused: no model here fills in the middle."""
    await _refuse(service, caller, body.model)


@router.post("/v1/fim/completions", responses=RESPONSES)
async def fim_completions(body: FimBody, caller: Infers, service: Services) -> None:
    """Refused: no model here fills in the middle."""
    await _refuse(service, caller, body.model)


async def _refuse(service: Service, caller: Caller, model: str) -> NoReturn:
    async with service.use(caller, model) as backend:
        raise RequestError(
            f"{backend.card.name} cannot fill in the middle of a text.",
            remedy="Ask /v1/completions to go on from what stands before the cursor.",
            code="unsupported_model",
            param="model",
        )
