"""Loads a checkpoint into the tree the decoder computes with, its tokenizer and its chat format.

What it is: `load`. As stored, the weights are views of the mapped file and cost no memory of their own.
What it is not: a choice of device. `tree_map` moves the tree.
What is surprising: `dtype="auto"` computes with each tensor as stored, norms included; any other converts on load,
which takes memory for the whole model and is said in `notes`. And no file of Meta's says whether a model was trained to
chat, so for their layout the folder's name does (`Llama3.2-1B-Instruct`, `llama-2-7b-chat`).
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from puna.errors import CheckpointError, TokenizerError, UsageError
from puna.kernels.layouts import Weight, convert
from puna.models import decoder, llama2
from puna.models.config import DecoderConfig
from puna.models.tree import DecoderWeights
from puna.weights.checkpoint import Checkpoint, open_checkpoint
from puna.weights.files import ITEM_SIZE, listed, release

if TYPE_CHECKING:
    from puna.text.chat import ChatFormat
    from puna.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to compute: its numbers, its weights, its tokenizer, and what its user should be told.

    `chat_format` is None for a base model.
    """

    config: DecoderConfig
    weights: DecoderWeights
    tokenizer: Tokenizer
    chat_format: ChatFormat | None
    checkpoint: Checkpoint
    notes: tuple[str, ...]


def load(path: Path, *, dtype: str = "auto", tokenizer: Path | None = None) -> LoadedModel:
    """Open, check and map a checkpoint, and load its tokenizer (`tokenizer`, else the one beside it).

    Raises CheckpointError, ConfigError, TokenizerError, ChatFormatError, and UsageError for an unknown dtype.
    """
    from puna.text.tokenizer import load_tokenizer

    checkpoint = open_checkpoint(path)
    weights, notes = load_weights(checkpoint, dtype)
    file = tokenizer or checkpoint.tokenizer
    if file is None:
        raise TokenizerError(
            f"{path}: there is no tokenizer beside the weights.",
            remedy="Name one with --tokenizer (tokenizer.json, tokenizer.model, or llama2.c's tok*.bin).",
        )
    config = checkpoint.config
    words = load_tokenizer(file, generation=config.generation)
    if words.vocab_size - len(words.special) > config.vocab_size:
        raise TokenizerError(
            f"{file}: it has {words.vocab_size} tokens, and the model an embedding for {config.vocab_size}.",
            remedy="It is another model's tokenizer: name the right one with --tokenizer.",
        )
    if words.vocab_size != config.vocab_size:
        notes = (*notes, f"the tokenizer has {words.vocab_size} tokens and the embedding {config.vocab_size} rows")
    chat = chat_format_of(checkpoint, words)
    if chat is None and tokenizer is not None and checkpoint.tokenizer is not None:
        beside = load_tokenizer(checkpoint.tokenizer, generation=config.generation)
        if beside.chat_template is not None:
            notes = (*notes, f"the chat template beside the model is not used: {tokenizer} was named, and has none")
    return LoadedModel(config, weights, words, chat, checkpoint, notes)


def chat_format_of(checkpoint: Checkpoint, tokenizer: Tokenizer) -> ChatFormat | None:
    """The tokenizer's own template, else the built-in of the generation where Meta's folder says it is a chat model."""
    from puna.text.chat import chat_format

    config = checkpoint.config
    instruct = checkpoint.format == "meta" and named_for_chat(checkpoint.folder) and config.generation != "llama1"
    if tokenizer.chat_template is None and not instruct:
        return None
    # Code Llama's 70B was trained on another format than the smaller ones, and only its size tells.
    is_code_70b = config.generation == "codellama" and config.layers == llama2.CODE_70B_LAYERS
    return chat_format(tokenizer, "codellama70b" if is_code_70b else config.generation, instruct=instruct)


def named_for_chat(folder: Path) -> bool:
    """Whether Meta's folder is called as a chat model's is; the hub keeps it as `original` in the model's folder."""
    folder = folder.resolve()
    parts = folder.parts[-4:] if folder.name == "original" else (folder.name,)
    return any(re.search(r"instruct|chat", part, re.IGNORECASE) for part in parts)


def load_weights(checkpoint: Checkpoint, dtype: str = "auto") -> tuple[DecoderWeights, tuple[str, ...]]:
    """The tree of a checkpoint's weights, and notes: what was ignored, unknown or converted.

    Raises UsageError for an unknown dtype, CheckpointError for a number that does not fit it.
    """
    if dtype != "auto" and dtype not in ITEM_SIZE:
        raise UsageError(f"--dtype {dtype}: no such type.", remedy=f"One of: auto, {', '.join(ITEM_SIZE)}.")

    def parameter(name: str) -> Weight:
        stored = checkpoint.tensors[name].read()
        weight = converted(checkpoint.path, name, stored, dtype)
        if weight is not stored:
            release(stored)
        return weight

    weights = decoder.build(checkpoint.config, parameter)
    return weights, tuple(notes_on(checkpoint, dtype))


def notes_on(checkpoint: Checkpoint, dtype: str) -> list[str]:
    """What a user should be told of a checkpoint read as `dtype`."""
    notes = list(checkpoint.notes)
    if checkpoint.read_config.unknown:
        notes.append(f"the config has keys Puna does not know: {listed(checkpoint.read_config.unknown)}")
    if checkpoint.ignored:
        notes.append(f"stored and not needed: {listed(checkpoint.ignored)}")
    stored = Counter(tensor.dtype for tensor in checkpoint.tensors.values())
    if len(stored) > 1 and dtype == "auto":
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
