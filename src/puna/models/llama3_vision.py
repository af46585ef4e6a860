"""Llama 3.2 Vision (11B, 90B): a Llama 3.1 decoder with layers between that look at pictures.

What it is: the decoder, complete, and `see`, which makes of a picture what those layers look at. The decoder's own
layers are `models.decoder`'s; the encoder is `llama3_vision_encoder`.
What it is not: a decoder with pictures among its tokens, as Llama 4 is. A picture takes one token, `<|image|>`, whose
embedding is an ordinary row, and the text after it reads the picture's keys and values in every cross layer.
What is surprising: a token sees the pictures of the last unbroken run of `<|image|>` at or before it, and no others
(Meta's `create_vision_mask`). One before which there is none passes the cross layers unchanged, as in Meta's code.
transformers shuts off only their feed-forward for it and lets it attend to all pictures, later ones too, unless the
text before the pictures was a call of its own.

Shapes: as in `decoder`; P tokens of a picture (tiles · tokens of a tile).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from puna.kernels import ops
from puna.kernels.layouts import PageTable
from puna.models import decoder
from puna.models import llama3_vision_encoder as encoder
from puna.models.decoder import linear, logits
from puna.models.llama3_vision_config import MllamaConfig
from puna.models.tree import CrossLayer, KVCache, Layer, Leaf, Linear, MllamaWeights, Pixels, Placed

__all__ = ["build", "forward", "logits", "make_cache", "parameter_count", "see", "shapes", "sight_bytes"]

Array = Any

Sight = tuple[tuple[Array, Array], ...]
"""A picture as the decoder sees it: keys and values [P, G, D] for each cross layer."""


@dataclass(frozen=True)
class _Stretch:
    """Neighbouring rows of a step, `begin` to `end`, that see the same pictures."""

    begin: int
    end: int
    pictures: tuple[Sight, ...]


def forward(
    weights: MllamaWeights,
    config: MllamaConfig,
    tokens: Array,
    table: PageTable | None = None,
    cache: KVCache | None = None,
    placed: Sequence[Placed] = (),
) -> Array:
    """Hidden states after the last norm, as `decoder.forward`, of text that sees the pictures in `placed`.

    Those are all pictures of the sequences up to the end of this step, also where their own token was in an earlier
    one; later ones do no harm. `Placed.sight` is what `see` gave. Raises ValueError for a table without a cache, and
    for a picture of a sequence that is not there, or at a place that another one has.
    """
    if (table is None) != (cache is None):
        raise ValueError("a table and a cache belong together")
    stretches = _stretches(tokens, table, placed)
    x = ops.embedding(weights.embedding, tokens)
    positions = ops.positions(tokens) if table is None else table.positions
    cos, sin = ops.rope_table(positions, weights.inv_freq)
    own = crossed = 0
    for layer in weights.layers:
        if isinstance(layer, CrossLayer):
            if stretches:
                x = cross(layer, config, x, stretches, crossed)
            crossed += 1
            continue
        kv = None if cache is None else (cache.keys[own], cache.values[own])
        own += 1
        y = ops.rms_norm(x, layer.attention_norm, config.norm_eps)
        x = x + decoder.attention(layer, config, y, cos, sin, table, kv)
        x = x + decoder.feed_forward(layer, ops.rms_norm(x, layer.mlp_norm, config.norm_eps))
    return ops.rms_norm(x, weights.norm, config.norm_eps)


def _stretches(tokens: Array, table: PageTable | None, placed: Sequence[Placed]) -> list[_Stretch]:
    """The rows of a step that see a picture, in order; rows count through the sequences."""
    if not placed:
        return []
    if table is None:
        sequences, length = tokens.shape
        spans = [(b * length, length, 0) for b in range(sequences)]
    else:
        starts, positions = table.starts.tolist(), table.positions.tolist()
        spans = [(begin, end - begin, positions[begin]) for begin, end in pairwise(starts)]
    if not all(0 <= picture.sequence < len(spans) for picture in placed):
        raise ValueError(f"a picture stands in a sequence that is not one of the {len(spans)} of this step")
    found = []
    for sequence, (row, count, first) in enumerate(spans):
        pictures = sorted((one for one in placed if one.sequence == sequence), key=lambda one: one.at)
        places = [one.at for one in pictures]
        if len(set(places)) != len(places):
            raise ValueError("two pictures stand at one place")
        for j, at in enumerate(places):
            run = j
            while run and places[run - 1] == places[run] - 1:
                run -= 1
            begin = max(at, first)
            end = min(places[j + 1] if j + 1 < len(places) else first + count, first + count)
            if begin < end:
                sights = tuple(one.sight for one in pictures[run : j + 1])
                found.append(_Stretch(row + begin - first, row + end - first, sights))
    return found


def cross(layer: CrossLayer, config: MllamaConfig, x: Array, stretches: Sequence[_Stretch], number: int) -> Array:
    """The `number`-th cross layer: x [*, dim] → [*, dim]; rows in no stretch are not touched.

    It may write to x, which is the caller's own.
    """
    flat = x.reshape(-1, config.dim)
    rows = [row for stretch in stretches for row in range(stretch.begin, stretch.end)]
    y = flat if len(rows) == len(flat) else flat[rows]
    q = linear(ops.rms_norm(y, layer.attention_norm, config.norm_eps), layer.q)
    q = ops.rms_norm(q.reshape(-1, config.heads, config.head_dim), layer.q_norm, config.norm_eps)
    parts, at = [], 0
    for stretch in stretches:
        count = stretch.end - stretch.begin
        keys, values = _together([picture[number] for picture in stretch.pictures])
        parts.append(ops.attend(q[at : at + count], keys, values).reshape(count, -1))
        at += count
    attended = parts[0] if len(parts) == 1 else ops.concat(parts)
    y = y + ops.gated(linear(attended, layer.o), layer.attention_gate)
    hidden = ops.rms_norm(y, layer.mlp_norm, config.norm_eps)
    gated = linear(ops.swiglu(linear(hidden, layer.gate), linear(hidden, layer.up)), layer.down)
    y = y + ops.gated(gated, layer.mlp_gate)
    if len(rows) == len(flat):
        return y.reshape(x.shape)
    flat[rows] = y
    return flat.reshape(x.shape)


def _together(parts: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Keys and values of one or several pictures, [P, G, D] each."""
    if len(parts) == 1:
        return parts[0]
    shape = (-1, *parts[0][0].shape[1:])
    keys, values = (ops.concat([one[i].reshape(len(one[i]), -1) for one in parts]).reshape(shape) for i in (0, 1))
    return keys, values


def see(weights: MllamaWeights, config: MllamaConfig, pixels: Pixels) -> Sight:
    """Keys and values of a picture for each cross layer: computed once, whatever text is about it.

    Raises ValueError for tiles that are no picture of this model, and for a model without its encoder.
    """
    if weights.vision is None or weights.projector is None or config.vision is None:
        raise ValueError("this model came without its vision encoder")
    states = linear(encoder.encode(weights.vision, config.vision, pixels), weights.projector)
    shape = (-1, config.kv_heads, config.head_dim)
    return tuple(
        (
            ops.rms_norm(linear(states, layer.k).reshape(shape), layer.k_norm, config.norm_eps),
            linear(states, layer.v).reshape(shape),
        )
        for layer in weights.layers
        if isinstance(layer, CrossLayer)
    )


def sight_bytes(config: MllamaConfig, pixels: Pixels) -> int:
    """The bytes of what `see` gives, float32."""
    tokens = 0 if config.vision is None else len(pixels.tiles) * config.vision.tile_tokens
    return 2 * len(config.cross_layers) * tokens * config.kv_heads * config.head_dim * 4


def shapes(config: MllamaConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name → shape of every parameter, in order, without allocating any."""
    c, table = config, decoder.shapes(config)
    table["embedding"] = (c.vocab_size + c.extra_rows, c.dim)
    for i in c.cross_layers:
        table |= {f"layers.{i}.{norm}": (c.head_dim,) for norm in ("q_norm", "k_norm")}
        table |= {f"layers.{i}.{gate}": (1,) for gate in ("attention_gate", "mlp_gate")}
    if c.vision is not None:
        table |= encoder.shapes(c.vision)
        table |= {"projector.weight": (c.dim, c.vision.output_dim), "projector.bias": (c.dim,)}
    return table


def parameter_count(config: MllamaConfig) -> int:
    """How many parameters the model has, those of the encoder too."""
    return sum(math.prod(shape) for shape in shapes(config).values())


def build(config: MllamaConfig, parameter: Callable[[str], Leaf]) -> MllamaWeights:
    """The tree of a model, its leaves fetched by canonical name (the keys of `shapes`), in that order."""
    fetched = {name: parameter(name) for name in shapes(config)}
    plain = decoder.build(config, fetched.__getitem__)

    def crossing(i: int, layer: Layer) -> CrossLayer:
        return CrossLayer(
            attention_norm=layer.attention_norm,
            q=layer.q,
            k=layer.k,
            v=layer.v,
            o=layer.o,
            q_norm=fetched[f"layers.{i}.q_norm"],
            k_norm=fetched[f"layers.{i}.k_norm"],
            attention_gate=fetched[f"layers.{i}.attention_gate"],
            mlp_norm=layer.mlp_norm,
            gate=layer.gate,
            up=layer.up,
            down=layer.down,
            mlp_gate=fetched[f"layers.{i}.mlp_gate"],
        )

    seeing = config.vision is not None
    return MllamaWeights(
        embedding=plain.embedding,
        layers=tuple(crossing(i, one) if i in config.cross_layers else one for i, one in enumerate(plain.layers)),
        norm=plain.norm,
        head=fetched["head"],
        inv_freq=plain.inv_freq,
        vision=None if config.vision is None else encoder.build(config.vision, fetched.__getitem__),
        projector=Linear(fetched["projector.weight"], fetched["projector.bias"]) if seeing else None,
    )


def make_cache(
    config: MllamaConfig,
    pages: int,
    page: int,
    zeros: Callable[[tuple[int, ...]], Array],
    local: int | None = None,
) -> KVCache:
    """An empty cache: one array for keys and one for values for each of the decoder's own layers, in their order.

    Cross layers have none: a picture's keys and values are with the picture. No layer sees one chunk only, so `local`
    counts for nothing.
    """
    shape = (pages, page, config.kv_heads, config.head_dim)
    own = range(config.cached_layers)
    return KVCache(tuple(zeros(shape) for _ in own), tuple(zeros(shape) for _ in own))
