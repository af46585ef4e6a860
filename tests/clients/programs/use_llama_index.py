"""LlamaIndex's OpenAI-like model."""

from __future__ import annotations

from checks import BASE, CHAT, KEY, URL, check, run
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, Field


class Point(BaseModel):
    """A point."""

    x: int = Field(ge=0, le=99)


def model(name: str, **options: object) -> OpenAILike:
    """The model at our server."""
    return OpenAILike(model=name, api_base=f"{URL}/v1", api_key=KEY, max_retries=0, context_window=512, **options)


@check("chat and stream_chat")
def chat() -> None:
    llm = model(CHAT, is_chat_model=True, max_tokens=6)
    assert llm.chat([ChatMessage(role="user", content="Hello")]).message.content is not None
    assert list(llm.stream_chat([ChatMessage(role="user", content="Hello")]))


@check("complete and stream_complete")
def complete() -> None:
    llm = model(BASE, max_tokens=12, temperature=0)
    whole = llm.complete("Once upon a time").text
    assert whole
    assert list(llm.stream_complete("Once upon a time"))[-1].text == whole


@check("structured output by a function call")
def structured() -> None:
    llm = model(CHAT, is_chat_model=True, is_function_calling_model=True, max_tokens=100)
    answer = llm.as_structured_llm(Point).chat([ChatMessage(role="user", content="A point")])
    assert isinstance(answer.raw, Point)


run()
