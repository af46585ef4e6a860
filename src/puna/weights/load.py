"""Loads a checkpoint into the tree the decoder computes with, its tokenizer and its chat format.

What it is: `load`. As stored, the weights are views of the mapped file and cost no memory of their own, but packed
matrices are to be regrouped for the kernels, which the runner does once it has answered (`layouts.Mapped`). The
tokenizer is read in a thread, and the file's pages are mapped meanwhile.
What it is not: a choice of device. `tree_map` moves the tree.
What is surprising: `dtype="auto"` computes with each tensor as stored, norms included; any other converts on load,
which takes memory for the whole model and is said in `notes`. So does `quant`, which packs the matrices one by one,
with the types that a GGUF file of that name would have. And no file of Meta's says whether a model was trained to
chat, so for their layout the folder's name does (`Llama3.2-1B-Instruct`, `llama-2-7b-chat`); nor do the GGUFs of 2023,
which brought no template: theirs does.
"""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np

from puna.errors import CheckpointError, TokenizerError, UsageError
from puna.kernels import ops
from puna.kernels.blocks import TYPES
from puna.kernels.layouts import Mapped, Packed, Weight, convert, mapping
from puna.models import llama2
from puna.models.config import DecoderConfig
from puna.models.llama3_vision_config import MllamaConfig
from puna.models.registry import definition
from puna.models.tree import Weights, leaves
from puna.types import QUANTS
from puna.weights import gguf_model, limits, mixes
from puna.weights.checkpoint import Checkpoint, open_checkpoint
from puna.weights.files import ITEM_SIZE, listed, release, unreadable
from puna.weights.pack import KINDS, kind_of
from puna.weights.pack import packed as pack

if TYPE_CHECKING:
    from puna.text.chat import ChatFormat
    from puna.text.tokenizer import Tokenizer


T = TypeVar("T")


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to compute: its numbers, its weights, its tokenizer, and what its user should be told.

    `chat_format` is None for a base model.
    """

    config: DecoderConfig
    weights: Weights
    tokenizer: Tokenizer
    chat_format: ChatFormat | None
    checkpoint: Checkpoint
    notes: tuple[str, ...]


def load(
    path: Path, *, dtype: str = "auto", quant: str | None = None, tokenizer: Path | None = None, packed: bool = True
) -> LoadedModel:
    """Open, check and map a checkpoint, and load its tokenizer (`tokenizer`, else the one in it or beside it).

    `packed`: whether what computes reads packed matrices, and types mixed (torch does not: then they are converted).
    Raises CheckpointError, ConfigError, TokenizerError, ChatFormatError, and UsageError for an unknown dtype or quant.
    """
    checkpoint = open_checkpoint(path)
    with Meanwhile(lambda: tokenizer_of(checkpoint, tokenizer)) as reading:
        weights, notes = load_weights(checkpoint, dtype, quant, packed=packed)
        in_blocks = [leaf for _, leaf in leaves(weights) if isinstance(leaf, Packed)]
        # Where some stay in the file, it is larger than memory, and to read all of it would drive out what is needed.
        if checkpoint.gguf is not None and in_blocks and all(isinstance(leaf, Mapped) for leaf in in_blocks):
            for file in checkpoint.gguf.files:
                for begin in range(0, file.size, TOUCHED):
                    if reading.running():
                        file.touch(begin, begin + TOUCHED)
    config, words = checkpoint.config, reading.result()
    # Llama 3.2 Vision's `<|image|>` is a token past the vocabulary, with a row of the embedding past it.
    past = config.extra_rows if isinstance(config, MllamaConfig) else 0
    if not config.vocab_size <= words.vocab_size <= config.vocab_size + past:
        notes = (*notes, f"the tokenizer has {words.vocab_size} tokens and the embedding {config.vocab_size} rows")
    chat = chat_format_of(checkpoint, words)
    if chat is not None and words.chat_template is None and checkpoint.format == "gguf":
        notes = (*notes, f"the file brings no chat template; by its name it is a chat model: the {chat.name} is used")
    if chat is None and tokenizer is not None and checkpoint.tokenizer is not None:
        beside = read_words(checkpoint, checkpoint.tokenizer)
        if beside.chat_template is not None:
            notes = (*notes, f"the chat template beside the model is not used: {tokenizer} was named, and has none")
    return LoadedModel(config, weights, words, chat, checkpoint, notes)


class Meanwhile(Generic[T]):
    """Work in a thread of its own while the `with` block does another; leaving the block waits for it.

    A fault of the block comes first; `result` raises the work's own.
    """

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._done: list[T] = []
        self._fault: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="puna-tokenizer")

    def _run(self) -> None:
        try:
            self._done.append(self._work())
        except BaseException as error:
            self._fault = error

    def __enter__(self) -> Meanwhile[T]:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()

    def running(self) -> bool:
        """Whether the work goes on."""
        return self._thread.is_alive()

    def result(self) -> T:
        """What the work gave. Raises what it raised."""
        if self._fault is not None:
            raise self._fault
        return self._done[0]


def tokenizer_of(checkpoint: Checkpoint, named: Path | None) -> Tokenizer:
    """The tokenizer in the file that was `named`, else the one in the checkpoint or beside it.

    Raises TokenizerError where there is none, it is damaged, or it has more ordinary tokens than the embedding rows.
    """
    file, config = named or checkpoint.tokenizer, checkpoint.config
    if file is None:
        raise TokenizerError(
            f"{checkpoint.path}: there is no tokenizer beside the weights.",
            remedy="Name one with --tokenizer (tokenizer.json, tokenizer.model, a GGUF, or llama2.c's tok*.bin).",
        )
    words = read_words(checkpoint, file)
    if words.vocab_size - len(words.special) > config.vocab_size:
        raise TokenizerError(
            f"{file}: it has {words.vocab_size} tokens, and the model an embedding for {config.vocab_size}.",
            remedy="It is another model's tokenizer: name the right one with --tokenizer.",
        )
    return words


def read_words(checkpoint: Checkpoint, file: Path) -> Tokenizer:
    """The tokenizer in `file` for a checkpoint: any of the tokenizers' own files, or a GGUF.

    Raises TokenizerError, and CheckpointError or ConfigError for a damaged GGUF.
    """
    from puna.text.tokenizer import load_tokenizer

    if checkpoint.gguf is not None and file == checkpoint.gguf.path:
        return gguf_model.tokenizer_of(checkpoint.gguf)
    try:
        is_gguf = file.is_file() and gguf_model.recognised(file)
    except OSError as error:
        raise unreadable(file, error) from error
    if is_gguf:
        return gguf_model.read_tokenizer(file)
    return load_tokenizer(file, generation=checkpoint.config.generation)


def chat_format_of(checkpoint: Checkpoint, tokenizer: Tokenizer) -> ChatFormat | None:
    """The tokenizer's own template, else the built-in of the generation where Meta's folder, or the name of a GGUF,
    says that it is a chat model."""
    from puna.text.chat import chat_format
    from puna.text.sight import sight_for

    config = checkpoint.config
    named = checkpoint.format == "meta" and named_for_chat(checkpoint.folder)
    instruct = (
        named or gguf_model.named_for_chat(checkpoint.gguf, config.generation)
    ) and config.generation != "llama1"
    if tokenizer.chat_template is None and not instruct:
        return None
    # Code Llama's 70B was trained on another format than the smaller ones, and only its size tells.
    is_code_70b = config.generation == "codellama" and config.layers == llama2.CODE_70B_LAYERS
    generation = "codellama70b" if is_code_70b else config.generation
    return chat_format(tokenizer, generation, instruct=instruct, sight=sight_for(config))


def infills(config: DecoderConfig, tokenizer: Tokenizer) -> bool:
    """Whether a model was trained to fill a gap: its tokenizer has the marks, and it is not the 70B, whose variants
    all have them and of which Meta's README (https://github.com/meta-llama/codellama) names none."""
    from puna.text.infill import infills as has_marks

    return has_marks(tokenizer) and config.layers != llama2.CODE_70B_LAYERS


def guard_version(name: str, checkpoint: Checkpoint, tokenizer: Tokenizer) -> str:
    """The version of Llama Guard that a checkpoint is; "" for none. Its chat template says so, or, where it has none,
    its name or its file's."""
    from puna.text.guard import version_of

    names = (name, checkpoint.folder.name, checkpoint.path.name)
    return version_of(checkpoint.config.generation, tokenizer.chat_template, names)


def named_for_chat(folder: Path) -> bool:
    """Whether Meta's folder is called as a chat model's is; the hub keeps it as `original` in the model's folder."""
    folder = folder.resolve()
    parts = folder.parts[-4:] if folder.name == "original" else (folder.name,)
    return any(re.search(r"instruct|chat", part, re.IGNORECASE) for part in parts)


TOUCHED = 1 << 30
"""Bytes of the file that are mapped at a time while the tokenizer is read: it is not to wait for more than these."""

MOST_OF_MEMORY = 0.6
"""The share of the available memory that packed matrices may take to be regrouped; of a mixture that takes more, its
matrices without the experts: while that goes on, a matrix is
there twice, and the conversation, the system and the file's pages want memory besides."""


def load_weights(
    checkpoint: Checkpoint, dtype: str = "auto", quant: str | None = None, *, packed: bool = True
) -> tuple[Weights, tuple[str, ...]]:
    """The tree of a checkpoint's weights, and notes: what was ignored, unknown, converted or packed.

    `quant` is one of `types.QUANTS`: matrices are packed, vectors become fp32. `packed` as in `load`. Raises UsageError
    for an unknown dtype or quant, for both of them, or for a quant that nothing could read; CheckpointError for a
    number that does not fit the type.
    """
    if dtype != "auto" and dtype not in ITEM_SIZE:
        raise UsageError(f"--dtype {dtype}: no such type.", remedy=f"One of: auto, {', '.join(ITEM_SIZE)}.")
    if quant is not None:
        if dtype != "auto":
            raise UsageError(
                f"--quant {quant} and --dtype {dtype} exclude each other.", remedy="Leave one of them out."
            )
        if not packed:
            raise UsageError(
                f"--quant {quant}: torch reads no packed weights.", remedy="Leave --quant or --device out."
            )
        return _pack(checkpoint, quant)
    if dtype == "auto" and not packed:
        dtype = _plain_dtype(checkpoint)
    sizes = {name: tensor.nbytes for name, tensor in checkpoint.tensors.items() if tensor.dtype in TYPES}
    size, room = sum(sizes.values()), limits.available()
    most = None if room is None or dtype != "auto" else MOST_OF_MEMORY * room
    # Of a mixture, the experts wait in the file first: a token passes few of them, and all of the rest.
    experts = sum(nbytes for name, nbytes in sizes.items() if ".experts." in name)
    keep_experts = most is not None and size > most
    keep_rest = most is not None and size - experts > most

    def parameter(name: str) -> Weight:
        stored = checkpoint.tensors[name].read()
        weight = converted(checkpoint.path, name, stored, dtype)
        if sizes and isinstance(weight, np.ndarray) and weight.ndim == 1 and mapping(weight) is not None:
            # A norm lies between matrices: reading it maps as much as 2 MiB of the file around it, for good.
            weight = weight.copy()
        if len(weight.shape) == 2:
            keep = keep_experts if ".experts." in name else keep_rest
            in_file = isinstance(weight, Packed) and mapping(weight) is not None
            weight = ops.prepare(weight, keep=keep or in_file)
            if in_file and not keep and isinstance(weight, Packed):
                return Mapped(weight.kind, weight.shape, weight.data)
        if weight is not stored:
            release(stored)
        return weight

    weights = definition(checkpoint.config).build(checkpoint.config, parameter)
    notes = notes_on(checkpoint, dtype)
    if room is not None and (keep_experts or checkpoint.nbytes > room):
        what = "the experts" if experts and not keep_rest else "they"
        notes.append(
            f"the weights take {checkpoint.nbytes / 1e9:.1f} GB and {room / 1e9:.1f} GB of memory are available: "
            f"{what} are used as they lie in the file, which is slower"
            + (", and what memory does not hold is read from the disk each time" if checkpoint.nbytes > room else "")
        )
    return weights, tuple(notes)


def _plain_dtype(checkpoint: Checkpoint) -> str:
    """For what computes in one type and reads no packed ones: the type of a GGUF's matrices, bf16 for packed ones."""
    if checkpoint.format != "gguf" or len({tensor.dtype for tensor in checkpoint.tensors.values()}) == 1:
        return "auto" if checkpoint.tensors["embedding"].dtype in ITEM_SIZE else "bf16"
    kinds = {tensor.dtype for tensor in checkpoint.tensors.values() if len(tensor.shape) == 2}
    return kinds.pop() if len(kinds) == 1 and kinds <= ITEM_SIZE.keys() else "bf16"


def _pack(checkpoint: Checkpoint, quant: str) -> tuple[Weights, tuple[str, ...]]:
    """The tree with its matrices packed, one after the other: memory grows with what is packed, not with the file."""
    mix = mixes.find(quant, "--quant", among=QUANTS)
    kinds, replaced = mixes.choose(mix, checkpoint.config, {n: t.shape for n, t in checkpoint.tensors.items()})
    anew = mixes.packed_anew({name: kind_of(tensor.dtype) for name, tensor in checkpoint.tensors.items()}, kinds)
    began, held = time.perf_counter(), 0

    def parameter(name: str) -> Weight:
        nonlocal held
        stored, kind = checkpoint.tensors[name].read(), kinds.get(name)
        if kind is None:  # of the vision encoder, which stays as it is
            weight: Weight = ops.prepare(stored) if len(stored.shape) == 2 else stored
        elif kind not in KINDS.values():
            weight = ops.prepare(pack(checkpoint.path, name, stored, kind))
        else:  # a vector, or rows that no block divides
            weight = converted(checkpoint.path, name, stored, "fp32" if kind == "F32" else "fp16")
            if weight is not stored:
                release(stored)
        held += weight.nbytes
        return weight

    weights = definition(checkpoint.config).build(checkpoint.config, parameter)
    said = (
        f"the weights were packed to {quant} on load: {time.perf_counter() - began:.1f} s, and {held / 1e6:.0f} MB of "
        f"memory for {checkpoint.nbytes / 1e6:.0f} MB stored; `puna convert --to gguf` does it once"
    )
    return weights, (*notes_on(checkpoint, "auto"), *replaced, *anew, said)


def notes_on(checkpoint: Checkpoint, dtype: str) -> list[str]:
    """What a user should be told of a checkpoint read as `dtype`."""
    notes = list(checkpoint.notes)
    if checkpoint.read_config.unknown:
        notes.append(f"the config has keys Puna does not know: {listed(checkpoint.read_config.unknown)}")
    if checkpoint.ignored:
        notes.append(f"stored and not needed: {listed(checkpoint.ignored)}")
    stored = Counter(tensor.dtype for tensor in checkpoint.tensors.values())
    # A GGUF keeps its norms in float32 whatever the rest is in, and `puna show` lists its types.
    if len(stored) > 1 and dtype == "auto" and checkpoint.format != "gguf":
        notes.append(f"the weights are stored in several types: {listed(f'{n} × {t}' for t, n in stored.items())}")
    if dtype != "auto" and (others := stored.keys() - {dtype}):
        notes.append(f"the weights were converted from {listed(others)} to {dtype}")
    return notes


def converted(path: Path, name: str, weight: Weight, dtype: str) -> Weight:
    """The weight in another type, or as it is for `auto`. Raises CheckpointError for a number too large for it."""
    if dtype == "auto":
        return weight
    try:
        return convert(weight, dtype)
    except OverflowError as error:
        raise CheckpointError(f"{path}: {name}: {error}.", remedy="Use bf16 or fp32.") from error
