"""Llama 4 (April 2025), the text model, complete: Scout, Maverick, and Llama Guard 4, which has no experts.

What it is: the same pure functions as `decoder`, over a tree of `Layer` and `ExpertLayer`. New since Llama 3: a
feed-forward that is a mixture (each token passes a shared expert and the one of 16 or 128 that its router picks), and
attention in two kinds. Most layers turn queries and keys by rope and see the token's own chunk of 8,192; every fourth
knows no positions and sees everything, its queries a little longer the later they come (Meta's llama-models,
models/llama4/model.py; the temperature is Nakanishi's 2025, "Scalable-Softmax").
What it is not: the vision encoder (`llama4_vision`), whose features stand here in place of embeddings.
What is surprising: the router's score multiplies what goes into an expert, not what comes out. The norm of queries and
keys has no weights, and comes after rope. Which layer is which is settled by the config: no token decides a branch.

Shapes: N tokens of B sequences, T tokens of a stretch, V vocabulary, H heads, G key/value heads, D head size, E
experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from puna.kernels import ops
from puna.kernels.layouts import PageTable, is_packed
from puna.models import decoder, llama4_vision
from puna.models.decoder import linear, logits, make_cache
from puna.models.llama4_config import Llama4Config
from puna.models.tree import ExpertLayer, Gated, KVCache, Layer, Linear, Llama4Weights, Pixels, Placed

Array = Any

__all__ = ["build", "forward", "logits", "make_cache", "parameter_count", "see", "shapes", "sight_bytes"]


def forward(
    weights: Llama4Weights,
    config: Llama4Config,
    tokens: Array,
    table: PageTable | None = None,
    cache: KVCache | None = None,
    placed: Sequence[Placed] = (),
) -> Array:
    """Hidden states after the last norm, [N, dim], for ids [N] that stand where `table` says (all int32).

    Without a table and a cache tokens are [B, T], as in `decoder.forward`. Where the table has pages of their own for
    layers that see one chunk only (`ChunkedTable`), the cache's arrays of those layers have as many. What was seen of a
    picture, [n, dim], stands in place of the embeddings of its n tokens. Raises ValueError for a table without a cache
    or a cache without one.
    """
    if (table is None) != (cache is None):
        raise ValueError("a table and a cache belong together")
    x = ops.embedding(weights.embedding, tokens)
    positions = ops.positions(tokens) if table is None else table.positions
    place(x, table, placed)
    angles = ops.rope_table(positions, weights.inv_freq)
    local_layers = config.local_layers
    near = table if table is None or table.local is None else PageTable(table.positions, table.starts, table.local)
    for i, layer in enumerate(weights.layers):
        kv = None if cache is None else (cache.keys[i], cache.values[i])
        turn = None if i in config.global_layers else angles
        where = near if i in local_layers else table
        x = x + attention(
            layer, config, ops.rms_norm(x, layer.attention_norm, config.norm_eps), positions, turn, where, kv
        )
        x = x + feed_forward(layer, config, ops.rms_norm(x, layer.mlp_norm, config.norm_eps))
    return ops.rms_norm(x, weights.norm, config.norm_eps)


def place(x: Array, table: PageTable | None, placed: Sequence[Placed]) -> None:
    """Write what was seen over the embeddings x [*, dim] of those of its tokens that stand in this step."""
    for sequence, at, sight in placed:
        if table is None:
            rows, first = x[sequence], 0
        else:
            start, stop = int(table.starts[sequence]), int(table.starts[sequence + 1])
            rows, first = x[start:stop], int(table.positions[start])
        begin, end = max(at, first), min(at + len(sight), first + len(rows))
        if begin < end:
            rows[begin - first : end - first] = sight[begin - at : end - at]


def see(weights: Llama4Weights, config: Llama4Config, pixels: Pixels) -> Array:
    """What is seen in a picture, [tiles · tile_tokens, dim], in the order of its `<|patch|>` tokens.

    Raises ValueError for tiles of another size, and for a model without its encoder.
    """
    if weights.vision is None or weights.projector is None or config.vision is None:
        raise ValueError("this model came without its vision encoder")
    return linear(llama4_vision.encode(weights.vision, config.vision, pixels.tiles), weights.projector)


def sight_bytes(config: Llama4Config, pixels: Pixels) -> int:
    """The bytes of what `see` gives, float32."""
    return 0 if config.vision is None else len(pixels.tiles) * config.vision.tile_tokens * config.dim * 4


def attention(
    layer: Layer | ExpertLayer,
    config: Llama4Config,
    x: Array,
    positions: Array,
    angles: tuple[Array, Array] | None,
    table: PageTable | None,
    kv: tuple[Array, Array] | None,
) -> Array:
    """Grouped-query attention: x [*, dim] → [*, dim], `*` being N, or B, T without a cache.

    With `angles`, a local layer: rope, QK norm, and a view of the chunk; without, a global one.
    """
    *tokens, _ = x.shape
    q = linear(x, layer.q).reshape(*tokens, config.heads, config.head_dim)
    k = linear(x, layer.k).reshape(*tokens, config.kv_heads, config.head_dim)
    v = linear(x, layer.v).reshape(*tokens, config.kv_heads, config.head_dim)
    if angles is not None:
        q, k = (ops.rope(t, *angles, config.interleaved_rope) for t in (q, k))
        if config.qk_norm:
            q, k = (ops.rms_norm(t, None, config.norm_eps) for t in (q, k))
    elif config.temperature_tuning:
        q = ops.temperature(q, positions, config.temperature_floor, config.temperature_scale)
    chunk = 0 if angles is None else config.chunk
    if kv is None or table is None:
        out = ops.attention(q, k, v, None, chunk=chunk)
    else:
        ops.write_kv(*kv, k, v, table)
        # Beside packed weights, whose products round to 8 bits, attention may round to bfloat16.
        out = ops.attention(q, *kv, table, bf16=is_packed(layer.q.weight), chunk=chunk)
    return linear(out.reshape(*tokens, config.heads * config.head_dim), layer.o)


def feed_forward(layer: Layer | ExpertLayer, config: Llama4Config, x: Array) -> Array:
    """SwiGLU, of which a mixture has a shared one and the router's choice: x [*, dim] → [*, dim]."""
    if isinstance(layer, Layer):
        return decoder.feed_forward(layer, x)
    chosen, scores = ops.route(linear(x, layer.router), config.experts_per_token)
    return ops.experts(x, chosen, scores, lambda e: layer.experts[e].matrices(), layer.shared.matrices())


def shapes(config: Llama4Config) -> dict[str, tuple[int, ...]]:
    """Canonical name → shape of every parameter, in order, without allocating any."""
    c = config
    q_rows, kv_rows = c.heads * c.head_dim, c.kv_heads * c.head_dim
    table: dict[str, tuple[int, ...]] = {"embedding": (c.vocab_size, c.dim)}
    for i in range(c.layers):
        prefix = f"layers.{i}"
        table[f"{prefix}.attention_norm"] = (c.dim,)
        for name, out, inner in (
            ("q", q_rows, c.dim),
            ("k", kv_rows, c.dim),
            ("v", kv_rows, c.dim),
            ("o", c.dim, q_rows),
        ):
            table[f"{prefix}.{name}.weight"] = (out, inner)
            if c.attention_bias:
                table[f"{prefix}.{name}.bias"] = (out,)
        table[f"{prefix}.mlp_norm"] = (c.dim,)
        if i not in c.moe_layers:
            table |= _gated_shapes(prefix, c.hidden_dim, c.dim)
            continue
        table[f"{prefix}.router.weight"] = (c.experts, c.dim)
        for e in range(c.experts):
            table |= _gated_shapes(f"{prefix}.experts.{e}", c.expert_hidden_dim, c.dim)
        table |= _gated_shapes(f"{prefix}.shared", c.expert_hidden_dim, c.dim)
    table["norm"] = (c.dim,)
    if not c.tied_head:
        table["head"] = (c.vocab_size, c.dim)
    if c.vision is not None:
        table |= llama4_vision.shapes(c.vision)
        table["projector.weight"] = (c.dim, c.vision.output_dim)
    return table


def _gated_shapes(prefix: str, hidden: int, dim: int) -> dict[str, tuple[int, ...]]:
    sizes = {"gate": (hidden, dim), "up": (hidden, dim), "down": (dim, hidden)}
    return {f"{prefix}.{name}.weight": size for name, size in sizes.items()}


def parameter_count(config: Llama4Config) -> int:
    """How many parameters the model has, its vision encoder's too; a tied head is counted once."""
    return sum(math.prod(shape) for shape in shapes(config).values())


def build(config: Llama4Config, parameter: Callable[[str], Array]) -> Llama4Weights:
    """The tree of a model, its leaves fetched by canonical name (the keys of `shapes`), in that order."""
    fetched = {name: parameter(name) for name in shapes(config)}

    def matrix(name: str) -> Linear:
        return Linear(fetched[f"{name}.weight"], fetched.get(f"{name}.bias"))

    def three(prefix: str) -> Gated:
        return Gated(*(matrix(f"{prefix}.{name}") for name in ("gate", "up", "down")))

    def layer(i: int) -> Layer | ExpertLayer:
        prefix = f"layers.{i}"
        norms = fetched[f"{prefix}.attention_norm"], fetched[f"{prefix}.mlp_norm"]
        q, k, v, o = (matrix(f"{prefix}.{name}") for name in "qkvo")
        if i not in config.moe_layers:
            dense = three(prefix)
            return Layer(norms[0], q, k, v, o, norms[1], dense.gate, dense.up, dense.down)
        experts = tuple(three(f"{prefix}.experts.{e}") for e in range(config.experts))
        return ExpertLayer(
            norms[0], q, k, v, o, norms[1], matrix(f"{prefix}.router"), experts, three(f"{prefix}.shared")
        )

    return Llama4Weights(
        embedding=fetched["embedding"],
        layers=tuple(layer(i) for i in range(config.layers)),
        norm=fetched["norm"],
        head=fetched.get("head"),
        inv_freq=config.rope.inv_freq(),
        vision=None if config.vision is None else llama4_vision.build(config.vision, fetched.__getitem__),
        projector=None if config.vision is None else matrix("projector"),
    )
