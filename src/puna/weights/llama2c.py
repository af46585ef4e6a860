"""Reads llama2.c's `.bin` files, version 0 (the "legacy" export).

What it is: seven little-endian int32 (dim, hidden_dim, layers, heads, kv heads, vocabulary, context), then float32
weights in the order of llama2.c's run.c `memory_map_weights`, all layers of a kind together.
What it is not: versions 1 and 2 (they begin with "24ka"): no published model to prove a reader with was found.
What is surprising: a negative vocabulary size means that the head is stored too, after two tables of rope which the
arithmetic recomputes. Norm epsilon and rope's base are not in the file: run.c has 1e-5 and 10000 built in.
"""

from __future__ import annotations

import math
import struct
from functools import partial
from typing import Any

from puna.errors import CheckpointError
from puna.models import decoder
from puna.models.config import ReadConfig, read_meta
from puna.models.llama1 import ROPE_THETA
from puna.weights.files import LazyTensor, MappedFile

MAGIC = b"24ka"
"""0x616b3432, little-endian: the first bytes of versions 1 and later."""

NORM_EPS = 1e-5
"""Built into llama2.c, as into its training code's `ModelArgs`."""

_HEADER = struct.Struct("<7i")

_ORDER = (
    "attention_norm", "q.weight", "k.weight", "v.weight", "o.weight", "mlp_norm", "gate.weight", "down.weight",
    "up.weight",
)  # fmt: skip


def recognised(file: MappedFile) -> bool:
    """Whether it is llama2.c's: a later version's magic number, or seven numbers that could be a version 0 header."""
    if file.bytes[:4] == MAGIC:
        return True
    if file.size < _HEADER.size:
        return False
    dim, hidden, layers, heads, kv_heads, vocab, context = _HEADER.unpack_from(file.bytes)
    sizes = (dim, hidden, layers, heads, kv_heads, abs(vocab), context)
    return all(0 < size < 1 << 24 for size in sizes) and dim % heads == 0 and heads % kv_heads == 0 and layers < 4096


def read(file: MappedFile) -> tuple[ReadConfig, dict[str, LazyTensor], tuple[str, ...]]:
    """Config, tensors by canonical name, and what the file holds besides.

    Raises CheckpointError when the size is not the header's to the byte, and ConfigError for its numbers.
    """
    if file.bytes[:4] == MAGIC:
        version = int.from_bytes(file.bytes[4:8], "little")
        raise CheckpointError(
            f"{file.path}: llama2.c's format version {version}; Puna reads version 0.",
            remedy="Export the model again with llama2.c's `export.py --version 0`, or use the .pt it came from.",
        )
    dim, hidden, layers, heads, kv_heads, vocab, context = _HEADER.unpack_from(file.bytes)
    params: dict[str, Any] = {
        "dim": dim, "hidden_dim": hidden, "n_layers": layers, "n_heads": heads, "n_kv_heads": kv_heads,
        "vocab_size": abs(vocab), "max_seq_len": context, "norm_eps": NORM_EPS, "rope_theta": ROPE_THETA,
        "tied_embeddings": vocab > 0,
    }  # fmt: skip
    read_config = read_meta(params, f"{file.path}: header")
    config = read_config.config
    shapes = decoder.shapes(config)
    names = ["embedding", *(f"layers.{i}.{part}" for part in _ORDER for i in range(layers)), "norm"]
    tables = context * config.head_dim * 4
    numbers = sum(math.prod(shape) for shape in shapes.values())
    if (expected := _HEADER.size + numbers * 4 + tables) != file.size:
        raise CheckpointError(
            f"{file.path}: a llama2.c model of {numbers} parameters takes {expected} bytes, not {file.size}.",
            remedy="It is cut short, damaged, or not a llama2.c model: fetch or export it again.",
        )
    tensors: dict[str, LazyTensor] = {}
    at = _HEADER.size
    for name in names if config.tied_head else [*names, "head"]:
        if name == "head":
            at += tables
        tensors[name] = LazyTensor(name, shapes[name], "fp32", partial(file.weight, "fp32", shapes[name], at))
        at += tensors[name].nbytes
    return read_config, {name: tensors[name] for name in shapes}, ("freq_cis_real", "freq_cis_imag")
