"""What a GGUF file says about a Llama besides its tensors: the keys that llama.cpp, Ollama and LM Studio read.

What it is: from a checkpoint's config, name and tokenizer to `general.*`, `llama.*` and `tokenizer.ggml.*` (ggml's
docs/gguf.md). Llama 4's own keys come from its config's page.
What it is not: a reader of model cards. A licence is said where the catalog knows the model, by its name and size.
What is surprising: GGUF has no word for Llama 3.1's rope. What its rule comes to, a divisor for each frequency, is a
tensor, `rope_freqs.weight`; linear stretching is a key.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from puna.catalog.models import CatalogEntry, find
from puna.kernels.layouts import F32
from puna.models import config_clip, llama4_config
from puna.models.config import DecoderConfig
from puna.models.llama4_config import Llama4Config
from puna.models.registry import definition
from puna.text.tokenizer import Tokenizer
from puna.text.vocabulary import UNUSED, vocabulary
from puna.text.words import Words
from puna.weights.checkpoint import Checkpoint
from puna.weights.embedded import EMBEDDED, embedded_folder
from puna.weights.gguf_write import Value

QUANTIZATION_VERSION = 2
"""ggml's number for the block layouts of today (`GGML_QNT_VERSION`)."""

_END_OF_TURN = ("<|eot_id|>", "<|eot|>", "▁<EOT>")
_END_OF_MESSAGE = ("<|eom_id|>", "<|eom|>")
_PADDING = ("<|finetune_right_pad_id|>", "<|finetune_right_pad|>", "<pad>", "[PAD]", "<PAD>")
_FOUND_BY_NAME = ("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|eom|>", "</s>", "▁<EOT>")
"""Tokens that end an answer in llama.cpp wherever a vocabulary has them."""

_SIZE = re.compile(r"[-_ ](\d+(?:\.\d+)?[BMKbmk])(?=[-_ .]|$)")


def general(checkpoint: Checkpoint, file_type: int) -> dict[str, Value]:
    """`general.*`: what the model is called, how large it is, and under which licence it came, as far as known.

    A GGUF file's own words about itself are kept.
    """
    written: dict[str, Value] = {
        "general.file_type": file_type, "general.quantization_version": QUANTIZATION_VERSION,
    }  # fmt: skip
    if checkpoint.gguf is not None:
        return _carried(checkpoint.gguf.metadata, kind(checkpoint.config)) | written
    entry = catalog_entry(checkpoint)
    name = _called(checkpoint.path) if entry is None else entry.hub_id.split("/")[1].removesuffix("-hf")
    keys: dict[str, Value] = {
        "general.architecture": kind(checkpoint.config), "general.type": "model", "general.name": name,
    }  # fmt: skip
    size = _SIZE.search(name)
    basename = name[: size.start()] if size else name
    if basename:
        keys["general.basename"] = basename
    if size and (finetune := name[size.end() :].strip("-_ ")):
        keys["general.finetune"] = finetune
    count = definition(checkpoint.config).parameter_count(checkpoint.config)
    keys["general.size_label"] = size[1].upper() if size else size_label(count)
    if entry is not None:
        keys |= {
            "general.license": entry.licence, "general.license.name": entry.licence_name,
            "general.license.link": entry.licence_page, "general.repo_url": entry.licence_page,
        }  # fmt: skip
    elif checkpoint.folder == embedded_folder():
        keys["general.license"] = "apache-2.0"
    keys["general.tags"] = ["llama", "text-generation"]
    if entry is not None or checkpoint.folder == embedded_folder():
        keys["general.languages"] = ["en"]
    return keys | written


def kind(config: DecoderConfig) -> str:
    """The architecture, and the prefix of its keys."""
    return "llama4" if isinstance(config, Llama4Config) else "llama"


def projector(checkpoint: Checkpoint, file_type: int) -> dict[str, Value]:
    """What the file of a vision encoder says, for llama.cpp's `mmproj` (tools/mtmd/clip-impl.h)."""
    config = checkpoint.config
    assert isinstance(config, Llama4Config)
    assert config.vision is not None
    return {
        "general.architecture": config_clip.ARCHITECTURE, "general.type": "mmproj",
        "general.name": _called(checkpoint.path), "general.file_type": file_type,
        "general.quantization_version": QUANTIZATION_VERSION, **config_clip.write_clip(config.vision, config.dim),
    }  # fmt: skip


def _carried(metadata: Mapping[str, Any], kind: str) -> dict[str, Value]:
    """The `general.*` keys of another file, but for how its bytes lie, which is said anew."""
    keys: dict[str, Value] = {"general.architecture": kind, "general.type": "model"}
    for key in metadata:
        if key.startswith("general.") and key != "general.alignment":
            value = metadata[key]
            keys[key] = (
                [word.decode("utf-8", "replace") for word in value.to_list()] if isinstance(value, Words) else value
            )
    return keys


def size_label(count: int) -> str:
    """A count of parameters in few letters: 1.2B, 71B, 260K."""
    units = {"T": 10**12, "B": 10**9, "M": 10**6, "K": 10**3}
    suffix = next((suffix for suffix, unit in units.items() if count >= unit), "K")
    scaled = count / units[suffix]
    return f"{scaled:.1f}{suffix}" if scaled < 9.95 else f"{scaled:.0f}{suffix}"


def _called(path: Path) -> str:
    """What a checkpoint goes by: the repository of a hub cache, else its folder, or its file where that has a name."""
    if path == embedded_folder():
        return EMBEDDED
    for part in path.resolve().parts:
        if part.startswith("models--"):
            return part.split("--")[-1]
    path = path.resolve()
    plain = ("model", "pytorch_model", "consolidated", "ckpt", "weights")
    named = path.is_file() and not path.name.startswith(plain)
    folder = path if path.is_dir() else path.parent
    return path.name.split(".")[0] if named else folder.parent.name if folder.name == "original" else folder.name


def catalog_entry(checkpoint: Checkpoint) -> CatalogEntry | None:
    """The catalog's entry for this checkpoint: of its name, and of its size."""
    config, entry = checkpoint.config, find(_called(checkpoint.path))
    if entry is None or (entry.layers, entry.dim, entry.ffn_dim) != (config.layers, config.dim, config.hidden_dim):
        return None
    return entry


def architecture(config: DecoderConfig) -> dict[str, Value]:
    """`llama.*` or `llama4.*`: the numbers of the model. Raises ConfigError for what the keys cannot say."""
    if isinstance(config, Llama4Config):
        return llama4_config.write_gguf(config)
    keys: dict[str, Value] = {
        "llama.block_count": config.layers,
        "llama.context_length": config.context_length,
        "llama.embedding_length": config.dim,
        "llama.feed_forward_length": config.hidden_dim,
        "llama.vocab_size": config.vocab_size,
        "llama.attention.head_count": config.heads,
        "llama.attention.head_count_kv": config.kv_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": float(config.rope.theta),
    }
    if config.rope.linear_factor != 1.0:
        keys |= {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": float(config.rope.linear_factor)}
    return keys


def rope_factors(config: DecoderConfig) -> F32 | None:
    """What divides each frequency beyond what the keys say: float32 [head_dim/2], or None where nothing does."""
    plain = replace(config.rope, llama3=None, factors=None)
    if plain == config.rope:
        return None
    factors: F32 = (plain.inv_freq() / config.rope.inv_freq()).astype(np.float32)
    return factors


def words(
    checkpoint: Checkpoint, tokenizer: Tokenizer, chat_template: str | None
) -> tuple[dict[str, Value], list[str]]:
    """`tokenizer.*`, and what a user should be told. Raises TokenizerError for a tokenizer GGUF cannot express.

    There must be a token for each row of the embedding: rows without one get unused tokens, and tokens without a row
    (only special ones; `load` refuses others) are left out.
    """
    found, rows = vocabulary(tokenizer), checkpoint.config.vocab_size
    tokens, kinds, notes = found.tokens, found.kinds, []
    if len(tokens) > rows:
        notes.append(f"{len(tokens) - rows} tokens that the embedding has no rows for are left out")
    elif len(tokens) < rows:
        notes.append(f"{rows - len(tokens)} rows of the embedding have no token; they are called [PAD…]")
    tokens = tokens[:rows] + [f"[PAD{i}]" for i in range(len(tokens), rows)]
    kinds = kinds[:rows] + [UNUSED] * (rows - len(kinds))
    keys: dict[str, Value] = {"tokenizer.ggml.model": found.model, "tokenizer.ggml.pre": found.pre}
    keys["tokenizer.ggml.tokens"] = tokens
    if found.scores is not None:
        scores = np.zeros(rows, np.float32)
        scores[: len(found.scores)] = found.scores[:rows]
        keys["tokenizer.ggml.scores"] = scores
    keys["tokenizer.ggml.token_type"] = np.array(kinds, np.int32)
    if found.merges is not None:
        keys["tokenizer.ggml.merges"] = found.merges
    special = tokenizer.special
    stops = tokenizer.stop_ids.union(checkpoint.read_config.eos_ids)

    def first(names: tuple[str, ...], among: frozenset[int] | None = None) -> int | None:
        ids = (special[name] for name in names if name in special)
        return next((i for i in ids if among is None or i in among), None)

    turn, message = first(_END_OF_TURN, stops), first(_END_OF_MESSAGE, stops)
    eos = tokenizer.eos_id if tokenizer.eos_id is not None else min(stops, default=None)
    said = {
        "bos": tokenizer.bos_id, "eos": eos, "eot": turn, "eom": message, "unknown": found.unknown_id,
        "padding": first(_PADDING),
    }  # fmt: skip
    keys |= {f"tokenizer.ggml.{name}_token_id": i for name, i in said.items() if i is not None and i < rows}
    names = {i: name for name, i in special.items()}
    if lost := sorted(i for i in stops - {eos, turn, message} if names.get(i) not in _FOUND_BY_NAME):
        listed = ", ".join(names.get(i, str(i)) for i in lost)
        notes.append(f"GGUF has no key for further stop tokens, so other programs may not end at {listed}")
    keys["tokenizer.ggml.add_bos_token"] = tokenizer.adds_bos
    keys["tokenizer.ggml.add_eos_token"] = False
    if found.adds_space is not None:
        keys["tokenizer.ggml.add_space_prefix"] = found.adds_space
    if chat_template is not None:
        keys["tokenizer.chat_template"] = chat_template
    return keys, notes
