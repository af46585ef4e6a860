"""The vision encoder of Llama 4, complete: tiles of a picture to what stands in place of the text's embeddings.

What it is: `encode`, pure functions over the records below, and the canonical names of every parameter. Each tile is
looked at by itself: its patches through one matrix, a class token behind them, layers in which everything sees
everything, and a pixel shuffle with an MLP that makes one token of four neighbours (Meta's llama-models,
models/llama4/vision/embedding.py and encoder.py).
What it is not: the projector, and the text model (`llama4`), which holds both.
What is surprising: rope turns by the patch's column in the first half of a head and by its row in the second, both
counted from 1, pairs being neighbours; the class token is not turned. The pixel shuffle's MLP has an activation after
its second matrix too, and neither has a bias.

Shapes: N tiles, T tokens of a tile (its patches and the class token), H heads, D head size, C width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from puna.kernels import ops
from puna.models.decoder import linear
from puna.models.llama4_config import Llama4VisionConfig
from puna.models.tree import Leaf, Linear

Array = Any


@dataclass(frozen=True, slots=True)
class Norm:
    """Of a layer norm: weight and bias [dim]."""

    weight: Leaf
    bias: Leaf


@dataclass(frozen=True, slots=True)
class VisionLayer:
    """A block of the encoder: attention that sees everything, and a feed-forward without a gate."""

    attention_norm: Norm
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    mlp_norm: Norm
    up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class Adapter:
    """The MLP after the pixel shuffle."""

    up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class Vision:
    """The encoder: a matrix over patches, the class token, positions, norms before and after, layers, the adapter.

    `rope_cos` and `rope_sin` [T, D/2] are no parameters but rope's table, as `DecoderWeights.inv_freq` is.
    """

    patch: Linear
    class_embedding: Leaf
    position_embedding: Leaf
    pre_norm: Norm
    layers: tuple[VisionLayer, ...]
    post_norm: Norm
    adapter: Adapter
    rope_cos: Leaf
    rope_sin: Leaf


def encode(weights: Vision, config: Llama4VisionConfig, tiles: Array) -> Array:
    """What is seen in tiles [N, 3, S, S], normalised: [N · tile_tokens, output_dim], the tiles' one after the other.

    Raises ValueError for tiles of another size.
    """
    size = config.image_size
    if tiles.ndim != 4 or tuple(tiles.shape[1:]) != (3, size, size):
        raise ValueError(f"tiles are [N, 3, {size}, {size}] here, not {tuple(tiles.shape)}")
    x = linear(patches(tiles, config.patch_size), weights.patch)
    x = ops.concat([x, weights.class_embedding])
    places = ops.positions(x[:, :, 0])
    x = norm(x + ops.embedding(weights.position_embedding, places), weights.pre_norm, config)
    turn = ops.embedding(weights.rope_cos, places), ops.embedding(weights.rope_sin, places)
    for layer in weights.layers:
        x = x + attention(layer, config, norm(x, layer.attention_norm, config), turn)
        x = x + linear(ops.gelu(linear(norm(x, layer.mlp_norm, config), layer.up)), layer.down)
    x = shuffled(norm(x, weights.post_norm, config)[:, :-1], config)
    return ops.gelu(linear(ops.gelu(linear(x, weights.adapter.up)), weights.adapter.down))


def patches(tiles: Array, size: int) -> Array:
    """Tiles [N, 3, S, S] cut into patches, row by row: [N, (S/size)², 3 · size²], each channel by channel."""
    count, _, side, _ = tiles.shape
    x = tiles.reshape(count, 3, side // size, size, side // size, size)
    x = x.swapaxes(1, 2).swapaxes(2, 4).swapaxes(3, 4)  # [N, row, column, 3, size, size]
    return x.reshape(count, (side // size) ** 2, 3 * size * size)


def norm(x: Array, weights: Norm, config: Llama4VisionConfig) -> Array:
    """Layer norm."""
    return ops.layer_norm(x, weights.weight, weights.bias, config.norm_eps)


def attention(layer: VisionLayer, config: Llama4VisionConfig, x: Array, turn: tuple[Array, Array]) -> Array:
    """Attention of a tile's tokens over all of them: [N, T, C] → [N, T, C]."""
    shape = (*x.shape[:-1], config.heads, config.head_dim)
    q, k, v = (linear(x, each).reshape(shape) for each in (layer.q, layer.k, layer.v))
    q, k = (ops.rope(t, *turn, True) for t in (q, k))
    return linear(ops.attend(q, k, v).reshape(x.shape), layer.o)


def shuffled(x: Array, config: Llama4VisionConfig) -> Array:
    """The pixel shuffle: patches [N, side², C] → [N · tile_tokens, C / shuffle²], neighbours beside one another."""
    count, side, less = len(x), config.side, round(config.side * config.shuffle)
    x = x.reshape(count, side, less, -1).swapaxes(1, 2)
    x = x.reshape(count, less, less, -1).swapaxes(1, 2)
    return x.reshape(count * less * less, -1)


def rope_tables(config: Llama4VisionConfig) -> tuple[Array, Array]:
    """cos and sin [T, D/2] of each token's angles; those of the class token, the last, are zero."""
    quarter, side = config.head_dim // 4, config.side
    powers = np.arange(quarter, dtype=np.float32) / np.float32(quarter)
    frequencies = np.float32(1) / np.float32(config.rope_theta) ** powers
    rows, columns = np.divmod(np.arange(side * side, dtype=np.float32), np.float32(side))
    angles = np.zeros((side * side + 1, 2 * quarter), np.float32)
    angles[:-1, :quarter] = (columns[:, None] + 1) * frequencies
    angles[:-1, quarter:] = (rows[:, None] + 1) * frequencies
    return np.cos(angles), np.sin(angles)


def shapes(config: Llama4VisionConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name → shape of every parameter of the encoder, in order."""
    c = config
    table: dict[str, tuple[int, ...]] = {
        "vision.patch.weight": (c.dim, 3 * c.patch_size**2),
        "vision.class_embedding": (c.dim,),
        "vision.position_embedding": (c.side**2 + 1, c.dim),
    }

    def norm(name: str) -> None:
        table[f"{name}.weight"] = table[f"{name}.bias"] = (c.dim,)

    norm("vision.pre_norm")
    for i in range(c.layers):
        prefix = f"vision.layers.{i}"
        norm(f"{prefix}.attention_norm")
        for name in "qkvo":
            table[f"{prefix}.{name}.weight"], table[f"{prefix}.{name}.bias"] = (c.dim, c.dim), (c.dim,)
        norm(f"{prefix}.mlp_norm")
        for name, out, inner in (("up", c.hidden_dim, c.dim), ("down", c.dim, c.hidden_dim)):
            table[f"{prefix}.{name}.weight"], table[f"{prefix}.{name}.bias"] = (out, inner), (out,)
    norm("vision.post_norm")
    table["vision.adapter.up.weight"] = (c.output_dim, c.shuffled_dim)
    table["vision.adapter.down.weight"] = (c.output_dim, c.output_dim)
    return table


def build(config: Llama4VisionConfig, parameter: Callable[[str], Array]) -> Vision:
    """The encoder's tree, its leaves by canonical name."""

    def linear(name: str) -> Linear:
        return Linear(parameter(f"vision.{name}.weight"), parameter(f"vision.{name}.bias"))

    def norm(name: str) -> Norm:
        return Norm(parameter(f"vision.{name}.weight"), parameter(f"vision.{name}.bias"))

    layers = tuple(
        VisionLayer(
            attention_norm=norm(f"layers.{i}.attention_norm"),
            q=linear(f"layers.{i}.q"),
            k=linear(f"layers.{i}.k"),
            v=linear(f"layers.{i}.v"),
            o=linear(f"layers.{i}.o"),
            mlp_norm=norm(f"layers.{i}.mlp_norm"),
            up=linear(f"layers.{i}.up"),
            down=linear(f"layers.{i}.down"),
        )
        for i in range(config.layers)
    )
    cos, sin = rope_tables(config)
    return Vision(
        patch=Linear(parameter("vision.patch.weight")),
        class_embedding=parameter("vision.class_embedding"),
        position_embedding=parameter("vision.position_embedding"),
        pre_norm=norm("pre_norm"),
        layers=layers,
        post_norm=norm("post_norm"),
        adapter=Adapter(Linear(parameter("vision.adapter.up.weight")), Linear(parameter("vision.adapter.down.weight"))),
        rope_cos=cos,
        rope_sin=sin,
    )
