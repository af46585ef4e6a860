"""An answer that its caller has begun: the last message is the assistant's, and the model goes on with it.

What it is: the ids of such a conversation, for every protocol that knows this (Anthropic's, Ollama's, vLLM's
`continue_final_message`).
What it is not: a chat format; the conversation up to the assistant's turn is encoded by the model's own.
What is surprising: the begun text is tokenized by itself, as the model would have made it token by token after the
assistant's header, and its text never becomes a special token.
"""

from __future__ import annotations

from collections.abc import Sequence

from puna.server.problems import RequestError
from puna.types import Backend, Grammar, Message, Tool


def check_begun(last: Message, *, calls: bool, grammar: Grammar | None, param: str) -> None:
    """Raise RequestError where the assistant's last message cannot go on: it calls a tool, or `calls` may be made in
    what follows, or that must have a form."""
    if last.tool_calls:
        raise RequestError(
            "The last message calls a tool, and no result follows.",
            remedy="Send the tool's result after it.",
            code="invalid_messages",
            param=param,
        )
    if grammar is not None or calls:
        raise RequestError(
            "An answer that was begun cannot go on as a call of a tool, or in a given form.",
            remedy="End with a user's message, or leave tools and the form out.",
            code="invalid_messages",
            param=param,
        )


async def begun(backend: Backend, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> tuple[int, ...]:
    """The ids of a conversation that ends in the middle of the assistant's message.

    Raises ChatFormatError where there is no chat format, or no message before it.
    """
    if any(message.pictures for message in messages):  # the ids alone would not say what they show
        raise RequestError(
            "An answer that was begun cannot go on after a picture.",
            remedy="End with a user's message.",
            code="invalid_messages",
            param="messages",
        )
    asked = await backend.encode(tuple(messages[:-1]), tools=tools)
    start = await backend.encode("", raw=True)  # what every text begins with: BOS, or nothing
    return asked + (await backend.encode(messages[-1].content, raw=True))[len(start) :]
