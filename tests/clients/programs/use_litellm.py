"""LiteLLM, by each of our three protocols."""

from __future__ import annotations

import json

import litellm
from checks import BASE, CHAT, KEY, URL, check, run

HELLO = [{"role": "user", "content": "Say hello."}]
litellm.telemetry = False
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"enum": ["Lima"]}}, "required": ["city"],
                       "additionalProperties": False},
    },
}  # fmt: skip


@check("openai/: completion, streamed, a tool, embedding")
def by_openai() -> None:
    to = {"api_base": f"{URL}/v1", "api_key": KEY}
    answer = litellm.completion(f"openai/{CHAT}", HELLO, max_tokens=5, **to)
    assert answer.usage.completion_tokens == 5
    assert list(litellm.completion(f"openai/{CHAT}", HELLO, max_tokens=5, stream=True, **to))
    called = litellm.completion(f"openai/{CHAT}", HELLO, max_tokens=99, tools=[TOOL], tool_choice="required", **to)
    assert json.loads(called.choices[0].message.tool_calls[0].function.arguments) == {"city": "Lima"}
    assert len(litellm.embedding(f"openai/{BASE}", ["a dog"], **to).data) == 1


@check("text-completion-openai/: the text goes on")
def by_completions() -> None:
    made = litellm.text_completion(
        model=f"text-completion-openai/{BASE}", prompt="Once", max_tokens=5, api_base=f"{URL}/v1", api_key=KEY
    )
    assert made.choices[0].text


@check("anthropic/: completion, streamed")
def by_anthropic() -> None:
    to = {"api_base": URL, "api_key": KEY}
    assert litellm.completion(f"anthropic/{CHAT}", HELLO, max_tokens=5, **to).usage.completion_tokens == 5
    assert list(litellm.completion(f"anthropic/{CHAT}", HELLO, max_tokens=5, stream=True, **to))


@check("ollama_chat/: completion, streamed")
def by_ollama() -> None:
    to = {"api_base": URL, "api_key": KEY}
    assert litellm.completion(f"ollama_chat/{CHAT}", HELLO, max_tokens=5, **to).usage.completion_tokens == 5
    assert list(litellm.completion(f"ollama_chat/{CHAT}", HELLO, max_tokens=5, stream=True, **to))


run()
