"""`convert`: one checkpoint into another layout, tensor by tensor, all of it or nothing.

What it is: the walk from any format Puna reads to what others read: a folder as the hub has it (safetensors,
config.json) or as Meta has it (consolidated.00.pth, params.json), with the tokenizer's files copied along; or one GGUF
file (`convert_gguf`), with the tokenizer inside.
What it is not: a change of numbers, unless a type is asked for.
What is surprising: everything is written beside the destination, under a hidden name, until it is whole (`whole`).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puna.errors import TokenizerError, UsageError
from puna.kernels.layouts import Weight
from puna.models.config import write_hub, write_meta
from puna.text.pictures import PROCESSOR_FILES
from puna.weights import convert_gguf, gguf_model, names, notices, parts
from puna.weights.checkpoint import CONFIG_NAME, GENERATION_CONFIG_NAME, Checkpoint, open_checkpoint
from puna.weights.files import ITEM_SIZE, LazyTensor, raw, release, wrap
from puna.weights.load import converted, named_for_chat, notes_on, read_words
from puna.weights.meta import PARAMS_NAME
from puna.weights.pack import kind_of
from puna.weights.save import sync, write_json, write_safetensors, write_torch
from puna.weights.whole import appearing

LAYOUTS = ("safetensors", "meta", "gguf")
"""What `--to` takes."""

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip

_TEMPLATE_FILES = ("tokenizer_config.json", "chat_template.jinja", "chat_template.json")

_LICENCES = re.compile(r"(?:licen[cs]e|use_policy|notice)[\w.-]*", re.IGNORECASE)

_TORCH_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Conversion:
    """What a conversion made: the folder or file, its files, the bytes of its tensors, what its user should be told."""

    path: Path
    layout: str
    files: tuple[str, ...]
    nbytes: int
    notes: tuple[str, ...]


def convert(
    src: Path,
    dest: Path,
    *,
    to: str = "safetensors",
    dtype: str = "auto",
    tokenizer: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Write the checkpoint at `src` as the new folder `dest`, or GGUF file, in the layout `to` (one of LAYOUTS).

    `dtype` auto keeps every tensor's type; others are `fp32`, `bf16`, `fp16`, and for GGUF the names of `mixes.MIXES`.
    `progress(done, total)` gets bytes. Two conversions there and back give the same bits, q and k rows reordered each
    time. Raises UsageError when `dest` exists with something in it, CheckpointError or ConfigError for a source that is
    damaged or that the layout cannot express, PunaError when writing fails; then nothing is left at `dest`,
    nor are the folders above it that were made for it.
    """
    if to not in LAYOUTS:
        raise UsageError(f"--to {to}: no such layout.", remedy=f"One of: {', '.join(LAYOUTS)}.")
    if to != "gguf" and dtype != "auto" and dtype not in ITEM_SIZE:
        raise UsageError(f"--dtype {dtype}: no such type.", remedy=f"One of: auto, {', '.join(ITEM_SIZE)}.")
    thing = "file" if to == "gguf" else "folder"
    if dest.name in ("", ".."):
        raise UsageError(f"{dest}: not the name of a new {thing}.", remedy="Name one that is not there yet.")
    free = dest.is_dir() and to != "gguf" and not any(dest.iterdir())
    if dest.is_symlink() or (dest.exists() and not free):
        raise UsageError(
            f"{dest}: already exists{', and is not empty' * (to != 'gguf')}.", remedy=f"Name a new {thing}."
        )
    checkpoint = open_checkpoint(src)
    if to == "gguf":
        said: list[str] = []
        kind = kind_of(dtype)
        nbytes = convert_gguf.write(checkpoint, dest, mix=kind, tokenizer=tokenizer, notes=said, progress=progress)
        notices.note_on_file(checkpoint, said)
        return Conversion(dest, to, (dest.name,), nbytes, (*notes_on(checkpoint, "auto"), *said))
    if dtype == "auto" and (kinds := {t.dtype for t in checkpoint.tensors.values()} - ITEM_SIZE.keys()):
        raise UsageError(
            f"{src}: its weights are packed ({', '.join(sorted(kinds))}), and the layout {to} holds plain numbers.",
            remedy="Say with --type what to unpack them to: BF16, F16 or F32. Or convert to gguf.",
        )
    notes = notes_on(checkpoint, dtype)
    convention: names.Convention = "hub" if to == "safetensors" else "meta"
    plan = names.plan(checkpoint.config, convention)
    prepared = {name: _prepared(checkpoint, tensor, convention, dtype) for name, tensor in checkpoint.tensors.items()}
    outgoing = parts.write(plan, prepared, src)
    config = _config(checkpoint, outgoing, to, tokenizer)
    companions = _companions(checkpoint, to, tokenizer, notes)
    notice = notices.notice(checkpoint, [name for _, name in companions], notes)
    brings_template = any(name in _TEMPLATE_FILES for _, name in companions)
    was_chat = checkpoint.format == "meta" and named_for_chat(checkpoint.folder)
    if was_chat and not brings_template and not (to == "meta" and named_for_chat(dest)):
        notes.append("the folder's name made it a chat model; the copy has no chat_template and counts as a base model")
    total = sum(tensor.nbytes for tensor in outgoing)
    done = 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    with appearing(dest, total) as unfinished:
        unfinished.mkdir()
        if to == "safetensors":
            files = write_safetensors(unfinished, outgoing, report)
        else:
            # Meta's code wants a head; where it is the embedding, both names stand for the same numbers.
            head, embedding = names.foreign("head", "meta"), names.foreign("embedding", "meta")
            same = {head: embedding} if checkpoint.config.tied_head else {}
            write_torch(unfinished / "consolidated.00.pth", outgoing, same, report)
            files = ["consolidated.00.pth"]
        for source, name in companions:
            with source.open("rb") as a, (unfinished / name).open("wb") as b:
                shutil.copyfileobj(a, b)
                sync(b)
        if notice is not None:
            with (unfinished / notices.NOTICE_NAME).open("wb") as b:
                b.write(notice.encode())
                sync(b)
        # The config is written last: a folder without one is no model to any program.
        write_json(unfinished / (CONFIG_NAME if to == "safetensors" else PARAMS_NAME), config)
    written = [name for _, name in companions] + [notices.NOTICE_NAME] * (notice is not None)
    every = (*files, *written, CONFIG_NAME if to == "safetensors" else PARAMS_NAME)
    return Conversion(dest, to, every, total, tuple(notes))


def _prepared(checkpoint: Checkpoint, tensor: LazyTensor, convention: names.Convention, dtype: str) -> LazyTensor:
    """A parameter as it will be written: in the type asked for, its rows in the layout's order."""

    def read() -> Weight:
        tensor.check()
        stored = tensor.read()
        weight = converted(checkpoint.path, tensor.name, stored, dtype)
        rows = names.repair(tensor.name, raw(weight), checkpoint.config, interleaved=convention == "meta")
        if rows is not raw(stored):
            release(stored)
        return wrap(rows)

    kept = tensor.dtype if dtype == "auto" else dtype
    return LazyTensor(tensor.name, tensor.shape, kept, read)


def _config(checkpoint: Checkpoint, outgoing: list[LazyTensor], to: str, tokenizer: Path | None) -> dict[str, Any]:
    if to == "meta":
        return write_meta(checkpoint.config)
    bos, eos = checkpoint.read_config.bos_id, checkpoint.read_config.eos_ids
    file = tokenizer or checkpoint.tokenizer
    if bos is None and not eos and file is not None:
        words = read_words(checkpoint, file)
        bos, eos = words.bos_id, tuple(sorted(words.stop_ids))
    return write_hub(checkpoint.config, dtype=_TORCH_DTYPES[outgoing[0].dtype], bos_id=bos, eos_ids=eos)


def _companions(checkpoint: Checkpoint, to: str, tokenizer: Path | None, notes: list[str]) -> list[tuple[Path, str]]:
    """Files to copy as they are, and their names: tokenizer, stop tokens, how pictures are made ready, licences.
    What others cannot use is noted."""
    if tokenizer is not None and not tokenizer.is_file():
        raise TokenizerError(
            f"{tokenizer}: no such file.", remedy="Name the tokenizer's file, or leave --tokenizer out."
        )
    file = tokenizer or checkpoint.tokenizer
    found: dict[str, Path] = {}
    if file is None:
        notes.append("there was no tokenizer to copy")
    elif gguf_model.recognised(file):
        notes.append(f"the tokenizer lies in {file.name} and is not copied: --tokenizer {file} runs the result with it")
    else:
        found[file.name] = file
        beside = ((name, file.parent / name) for name in _TOKENIZER_FILES)
        if file.name in _TOKENIZER_FILES:
            found |= {name: path for name, path in beside if path.is_file()}
        wanted = {"safetensors": "tokenizer.json", "meta": "tokenizer.model"}[to]
        if wanted not in found:
            whom = {"safetensors": "transformers", "meta": "Meta's code"}[to]
            notes.append(f"{file.name} is copied as it is; Puna reads it, and {whom} may want a {wanted}")
    generation = checkpoint.folder / GENERATION_CONFIG_NAME
    if generation.is_file():
        found[GENERATION_CONFIG_NAME] = generation
    if checkpoint.path.is_dir() or checkpoint.format in ("safetensors", "meta"):
        found |= {name: path for name in PROCESSOR_FILES if (path := checkpoint.folder / name).is_file()}
        found |= {p.name: p for p in checkpoint.folder.iterdir() if _LICENCES.fullmatch(p.name) and p.is_file()}
    return [(path, name) for name, path in found.items()]
