"""A backend that plays a model from a script: for tests of whatever stands on a `Backend`, and to try a client.

What it is: answers that are known beforehand, with no weights, no thread and no luck of timing.
What it is not: a model. Its tokens are the bytes of UTF-8 (0 to 255), and 256 ends an answer.
What is surprising: an answer waits where its script waits: a script is an async generator, and may await an event.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Callable, Sequence

from puna.errors import StoppedError, TokenizerError
from puna.types import (
    Activity,
    Embeddings,
    Event,
    Infill,
    Judge,
    Message,
    ModelCard,
    Pooling,
    Prompt,
    Request,
    Score,
    TokenLogprob,
    Tool,
    Usage,
)

Script = Callable[[Request], AsyncGenerator[Event]]
"""The events of the answer to a request."""

CARD = ModelCard(
    "scripted", format="script", family="script", context_length=4096, vocab_size=257, embedding_length=8, chat=True,
    tools=True,
)  # fmt: skip


def saying(*pieces: str) -> Script:
    """A script that says these pieces, whatever is asked, in every choice, with max_tokens honoured by the byte."""

    async def script(request: Request) -> AsyncGenerator[Event]:
        sampling = request.sampling
        prompt = len(encoded(request.prompt))
        choices, made = sampling.best_of or sampling.n, 0
        for choice in range(choices):
            left = sampling.max_tokens if sampling.max_tokens is not None else 1 << 30
            for piece in pieces:
                data = piece.encode()[:left]
                left, made = left - len(data), made + len(data)
                logprobs = () if sampling.logprobs is None else tuple(TokenLogprob(byte, -0.5) for byte in data)
                if data:
                    yield Event(choice, data.decode(errors="ignore"), tuple(data), logprobs, prefilled=prompt)
            last = choice == choices - 1
            usage = Usage(prompt, 0, made) if last else None
            yield Event(choice, finish="stop" if left > 0 else "length", prefilled=prompt, usage=usage)

    return script


def encoded(prompt: Prompt | str) -> tuple[int, ...]:
    """The bytes of a prompt; of a conversation, of `role: content` lines, with `[picture]` for one; of a gap, of what
    stands around it."""
    if isinstance(prompt, str):
        return tuple(prompt.encode())
    if isinstance(prompt, Infill):
        return tuple((prompt.prefix + prompt.suffix).encode())
    if isinstance(prompt, Judge):
        return encoded(prompt.messages)
    if prompt and isinstance(prompt[0], Message):
        return tuple("".join(f"{m.role}: {m.marked}\n" for m in prompt if isinstance(m, Message)).encode())
    return tuple(token for token in prompt if isinstance(token, int))


class ScriptedBackend:
    """See types.Backend. `requests` holds what was asked, for tests to look at."""

    def __init__(self, script: Script | None = None, card: ModelCard = CARD) -> None:
        self._script = script or saying("Hello", " there", ".")
        self._card = card
        self.requests: list[Request] = []
        self.running = 0
        self.closed = False

    @property
    def card(self) -> ModelCard:
        """See types.Backend."""
        return self._card

    async def generate(self, request: Request) -> AsyncGenerator[Event]:
        """See types.Backend."""
        if self.closed:
            raise StoppedError("The backend was closed.", remedy="Start it again.")
        self.requests.append(request)
        self.running += 1
        events = self._script(request)
        try:
            async for event in events:
                yield event
        finally:
            self.running -= 1
            await events.aclose()

    async def embed(
        self,
        texts: Sequence[str | tuple[int, ...]],
        *,
        pooling: Pooling = "mean",
        normalize: bool = True,
        namespace: str = "",
        priority: int = 0,
    ) -> Embeddings:
        """See types.Backend: how often each remainder by 8 occurs among the bytes."""
        vectors = []
        for text in texts:
            counts = [0.0] * 8
            for byte in encoded(text):
                counts[byte % 8] += 1
            length = math.hypot(*counts) if normalize else 1.0
            vectors.append(tuple(count / (length or 1.0) for count in counts))
        return Embeddings(tuple(vectors), sum(len(encoded(text)) for text in texts))

    async def score(
        self,
        prompt: Prompt,
        continuations: Sequence[str | tuple[int, ...]],
        *,
        raw: bool = False,
        namespace: str = "",
        priority: int = 0,
    ) -> tuple[Score, ...]:
        """See types.Backend: -0.5 a byte."""
        every = [tuple(TokenLogprob(byte, -0.5) for byte in encoded(text)) for text in continuations]
        return tuple(Score(-0.5 * len(tokens), False, tokens) for tokens in every)

    async def encode(self, prompt: Prompt, *, raw: bool = False, tools: Sequence[Tool] = ()) -> tuple[int, ...]:
        """See types.Backend."""
        return encoded(prompt)

    async def decode(self, ids: Sequence[int]) -> str:
        """See types.Backend."""
        if any(not 0 <= token < 257 for token in ids):
            raise TokenizerError("There is no such token.", remedy="Ids go from 0 to 256.")
        return bytes(token for token in ids if token < 256).decode(errors="replace")

    async def render(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> str:
        """See types.Backend."""
        return bytes(encoded(tuple(messages))).decode()

    def token_bytes(self, token: int) -> bytes:
        """See types.Backend."""
        return bytes([token]) if token < 256 else b""

    async def activity(self) -> Activity:
        """See types.Backend."""
        return Activity(running=self.running, kernels="script", kv_type="none")

    async def close(self) -> None:
        """See types.Backend."""
        self.closed = True
