"""Pydantic AI."""

from __future__ import annotations

from checks import CHAT, KEY, URL, check, run
from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider


class Point(BaseModel):
    """A point."""

    x: int = Field(ge=0, le=99)


PROVIDER = OpenAIProvider(base_url=f"{URL}/v1", api_key=KEY)


@check("text, whole and streamed")
async def text() -> None:
    agent = Agent(OpenAIChatModel(CHAT, provider=PROVIDER), model_settings={"max_tokens": 6})
    assert (await agent.run("Hello")).usage.output_tokens == 6
    async with agent.run_stream("Hello") as answer:
        assert await answer.get_output() is not None


@check("an output type, by a tool call and by a JSON schema")
async def typed() -> None:
    model = OpenAIChatModel(CHAT, provider=PROVIDER)
    for kind in (Point, NativeOutput(Point)):
        agent = Agent(model, output_type=kind, model_settings={"max_tokens": 200, "parallel_tool_calls": False})
        assert isinstance((await agent.run("A point")).output, Point)


@check("the Responses API")
async def responses() -> None:
    agent = Agent(OpenAIResponsesModel(CHAT, provider=PROVIDER), model_settings={"max_tokens": 16})
    assert (await agent.run("Hello")).output is not None


run()
