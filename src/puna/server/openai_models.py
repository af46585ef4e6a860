"""`/v1/models`: what may be asked for.

What it is: OpenAI's list, after https://platform.openai.com/docs/api-reference/models.
What it is not: loading or unloading.
What is surprising: each model has `puna` beside OpenAI's fields, from which a client learns what fits, and if not, why.
"""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Depends
from pydantic import BaseModel

from puna.server.caller import Caller, needs
from puna.server.openai_parts import RESPONSES
from puna.server.problems import without_folders
from puna.server.service import Service, service_of, unknown_model
from puna.types import ModelState

router = APIRouter()


class About(BaseModel):
    """What a client may want to know before it chooses: see `types.ModelCard` and `types.ModelState`."""

    context_length: int
    nbytes: int
    loaded: bool
    fits: bool
    why: str
    chat: bool
    tools: bool
    sees: bool
    infills: bool
    quantization: str
    parameters: int
    aliases: list[str]


class Model(BaseModel):
    """A model. `created` is when its files were written."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "puna"
    puna: About


class ModelList(BaseModel):
    """All models that the key may use, the default first."""

    object: Literal["list"] = "list"
    data: list[Model]


def described(state: ModelState) -> Model:
    """A model as it is told."""
    card = state.card
    about = About(
        context_length=card.context_length,
        nbytes=card.nbytes,
        loaded=state.loaded,
        fits=state.fits,
        why=without_folders(state.why),
        chat=card.chat,
        tools=card.tools,
        sees=card.sees,
        infills=card.infills,
        quantization=card.quantization,
        parameters=card.parameters,
        aliases=list(card.aliases),
    )
    return Model(id=card.name, created=int(card.modified), puna=about)


@router.get("/v1/models", responses=RESPONSES, tags=["OpenAI"])
async def models(
    caller: Annotated[Caller, Depends(needs("infer"))], service: Annotated[Service, Depends(service_of)]
) -> ModelList:
    """The models that may be asked for."""
    states = await service.models.states()
    return ModelList(data=[described(state) for state in states if _theirs(caller, state)])


@router.get("/v1/models/{model:path}", responses=RESPONSES, tags=["OpenAI"])
async def model(
    model: str, caller: Annotated[Caller, Depends(needs("infer"))], service: Annotated[Service, Depends(service_of)]
) -> Model:
    """One model, by its name or an alias."""
    for state in await service.models.states():
        if model in (state.card.name, *state.card.aliases) and _theirs(caller, state):
            return described(state)
    raise unknown_model(model)


def _theirs(caller: Caller, state: ModelState) -> bool:
    return any(caller.may_use(name) for name in (state.card.name, *state.card.aliases))
