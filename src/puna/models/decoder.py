"""The dense Llama decoder, complete: Llama 1, 2, 3, 3.1, 3.2 (text), 3.3 and Code Llama are this with other numbers.

What it is: pure functions over a tree of weights. `forward` gives hidden states, `logits` turns them into scores.
What it is not: a loop that generates (`puna.engine`), or a place that knows where arrays live (`puna.kernels.ops`).
What is surprising: there is no attention mask and no padding. A step's tokens are one row [N], whatever sequences they
are of; a table says where each stands, and a query at position p sees the keys at 0 to p of its own sequence.

Shapes: N tokens of B sequences, T tokens of a stretch, V vocabulary, H heads, G key/value heads, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from puna.kernels import ops
from puna.kernels.layouts import PageTable, is_packed
from puna.models.config import DecoderConfig
from puna.models.tree import DecoderWeights, KVCache, Layer, Linear, Placed, Weights

Array = Any


def forward(
    weights: DecoderWeights,
    config: DecoderConfig,
    tokens: Array,
    table: PageTable | None = None,
    cache: KVCache | None = None,
    placed: Sequence[Placed] = (),
) -> Array:
    """Hidden states after the last norm, [N, dim], for ids [N] that stand where `table` says (all int32).

    The new keys and values are written to the cache, and attention reads it. Without a table and a cache, tokens [B, T]
    are whole stretches from position 0, and the result is [B, T, dim]: training, or scoring a text. Raises ValueError
    for one of them without the other, and for pictures, which this model does not see.
    """
    if (table is None) != (cache is None):
        raise ValueError("a table and a cache belong together")
    if placed:
        raise ValueError("this model sees no pictures")
    x = ops.embedding(weights.embedding, tokens)
    positions = ops.positions(tokens) if table is None else table.positions
    cos, sin = ops.rope_table(positions, weights.inv_freq)
    for i, layer in enumerate(weights.layers):
        kv = None if cache is None else (cache.keys[i], cache.values[i])
        x = x + attention(layer, config, ops.rms_norm(x, layer.attention_norm, config.norm_eps), cos, sin, table, kv)
        x = x + feed_forward(layer, ops.rms_norm(x, layer.mlp_norm, config.norm_eps))
    return ops.rms_norm(x, weights.norm, config.norm_eps)


def attention(
    layer: Layer,
    config: DecoderConfig,
    x: Array,
    cos: Array,
    sin: Array,
    table: PageTable | None,
    kv: tuple[Array, Array] | None,
) -> Array:
    """Grouped-query attention with rotary positions: x [*, dim] → [*, dim], `*` being N, or B, T without a cache."""
    *tokens, _ = x.shape
    q = linear(x, layer.q).reshape(*tokens, config.heads, config.head_dim)
    k = linear(x, layer.k).reshape(*tokens, config.kv_heads, config.head_dim)
    v = linear(x, layer.v).reshape(*tokens, config.kv_heads, config.head_dim)
    q = ops.rope(q, cos, sin, config.interleaved_rope)
    k = ops.rope(k, cos, sin, config.interleaved_rope)
    if kv is None or table is None:
        out = ops.attention(q, k, v, None)
    else:
        ops.write_kv(*kv, k, v, table)
        # Beside packed weights, whose products round to 8 bits, attention may round to bfloat16.
        out = ops.attention(q, *kv, table, bf16=is_packed(layer.q.weight))
    return linear(out.reshape(*tokens, config.heads * config.head_dim), layer.o)


def feed_forward(layer: Layer, x: Array) -> Array:
    """The gated feed-forward (SwiGLU): x [B, T, dim] → [B, T, dim]."""
    return linear(ops.swiglu(linear(x, layer.gate), linear(x, layer.up)), layer.down)


def logits(weights: Weights, hidden: Array) -> Array:
    """Scores over the vocabulary for hidden states of `forward`: [*, dim] → [*, V]."""
    return ops.linear(hidden, weights.embedding if weights.head is None else weights.head)


def linear(x: Array, layer: Linear) -> Array:
    """x · weightᵀ + bias."""
    return ops.linear(x, layer.weight, layer.bias)


def shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name → shape of every parameter, in order, without allocating any."""
    c = config
    q_rows, kv_rows = c.heads * c.head_dim, c.kv_heads * c.head_dim
    table: dict[str, tuple[int, ...]] = {"embedding": (c.vocab_size, c.dim)}
    for i in range(c.layers):
        table[f"layers.{i}.attention_norm"] = (c.dim,)
        for name, out, inner in (
            ("q", q_rows, c.dim),
            ("k", kv_rows, c.dim),
            ("v", kv_rows, c.dim),
            ("o", c.dim, q_rows),
        ):
            table[f"layers.{i}.{name}.weight"] = (out, inner)
            if c.attention_bias:
                table[f"layers.{i}.{name}.bias"] = (out,)
        table[f"layers.{i}.mlp_norm"] = (c.dim,)
        for name, out, inner in (
            ("gate", c.hidden_dim, c.dim),
            ("up", c.hidden_dim, c.dim),
            ("down", c.dim, c.hidden_dim),
        ):
            table[f"layers.{i}.{name}.weight"] = (out, inner)
            if c.mlp_bias:
                table[f"layers.{i}.{name}.bias"] = (out,)
    table["norm"] = (c.dim,)
    if not c.tied_head:
        table["head"] = (c.vocab_size, c.dim)
    return table


def parameter_count(config: DecoderConfig) -> int:
    """How many parameters the model has; a tied head is counted once."""
    return sum(math.prod(shape) for shape in shapes(config).values())


def build(config: DecoderConfig, parameter: Callable[[str], Array]) -> DecoderWeights:
    """The tree of a model, its leaves fetched by canonical name (the keys of `shapes`), in that order."""
    fetched = {name: parameter(name) for name in shapes(config)}

    def matrix(i: int, name: str) -> Linear:
        return Linear(fetched[f"layers.{i}.{name}.weight"], fetched.get(f"layers.{i}.{name}.bias"))

    layers = tuple(
        Layer(
            attention_norm=fetched[f"layers.{i}.attention_norm"],
            q=matrix(i, "q"),
            k=matrix(i, "k"),
            v=matrix(i, "v"),
            o=matrix(i, "o"),
            mlp_norm=fetched[f"layers.{i}.mlp_norm"],
            gate=matrix(i, "gate"),
            up=matrix(i, "up"),
            down=matrix(i, "down"),
        )
        for i in range(config.layers)
    )
    return DecoderWeights(fetched["embedding"], layers, fetched["norm"], fetched.get("head"), config.rope.inv_freq())


def make_cache(
    config: DecoderConfig,
    pages: int,
    page: int,
    zeros: Callable[[tuple[int, ...]], Array],
    local: int | None = None,
) -> KVCache:
    """An empty cache of `pages` pages of `page` positions each; `zeros(shape)` says where and of what type.

    Layers that see one chunk only have `local` pages, where the table has pages of their own for them.
    """
    own = config.local_layers
    counts = [pages if local is None or i not in own else local for i in range(config.layers)]
    shapes = [(count, page, config.kv_heads, config.head_dim) for count in counts]
    return KVCache(tuple(map(zeros, shapes)), tuple(map(zeros, shapes)))
