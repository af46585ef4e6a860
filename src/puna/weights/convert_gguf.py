"""A checkpoint as one GGUF file.

What it is: types, metadata and tensors brought together for `convert`: rows of q and k in GGUF's order (Meta's), each
tensor packed as it is written.
What it is not: the container (`gguf_write`), the keys (`gguf_metadata`), or the rule of the mixes (`mixes`).
What is surprising: a file needs a tokenizer, for a program that runs it has no other place to find one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from puna.kernels.layouts import F32, Packed
from puna.weights import gguf_metadata, gguf_write, mixes, names
from puna.weights.checkpoint import Checkpoint
from puna.weights.files import LazyTensor, raw, release, wrap
from puna.weights.gguf_write import Outgoing
from puna.weights.load import chat_format_of, tokenizer_of
from puna.weights.mixes import MIXES
from puna.weights.pack import kind_of, packed_rows
from puna.weights.save import sync
from puna.weights.whole import appearing


def write(
    checkpoint: Checkpoint,
    dest: Path,
    *,
    mix: str,
    tokenizer: Path | None,
    notes: list[str],
    progress: Callable[[int, int], None] | None,
) -> int:
    """Write the checkpoint as the new file `dest`; gives the bytes of its tensors.

    `mix` is `auto` (every matrix as stored) or a name of `mixes.MIXES`; what a user should be told is added to `notes`.
    Raises UsageError for another mix, TokenizerError where there is no tokenizer or GGUF cannot express it,
    CheckpointError for numbers that do not fit the type, PunaError when writing fails.
    """
    stored = {name: kind_of(tensor.dtype) for name, tensor in checkpoint.tensors.items()}
    if mix == "auto":
        kinds = {name: "F32" if len(checkpoint.tensors[name].shape) == 1 else kind for name, kind in stored.items()}
        said = None if checkpoint.gguf is None else checkpoint.gguf.metadata.get("general.file_type")
        file_type = said if type(said) is int else _file_type(checkpoint, kinds)
    else:
        chosen = mixes.find(mix, "--type")
        shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
        kinds, replaced = mixes.choose(chosen, checkpoint.config, shapes)
        file_type = chosen.file_type
        notes += replaced
    notes += mixes.packed_anew(stored, kinds)
    words = tokenizer_of(checkpoint, tokenizer)
    chat = chat_format_of(checkpoint, words)
    if chat is not None and chat.template is None:
        notes.append(f"the {chat.name} cannot be said in a chat template, so the file counts as a base model")
    vocabulary, more = gguf_metadata.words(checkpoint, words, None if chat is None else chat.template)
    notes += more
    metadata = {
        **gguf_metadata.general(checkpoint, file_type), **gguf_metadata.architecture(checkpoint.config), **vocabulary,
    }  # fmt: skip
    tensors = [_outgoing(checkpoint, tensor, kinds[name]) for name, tensor in checkpoint.tensors.items()]
    if (factors := gguf_metadata.rope_factors(checkpoint.config)) is not None:
        tensors.insert(0, _table("rope_freqs.weight", factors))
    total, done = sum(tensor.nbytes for tensor in tensors), 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    with appearing(dest, total) as unfinished, unfinished.open("xb") as file:
        gguf_write.write(file, metadata, tensors, report)
        sync(file)
    return total


def _outgoing(checkpoint: Checkpoint, tensor: LazyTensor, kind: str) -> Outgoing:
    def pieces() -> Iterator[memoryview]:
        tensor.check()
        weight = stored = tensor.read()
        if not isinstance(stored, Packed):
            weight = wrap(names.repair(tensor.name, raw(stored), checkpoint.config, interleaved=True))
        for rows in packed_rows(checkpoint.path, tensor.name, weight, kind):
            yield rows.reshape(-1).data
        release(stored)

    return Outgoing(names.foreign(tensor.name, "gguf"), tensor.shape, kind, pieces)


def _table(name: str, values: F32) -> Outgoing:
    data = values.astype("<f4").view(np.uint8).data
    return Outgoing(name, values.shape, "F32", lambda: iter([data]))


def _file_type(checkpoint: Checkpoint, kinds: dict[str, str]) -> int:
    """The number of the mix whose own type most of the numbers have."""
    sizes: dict[str, int] = {}
    for name, kind in kinds.items():
        if len(checkpoint.tensors[name].shape) > 1:
            sizes[kind] = sizes.get(kind, 0) + checkpoint.tensors[name].nbytes
    most = max(sizes, key=lambda kind: sizes[kind])
    return next((mix.file_type for mix in MIXES.values() if mix.base == most), 0)
