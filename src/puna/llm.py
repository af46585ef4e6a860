"""`puna.LLM`: a model, its tokenizer and its chat format behind one small interface.

What it is: the walk from a prompt to text on this machine: load, encode, step the engine, detokenize.
What it is not: a server, or several requests at once.
What is surprising: a model that has a chat format takes a string as a user's message; `raw=True` (or a model without
one, such as `cria`) continues the text itself. Which of the two happened is `LLM.chat_format` being None or not.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Unpack

from puna.engine.engine import Engine
from puna.engine.runner import HostRunner, Logits, Runner
from puna.errors import ChatFormatError, DeviceError, UsageError
from puna.kernels import ops
from puna.models.config import DecoderConfig
from puna.types import Answer, FinishReason, Sampling, SamplingOptions, Timings
from puna.weights.find import EMBEDDED, find_model

if TYPE_CHECKING:
    from puna.text.chat import ChatFormat, Message
    from puna.text.tokenizer import Tokenizer


class LLM:
    """A model ready to answer.

    `model` is a path (file or folder), a hub id or short name that was pulled, or `cria`. `dtype` is `auto` (as
    stored), `fp32`, `bf16` or `fp16`; `device` is `cpu` or a torch device such as `cuda`; `kernels` is one of
    `ops.KERNELS`. Raises UserError's children for a model that is not there, damaged, or not of this family.
    """

    def __init__(
        self,
        model: str | Path = EMBEDDED,
        *,
        dtype: str = "auto",
        device: str = "cpu",
        kernels: str = "auto",
        tokenizer: str | Path | None = None,
    ) -> None:
        from puna.weights.load import load

        ops.select(kernels)
        self.name = str(model)
        self.path = find_model(self.name)
        loaded = load(self.path, dtype=dtype, tokenizer=Path(tokenizer) if tokenizer is not None else None)
        self.config: DecoderConfig = loaded.config
        self.tokenizer: Tokenizer = loaded.tokenizer
        self.chat_format: ChatFormat | None = loaded.chat_format
        self.notes: tuple[str, ...] = loaded.notes
        self.device = device
        runner: Runner
        if device == "cpu":
            runner = HostRunner(loaded.config, loaded.weights)
            self.kernels = ops.summary()
        else:
            runner = torch_engine(device).TorchRunner(loaded.config, loaded.weights, device)
            self.kernels = f"torch {device}"
        self._runner = runner
        self._engine = Engine(runner)

    def encode(self, prompt: str | Sequence[Message], *, system: str | None = None, raw: bool = False) -> list[int]:
        """The token ids that `stream` starts from: BOS and the text, or the chat rendered by the model's own format.

        Raises ChatFormatError for messages without a chat format, UsageError for a system message with `raw`.
        """
        if isinstance(prompt, str) and (raw or self.chat_format is None):
            if system is not None:
                why = "raw text has no roles" if raw else f"{self.name} has no chat format, so no system message"
                raise UsageError(f"A system message cannot be honoured: {why}.", remedy="Put it into the prompt.")
            return self.tokenizer.encode(prompt, bos=self.tokenizer.bos_id is not None)
        from puna.text.chat import Message

        if raw:
            raise UsageError("raw takes a text, not messages.", remedy="Leave raw out to use the model's chat format.")
        if self.chat_format is None:
            raise ChatFormatError(
                f"{self.name} is a base model without a chat format.", remedy="Give it a text to continue instead."
            )
        messages = [Message("user", prompt)] if isinstance(prompt, str) else list(prompt)
        if system is not None:
            messages = [Message("system", system), *messages]
        return self.chat_format.encode(messages, self.tokenizer)

    def stream(
        self,
        prompt: str | Sequence[Message] | Sequence[int],
        *,
        system: str | None = None,
        raw: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> Stream:
        """The answer piece by piece: iterate over it for text; afterwards `.answer` has the whole and its figures.

        `prompt` is a text, a list of messages, or token ids taken as they are. Options are `Sampling`'s fields.
        One answer at a time: a new stream ends the one before.
        Raises ContextError, ChatFormatError or UsageError before anything is computed.
        """
        sampling = Sampling(**options)
        if not isinstance(prompt, str) and all(isinstance(item, int) for item in prompt):
            if system is not None:
                raise UsageError("A system message cannot be added to token ids.")
            ids = [int(item) for item in prompt]  # type: ignore[call-overload]
        else:
            ids = self.encode(prompt, system=system, raw=raw)  # type: ignore[arg-type]
        request = self._engine.submit(ids, sampling, self.tokenizer.stop_ids)
        return Stream(self, self._engine, request, ids, sampling)

    def generate(
        self,
        prompt: str | Sequence[Message] | Sequence[int],
        *,
        system: str | None = None,
        raw: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> Answer:
        """The whole answer at once; arguments and errors as `stream`."""
        stream = self.stream(prompt, system=system, raw=raw, **options)
        for _ in stream:
            pass
        return stream.answer

    def logits(self, prompt: str | Sequence[int], *, raw: bool = True) -> Logits:
        """Logits after every token of a text (or of ids): float32 [T, V]. Raises ContextError when it is too long."""
        ids = self.encode(prompt, raw=raw) if isinstance(prompt, str) else list(prompt)
        # Submitting checks ids and length by the engine's own rules; scoring leaves its cache alone.
        self._engine.cancel(self._engine.submit(ids, Sampling(max_tokens=None)))
        return self._runner.all_logits(ids)


class Stream:
    """One answer under way. Iterating gives text as soon as it is certain; closing it early cancels the request."""

    def __init__(self, llm: LLM, engine: Engine, request: int, prompt: list[int], sampling: Sampling) -> None:
        from puna.text.detokenizer import Detokenizer, StopStrings

        self._llm, self._engine, self._request, self._prompt = llm, engine, request, prompt
        self._detokenizer = Detokenizer(llm.tokenizer, prompt)
        self._stops = StopStrings(sampling.stop)
        self._answer: Answer | None = None
        self.prefilled = 0
        self._pieces = self._run()

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Stop here: the answer is what was made so far, its finish reason "cancelled"."""
        self._pieces.close()

    @property
    def answer(self) -> Answer:
        """The finished answer. Raises UsageError before the stream has ended."""
        if self._answer is None:
            raise UsageError("The answer is not finished.", remedy="Iterate over the stream to its end, or close() it.")
        return self._answer

    def _run(self) -> Generator[str, None, None]:
        began = time.perf_counter()
        first: float | None = None
        ids: list[int] = []
        text: list[str] = []
        finish: FinishReason = "cancelled"
        reused = 0
        try:
            while self._engine.active == self._request:
                progress = self._engine.step()
                self.prefilled, reused = progress.prefilled, progress.reused
                if progress.token is None and progress.finish is None:
                    continue
                first = first or time.perf_counter()
                piece = ""
                if progress.token is not None:
                    ids.append(progress.token)
                    piece = self._stops.push(self._detokenizer.push(progress.token))
                if progress.finish is not None:
                    piece += self._stops.push(self._detokenizer.flush()) + self._stops.flush()
                ended: FinishReason | None = "stop" if self._stops.hit is not None else progress.finish
                if piece:
                    text.append(piece)
                if ended is not None:
                    finish = ended
                    self._engine.cancel(self._request)
                if piece:
                    yield piece
                if ended is not None:
                    return
        finally:
            self._engine.cancel(self._request)
            if finish == "cancelled":
                # What was held back (half a character, the start of a stop string) belongs to what was made.
                text.append(self._stops.push(self._detokenizer.flush()) + self._stops.flush())
            now = time.perf_counter()
            prefill = (first or now) - began
            decode = now - (first or now)
            self._answer = Answer(
                text="".join(text),
                token_ids=tuple(ids),
                prompt_tokens=len(self._prompt),
                completion_tokens=len(ids),
                finish_reason=finish,
                timings=Timings(
                    prefill,
                    decode,
                    (len(self._prompt) - reused) / prefill if prefill > 0 else 0.0,
                    (len(ids) - 1) / decode if decode > 0 and len(ids) > 1 else 0.0,
                ),
                model=self._llm.name,
                kernels=self._llm.kernels,
                notes=self._llm.notes,
            )


def torch_engine(device: str) -> ModuleType:
    """The module that runs models on torch devices (`puna.engine.torch_runner`). Raises DeviceError without PyTorch."""
    try:
        from puna.engine import torch_runner
    except ImportError as error:
        raise DeviceError(
            f"--device {device} needs PyTorch, which is not installed ({error}).",
            remedy='Install it with `pip install "puna[torch]"`, or use --device cpu.',
        ) from error
    return torch_runner
