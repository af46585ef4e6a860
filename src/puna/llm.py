"""`puna.LLM`: a model, its tokenizer and its chat format behind one small interface.

What it is: the walk from a prompt to text on this machine: load, encode, step the engine, detokenize.
What it is not: a server, or a thread: an open stream is computed while somebody iterates over one.
What is surprising: a model that has a chat format takes a string as a user's message; `raw=True` (or a model without
one, such as `cria`) continues the text itself. Whether a model has one is `LLM.chat_format` being None or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from numbers import Integral
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack, cast
from weakref import WeakValueDictionary

import numpy as np

from puna import images as pictured
from puna import sessions
from puna.engine.engine import Engine, Progress
from puna.engine.native_runner import host_runner
from puna.engine.pictures import Shown
from puna.engine.runner import Hidden, Logits, Runner, window
from puna.engine.speculation import PromptLookup, Proposer
from puna.errors import ChatFormatError, DeviceError, PictureError, QueueFullError, UsageError
from puna.images import Image
from puna.kernels import ops
from puna.kernels.layouts import Mapped, mapping
from puna.models.config import DecoderConfig
from puna.models.tree import Weights, leaves
from puna.plan import CacheBudget, cache_budget
from puna.sessions import Restored
from puna.stream import About, Job, Stream
from puna.types import (
    KV_TYPES,
    SPECULATIONS,
    Answer,
    Grammar,
    Infill,
    Judge,
    Message,
    Pooling,
    Prompt,
    Sampling,
    SamplingOptions,
    Score,
    TokenLogprob,
    Tool,
)  # fmt: skip
from puna.weights.adapter import read_adapter
from puna.weights.embedded import EMBEDDED
from puna.weights.find import find_model
from puna.weights.limits import available

if TYPE_CHECKING:
    from puna.engine.grammar import Grammars
    from puna.text.chat import ChatFormat
    from puna.text.pictures import Processor
    from puna.text.tokenizer import Tokenizer

__all__ = ["LLM", "SEQUENCES", "Restored", "Stream", "torch_engine"]

SEQUENCES = 16
"""Answers of a full context that the cache has room for, where the memory has: several streams share it, and adapters
take their memory from it."""


class Prepared(NamedTuple):
    """A prompt for the engine: its ids, those that the answer's text continues, and the pictures that stand in it."""

    ids: list[int]
    follows: list[int]
    pictures: tuple[Shown, ...] = ()


class LLM:
    """A model ready to answer.

    `model` is a path (file or folder), a hub id or short name that was pulled, or `cria`. `dtype` is `auto` (as
    stored), `fp32`, `bf16` or `fp16`; `quant` packs the weights on load (one of `types.QUANTS`, such as `Q4_K_M`);
    `device` is `cpu` or a torch device such as `cuda`; `kernels` is one of `ops.KERNELS`; with `invariant` an answer's
    bits depend on nothing but its own tokens (docs/concepts/engine.md says what that costs); `kv_type` is one of
    `types.KV_TYPES`, and `kv_memory` gigabytes that the cache may take (without: see `puna.plan`).
    `adapter` is the folder of a LoRA adapter for all requests that name none.
    Raises UserError's children for a model that is not there, damaged, or not of this family.
    """

    def __init__(
        self,
        model: str | Path = EMBEDDED,
        *,
        dtype: str = "auto",
        quant: str | None = None,
        device: str = "cpu",
        kernels: str = "auto",
        invariant: bool = False,
        kv_type: str = KV_TYPES[0],
        kv_memory: float | None = None,
        tokenizer: str | Path | None = None,
        adapter: str | Path | None = None,
        speculate: str = SPECULATIONS[0],
        draft: str | Path | None = None,
    ) -> None:
        from puna.weights.load import load

        if device != "cpu" and kernels != "auto":
            raise UsageError(
                f"--kernels {kernels} is about the CPU, and --device is {device}.", remedy="Leave one of them out."
            )
        if device != "cpu" and invariant:
            raise UsageError(f"--invariant is for the CPU, and --device is {device}.", remedy="Leave one of them out.")
        if device != "cpu" and quant is not None:
            raise UsageError(
                f"--quant {quant} is for the CPU, and --device is {device}.", remedy="Leave one of them out."
            )
        if kv_memory is not None and not 0 < kv_memory <= 1e9:
            raise UsageError(f"--kv-memory must be gigabytes, more than 0, not {kv_memory!r}.", remedy="Leave it out.")
        if speculate not in SPECULATIONS:
            raise UsageError(f"--speculate {speculate}: no such way.", remedy=f"One of: {', '.join(SPECULATIONS)}.")
        if draft is not None and speculate != SPECULATIONS[0]:
            raise UsageError(
                f"--speculate {speculate} and --draft exclude each other.", remedy="Leave one of them out."
            )
        self._table = kernels, invariant
        self.settle()
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
        small, free = None, available()
        to_come = _mapped(loaded.weights, free)
        if draft is not None:
            small, more = self._draft_model(str(draft), kv_type)
            to_come += more
            free = available()
        if device == "cpu":
            runner = host_runner(loaded.config, loaded.weights, kv_type)
            self.kernels = ops.summary()
        else:
            on_device = torch_engine(device).TorchRunner(loaded.config, loaded.weights, device, kv_type)
            runner, room = on_device, on_device.free_memory()
            if room is not None:
                free, to_come = room, 0
            self.kernels = f"torch {device}"
        self.kv_type = runner.kv_type
        self.cache: CacheBudget = cache_budget(
            page=runner.page,
            page_bytes=runner.page_bytes,
            context=loaded.config.context_length,
            sequences=SEQUENCES,
            available=free,
            to_come=to_come,
            asked=None if kv_memory is None else int(kv_memory * 1e9),
            draft_page_bytes=small.page_bytes + small.local_page_bytes if small else 0,
            draft_context=small.config.context_length if small else 0,
            local_page_bytes=runner.local_page_bytes,
            window=window(loaded.config, runner.page),
        )
        """The memory of the cache that all answers share."""
        if self.cache.tokens < loaded.config.context_length:
            self.notes = (
                *self.notes,
                f"the cache has room for {self.cache.tokens} tokens of the model's context of "
                f"{loaded.config.context_length}: {self.cache.why}",
            )
        self.checkpoint = loaded.checkpoint
        self.loaded_as = (dtype, quant or "")
        """The dtype that was asked for, and the type that matrices are packed in."""
        self._runner = runner
        guess: Callable[[], Proposer] | None = PromptLookup if speculate == "lookup" else None
        if small is not None:
            from puna.engine.draft import DraftModel

            guess = DraftModel(Engine(small, pages=self.cache.draft_pages))
            self.notes = (
                *self.notes,
                f"of the cache's {self.cache.nbytes / 1e6:,.0f} MB the draft model's takes "
                f"{self.cache.draft_pages * (small.page_bytes + small.local_page_bytes) / 1e6:,.0f} MB",
            )
        local = self.cache.local_pages or None
        self._engine = Engine(runner, pages=self.cache.pages, speculate=guess, local_pages=local)
        self._engine_taken = False
        # Weak: a stream that nobody holds any more is not computed to its end.
        self._streams: WeakValueDictionary[int, Stream | Job] = WeakValueDictionary()
        self.adapter: str | None = None
        """The name of the one that requests use which name none."""
        if adapter is not None:
            self.adapter = self.load_adapter(adapter)

    def _draft_model(self, name: str, kv_type: str) -> tuple[Runner, int]:
        """The model that guesses for this one, and bytes of its weights that the memory is still to take.

        Raises what loading does, and UsageError for a model of another vocabulary.
        """
        from puna.text.token_table import token_table
        from puna.weights.load import load

        small = load(find_model(name), packed=self.device == "cpu")
        if small.config.vocab_size != self.config.vocab_size or token_table(small.tokenizer) != token_table(
            self.tokenizer
        ):
            raise UsageError(
                f"--draft {name}: its tokens are not those of {self.name}.",
                remedy="A draft model has the same tokenizer: name a smaller model of the same family.",
            )
        if self.device == "cpu":
            return host_runner(small.config, small.weights, kv_type), _mapped(small.weights, available())
        on_device: Runner = torch_engine(self.device).TorchRunner(small.config, small.weights, self.device, kv_type)
        return on_device, 0

    @property
    def sees(self) -> bool:
        """Whether messages may hold pictures."""
        return self._runner.sees and self.chat_format is not None and self.chat_format.sees

    def encode(
        self,
        prompt: str | Sequence[Message] | Infill | Judge,
        *,
        system: str | None = None,
        raw: bool = False,
        tools: Sequence[Tool] = (),
    ) -> list[int]:
        """The token ids that `stream` starts from: BOS and the text, or the chat rendered by the model's own format,
        with the tools that it is told about, and those that stand for its pictures; for a gap and for what a guard
        judges, the form that is trained for it.

        Raises ChatFormatError for messages without a chat format and tools that it cannot tell about, UsageError for a
        system message or tools with `raw`, a gap where the model fills none, and a judgement by a model that is no
        guard, PictureError for pictures where the model is blind, and for bad ones.
        """
        return self._encoded(prompt, system=system, raw=raw, tools=tools)[0]

    def _encoded(
        self,
        prompt: str | Sequence[Message] | Infill | Judge,
        *,
        system: str | None = None,
        raw: bool = False,
        tools: Sequence[Tool] = (),
    ) -> tuple[list[int], tuple[Shown, ...]]:
        """As `encode`, with the pictures."""
        if isinstance(prompt, Infill | Judge):
            if system is not None or tools:
                raise UsageError(
                    "A gap, or what a guard judges, has no place for a system message or tools.",
                    remedy="Leave them out.",
                )
            return self._special_ids(prompt), ()
        if tools and isinstance(prompt, str) and (raw or self.chat_format is None):
            why = "raw text has no place for them" if raw else f"{self.name} has no chat format"
            raise UsageError(f"Tools cannot be honoured: {why}.", remedy="Leave them out, or give a conversation.")
        if isinstance(prompt, str) and (raw or self.chat_format is None):
            if system is not None:
                why = "raw text has no roles" if raw else f"{self.name} has no chat format, so no system message"
                raise UsageError(f"A system message cannot be honoured: {why}.", remedy="Put it into the prompt.")
            return self.tokenizer.encode(prompt, bos=self.tokenizer.adds_bos), ()
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
                "A conversation is a list of messages.", remedy='Make each a puna.types.Message("user", "...").'
            )
        if system is not None:
            messages = [Message("system", system), *messages]
        pictures = pictured.pictures_of(messages)
        if not pictures:
            return self.chat_format.encode(messages, self.tokenizer, tools=tools), ()
        pixels = pictured.pixels_of(pictures, self._processor)
        ids, stands = self.chat_format.encode_pictures(messages, self.tokenizer, pixels, tools=tools)
        return ids, pictured.shown(pictures, pixels, stands)

    @cached_property
    def _processor(self) -> Processor:
        """What makes pictures ready for this model. Raises PictureError where it is blind."""
        from puna.text.pictures import processor_for

        if not self._runner.sees and getattr(self.config, "vision", None) is not None:
            raise PictureError(f"--device {self.device} sees no pictures.", remedy="Use --device cpu.")
        folder = self.checkpoint.folder if self.checkpoint.format in ("safetensors", "meta") else None
        return processor_for(self.config, folder)

    def prepared(
        self,
        prompt: str | Sequence[Message] | Sequence[int] | Infill | Judge,
        *,
        system: str | None = None,
        raw: bool = False,
        tools: Sequence[Tool] = (),
    ) -> Prepared:
        """A prompt made ready for the engine; what is an id already stays as it is.

        Raises what `encode` does, and UsageError for a system message or tools beside ids.
        """
        if isinstance(prompt, Infill):
            from puna.text.infill import gap_follows

            return Prepared(self.encode(prompt, system=system, tools=tools), list(gap_follows(self.tokenizer)))
        if isinstance(prompt, Judge):
            return Prepared(self.encode(prompt, system=system, tools=tools), [])
        ids = _token_ids(prompt)
        if ids is None:
            words = cast("str | Sequence[Message]", prompt)
            ids, pictures = self._encoded(words, system=system, raw=raw, tools=tools)
            # An answer in a chat is a text of its own; elsewhere it goes on where the prompt ends, spaces and all.
            return Prepared(ids, ids if raw or self.chat_format is None else [], pictures)
        if system is not None:
            raise UsageError("A system message cannot be added to token ids.", remedy="Give messages, or a text.")
        if tools:
            raise UsageError("Tools cannot be told about in token ids.", remedy="Give messages, or a text.")
        return Prepared(ids, ids)

    def prompt_ids(
        self,
        prompt: str | Sequence[Message] | Sequence[int] | Infill | Judge,
        *,
        system: str | None = None,
        raw: bool = False,
        tools: Sequence[Tool] = (),
    ) -> tuple[list[int], list[int]]:
        """The ids of a prompt, and those that the answer's text continues.

        Raises what `prepared` does, and UsageError for pictures, which ids alone do not show.
        """
        made = self.prepared(prompt, system=system, raw=raw, tools=tools)
        if made.pictures:
            raise UsageError("Pictures have no place here.", remedy="Leave them out, or ask for an answer.")
        return made.ids, made.follows

    @cached_property
    def infills(self) -> bool:
        """Whether it was trained to fill a gap."""
        from puna.weights.load import infills

        return infills(self.config, self.tokenizer)

    @cached_property
    def guards(self) -> str:
        """The version of Llama Guard that it is, "" for none."""
        from puna.weights.load import guard_version

        return guard_version(self.name, self.checkpoint, self.tokenizer)

    def _special_ids(self, prompt: Infill | Judge) -> list[int]:
        if isinstance(prompt, Infill):
            from puna.text.infill import infill_ids

            if not self.infills:
                raise UsageError(
                    f"{self.name} was not trained to fill in the middle of a text.",
                    remedy="Code Llama's 7B and 13B were, but for their Python variants.",
                )
            return infill_ids(self.tokenizer, prompt)
        from puna.text.guard import judge_ids

        if not self.guards:
            raise UsageError(
                f"{self.name} is no guard model: it was not trained to judge.", remedy="Ask a Llama Guard."
            )
        return judge_ids(self.guards, self.tokenizer, prompt)

    @property
    def page_tokens(self) -> int:
        """Tokens that a page of the cache has room for."""
        return self._runner.page

    @property
    def page_bytes(self) -> int:
        """Bytes of a page of the cache: of all layers, but for those that see one chunk only."""
        return self._runner.page_bytes

    @property
    def local_page_bytes(self) -> int:
        """Bytes of a page of the layers that see one chunk only; 0 where there are none."""
        return self._runner.local_page_bytes

    @cached_property
    def grammars(self) -> Grammars:
        """The grammars of this model's vocabulary; made when the first is asked for."""
        from puna.engine.grammar import Grammars
        from puna.text.token_table import encode_after, token_table

        encode = partial(encode_after, self.tokenizer)
        return Grammars(token_table(self.tokenizer), self.stop_ids, self.config.vocab_size, encode=encode)

    def settle(self) -> None:
        """Have the process compute with the kernels that this model was loaded for: that choice is the process's."""
        ops.select(*self._table)

    def take_engine(self) -> Engine:
        """The engine, for another owner, such as a thread: this object computes no more.

        Raises UsageError if it has one, or a stream is open.
        """
        if self._engine_taken:
            raise UsageError("The engine of this model has an owner already.", remedy="Load the model once more.")
        if any(isinstance(stream, Stream) and stream.open for stream in self._streams.values()):
            raise UsageError("A stream of this model is open.", remedy="Iterate over it to its end, or close() it.")
        self._engine.cancel_all()  # streams that were dropped
        self._engine_taken = True
        return self._engine

    def load_adapter(self, folder: str | Path, name: str | None = None) -> str:
        """Have requests name a LoRA adapter that PEFT saved; returns its name, the folder's unless `name` is given.

        While it is loaded its memory is taken from the KV cache's. Raises CheckpointError and ConfigError for one that
        is damaged or of another model, AdapterError for a name that is taken and where the cache has no room for it.
        """
        self._own_engine()
        adapter = read_adapter(Path(folder), self.config)
        name = name or Path(folder).absolute().name
        self._engine.load_adapter(name, adapter.pairs, adapter.nbytes)
        if adapter.unknown:
            self.notes += (f"the config of adapter {name} has keys Puna does not know: {', '.join(adapter.unknown)}",)
        return name

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter. Raises AdapterError for an unknown one, and while an open stream uses it."""
        self._own_engine()
        self._engine.unload_adapter(name)
        if name == self.adapter:
            self.adapter = None

    def stream(
        self,
        prompt: str | Sequence[Message] | Sequence[int] | Infill | Judge,
        *,
        system: str | None = None,
        raw: bool = False,
        grammar: Grammar | None = None,
        adapter: str | None = None,
        images: Sequence[Image] = (),
        **options: Unpack[SamplingOptions],
    ) -> Stream:
        """The answer piece by piece: iterate over it for text; afterwards `.answer` has the whole and its figures.

        `prompt` is a text, a list of messages, token ids taken as they are, a gap to fill, or what a guard judges.
        `images` are shown before the text, or before that of the last message: paths of PNG, JPEG, WebP or GIF files,
        or their bytes. `grammar` is the form that the answer must have, `adapter` the name of one that is loaded.
        Options are `Sampling`'s fields. Several may be open at once, and are computed together.
        Raises ContextError, ChatFormatError, GrammarError, AdapterError, PictureError or UsageError before anything is
        computed.
        """
        from puna.text.answer import AnswerText

        engine = self._own_engine()
        sampling = Sampling(**options)
        for name in ("n", "best_of", "logprobs", "prompt_logprobs"):
            if getattr(sampling, name) != getattr(Sampling, name):
                raise UsageError(
                    f"{name} cannot be honoured here: a stream is the text of one answer.", remedy="Leave it out."
                )
        if images:
            prompt = self._with_images(prompt, images, raw=raw)
        made = self.prepared(prompt, system=system, raw=raw)
        constraint = None if grammar is None else self.grammars.compile(grammar).result()
        request = engine.submit(
            made.ids,
            sampling,
            stop_ids=self.stop_ids,
            constraint=constraint,
            adapter=adapter or self.adapter,
            pictures=made.pictures,
        )
        stream = self._streams[request] = Stream(
            AnswerText(self.tokenizer, made.follows, sampling.stop),
            made.ids,
            step=self._step,
            cancel=partial(engine.cancel, request),
            about=self._about,
        )
        return stream

    def generate(
        self,
        prompt: str | Sequence[Message] | Sequence[int] | Infill | Judge,
        *,
        system: str | None = None,
        raw: bool = False,
        grammar: Grammar | None = None,
        adapter: str | None = None,
        images: Sequence[Image] = (),
        **options: Unpack[SamplingOptions],
    ) -> Answer:
        """The whole answer at once; arguments and errors as `stream`."""
        stream = self.stream(prompt, system=system, raw=raw, grammar=grammar, adapter=adapter, images=images, **options)
        for _ in stream:
            pass
        return stream.answer

    def _with_images(self, prompt: object, given: Sequence[Image], *, raw: bool) -> list[Message]:
        """The prompt with pictures. Raises UsageError and PictureError where they have no place."""
        if isinstance(given, str | bytes):
            raise UsageError("images is a list.", remedy="Put the image into a list.")
        if raw:
            raise UsageError("Images cannot be honoured: raw text has no place for them.", remedy="Leave raw out.")
        self._processor  # noqa: B018 - a blind model refuses before a file is read
        if self.chat_format is None:
            raise ChatFormatError(
                f"{self.name} has no chat format, and images stand in a message.", remedy="Use an instruct model."
            )
        return pictured.with_images(prompt, given)

    def score(
        self,
        prompt: str | Sequence[int],
        continuations: Sequence[str | Sequence[int]],
        *,
        raw: bool = True,
        adapter: str | None = None,
    ) -> list[Score]:
        """How likely the model finds each continuation (a text, or ids) after a prompt, which is computed once.

        A text is cut into tokens as what goes on after the prompt, on its own. Raises ContextError, AdapterError, and
        UsageError for a continuation that has no tokens.
        """
        self._own_engine()
        ids, given = self.given_ids(prompt, continuations, raw=raw)
        name = adapter or self.adapter
        [job] = self._finish([lambda: self._engine.submit_score(ids, given, adapter=name)], len(given))
        return scores_of(job.seen, len(given))

    def given_ids(
        self, prompt: Prompt | Sequence[int], continuations: Sequence[str | Sequence[int]], *, raw: bool = True
    ) -> tuple[list[int], list[list[int]]]:
        """The ids of a prompt, and those of each continuation. Raises what `prompt_ids` does."""
        from puna.text.token_table import encode_after

        ids, _ = self.prompt_ids(prompt, raw=raw)
        given = [
            encode_after(self.tokenizer, each) if isinstance(each, str) else _token_ids(each) or []
            for each in continuations
        ]
        return ids, given

    def embed(
        self,
        texts: Sequence[str | Sequence[int]],
        *,
        pooling: Pooling = "mean",
        normalize: bool = True,
        raw: bool = True,
        adapter: str | None = None,
    ) -> Hidden:
        """A vector for each text (or ids), computed together: float32 [N, dim], each of length 1 if `normalize`.

        It is pooled from the hidden states after the last norm: their mean, the last token's, or (cls) the first one's.
        Raises ContextError, AdapterError, and UsageError for a text without tokens and an unknown pooling.
        """
        self._own_engine()
        if isinstance(texts, str):
            raise UsageError("embed takes a list of texts.", remedy="Put the text into a list.")
        prompts = [self.prompt_ids(text, raw=raw)[0] for text in texts]
        name = adapter or self.adapter
        jobs = self._finish(partial(self._engine.submit_embedding, prompt, pooling, adapter=name) for prompt in prompts)
        vectors = [vector_of(job.seen, normalize=normalize) for job in jobs]
        return np.array(vectors, np.float32).reshape(-1, self.config.dim)

    def logits(self, prompt: str | Sequence[int], *, raw: bool = True) -> Logits:
        """Logits after every token of a text (or of ids): float32 [T, V]. Raises ContextError when it is too long."""
        self._own_engine()
        ids = _token_ids(prompt)
        if ids is None:
            ids = self.encode(cast("str", prompt), raw=raw)
        self._engine.check_prompt(ids, answer=0)
        self.settle()
        return self._runner.all_logits(ids)

    def save_session(self, path: str | Path, prompt: str | Sequence[Message] | Sequence[int]) -> int:
        """Save what was computed for a prompt, to be loaded by `load_session` after a restart; returns its tokens.

        It is what is in the cache: the prompt of an answer, and the answer where `prompt` has it too, in whole pages of
        `engine.runner.PAGE` tokens. The file takes the memory that they take; an older session there is replaced.
        Raises UsageError where another file is there, PunaError where the disk has no room.
        """
        engine = self._own_engine()
        if self.adapter is not None:
            raise UsageError(
                "A session computed with an adapter is not saved.",
                remedy="Merge the adapter into the model, or leave it.",
            )
        return sessions.save(Path(path), self._identity, self.prompt_ids(prompt)[0], engine, self._runner)

    def load_session(self, path: str | Path) -> Restored:
        """Put what `save_session` saved back into the cache: a prompt that begins with its text is not computed again.

        A file that is damaged is used as far as it is good; one of another model, or that is no session, not at all.
        Raises CheckpointError where there is no such file or it cannot be read.
        """
        engine = self._own_engine()
        if self.adapter is not None:
            raise UsageError("A session is not loaded beside an adapter.", remedy="Leave one of them out.")
        return sessions.load(Path(path), self._identity, engine, self._runner)

    @cached_property
    def _identity(self) -> dict[str, str]:
        """Whose keys and values these are: what else computes them differs in their last bits at least."""
        from puna.weights.session_file import model_identity

        kernels = f"{self.kernels} {ops.machine()}{' invariant' if self._table[1] else ''}"
        return {
            "model": model_identity(self.checkpoint, *self.loaded_as),
            "kernels": kernels,
            "kv_type": self.kv_type,
        }

    def _about(self) -> About:
        return {"model": self.name, "kernels": self.kernels, "kv_type": self.kv_type, "notes": self.notes}

    def _own_engine(self) -> Engine:
        if self._engine_taken:
            raise UsageError(
                "Another owner has this model's engine.", remedy="Ask that owner, or load the model again."
            )
        return self._engine

    def _finish(self, submits: Iterable[Callable[[], int]], choices: int = 1) -> list[Job]:
        """Submit requests, as many at once as the engine takes, and step until all are over. Raises what ended one."""
        jobs: list[Job] = []
        try:
            for submit in submits:
                while True:
                    try:
                        job = Job(submit(), choices)
                        break
                    except QueueFullError:
                        self._step()
                self._streams[job.request] = job
                jobs.append(job)
            for job in jobs:
                while not job.over:
                    self._step()
                if job.error is not None:
                    raise job.error
        finally:
            for job in jobs:
                self._engine.cancel(job.request)
        return jobs

    def _step(self) -> None:
        """Step the engine, and hand each open stream what was made for it."""
        self.settle()  # another LLM may have made its own choice since
        for progress in self._engine.step():
            stream = self._streams.get(progress.request)
            if stream is None:
                self._engine.cancel(progress.request)
            else:
                stream.arrive(progress)


FILE_SHARE = 0.75
"""Of the available memory, which pages of a file are counted to fill at most, where weights are used as they lie in it:
the system may drop those and read them again, so the cache gets something beside a file larger than memory."""


def _mapped(weights: Weights, free: int | None) -> int:
    """Bytes of `free` memory that a model's mapped weights are still going to take: all that are to be regrouped, and
    pages of its file for the rest."""
    mapped = [leaf for _, leaf in leaves(weights) if mapping(leaf) is not None]
    regrouped: int = sum(leaf.nbytes for leaf in mapped if isinstance(leaf, Mapped))
    read: int = sum(leaf.nbytes for leaf in mapped) - regrouped
    return regrouped + (read if free is None else min(read, max(0, int(FILE_SHARE * (free - regrouped)))))


def scores_of(seen: Sequence[Progress], count: int) -> list[Score]:
    """What was told of a request for the scores of `count` continuations, as those."""
    scores = []
    for choice in range(count):
        draws = [draw for each in seen if each.choice == choice for draw in each.logprobs or ()]
        tokens = tuple(TokenLogprob(each.token, cast("float", each.logprob), each.top) for each in draws)
        greedy = all(each.token == each.top[0][0] for each in tokens)
        scores.append(Score(sum(each.logprob for each in tokens), greedy, tokens))
    return scores


def vector_of(seen: Sequence[Progress], *, normalize: bool) -> Hidden:
    """What was told of a request for a vector, as that: float32 [dim], of length 1 if `normalize`."""
    vector = np.array(seen[-1].embedding, np.float32)
    if normalize:
        vector /= np.linalg.norm(vector) or 1
    return vector


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
            remedy='Give a str, [puna.types.Message("user", "...")], or whole numbers.',
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
