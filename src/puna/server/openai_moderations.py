"""`/v1/moderations`: texts judged by a Llama Guard, in OpenAI's words.

What it is: https://platform.openai.com/docs/api-reference/moderations over a guard model that is served: the one named,
else the server's own guard (`puna serve --guard`), with its categories, else the first guard there is.
What it is not: OpenAI's classifier. Its thirteen categories are not those that Llama Guard was trained on: `AS_OPENAI`
is our own reading of which go together, several have no counterpart and are never true (`violence/graphic`,
`self-harm/intent`, `hate/threatening` and their kin), and some of Llama Guard's (privacy, elections, an operator's own)
have none there: then `flagged` is true and no category is. What the guard said itself stands in `guard`.
What is surprising: the guard gives one probability, that of "unsafe", and no number for a category: in
`category_scores` those that are violated have that number, all others 0.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse
from pydantic import Field
from starlette.responses import Response

from puna.server.bodies import Body, RequestBody
from puna.server.caller import Caller, needs
from puna.server.fields import TEXT, answer, several, shape
from puna.server.guarding import Guarding, Judged, judged, question
from puna.server.limits import MAX_INPUTS, MAX_MODEL_NAME
from puna.server.openai_parts import RESPONSES, unsupported
from puna.server.problems import RequestError
from puna.server.service import Call, Service, new_id, service_of
from puna.server.streams import answered, together
from puna.types import Message

router = APIRouter()

CATEGORIES = (
    *("harassment", "harassment/threatening", "hate", "hate/threatening", "illicit", "illicit/violent", "self-harm"),
    *("self-harm/instructions", "self-harm/intent", "sexual", "sexual/minors", "violence", "violence/graphic"),
)
"""OpenAI's, all of which stand in every result."""

AS_OPENAI: dict[str, tuple[str, ...]] = {
    "Violent Crimes.": ("violence", "illicit/violent"),
    "Non-Violent Crimes.": ("illicit",),
    "Sex Crimes.": ("illicit",),
    "Child Exploitation.": ("sexual", "sexual/minors"),
    "Defamation.": ("harassment",),
    "Indiscriminate Weapons.": ("illicit", "illicit/violent"),
    "Hate.": ("hate",),
    "Self-Harm.": ("self-harm",),
    "Sexual Content.": ("sexual",),
    "Violence and Hate.": ("violence", "hate"),
    "Criminal Planning.": ("illicit",),
    "Guns and Illegal Weapons.": ("illicit", "illicit/violent"),
    "Regulated or Controlled Substances.": ("illicit",),
}
"""Llama Guard's categories, by their names (its versions number them differently), as OpenAI's."""

AT_ONCE = 32
"""Texts of one request that are judged at once."""


class TextInput(Body):
    """A piece of text."""

    type: Literal["text"]
    text: str


class ImageInput(Body):
    """A picture: refused, for guards read text here."""

    type: Literal["image_url"]
    image_url: Any = None


Input = Annotated[TextInput | ImageInput, Field(discriminator="type")]


class ModerationBody(RequestBody):
    """A request. A list of texts has a result for each; a list of pieces is one input, and has one."""

    input: str | list[str] | list[Input]
    model: str = Field(default="", max_length=MAX_MODEL_NAME)


_BOOLEANS = shape(**{name: {"type": "boolean"} for name in CATEGORIES})
_NUMBERS = shape(**{name: {"type": "number"} for name in CATEGORIES})
_RESULT = shape(flagged={"type": "boolean"}, categories=_BOOLEANS, category_scores=_NUMBERS)


@router.post(
    "/v1/moderations",
    responses={**RESPONSES, **answer(shape(id=TEXT, model=TEXT, results=several(_RESULT)))},
    response_class=JSONResponse,
    tags=["OpenAI"],
)
async def moderations(
    body: ModerationBody,
    http: HttpRequest,
    caller: Annotated[Caller, Depends(needs("infer"))],
    service: Annotated[Service, Depends(service_of)],
) -> Response:
    """Judge texts."""
    guard: Guarding | None = http.app.state.guard
    texts = _texts(body)
    name = body.model or await _guard_of(service, caller, guard)
    return JSONResponse(await answered(http, _judged(service, caller, guard, name, texts)))


def _texts(body: ModerationBody) -> list[str]:
    if isinstance(body.input, str):
        return [body.input]
    texts: list[str] = []
    pieces: list[str] = []
    for i, part in enumerate(body.input):
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, TextInput):
            pieces.append(part.text)
        else:
            raise unsupported(f"input.{i}.type", "image_url: guards read text here")
    texts += ["\n".join(pieces)] if pieces else []
    if not 1 <= len(texts) <= MAX_INPUTS:
        raise RequestError(f"input must be from 1 to {MAX_INPUTS} texts.", code="invalid_value", param="input")
    return texts


async def _guard_of(service: Service, caller: Caller, guard: Guarding | None) -> str:
    """The name of the guard that is asked where none is named. Raises RequestError where there is none."""
    names = [] if guard is None else [guard.backend.card.name]
    names += [state.card.name for state in await service.models.states() if state.card.guards]
    for name in names:
        if caller.may_use(name):
            return name
    raise RequestError(
        "No guard model is served here, so nothing can be judged.",
        remedy="Ask again where one is: GET /v1/models lists what is served.",
        code="no_guard_model",
        param="model",
    )


async def _judged(
    service: Service, caller: Caller, guard: Guarding | None, name: str, texts: list[str]
) -> dict[str, Any]:
    async with service.use(caller, name) as backend:
        if not backend.card.guards:
            raise RequestError(
                f"{backend.card.name} is no guard model: its judgement would only look like one.",
                remedy="Leave model out, or name a Llama Guard.",
                code="unsupported_model",
                param="model",
            )
        categories = guard.categories if guard is not None and guard.backend is backend else ()
        call = Call(new_id("modr-"), caller, "moderation", backend.card.name)
        slots = asyncio.Semaphore(AT_ONCE)

        async def one(text: str) -> Judged:
            asks = question(backend, [Message("user", text)], categories)
            async with slots:
                return await judged(backend, service.answer(call, backend, asks), categories)

        found = await together([one(text) for text in texts])
        return {"id": call.id, "model": name, "results": [_result(each) for each in found]}


def _result(found: Judged) -> dict[str, Any]:
    violated = {theirs for each in found.verdict.categories for theirs in AS_OPENAI.get(each.name, ())}
    return {
        "flagged": found.verdict.unsafe,
        "categories": {name: name in violated for name in CATEGORIES},
        "category_scores": {name: found.score if name in violated else 0.0 for name in CATEGORIES},
        "category_applied_input_types": {name: ["text"] for name in CATEGORIES},
        "guard": {
            "verdict": "unsafe" if found.verdict.unsafe else "safe",
            "score": found.score,
            "categories": [{"code": each.code, "name": each.name} for each in found.verdict.categories],
        },
    }
