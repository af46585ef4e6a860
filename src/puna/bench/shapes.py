"""Models with the shape of a real one and random weights, made for a measurement and kept for the next.

What it is: shapes by name (the catalog's, `cria`, llama2.c's small ones, a small Scout), written as GGUF for Puna and
llama.cpp, or as the hub's safetensors for the others. Of a model that sees, the text alone.
What it is not: a model that says anything. Speed does not depend on the numbers as long as none is infinite: they are
drawn with the spread that Llama's weights have, and norms are 1.
What is surprising: numbers are drawn and packed once, a million of them, and each tensor is a shuffle of their blocks,
so a file takes as long as the disk. The vocabulary is made up, in sentencepiece's style, which every engine loads
quickly: a cold start measures the engine. And the context is widened to hold the longest work.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from puna.catalog import models as catalog
from puna.errors import UsageError
from puna.kernels import ops
from puna.kernels.blocks import TYPES
from puna.kernels.layouts import BF16
from puna.models import known, llama1, llama2
from puna.models.config import DecoderConfig, write_hub
from puna.models.llama4_config import Llama4Config, every
from puna.models.registry import definition
from puna.models.rope import Rope
from puna.settings import puna_home
from puna.weights import gguf_metadata, gguf_write, mixes, names
from puna.weights.checkpoint import CONFIG_NAME, open_checkpoint
from puna.weights.embedded import EMBEDDED, embedded_folder
from puna.weights.files import LazyTensor
from puna.weights.save import sync, write_json, write_safetensors
from puna.weights.whole import appearing

SPREAD = 0.02
"""Standard deviation of the weights: what Llama's are initialised with, and stay near."""

DRAWN = 1 << 20
"""Numbers drawn for each block type."""

LONGEST = 8192 + 256
"""Positions that every shape has room for."""

_STORIES = {"stories15M": (288, 6, 6), "stories42M": (512, 8, 8), "stories110M": (768, 12, 12)}
# llama2.c's models on TinyStories (its README): width, layers, heads; hidden widths by Llama 2's rule, multiples of 32.
_STORIES_VOCABULARY = 32000

_SCALED = {"scout-2b": ("llama4:scout", 4)}
# A shape of the catalog with each of its numbers divided, but the size of a head: its ratios, and fewer parameters.

_UNWRITTEN = "its cross-attention layers have no layout in GGUF"
# Of Llama 3.2 Vision, whose architecture the catalog calls `vision`.

_BYTES = 256
_SPECIAL = ("<unk>", "<s>", "</s>")
_BOS, _EOS = 1, 2

_VERSION = 1  # of the files' content: a change makes new ones


def names_of_shapes() -> list[str]:
    """Every name that `config_of` knows, besides other spellings of the catalog's."""
    whole = (entry.short_name for entry in catalog.entries() if not _why_not(entry))
    return [EMBEDDED, *_STORIES, *_SCALED, *whole]


def _why_not(entry: catalog.CatalogEntry) -> str:
    """Why a model of the catalog is not to be had as a shape; empty where it is."""
    return _UNWRITTEN if entry.architecture == "vision" else ""


def config_of(shape: str) -> DecoderConfig:
    """The numbers of a shape, its context at least LONGEST. Raises UsageError for a name that is not known."""
    if shape == EMBEDDED:
        config = open_checkpoint(embedded_folder()).config
    elif shape in _STORIES:
        dim, layers, heads = _STORIES[shape]
        config = DecoderConfig(
            generation="llama2", vocab_size=_STORIES_VOCABULARY, dim=dim, layers=layers, heads=heads, kv_heads=heads,
            head_dim=dim // heads, hidden_dim=llama2.hidden_dim(dim, 32), norm_eps=1e-5,
            rope=Rope(dim // heads, llama1.ROPE_THETA), context_length=LONGEST, tied_head=True,
        )  # fmt: skip
    elif shape in _SCALED:
        config = _scaled(*_SCALED[shape])
    else:
        config = _from_catalog(shape)
    return replace(config, context_length=max(config.context_length, LONGEST), interleaved_rope=True)


def _from_catalog(shape: str) -> DecoderConfig:
    entry = catalog.find(shape)
    why = "no such shape" if entry is None else _why_not(entry)
    if entry is None or why:
        raise UsageError(f"--shape {shape}: {why}.", remedy=f"One of: {', '.join(names_of_shapes())}.")
    config = known.config_of(entry)
    return replace(config, vision=None) if isinstance(config, Llama4Config) else config


def _scaled(name: str, by: int) -> DecoderConfig:
    """A mixture of the catalog, every layer of it one, made smaller: each number over `by`, but the head size."""
    whole = _from_catalog(name)
    assert isinstance(whole, Llama4Config)
    assert len(whole.moe_layers) == whole.layers
    layers = whole.layers // by
    return replace(
        whole, vocab_size=whole.vocab_size // by, dim=whole.dim // by, layers=layers, heads=whole.heads // by,
        kv_heads=whole.kv_heads // by, hidden_dim=whole.hidden_dim // by,
        expert_hidden_dim=whole.expert_hidden_dim // by, moe_layers=tuple(range(layers)),
        global_layers=every(whole.global_layers[0] + 1, layers), context_length=LONGEST,
    )  # fmt: skip


def folder() -> Path:
    """Where the made models lie."""
    return puna_home() / "bench"


def kept(name: str, config: DecoderConfig, ending: str) -> Path:
    """The path of a made model: the shape's name, and a digest of its numbers."""
    digest = hashlib.sha256(repr((_VERSION, config)).encode()).hexdigest()[:8]
    return folder() / f"{name.replace(':', '-').replace('/', '-')}-{digest}-{ending}"


def random_gguf(name: str, config: DecoderConfig, mix_name: str, say: Callable[[str], None]) -> Path:
    """The GGUF of a shape, in a mix of `weights.mixes`, written where it is not there yet.

    Raises UsageError for another mix or a vocabulary too small for one, PunaError where the disk has no room.
    """
    mix = mixes.find(mix_name, "--type")
    path = kept(name, config, f"{mix_name}.gguf")
    if path.is_file():
        return path
    shapes = definition(config).shapes(config)
    kinds, notes = mixes.choose(mix, config, shapes)
    for note in notes:
        say(f"note: {note}")
    pools, plan = _Pools(), names.plan(config, "gguf")
    stored = {part.stored: kinds[parameter] for parameter, parts in plan.parts.items() for part in parts}
    tensors = [
        gguf_write.Outgoing(name, shape, stored[name], pools.tensor(stored[name], shape))
        for name, shape in plan.shapes.items()
    ]
    if (factors := gguf_metadata.rope_factors(config)) is not None:
        data = factors.view(np.uint8).data
        tensors.insert(0, gguf_write.Outgoing("rope_freqs.weight", factors.shape, "F32", lambda: iter([data])))
    metadata: dict[str, gguf_write.Value] = {
        "general.architecture": gguf_metadata.kind(config), "general.type": "model",
        "general.name": f"random weights of the shape {name}",
        "general.file_type": mix.file_type, "general.quantization_version": gguf_metadata.QUANTIZATION_VERSION,
        **gguf_metadata.architecture(config), **_vocabulary(config.vocab_size),
    }  # fmt: skip
    total = sum(tensor.nbytes for tensor in tensors)
    say(f"writing {total / 1e9:.2f} GB of random weights to {path} (kept for the next time)")
    with appearing(path, total) as unfinished, unfinished.open("xb") as file:
        gguf_write.write(file, metadata, tensors, lambda _: None)
        sync(file)
    return path


def random_hub_folder(name: str, config: DecoderConfig, say: Callable[[str], None]) -> Path:
    """The shape as the hub's safetensors in bfloat16, for engines that read those; written where it is not there."""
    path = kept(name, config, "hub")
    if path.is_dir():
        return path
    pools = _Pools()
    tensors = [
        LazyTensor(names.foreign(parameter, "hub"), shape, "bf16", pools.bf16(shape))
        for parameter, shape in definition(config).shapes(config).items()
    ]
    total = sum(tensor.nbytes for tensor in tensors)
    say(f"writing {total / 1e9:.2f} GB of random weights to {path} (kept for the next time)")
    with appearing(path, total) as unfinished:
        unfinished.mkdir()
        write_safetensors(unfinished, tensors, lambda _: None)
        write_json(unfinished / CONFIG_NAME, write_hub(config, dtype="bfloat16", bos_id=_BOS, eos_ids=(_EOS,)))
        special = dict(zip(("unk_token", "bos_token", "eos_token"), _SPECIAL, strict=True))
        write_json(unfinished / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **special})
        words = {word: i for i, word in enumerate(_words(config.vocab_size))}
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        tokenizer: dict[str, Any] = {
            "version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": byte_level,
            "post_processor": None, "decoder": byte_level,
            "model": {"type": "BPE", "vocab": words, "merges": [], "unk_token": _SPECIAL[0]},
        }  # fmt: skip
        (unfinished / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return path


class _Pools:
    """Random blocks of each type, drawn when they are first needed, and tensors shuffled from them."""

    def __init__(self) -> None:
        self._random = np.random.default_rng(0)
        self._blocks: dict[str, npt.NDArray[np.uint8]] = {}

    def tensor(self, kind: str, shape: tuple[int, ...]) -> Callable[[], Iterator[memoryview]]:
        """What gives a tensor's bytes: ones for a vector (a norm), else shuffled blocks, some rows at a time."""
        if len(shape) == 1:
            return lambda: iter([np.ones(shape, "<f4").view(np.uint8).data])

        def pieces() -> Iterator[memoryview]:
            *outer, columns = shape
            total, rows = math.prod(outer), max(1, DRAWN // columns)
            for at in range(0, total, rows):
                yield self._shuffled(kind, min(rows, total - at), columns).reshape(-1).data

        return pieces

    def bf16(self, shape: tuple[int, ...]) -> Callable[[], BF16]:
        """The same for a whole tensor in bfloat16."""

        def whole() -> BF16:
            if len(shape) == 1:
                return BF16(np.full(shape, 0x3F80, np.uint16))  # 1
            return BF16(self._shuffled("BF16", *shape).view(np.uint16).reshape(shape))

        return whole

    def _shuffled(self, kind: str, rows: int, columns: int) -> npt.NDArray[np.uint8]:
        """Rows of a type, uint8 [groups, bytes]: groups of as many whole blocks as divide a row, up to 256 numbers."""
        if kind not in self._blocks:
            values = self._random.standard_normal((DRAWN // 256, 256), np.float32) * np.float32(SPREAD)
            self._blocks[kind] = np.ascontiguousarray(ops.encode(kind, values))
        group = math.gcd(columns, 256)
        groups = self._blocks[kind].reshape(-1, TYPES[kind].row_bytes(group))
        return groups[self._random.integers(0, len(groups), rows * columns // group)]


def _words(size: int) -> list[str]:
    """A made-up vocabulary: special tokens, a token for each byte, then numbered words."""
    fixed = [*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(_BYTES))]
    if size < len(fixed):
        raise UsageError(
            f"A vocabulary of {size} is too small for a made-up one ({len(fixed)}).", remedy="Name another shape."
        )
    return [*fixed, *(f"▁w{i}" for i in range(size - len(fixed)))]


def _vocabulary(size: int) -> dict[str, Any]:
    """`tokenizer.*` of a made-up vocabulary, in sentencepiece's numbers: unknown 2, control 3, byte 6, normal 1."""
    kinds = np.ones(size, np.int32)
    kinds[0], kinds[1:3] = 2, 3
    kinds[len(_SPECIAL) : len(_SPECIAL) + _BYTES] = 6
    return {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", "tokenizer.ggml.tokens": _words(size),
        "tokenizer.ggml.scores": -np.arange(size, dtype=np.float32), "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": _BOS, "tokenizer.ggml.eos_token_id": _EOS,
        "tokenizer.ggml.unknown_token_id": 0, "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False, "tokenizer.ggml.add_space_prefix": True,
    }  # fmt: skip
