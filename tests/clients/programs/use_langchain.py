"""LangChain's OpenAI package."""

from __future__ import annotations

from typing import Annotated

from checks import BASE, CHAT, KEY, URL, check, run
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field

TO = {"base_url": f"{URL}/v1", "api_key": KEY, "max_retries": 0}


class Point(BaseModel):
    """A point."""

    x: int = Field(ge=0, le=99)


@tool
def double(number: Annotated[int, Field(ge=0, le=99)]) -> int:
    """Twice a number."""
    return 2 * number


@check("ChatOpenAI: invoke, stream, batch")
def chat() -> None:
    model = ChatOpenAI(model=CHAT, max_tokens=6, **TO)
    answer = model.invoke([SystemMessage("Be kind."), HumanMessage("Hello")])
    assert answer.usage_metadata["output_tokens"] == 6
    assert answer.response_metadata["finish_reason"] == "length"
    assert len(list(model.stream("Hello"))) >= 2
    assert len(model.batch(["a", "b", "c"])) == 3


@check("with_structured_output")
def structured() -> None:
    model = ChatOpenAI(model=CHAT, max_tokens=100, **TO)
    assert isinstance(model.with_structured_output(Point, method="json_schema").invoke("A point"), Point)
    assert isinstance(model.with_structured_output(Point, method="function_calling").invoke("A point"), Point)


@check("bind_tools: a call and its result")
def tools() -> None:
    model = ChatOpenAI(model=CHAT, max_tokens=100, **TO)
    asked = HumanMessage("Twice 4?")
    called = model.bind_tools([double], tool_choice="double", parallel_tool_calls=False).invoke([asked])
    assert isinstance(called, AIMessage)
    (call,) = called.tool_calls
    assert call["name"] == "double"
    result = ToolMessage(str(2 * call["args"]["number"]), tool_call_id=call["id"])
    last = ChatOpenAI(model=CHAT, max_tokens=4, **TO).invoke([asked, called, result])
    assert last.usage_metadata["output_tokens"] >= 1


@check("OpenAI (completions) and OpenAIEmbeddings")
def others() -> None:
    assert OpenAI(model=BASE, max_tokens=6, seed=1, **TO).invoke("Once upon a time")
    vectors = OpenAIEmbeddings(model=BASE, check_embedding_ctx_length=False, **TO).embed_documents(["a dog", "a cat"])
    assert len(vectors) == 2


run()
