"""Text and tokens: `/tokenize`, `/detokenize`, `/tokenizer_info` and `/apply-template`.

What it is: the shapes of two servers under the same paths, since clients of both call them: llama-server's
(https://github.com/ggml-org/llama.cpp/tree/master/tools/server: `content`, `add_special`, `with_pieces`) and vLLM's
(https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html: `prompt` or `messages`, `add_special_tokens`,
`return_token_strs`). Which field has the text says whose shape is meant; the other's fields are refused beside it.
What it is not: a protocol's answers. `add_special` is false where it is left out, `add_special_tokens` true, as there.
What is surprising: a text that spells a special token is text, and never becomes that token: `parse_special` may only
be false, though llama-server's default is true. `/detokenize` answers both shapes at once: `content` and `prompt`.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from pydantic import ConfigDict, Field

from puna.server.bodies import Body
from puna.server.caller import Caller, needs
from puna.server.elsewhere import at_hand
from puna.server.fields import check_tools, refuse, refused, told_refused
from puna.server.limits import MAX_MODEL_NAME, MAX_TOOLS
from puna.server.openai_chat import ChatMessage, ChatTool, messages_of
from puna.server.openai_parts import RESPONSES
from puna.server.prefill import begun, check_begun
from puna.server.problems import RequestError
from puna.server.service import Service, service_of
from puna.types import Backend, Tool

router = APIRouter(tags=["Tokens"])

Name = Annotated[str, Field(max_length=MAX_MODEL_NAME)]
Infers = Annotated[Caller, Depends(needs("infer"))]
Services = Annotated[Service, Depends(service_of)]

_TEMPLATES = {
    "chat_template": "the model's own chat format is used",
    "chat_template_kwargs": "the chat format takes messages and tools only",
    "mm_processor_kwargs": "this model takes text only",
}


class TokenizeBody(Body):
    """The body of `/tokenize`: one of `content`, `prompt` and `messages`, and what goes with it."""

    model_config = ConfigDict(json_schema_extra=told_refused(_TEMPLATES))

    model: Name = ""
    content: str | None = None
    add_special: bool | None = None
    parse_special: bool | None = None
    with_pieces: bool | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(default=None, min_length=1)
    tools: list[ChatTool] | None = Field(default=None, max_length=MAX_TOOLS)
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: Any = None
    chat_template_kwargs: Any = None
    mm_processor_kwargs: Any = None


_GO_WITH = {
    "content": ("add_special", "parse_special", "with_pieces"),
    "prompt": ("add_special_tokens", "return_token_strs"),
    "messages": ("tools", "add_special_tokens", "return_token_strs", "add_generation_prompt", "continue_final_message"),
}


@router.post("/tokenize", responses=RESPONSES)
async def tokenize(body: TokenizeBody, caller: Infers, service: Services) -> dict[str, Any]:
    """The token ids of a text or a conversation, in the shape of the server whose field has it."""
    refuse(body, _TEMPLATES)
    given = [name for name in _GO_WITH if getattr(body, name) is not None]
    if len(given) != 1:
        raise RequestError(
            "The body needs one of content, prompt and messages.", code="invalid_value", param=(given or ["prompt"])[-1]
        )
    shape = given[0]
    for name in {name for names in _GO_WITH.values() for name in names} - {*_GO_WITH[shape]}:
        if getattr(body, name) is not None:
            raise refused(name, f"it does not go with {shape}")
    if body.parse_special:
        raise refused("parse_special", "a text never becomes a special token")
    if shape == "messages" and body.add_special_tokens:
        raise refused("add_special_tokens", "the chat format brings its own")
    async with service.use(caller, body.model) as backend:
        if shape == "content":
            ids = await _text(backend, body.content or "", bool(body.add_special))
            if not body.with_pieces:
                return {"tokens": list(ids)}
            return {"tokens": [{"id": token, "piece": _piece(backend.token_bytes(token))} for token in ids]}
        if shape == "prompt":
            ids = await _text(backend, body.prompt or "", body.add_special_tokens is not False)
        else:
            ids = await _conversation(service, backend, body)
        told = {"count": len(ids), "max_model_len": backend.card.context_length, "tokens": list(ids)}
        if body.return_token_strs:
            return told | {"token_strs": [backend.token_bytes(token).decode(errors="replace") for token in ids]}
        return told | {"token_strs": None}


async def _text(backend: Backend, text: str, special: bool) -> tuple[int, ...]:
    ids = await backend.encode(text, raw=True)
    return ids if special else ids[len(await backend.encode("", raw=True)) :]


async def _conversation(service: Service, backend: Backend, body: TokenizeBody) -> tuple[int, ...]:
    said, tools = messages_of(body.messages or []), _tools(body.tools)
    check_tools(backend, tools)
    said = await at_hand(service.pictures, backend, said)
    goes_on = bool(body.continue_final_message)
    if goes_on == (body.add_generation_prompt is not False):
        raise refused(
            "add_generation_prompt",
            "an answer that goes on has its header already; set it to false"
            if goes_on
            else "a conversation ends with the assistant's header",
        )
    if not goes_on:
        return await backend.encode(said, tools=tools)
    if said[-1].role != "assistant":
        raise RequestError(
            "continue_final_message needs a last message of the assistant's.", param="continue_final_message"
        )
    check_begun(said[-1], calls=False, grammar=None, param="messages")
    return await begun(backend, said, tools)


def _tools(given: list[ChatTool] | None) -> tuple[Tool, ...]:
    return tuple(tool.function.tool(f"tools.{i}.function.parameters") for i, tool in enumerate(given or ()))


def _piece(data: bytes) -> str | list[int]:
    """A token's text, or its bytes where they are no whole characters, as llama-server tells it."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return list(data)


class DetokenizeBody(Body):
    """The body of `/detokenize`."""

    tokens: list[int]
    model: Name = ""


@router.post("/detokenize", responses=RESPONSES)
async def detokenize(body: DetokenizeBody, caller: Infers, service: Services) -> dict[str, str]:
    """The text of token ids."""
    if any(not 0 <= token < 1 << 31 for token in body.tokens):
        raise RequestError("tokens has a number that is no token id.", code="invalid_value", param="tokens")
    async with service.use(caller, body.model) as backend:
        text = await backend.decode(body.tokens)
    return {"content": text, "prompt": text}


@router.get("/tokenizer_info", responses=RESPONSES)
async def tokenizer_info(
    caller: Infers, service: Services, model: Annotated[str, Query(max_length=MAX_MODEL_NAME)] = ""
) -> dict[str, Any]:
    """What lm-eval asks of a tokenizer elsewhere: the texts of its begin and end tokens, and the chat template."""
    async with service.use(caller, model) as backend:
        card = backend.card
    return {
        "bos_token": card.bos_token or None,
        "eos_token": card.eos_token or None,
        "pad_token": None,
        "chat_template": card.template,
        "model_max_length": card.context_length,
        "vocab_size": card.vocab_size,
    }


class TemplateBody(Body):
    """The body of `/apply-template`."""

    messages: list[ChatMessage] = Field(min_length=1)
    model: Name = ""
    tools: list[ChatTool] | None = Field(default=None, max_length=MAX_TOOLS)
    add_generation_prompt: bool | None = None
    chat_template: Any = None
    chat_template_kwargs: Any = None


@router.post("/apply-template", responses=RESPONSES)
async def apply_template(body: TemplateBody, caller: Infers, service: Services) -> dict[str, str]:
    """A conversation as the text that the model sees, with the assistant's header at its end."""
    refuse(body, {name: why for name, why in _TEMPLATES.items() if name in TemplateBody.model_fields})
    if body.add_generation_prompt is False:
        raise refused("add_generation_prompt", "a conversation ends with the assistant's header")
    said, tools = messages_of(body.messages), _tools(body.tools)
    async with service.use(caller, body.model) as backend:
        check_tools(backend, tools)
        said = await at_hand(service.pictures, backend, said)
        return {"prompt": await backend.render(said, tools)}
