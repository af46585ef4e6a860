"""GGUF files byte by byte, for tests that need one that no writer would write.

What it is: the format's own words (ggml, docs/gguf.md) in a few lines, so that any of them can be said wrongly.
What it is not: a writer. Nothing is checked: that is the point.
What is surprising: `tiny()` is a whole model that runs, a vocabulary of bytes included; a test changes one thing of it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from puna.kernels.blocks import TYPES
from puna.models.rope import Llama3Scaling

ARRAY, STRING = 9, 8
_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

DIM, HIDDEN, LAYERS, HEADS, KV_HEADS, VOCAB = 64, 96, 2, 4, 2, 259


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return u64(len(raw)) + raw


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + u32(kind) + value


def array(kind: int, values: Sequence[Any]) -> bytes:
    items = b"".join(text(v) if kind == STRING else struct.pack("<" + _CODES[kind], v) for v in values)
    return u32(kind) + u64(len(values)) + items


def number(key: str, value: int) -> bytes:
    return entry(key, 4, u32(value))


def real(key: str, value: float) -> bytes:
    return entry(key, 6, struct.pack("<f", value))


def words(key: str, value: str | bytes) -> bytes:
    return entry(key, STRING, text(value))


@dataclass
class Row:
    """One line of the table of tensors, and its bytes; the numbers of the line may be any."""

    name: str
    shape: Sequence[int]
    data: bytes
    kind: int = 0
    offset: int | None = None
    dimensions: int | None = None


@dataclass
class Built:
    """A file to be: `build()` gives its bytes."""

    metadata: list[bytes] = field(default_factory=list)
    tensors: list[Row] = field(default_factory=list)
    version: int = 3
    alignment: int = 32
    tensor_count: int | None = None
    value_count: int | None = None
    tail: bytes = b""

    def header(self) -> bytes:
        out = [b"GGUF", u32(self.version)]
        out.append(u64(len(self.tensors) if self.tensor_count is None else self.tensor_count))
        out.append(u64(len(self.metadata) if self.value_count is None else self.value_count))
        out += self.metadata
        at = 0
        for row in self.tensors:
            dims = len(row.shape) if row.dimensions is None else row.dimensions
            sizes = b"".join(u64(n) for n in reversed(row.shape))
            out += [text(row.name), u32(dims), sizes, u32(row.kind), u64(at if row.offset is None else row.offset)]
            at += -(-len(row.data) // self.alignment) * self.alignment
        return b"".join(out)

    def build(self) -> bytes:
        out = bytearray(self.header())
        for row in self.tensors:
            out += b"\0" * (-len(out) % self.alignment)
            out += row.data
        return bytes(out) + self.tail

    def write(self, path: Path) -> Path:
        path.write_bytes(self.build())
        return path

    def without(self, key: str) -> Built:
        self.metadata = [one for one in self.metadata if not one.startswith(text(key))]
        return self

    def named(self, name: str) -> Row:
        return next(row for row in self.tensors if row.name == name)


def settings(**changes: Any) -> list[bytes]:
    """The `llama.*` keys of the tiny model."""
    numbers = {
        "block_count": LAYERS, "context_length": 64, "embedding_length": DIM, "feed_forward_length": HIDDEN,
        "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, "rope.dimension_count": DIM // HEADS,
    } | changes  # fmt: skip
    return [
        words("general.architecture", "llama"),
        *(number(f"llama.{key}", value) for key, value in numbers.items()),
        real("llama.attention.layer_norm_rms_epsilon", 1e-5),
        real("llama.rope.freq_base", 10000.0),
    ]


def vocabulary() -> list[bytes]:
    """A sentencepiece vocabulary of three control tokens and the 256 bytes."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    return [
        words("tokenizer.ggml.model", "llama"),
        entry("tokenizer.ggml.tokens", ARRAY, array(STRING, tokens)),
        entry("tokenizer.ggml.scores", ARRAY, array(6, [0.0] * VOCAB)),
        entry("tokenizer.ggml.token_type", ARRAY, array(5, [2, 3, 3] + [6] * 256)),
        number("tokenizer.ggml.bos_token_id", 1),
        number("tokenizer.ggml.eos_token_id", 2),
    ]


def shapes(dim: int = DIM, hidden: int = HIDDEN) -> dict[str, tuple[int, ...]]:
    """GGUF's names and shapes of the tiny model's parameters."""
    kv = dim // HEADS * KV_HEADS
    table: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCAB, dim), "output_norm.weight": (dim,)}
    for i in range(LAYERS):
        for name, shape in {
            "attn_norm": (dim,), "attn_q": (dim, dim), "attn_k": (kv, dim), "attn_v": (kv, dim),
            "attn_output": (dim, dim), "ffn_norm": (dim,), "ffn_gate": (hidden, dim), "ffn_up": (hidden, dim),
            "ffn_down": (dim, hidden),
        }.items():  # fmt: skip
            table[f"blk.{i}.{name}.weight"] = shape
    return table


def tiny(
    kind: str = "F32",
    encode: Callable[[np.ndarray[Any, Any]], bytes] | None = None,
    *,
    dim: int = DIM,
    hidden: int = HIDDEN,
) -> Built:
    """The whole tiny model, matrices of the type `kind` as `encode` packs them, tied head, norms near one."""
    random = np.random.default_rng(0)
    rows = []
    sizes = {"embedding_length": dim, "feed_forward_length": hidden, "rope.dimension_count": dim // HEADS}
    for name, shape in shapes(dim, hidden).items():
        values = (random.standard_normal(shape) * 0.2 + (len(shape) == 1)).astype(np.float32)
        packed = encode is not None and len(shape) == 2
        data = encode(values) if packed and encode is not None else values.tobytes()
        rows.append(Row(name, shape, data, TYPES[kind].ggml_id if packed else 0))
    return Built([*settings(**sizes), *vocabulary()], rows)


def converter_factors(rule: Llama3Scaling, head_dim: int, theta: float) -> list[float]:
    """What the converter that comes with llama.cpp writes for Llama 3.1's rule."""
    factors = []
    for freq in 1.0 / (theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)):
        wavelength = 2 * math.pi / freq
        if wavelength < rule.original_context / rule.high_freq_factor:
            factors.append(1.0)
        elif wavelength > rule.original_context / rule.low_freq_factor:
            factors.append(rule.factor)
        else:
            smooth = (rule.original_context / wavelength - rule.low_freq_factor) / (
                rule.high_freq_factor - rule.low_freq_factor
            )
            factors.append(1 / ((1 - smooth) / rule.factor + smooth))
    return factors
