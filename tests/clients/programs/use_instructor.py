"""Instructor."""

from __future__ import annotations

import instructor
import openai
from checks import CHAT, KEY, URL, check, run
from pydantic import BaseModel, Field

HELLO = [{"role": "user", "content": "A point, please."}]


class Point(BaseModel):
    """A point. Nothing else: a model of random weights would never be done with what more there may be."""

    model_config = {"extra": "forbid"}
    x: int = Field(ge=0, le=99)
    colour: str = Field(pattern="^(red|green)$")


def made(mode: instructor.Mode) -> Point:
    """A point, asked for in one of instructor's ways."""
    plain = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0)
    client = instructor.from_openai(plain, mode=mode)
    return client.chat.completions.create(
        model=CHAT, messages=HELLO, response_model=Point, max_tokens=200, max_retries=0
    )


@check("by a tool call")
def tools() -> None:
    assert isinstance(made(instructor.Mode.TOOLS), Point)


@check("by a JSON schema")
def schema() -> None:
    assert isinstance(made(instructor.Mode.JSON_SCHEMA), Point)


run()
