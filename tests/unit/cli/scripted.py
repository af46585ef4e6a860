"""A model that says what it is told to, in the place of `puna.LLM`; as a program, the `puna` command with that model.

What is surprising: as a program it takes its pieces from the first argument (JSON) and sleeps between them, so that a
test at a pseudo-terminal can interrupt it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from puna.cli import run
from puna.cli.main import main
from puna.errors import ContextError, UsageError
from puna.models.config import DecoderConfig
from puna.models.rope import Rope
from puna.types import Answer, FinishReason, Infill, Sampling, Timings

CONFIG = DecoderConfig(
    generation="llama3", vocab_size=128, dim=8, layers=1, heads=2, kv_heads=1, head_dim=4, hidden_dim=16, norm_eps=1e-5,
    rope=Rope(4, 10000.0), context_length=64,
)  # fmt: skip


class ScriptedLLM:
    """Answers every prompt with the same pieces, each of them one token; remembers what it was asked."""

    def __init__(
        self,
        pieces: Sequence[str] = ("Hello", " there"),
        *,
        chat: bool = True,
        sees: bool = True,
        delay: float = 0.0,
        notes: Sequence[str] = (),
        finish: FinishReason = "stop",
        error: Exception | None = None,
    ) -> None:
        self.pieces, self.delay, self.finish, self.error = pieces, delay, finish, error
        self.name, self.config, self.kernels, self.notes = "cria", CONFIG, "scripted", tuple(notes)
        self.chat_format = object() if chat else None
        self.sees = chat and sees
        self.shown: list[bytes] = []
        self.asked: list[tuple[Any, dict[str, Any]]] = []

    def encode(self, prompt: Any, *, system: str | None = None, raw: bool = False) -> list[int]:
        """A token a character."""
        if system is not None and (raw or self.chat_format is None):
            raise UsageError("A system message cannot be honoured.")
        if isinstance(prompt, Infill):
            prompt = prompt.prefix + prompt.suffix
        text = prompt if isinstance(prompt, str) else "".join(message.content for message in prompt)
        return list(text.encode())

    def stream(
        self, prompt: Any, *, system: str | None = None, raw: bool = False, images: Any = (), **options: Any
    ) -> ScriptedStream:
        """As `LLM.stream`."""
        self.shown += [each.data for each in images]
        self.asked.append((prompt, {"system": system, "raw": raw, **options}))
        count = len(self.encode(prompt, system=system, raw=raw))
        if count >= self.config.context_length:
            raise ContextError(f"It exceeds the context by {count + 1 - self.config.context_length} tokens.")
        return ScriptedStream(self, count, Sampling(**options))


class ScriptedStream:
    """As `puna.llm.Stream`."""

    def __init__(self, llm: ScriptedLLM, prompt: int, sampling: Sampling) -> None:
        self._llm, self._prompt, self._sampling = llm, prompt, sampling
        self._said: list[str] = []
        self._finish: FinishReason = "cancelled"
        self.prefilled = 0
        self.prompt_ids = list(range(prompt))
        self._pieces = self._run()

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def _run(self) -> Any:
        for piece in self._llm.pieces:
            time.sleep(self._llm.delay)
            self._said.append(piece)
            if self._sampling.max_tokens == len(self._said):
                self._finish = "length"
                yield piece
                return
            yield piece
        if self._llm.error is not None:
            raise self._llm.error
        self._finish = self._llm.finish

    def close(self) -> None:
        """Stop here."""
        self._pieces.close()

    @property
    def answer(self) -> Answer:
        """What was said."""
        return Answer(
            text="".join(self._said),
            token_ids=tuple(range(len(self._said))),
            prompt_tokens=self._prompt,
            completion_tokens=len(self._said),
            finish_reason=self._finish,
            timings=Timings(0.5, 1.0, 2.0, 4.0),
            model=self._llm.name,
            kernels=self._llm.kernels,
            kv_type="fp16",
            notes=self._llm.notes,
        )


if __name__ == "__main__":
    script = json.loads(sys.argv[1])
    run._load = lambda settings: ScriptedLLM(**script)  # type: ignore[assignment, return-value]
    sys.exit(main(sys.argv[2:]))
