"""Ollama's routes about models: `/api/tags`, `/api/show`, `/api/ps`, `/api/version`, `/api/embed`, and those that would
change what is there.

What it is: https://docs.ollama.com/api, as far as it is about models and not about answers.
What it is not: the fetching of a model (`ollama_pull.py`).
What is surprising: `/api/create`, `/api/copy`, `/api/delete` and `/api/push` are there and refuse with words: what is
on the disk is its owner's, who has `puna rm` and `puna convert`. A model is listed under its name, and found under its
aliases too. `/api/version` tells the version of Ollama whose protocol this is, as clients decide by it what they may
send; Puna's own is at `/version`.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse
from pydantic import Field

from puna.server.bodies import Body
from puna.server.caller import Caller, needs
from puna.server.fields import errors
from puna.server.limits import MAX_INPUTS
from puna.server.ollama_bodies import KeepAlive, ModelName, Options, check_embedding
from puna.server.ollama_routes import kept_for, plain, stamp
from puna.server.problems import Problem, RequestError, shaped
from puna.server.service import Call, Service, request_id, service_of, unknown_model
from puna.server.streams import answered
from puna.types import Embeddings, ModelCard, ModelState

router = APIRouter()

OLLAMA_VERSION = "0.13.0"
"""The version of Ollama whose protocol is spoken."""

NEVER = "9999-12-31T23:59:59Z"
"""When a model that stays is unloaded."""

_ERRORS = errors("ollama")
Infers = Annotated[Caller, Depends(needs("infer"))]
Manages = Annotated[Caller, Depends(needs("manage"))]
Services = Annotated[Service, Depends(service_of)]


@router.get("/api/version", responses=_ERRORS)
async def version(caller: Infers) -> dict[str, str]:
    """The version of Ollama whose protocol is spoken."""
    return {"version": OLLAMA_VERSION}


@router.get("/api/tags", responses=_ERRORS)
async def tags(caller: Infers, service: Services) -> dict[str, list[dict[str, Any]]]:
    """The models that this caller may use."""
    return {"models": [_listed(state.card) for state in await _states(caller, service)]}


@router.get("/api/ps", responses=_ERRORS)
async def ps(caller: Infers, service: Services) -> dict[str, list[dict[str, Any]]]:
    """Those of them that are loaded. `size_vram` is 0: nothing is known here of a card's memory."""
    return {"models": [_running(state) for state in await _states(caller, service) if state.loaded]}


class NameBody(Body):
    """A model; `name` is what the field was called before."""

    model: ModelName | None = None
    name: ModelName | None = None

    @property
    def named(self) -> str:
        """The model's name. Raises RequestError for none, and for two."""
        if (self.model is None) == (self.name is None):
            raise RequestError("The body needs model.", remedy="Name one, once.", code="invalid_value", param="model")
        return plain(self.model or self.name or "")


class ShowBody(NameBody):
    """The body of `/api/show`. There is nothing more to tell where `verbose` asks for it, and nothing is left out."""

    verbose: bool | None = None


@router.post("/api/show", responses=_ERRORS)
async def show(body: ShowBody, caller: Infers, service: Services) -> dict[str, Any]:
    """What is known of a model."""
    name = body.named
    for state in await _states(caller, service, asked=name):
        card = state.card
        if name in (card.name, *card.aliases):
            return {
                "modelfile": f"FROM {card.name}\n",
                "parameters": "",
                "template": card.template or "",
                "modified_at": stamp(card.modified),
                "details": _details(card),
                "capabilities": _capabilities(card),
                "model_info": {
                    "general.architecture": "llama",
                    "general.basename": card.name,
                    "general.parameter_count": card.parameters,
                    "llama.context_length": card.context_length,
                    "llama.embedding_length": card.embedding_length,
                    "llama.vocab_size": card.vocab_size,
                },
            }
    raise unknown_model(name)


class EmbedBody(Body):
    """The body of `/api/embed`. `truncate` may say what it likes: a text that is too long is refused, not cut."""

    model: ModelName
    input: str | list[str]
    truncate: bool | None = None
    dimensions: int | None = Field(default=None, ge=1)
    options: Options | None = None
    keep_alive: KeepAlive = None


class EmbeddingsBody(Body):
    """The body of `/api/embeddings`, which came before `/api/embed`."""

    model: ModelName
    prompt: str
    options: Options | None = None
    keep_alive: KeepAlive = None


@router.post("/api/embed", responses=_ERRORS)
async def embed(body: EmbedBody, request: Request, caller: Infers, service: Services) -> dict[str, Any]:
    """A vector of length 1 for each text. `dimensions` keeps the first so many, again at length 1."""
    began = datetime.now(UTC)
    texts = [body.input] if isinstance(body.input, str) else body.input
    made = await answered(request, _embedded(request, caller, service, body, texts, normalize=True))
    vectors = [list(vector) for vector in made.vectors]
    if body.dimensions is not None:
        if vectors and body.dimensions > len(vectors[0]):
            raise RequestError(
                f"dimensions is {body.dimensions}, and the vectors have {len(vectors[0])}.", param="dimensions"
            )
        vectors = [_unit(vector[: body.dimensions]) for vector in vectors]
    return {
        "model": body.model,
        "embeddings": vectors,
        "total_duration": round((datetime.now(UTC) - began).total_seconds() * 1e9),
        "prompt_eval_count": made.prompt_tokens,
    }


@router.post("/api/embeddings", responses=_ERRORS)
async def embeddings(body: EmbeddingsBody, request: Request, caller: Infers, service: Services) -> dict[str, Any]:
    """The vector of a text, of whatever length the model gives it."""
    made = await answered(request, _embedded(request, caller, service, body, [body.prompt], normalize=False))
    return {"embedding": list(made.vectors[0])}


async def _embedded(
    request: Request,
    caller: Caller,
    service: Service,
    body: EmbedBody | EmbeddingsBody,
    texts: list[str],
    *,
    normalize: bool,
) -> Embeddings:
    if len(texts) > MAX_INPUTS:
        raise RequestError(f"input has {len(texts)} texts; {MAX_INPUTS} are allowed.", param="input")
    call = Call(request_id(request), caller, "embeddings", body.model)
    async with service.use(caller, plain(body.model), keep_alive=kept_for(body.keep_alive, caller)) as backend:
        check_embedding(body.options, backend.card)
        if not texts:
            return Embeddings((), 0)
        return await service.embed(call, backend, texts, normalize=normalize)


def _unit(vector: list[float]) -> list[float]:
    length = math.hypot(*vector)
    return [value / length for value in vector] if length else vector


_NOT_HERE = (
    (
        "POST",
        "/api/create",
        "Models are not made over this protocol.",
        "Where the server is, `puna convert` makes one.",
    ),
    ("POST", "/api/copy", "Models are not copied over this protocol.", "An alias gives a model another name."),
    ("DELETE", "/api/delete", "Models are not deleted over this protocol.", "Where the server is, `puna rm` does it."),
    ("POST", "/api/push", "Models are not sent anywhere from here.", "The hub's own tools do it."),
)


def _refusing(method: str, path: str, message: str, remedy: str) -> None:
    async def refuse(caller: Manages) -> JSONResponse:
        # Not 501, which says that it may come: a path that allows no method is 405.
        return JSONResponse(shaped(Problem(405, f"{message} {remedy}"), "ollama"), 405, headers={"Allow": ""})

    refuse.__doc__ = f"Refused: {message}"
    router.add_api_route(
        path,
        refuse,
        methods=[method],
        name=f"refuse {path}",
        responses=errors("ollama", 405),
        response_class=JSONResponse,
        status_code=405,
    )


for _each in _NOT_HERE:
    _refusing(*_each)


async def _states(caller: Caller, service: Service, asked: str = "") -> list[ModelState]:
    states = await service.models.states()
    return [state for state in states if caller.may_use(state.card.name) or (asked and caller.may_use(asked))]


def _listed(card: ModelCard) -> dict[str, Any]:
    return {
        "name": card.name,
        "model": card.name,
        "modified_at": stamp(card.modified),
        "size": card.nbytes,
        "digest": card.digest,
        "details": _details(card),
    }


def _running(state: ModelState) -> dict[str, Any]:
    card = state.card
    ends = NEVER if state.unload_in is None else stamp(datetime.now(UTC).timestamp() + state.unload_in)
    return {
        "name": card.name,
        "model": card.name,
        "size": state.resident or card.nbytes,
        "digest": card.digest,
        "details": _details(card),
        "expires_at": ends,
        "size_vram": 0,
        "context_length": card.context_length,
    }


def _details(card: ModelCard) -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": card.format,
        "family": card.family,
        "families": [card.family],
        "parameter_size": counted(card.parameters),
        "quantization_level": card.quantization,
    }


def _capabilities(card: ModelCard) -> list[str]:
    return ["completion", *(["tools"] if card.tools else []), *(["insert"] if card.infills else [])]


def counted(parameters: int) -> str:
    """A number of parameters in three digits at most: "260K", "1.24B"."""
    for unit, size in (("B", 1_000_000_000), ("M", 1_000_000), ("K", 1_000)):
        if parameters >= size:
            return f"{parameters / size:.3g}{unit}"
    return str(parameters)
