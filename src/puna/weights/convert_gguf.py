"""A checkpoint as one GGUF file.

What it is: types, metadata and tensors brought together for `convert`: rows of q and k in GGUF's order (Meta's), each
tensor packed as it is written. A model that sees becomes two files, as llama.cpp has them: the text, and its vision
encoder beside it (`projector_path`).
What it is not: the container (`gguf_write`), the keys (`gguf_metadata`), or the rule of the mixes (`mixes`).
What is surprising: a file needs a tokenizer, for a program that runs it has no other place to find one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from puna.errors import CheckpointError, UsageError
from puna.kernels.layouts import F32, Packed
from puna.weights import gguf_metadata, gguf_write, mixes, names
from puna.weights.checkpoint import Checkpoint
from puna.weights.files import raw, release, wrap
from puna.weights.gguf_model import projector_path
from puna.weights.gguf_write import Outgoing
from puna.weights.load import chat_format_of, tokenizer_of
from puna.weights.mixes import MIXES
from puna.weights.pack import kind_of, packed_rows
from puna.weights.parts import Plan
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
    """Write the checkpoint as the new file `dest`, and the vision encoder beside it; gives the bytes of the tensors.

    `mix` is `auto` (every matrix as stored) or a name of `mixes.MIXES`; what a user should be told is added to `notes`.
    Raises UsageError for another mix or a projector's file that is there already, TokenizerError where there is no
    tokenizer or GGUF cannot express it, ConfigError for a model that it cannot, CheckpointError for numbers that do not
    fit the type, PunaError when writing fails.
    """
    plan = names.plan(checkpoint.config, "gguf")
    stored = {name: kind_of(tensor.dtype) for name, tensor in checkpoint.tensors.items()}
    if mix == "auto":
        kinds = {
            name: "F32" if mixes.stays_plain(name, checkpoint.tensors[name].shape) else kind
            for name, kind in stored.items()
        }
        said = None if checkpoint.gguf is None else checkpoint.gguf.metadata.get("general.file_type")
        file_type = said if type(said) is int else _file_type(checkpoint, kinds)
    else:
        chosen = mixes.find(mix, "--type")
        shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
        chosen_kinds, replaced = mixes.choose(chosen, checkpoint.config, shapes)
        kinds = stored | chosen_kinds
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
    every = _tensors(checkpoint, plan, kinds)
    tensors = [tensor for tensor in every if not tensor.name.startswith(_PROJECTOR_TENSORS)]
    files = [(dest, metadata, tensors)]
    if len(tensors) < len(every):
        beside = projector_path(dest)
        if beside.exists():
            raise UsageError(f"{beside}: already exists.", remedy="Name another file: its projector lies beside it.")
        projector = gguf_metadata.projector(checkpoint, file_type)
        # First: a model that lies there without its projector would be taken for one that sees nothing.
        files.insert(0, (beside, projector, every[len(tensors) :]))
        notes.append(f"its vision encoder is a file of its own: {beside.name}")
    if (factors := gguf_metadata.rope_factors(checkpoint.config)) is not None:
        tensors.insert(0, _table("rope_freqs.weight", factors))
    sizes = [sum(tensor.nbytes for tensor in held) for _, _, held in files]
    total, done = sum(sizes), 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    with ExitStack() as stack:
        for (path, keys, held), size in zip(reversed(files), reversed(sizes), strict=True):
            unfinished = stack.enter_context(appearing(path, size))
            with unfinished.open("xb") as file:
                gguf_write.write(file, keys, held, report)
                sync(file)
    return total


_PROJECTOR_TENSORS = ("v.", "mm.")


def _tensors(checkpoint: Checkpoint, plan: Plan, kinds: Mapping[str, str]) -> list[Outgoing]:
    """The tensors under GGUF's names, those of a vision encoder last; experts of a layer are one tensor."""
    held: dict[str, list[str]] = {stored: [] for stored in plan.shapes}
    for name, parts in plan.parts.items():  # whole, or one index of the first dimension after the other
        held[parts[0].stored].append(name)
    for stored, inside in held.items():
        if len(several := {kinds[name] for name in inside}) > 1:
            raise CheckpointError(
                f"{checkpoint.path}: {stored} holds the experts of a layer in one type, and they are stored as "
                f"{', '.join(sorted(several))}.",
                remedy="Say with --type what to write them in.",
            )
    ordered = sorted(held, key=lambda stored: stored.startswith(_PROJECTOR_TENSORS))
    return [
        _outgoing(checkpoint, stored, plan.shapes[stored], kinds[held[stored][0]], held[stored]) for stored in ordered
    ]


def _outgoing(
    checkpoint: Checkpoint, stored: str, shape: tuple[int, ...], kind: str, inside: Sequence[str]
) -> Outgoing:
    def pieces() -> Iterator[memoryview]:
        for name in inside:
            tensor = checkpoint.tensors[name]
            tensor.check()
            weight = read = tensor.read()
            if not isinstance(read, Packed):
                weight = wrap(names.repair(name, raw(read), checkpoint.config, interleaved=True))
            for rows in packed_rows(checkpoint.path, name, weight, kind):
                yield rows.reshape(-1).data
            release(read)

    return Outgoing(stored, shape, kind, pieces)


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
