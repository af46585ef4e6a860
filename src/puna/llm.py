"""`puna.LLM`: a model, its tokenizer and its chat format behind one small interface.

What it is: the walk from a prompt to text on this machine: load, encode, step the engine, detokenize.
What it is not: a server, or several requests at once.
What is surprising: a model that has a chat format takes a string as a user's message; `raw=True` (or a model without
one, such as `cria`) continues the text itself. Whether a model has one is `LLM.chat_format` being None or not.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from numbers import Integral
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Unpack

from puna.engine.engine import Engine
from puna.engine.native_runner import host_runner
from puna.engine.runner import Logits, Runner
from puna.errors import ChatFormatError, DeviceError, UsageError
from puna.kernels import ops
from puna.models.config import DecoderConfig
from puna.types import KV_TYPES, Answer, FinishReason, Sampling, SamplingOptions, Timings
from puna.weights.embedded import EMBEDDED
from puna.weights.find import find_model

if TYPE_CHECKING:
    from puna.text.chat import ChatFormat, Message
    from puna.text.tokenizer import Tokenizer


class LLM:
    """A model ready to answer.

    `model` is a path (file or folder), a hub id or short name that was pulled, or `cria`. `dtype` is `auto` (as
    stored), `fp32`, `bf16` or `fp16`; `quant` packs the weights on load (one of `types.QUANTS`, such as `Q4_K_M`);
    `device` is `cpu` or a torch device such as `cuda`; `kernels` is one of `ops.KERNELS`; `kv_type` is one of
    `types.KV_TYPES`. Raises UserError's children for a model that is not there, damaged, or not of this family.
    """

    def __init__(
        self,
        model: str | Path = EMBEDDED,
        *,
        dtype: str = "auto",
        quant: str | None = None,
        device: str = "cpu",
        kernels: str = "auto",
        kv_type: str = KV_TYPES[0],
        tokenizer: str | Path | None = None,
    ) -> None:
        from puna.weights.load import load

        if device != "cpu" and kernels != "auto":
            raise UsageError(
                f"--kernels {kernels} is about the CPU, and --device is {device}.", remedy="Leave one of them out."
            )
        if device != "cpu" and quant is not None:
            raise UsageError(
                f"--quant {quant} is for the CPU, and --device is {device}.", remedy="Leave one of them out."
            )
        self.kernels_asked = kernels
        ops.select(kernels)
        self.name = str(model)
        self.path = find_model(self.name)
        loaded = load(
            self.path,
            dtype=dtype,
            quant=quant,
            tokenizer=Path(tokenizer) if tokenizer is not None else None,
            packed=device == "cpu",
        )
        self.config: DecoderConfig = loaded.config
        self.tokenizer: Tokenizer = loaded.tokenizer
        self.chat_format: ChatFormat | None = loaded.chat_format
        self.notes: tuple[str, ...] = loaded.notes
        self.stop_ids: frozenset[int] = self.tokenizer.stop_ids.union(loaded.checkpoint.read_config.eos_ids)
        """Every token that ends an answer: the tokenizer's, and those the model's own config names."""
        self.device = device
        runner: Runner
        if device == "cpu":
            runner = host_runner(loaded.config, loaded.weights, kv_type)
            self.kernels = ops.summary()
        else:
            runner = torch_engine(device).TorchRunner(loaded.config, loaded.weights, device, kv_type)
            self.kernels = f"torch {device}"
        self.kv_type = runner.kv_type
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
            return self.tokenizer.encode(prompt, bos=self.tokenizer.adds_bos)
        from puna.text.chat import Message

        if raw:
            raise UsageError("raw takes a text, not messages.", remedy="Leave raw out to use the model's chat format.")
        if self.chat_format is None:
            raise ChatFormatError(
                f"{self.name} has no chat format: it brings no chat template, and its files do not say which it was "
                "trained on.",
                remedy="Give it a text to continue instead.",
            )
        messages = [Message("user", prompt)] if isinstance(prompt, str) else list(prompt)
        if not all(isinstance(message, Message) for message in messages):
            raise UsageError(
                "A conversation is a list of messages.", remedy='Make each a puna.text.chat.Message("user", "...").'
            )
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
        ids = _token_ids(prompt)
        as_ids = ids is not None
        if ids is None:
            ids = self.encode(prompt, system=system, raw=raw)  # type: ignore[arg-type]
        elif system is not None:
            raise UsageError("A system message cannot be added to token ids.", remedy="Give messages, or a text.")
        # An answer in a chat is a text of its own; elsewhere it goes on where the prompt ends, spaces and all.
        follows = ids if as_ids or raw or self.chat_format is None else []
        request = self._engine.submit(ids, sampling, self.stop_ids)
        return Stream(self, self._engine, request, ids, follows, sampling)

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
        ids = _token_ids(prompt)
        if ids is None:
            ids = self.encode(prompt, raw=raw)  # type: ignore[arg-type]
        self._engine.check_prompt(ids, answer=0)
        ops.select(self.kernels_asked)
        return self._runner.all_logits(ids)


class Stream:
    """One answer under way. Iterating gives text as soon as it is certain; closing it early cancels the request."""

    def __init__(
        self, llm: LLM, engine: Engine, request: int, prompt: list[int], follows: list[int], sampling: Sampling
    ) -> None:
        """`follows`: the ids that the answer's text continues; none where it is a text of its own."""
        from puna.text.detokenizer import Detokenizer, StopStrings

        self._llm, self._engine, self._request, self._prompt = llm, engine, request, prompt
        self._detokenizer = Detokenizer(llm.tokenizer, follows)
        self._stops = StopStrings(sampling.stop)
        self._ids: list[int] = []
        self._text: list[str] = []
        self._began = time.perf_counter()
        self._first: float | None = None
        self._reused = 0
        self._answer: Answer | None = None
        self.prefilled = 0
        """How many of the prompt's tokens are in the cache so far."""

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while self._answer is None:
            if self._engine.active != self._request:  # a newer request took the engine
                self.close()
            elif piece := self._advance():
                return piece
        raise StopIteration

    def close(self) -> None:
        """Stop here: the answer is what was made so far, finish reason "cancelled". After the end it does nothing."""
        if self._answer is None:
            # What was held back (half a character, the start of a stop string) belongs to what was made.
            self._text.append(self._held_back())
            self._end("cancelled")

    @property
    def answer(self) -> Answer:
        """The finished answer. Raises UsageError before the stream has ended."""
        if self._answer is None:
            raise UsageError("The answer is not finished.", remedy="Iterate over the stream to its end, or close() it.")
        return self._answer

    def _advance(self) -> str:
        """One step of the engine; the text it makes certain, often none."""
        ops.select(self._llm.kernels_asked)  # another LLM may have made its own choice since
        progress = self._engine.step()
        self.prefilled, self._reused = progress.prefilled, progress.reused
        if progress.token is None and progress.finish is None:
            return ""
        self._first = self._first or time.perf_counter()
        piece = ""
        if progress.token is not None:
            self._ids.append(progress.token)
            piece = self._stops.push(self._detokenizer.push(progress.token))
        if progress.finish is not None:
            piece += self._held_back()
        self._text.append(piece)
        if self._stops.hit is not None:
            self._end("stop")
        elif progress.finish is not None:
            self._end(progress.finish)
        return piece

    def _held_back(self) -> str:
        return self._stops.push(self._detokenizer.flush()) + self._stops.flush()

    def _end(self, reason: FinishReason) -> None:
        self._engine.cancel(self._request)
        now = time.perf_counter()
        prefill, decode = (self._first or now) - self._began, now - (self._first or now)
        made = len(self._ids)
        self._answer = Answer(
            text="".join(self._text),
            token_ids=tuple(self._ids),
            prompt_tokens=len(self._prompt),
            completion_tokens=made,
            finish_reason=reason,
            timings=Timings(
                prefill,
                decode,
                (len(self._prompt) - self._reused) / prefill if prefill > 0 else 0.0,
                (made - 1) / decode if decode > 0 and made > 1 else 0.0,
            ),
            model=self._llm.name,
            kernels=self._llm.kernels,
            kv_type=self._llm.kv_type,
            notes=self._llm.notes,
        )


def _token_ids(prompt: object) -> list[int] | None:
    """The prompt as token ids, or None for a text or messages. Raises UsageError for what is neither."""
    if isinstance(prompt, str):
        return None
    items: list[Any] = list(prompt) if isinstance(prompt, Iterable) and not isinstance(prompt, bytes) else [None]
    if all(isinstance(item, Integral) and not isinstance(item, bool) for item in items):
        return [int(item) for item in items]
    if any(item is None or isinstance(item, str | bytes | float) for item in items):
        raise UsageError(
            f"A prompt is a text, a list of messages, or a list of token ids, not {prompt!r:.80}.",
            remedy='Give a str, [puna.text.chat.Message("user", "...")], or whole numbers.',
        )
    return None


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
