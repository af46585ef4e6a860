"""Opens any checkpoint Puna reads, and proves that it is whole before a number of it is used.

What it is: `open_checkpoint`, which tells the format from the content, has that format's reader list the tensors, and
compares them with the shapes of the model's definition one by one.
What it is not: loading. A `Checkpoint` holds lazy tensors: opening an 8B model reads some kilobytes.
What is surprising: a head equal to the embedding, bit for bit, is not kept as a second tensor; Meta's Llama 3.2 files
and llama2.c's `.pt` store one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from puna.errors import CheckpointError
from puna.kernels.blocks import TYPES
from puna.models.config import DecoderConfig, ReadConfig, read_hub, read_meta
from puna.models.llama3_vision_config import MllamaConfig
from puna.models.registry import definition
from puna.weights import gguf, gguf_model, llama2c, meta, names, parts, safetensors
from puna.weights.files import ITEM_SIZE, LazyTensor, MappedFile, listed, read_json, same_bits, shown, unreadable
from puna.weights.torch_file import open_torch, state_tensors

__all__ = ["Checkpoint", "Format", "LazyTensor", "open_checkpoint"]

Format = Literal["safetensors", "meta", "llama2c", "pt", "gguf"]

CONFIG_NAME = "config.json"
GENERATION_CONFIG_NAME = "generation_config.json"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: what it is, and its parameters by canonical name, none of them read yet.

    `ignored` names what it stores besides, all of it known not to change the arithmetic. `tokenizer` is the tokenizer's
    file if one lies where it belongs, `folder` the folder they lie in, `files` those of the weights, `notes` what the
    user should be told. `gguf` is the open file where it is one: its metadata, its tokenizer.
    """

    path: Path
    format: Format
    read_config: ReadConfig
    tensors: Mapping[str, LazyTensor]
    ignored: tuple[str, ...]
    tokenizer: Path | None
    folder: Path
    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()
    gguf: gguf.GGUF | None = None

    @property
    def config(self) -> DecoderConfig:
        """The model's numbers."""
        return self.read_config.config

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters as stored."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a file or a folder, whichever of the formats it is.

    Raises CheckpointError or ConfigError naming file and key when anything is missing, left over, of another shape or
    type than the config says, or irregular in any way.
    """
    try:
        return _open_folder(path) if path.is_dir() else _open_file(path)
    except OSError as error:
        raise unreadable(error.filename or path, error) from error
    except RecursionError as error:
        raise CheckpointError(f"{path}: a file is nested too deeply.", remedy="Fetch it again.") from error


def _open_file(path: Path) -> Checkpoint:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file or folder.", remedy="`puna list` shows the models that are here.")
    if path.name == safetensors.INDEX_NAME:
        return _open_safetensors(path, path.parent)
    if path.suffix == ".json":
        raise CheckpointError(f"{path}: not a file of weights.", remedy="Name the folder it lies in, or the weights.")
    if path.name.startswith(_ADAPTER_PREFIX) and (path.parent / _ADAPTER_CONFIG_NAME).is_file():
        raise _adapter(path)
    file = MappedFile(path)
    start = file.bytes[:10]
    if start[:4] == gguf.MAGIC:
        return _open_gguf(path)
    if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
        if meta.SHARD_NAME.fullmatch(path.name) and (path.parent / meta.PARAMS_NAME).is_file():
            return _open_meta(path, path.parent)
        return _open_pt(path)
    if start[8:9] == b"{":
        index = path.parent / safetensors.INDEX_NAME
        if index.is_file() and path.name != safetensors.SINGLE_NAME:
            return _open_safetensors(index, path.parent)
        return _open_safetensors(path, path.parent)
    if llama2c.recognised(file):
        read_config, tensors, ignored = llama2c.read(file)
        tokenizer = _find_tokenizer(path.parent, read_config.config, "llama2c")
        return Checkpoint(path, "llama2c", read_config, tensors, ignored, tokenizer, path.parent, (path,))
    raise CheckpointError(f"{path}: no format that Puna reads.", remedy=_FORMATS)


_LOOSE_NAMES = ("model.bin", "pytorch_model.bin")

_FORMATS = (
    "Puna reads Hugging Face safetensors, GGUF, Meta's consolidated.*.pth with params.json, .pt files of torch.save, "
    "and llama2.c's .bin (version 0)."
)

# PEFT's names for what it saves.
_ADAPTER_CONFIG_NAME = "adapter_config.json"
_ADAPTER_PREFIX = "adapter_model."


def _open_folder(folder: Path) -> Checkpoint:
    index, single = folder / safetensors.INDEX_NAME, folder / safetensors.SINGLE_NAME
    shards = sorted(p for p in folder.iterdir() if meta.SHARD_NAME.fullmatch(p.name))
    adapter = (folder / _ADAPTER_CONFIG_NAME).is_file()
    others = sorted(p for p in folder.glob("*.safetensors") if not (adapter and p.name.startswith(_ADAPTER_PREFIX)))
    hub = [p for p in (index, single) if p.is_file()] or others[:1]
    if hub and shards:
        raise CheckpointError(
            f"{folder}: both {hub[0].name} and {shards[0].name} are there, two models or one model twice.",
            remedy="Name the file of the one you mean.",
        )
    if len(hub) == 2:
        raise CheckpointError(
            f"{folder}: both {index.name} and {single.name} are there.",
            remedy="Name the one you mean, or remove the other.",
        )
    if hub:
        if hub[0] not in (index, single) and len(others) > 1:
            raise CheckpointError(
                f"{folder}: {len(others)} safetensors files and no {safetensors.INDEX_NAME}.",
                remedy="Fetch the index, which says what lies in which shard.",
            )
        return _open_safetensors(hub[0], folder)
    if shards:
        return _open_meta(folder, folder)
    # Before the loose files: beside an adapter lie the .pt files of its training's optimizer.
    if adapter and not any((folder / name).is_file() for name in _LOOSE_NAMES):
        raise _adapter(folder)
    loose = sorted(p for p in folder.iterdir() if p.suffix in (".pt", ".pth") or p.name in _LOOSE_NAMES)
    if len(loose) == 1:
        return _open_file(loose[0])
    if loose:
        raise CheckpointError(f"{folder}: several models: {listed(p.name for p in loose)}.", remedy="Name one of them.")
    if ggufs := gguf_model.models_in(folder):
        if len(ggufs) > 1:
            raise CheckpointError(
                f"{folder}: {len(ggufs)} GGUF models: {listed(path.name for path in ggufs)}.",
                remedy="Name one of them.",
            )
        return _open_gguf(ggufs[0])
    # A .bin of llama2.c may have any name and has no magic number, so it is opened only when it is named.
    if bins := sorted(p.name for p in folder.glob("*.bin") if _is_llama2c(p)):
        raise CheckpointError(
            f"{folder}: no weights but llama2.c's: {listed(bins)}.",
            remedy=f"Name the file: {folder / shown(bins[0])}",
        )
    raise CheckpointError(f"{folder}: no weights in this folder.", remedy=f"Name the folder that has them. {_FORMATS}")


def _adapter(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path}: a LoRA adapter ({_ADAPTER_CONFIG_NAME} says so), not a model.",
        remedy="Merge it into its base model (PEFT's merge_and_unload, then save_pretrained), and name the result.",
    )


def _is_llama2c(path: Path) -> bool:
    if not path.is_file() or not path.stat().st_size:
        return False
    return llama2c.recognised(MappedFile(path))


def _open_safetensors(weights: Path, folder: Path) -> Checkpoint:
    config_file = folder / CONFIG_NAME
    if not config_file.is_file():
        raise CheckpointError(
            f"{weights}: there is no {CONFIG_NAME} beside it.", remedy="Fetch the model's config.json into that folder."
        )
    if weights.name == safetensors.INDEX_NAME:
        entries = safetensors.read_sharded(weights)
    else:
        entries = safetensors.read_header(MappedFile(weights))
    stored = {name: entry.lazy() for name, entry in entries.items()}
    read_config = _with_generation_config(read_hub(read_json(config_file), str(config_file)), folder)
    files = tuple(sorted({entry.file.path for entry in entries.values()}))
    return _matched(weights, "safetensors", folder, files, read_config, [stored], "hub")


def _with_generation_config(read_config: ReadConfig, folder: Path) -> ReadConfig:
    """The stop tokens of `generation_config.json` besides: chat models have more there than in config.json."""
    path = folder / GENERATION_CONFIG_NAME
    if not path.is_file():
        return read_config
    eos = read_json(path).get("eos_token_id")
    ids = tuple(eos if isinstance(eos, list) else [] if eos is None else [eos])
    if not all(type(i) is int and 0 <= i < 1 << 24 for i in ids):
        raise CheckpointError(f"{path}: 'eos_token_id' must be token ids.", remedy="Fetch the file again.")
    return dataclasses.replace(read_config, eos_ids=tuple(dict.fromkeys((*read_config.eos_ids, *ids))))


def _open_gguf(path: Path) -> Checkpoint:
    whole = gguf.read(path)
    read_config, stored, notes = gguf_model.config_of(whole)
    own = tuple(file.path for file in whole.files)
    beside = {Path(tensor.at[0]) for tensor in stored.values() if tensor.at is not None} - set(own)
    files = (*own, *sorted(beside))
    found = _matched(whole.path, "gguf", path.parent, files, read_config, [stored], "gguf")
    tokenizer = whole.path if gguf_model.has_tokenizer(whole) else found.tokenizer
    return dataclasses.replace(found, tokenizer=tokenizer, notes=(*found.notes, *notes), gguf=whole)


def _open_meta(path: Path, folder: Path) -> Checkpoint:
    params = folder / meta.PARAMS_NAME
    if not params.is_file():
        raise CheckpointError(
            f"{folder}: there is no {meta.PARAMS_NAME} beside the shards.", remedy="Fetch the model's params.json."
        )
    read_config, shards, besides = meta.read(folder, read_json(params))
    return _matched(path, "meta", folder, tuple(meta.shard_paths(folder)), read_config, shards, "meta", besides)


def _open_pt(path: Path) -> Checkpoint:
    """A `.pt`: llama2.c's (its arguments inside), or a bare state dict with a config beside it."""
    file = open_torch(path)
    value: dict[Any, Any] = file.value if isinstance(file.value, dict) else {}
    wrapped = isinstance(value.get("model"), dict)
    state = value["model"] if wrapped else file.value
    named = state_tensors(file, state)
    stored = {name.removeprefix("_orig_mod."): tensor for name, tensor in named.items()}  # torch.compile's prefix
    if len(stored) != len(named):
        raise CheckpointError(
            f"{path}: some of its tensors stand there twice, with the prefix _orig_mod. and without.",
            remedy="Save the state dict of one model.",
        )
    besides = tuple(str(key)[:120] for key in value if wrapped and key not in ("model", "model_args"))
    convention, embedding = _convention(path, stored)
    vocab = embedding[0] if len(embedding) == 2 else None
    params, config_file = path.parent / meta.PARAMS_NAME, path.parent / CONFIG_NAME
    if wrapped and isinstance(value.get("model_args"), dict):
        read_config = _model_args(value["model_args"], f"{path}: model_args", vocab)
    elif convention != "hub" and params.is_file():
        read_config = read_meta(read_json(params), str(params), vocab_size=vocab)
    elif config_file.is_file():
        found = _with_generation_config(read_hub(read_json(config_file), str(config_file)), path.parent)
        # Llama 4's pairs neighbours whoever wrote it.
        neighbours = found.config.interleaved_rope or convention != "hub"
        pairing = dataclasses.replace(found.config, interleaved_rope=neighbours)
        read_config = dataclasses.replace(found, config=pairing)
    else:
        raise CheckpointError(
            f"{path}: it holds weights and no config (heads, norm epsilon and rope cannot be told from weights).",
            remedy=f"Put the model's {CONFIG_NAME if convention == 'hub' else meta.PARAMS_NAME} beside it.",
        )
    return _matched(path, "pt", path.parent, (path,), read_config, [stored], convention, besides)


def _convention(path: Path, stored: Mapping[str, LazyTensor]) -> tuple[names.Convention, tuple[int, ...]]:
    """Whose names a state dict has, and the shape of its embedding."""
    for convention, prefixes in _PREFIXES.items():
        for prefix in prefixes:
            embedding, norm = (
                prefix + names.foreign(name, convention).removeprefix("model.") for name in ("embedding", "norm")
            )
            if embedding in stored and norm in stored:
                return convention, stored[embedding].shape
    raise CheckpointError(
        f"{path}: no Llama that Puna knows; its tensors are called {listed(stored)}.",
        remedy="Save it under the names of the hub, of Meta (and llama2.c) or of torchtune: Puna knows those.",
    )


_PREFIXES: dict[names.Convention, tuple[str, ...]] = {
    "hub": ("model.", "language_model.model.", "model.language_model."),
    "meta": ("", "text_model."),
    "torchtune": ("",),
}
"""What stands before the names of the text's tensors; models that see have more before them."""


def _model_args(args: Mapping[Any, Any], source: str, vocab: int | None) -> ReadConfig:
    """llama2.c's `model_args`, which are Meta's params; what they leave out is built into its code."""
    plain = {key: value for key, value in args.items() if isinstance(key, str) and _plain(value)}
    if len(plain) != len(args):
        raise CheckpointError(f"{source}: holds more than numbers and words.", remedy="Export the model again.")
    plain.setdefault("norm_eps", llama2c.NORM_EPS)
    plain.pop("dropout", None)
    return read_meta(plain, source, vocab_size=vocab)


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _matched(
    path: Path,
    format: Format,
    folder: Path,
    files: tuple[Path, ...],
    read_config: ReadConfig,
    shards: Sequence[Mapping[str, LazyTensor]],
    convention: names.Convention,
    besides: tuple[str, ...] = (),
) -> Checkpoint:
    """The checkpoint, once every parameter of the config is found with its shape and nothing is left over.

    `shards` are the tensors of each file where a model is split within its matrices, else the one collection of all.
    """
    notes: list[str] = []
    stored = shards[0]
    stored_shapes = {name: tensor.shape for name, tensor in stored.items()}
    untied = dataclasses.replace(read_config.config, tied_head=False)
    first = names.plan(untied, convention, stored_shapes, len(shards)).parts
    head, embedding = first["head"][0].stored, first["embedding"][0].stored
    copies: dict[str, str] = {}
    tied = read_config.config.tied_head
    # Joining the shards of a large head only to compare it would cost seconds: without a place it counts as its own.
    placed = head in stored and len(shards) == 1 and stored[head].at is not None
    # The embedding of Llama 3.2 Vision has rows that no head has, so that it never serves as one.
    if isinstance(untied, MllamaConfig):
        tied = False
    elif embedding in stored and head in stored and (tied or (convention != "hub" and placed)):
        whole = (read_config.config.vocab_size, read_config.config.dim)
        if stored[head].shape == whole and _is_copy(stored[head], stored[embedding]):
            copies[head] = f"{head} (a copy of {embedding})"
        elif tied:
            raise CheckpointError(
                f"{path}: the config says that the head is the embedding, and {head} differs from {embedding}.",
                remedy="Correct tie_word_embeddings (tied_embeddings in params.json), or fetch the model again.",
            )
        tied = head in copies
    elif head not in stored and not tied and convention != "hub":
        notes.append(f"there is no {head}: the embedding serves as the head")
        tied = True
    config = dataclasses.replace(read_config.config, tied_head=tied)
    read_config = dataclasses.replace(read_config, config=config)
    plan = names.plan(config, convention, stored_shapes, len(shards))
    if absent := plan.shapes.keys() - stored.keys():
        raise CheckpointError(
            f"{path}: {len(absent)} of {len(plan.shapes)} tensors missing: {listed(absent)}.",
            remedy="The config is another model's, or files are missing: fetch the model again.",
        )
    tables = [name for name in stored if names.ignorable(name) and name not in plan.shapes]
    if unknown := stored.keys() - plan.shapes.keys() - copies.keys() - set(tables):
        raise CheckpointError(
            f"{path}: {len(unknown)} tensors that this model has no use for: {listed(unknown)}.",
            remedy="The config is another model's: fetch both again. Or it is a kind of model that cannot run here; "
            "`puna models` lists those that can.",
        )
    tensors = parts.read(plan, definition(config).shapes(config), shards, path)
    if count := parts.copied_bytes(plan, tensors):
        notes.append(
            f"{_size(count)} of matrices lie transposed in the file: each is copied when it is loaded, so that much "
            "memory is needed; a GGUF needs none, its experts are used as they lie there"
        )
    tokenizer = _find_tokenizer(folder, read_config.config, format)
    ignored = (*besides, *copies.values(), *tables)
    return Checkpoint(path, format, read_config, tensors, ignored, tokenizer, folder, files, tuple(notes))


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def _is_copy(head: LazyTensor, embedding: LazyTensor) -> bool:
    """Whether the head is the embedding over again, told by place, else by value; an untied head differs at once."""
    if (head.shape, head.dtype) != (embedding.shape, embedding.dtype) or not {head.dtype} & {*ITEM_SIZE, *TYPES}:
        return False
    return (head.at is not None and head.at == embedding.at) or same_bits(head.read(), embedding.read())


def _find_tokenizer(folder: Path, config: DecoderConfig, format: Format) -> Path | None:
    """The tokenizer's file: beside the weights, or (Llama 1 as Meta shipped it) in the folder above."""
    beside = ("tokenizer.json", "tokenizer.model", f"tok{config.vocab_size}.bin", "tokenizer.bin")
    places = [folder / name for name in beside]
    if format == "meta":
        places.append(folder.parent / "tokenizer.model")
    return next((place for place in places if place.is_file()), None)
