"""The vision encoder of Llama 3.2 Vision: pixels in, states that the decoder's cross layers look at out.

What it is: a transformer over the patches of all tiles of a picture at once, in two stages; the second is gated.
What it is not: a processor. `text.pictures` makes tiles of a file.
What is surprising: padding takes part. A picture of fewer tiles than there may be is computed as if the others were
there, of zeros; only padding does not see padding (Meta's `build_encoder_attention_mask`). So the rows are sorted,
those of the picture first, and no mask is needed.

Shapes: T tiles of S × S pixels, P tokens a tile, N tokens of all T tiles that may be, R of them the picture's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from puna.kernels import ops
from puna.models.decoder import linear
from puna.models.llama3_vision_config import LAYER_NORM_EPS, MllamaVisionConfig
from puna.models.tree import Leaf, Linear, Pixels

Array = Any


@dataclass(frozen=True, slots=True)
class Norm:
    """A layer norm: weight and bias [dim]."""

    weight: Leaf
    bias: Leaf


@dataclass(frozen=True, slots=True)
class Block:
    """Attention of everything to everything and a feed-forward, a norm before each; the second stage gates both."""

    attention_norm: Norm
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    mlp_norm: Norm
    up: Linear
    down: Linear
    attention_gate: Leaf | None = None
    mlp_gate: Leaf | None = None


@dataclass(frozen=True, slots=True)
class TileEmbedding:
    """What tells a tile where in the picture it lies: [ratios + 1, max_tiles · dim], row 0 unused, and a gate [1]."""

    embedding: Leaf
    gate: Leaf


@dataclass(frozen=True, slots=True)
class Position:
    """What tells a token where in its tile it lies, [P, dim], and where in the picture, [ratios + 1, max_tiles · P ·
    dim]; the gate [1] weighs one against the other."""

    embedding: Leaf
    tiles: Leaf
    gate: Leaf


@dataclass(frozen=True, slots=True)
class Encoder:
    """The encoder's parameters: `vision.*` of the canonical names. `patch` is the convolution as a matrix."""

    patch: Linear
    class_embedding: Leaf
    position: Position
    pre_tile: TileEmbedding
    post_tile: TileEmbedding
    pre_norm: Norm
    post_norm: Norm
    layers: tuple[Block, ...]
    global_layers: tuple[Block, ...]


def encode(weights: Encoder, config: MllamaVisionConfig, pixels: Pixels) -> Array:
    """The states of a picture's tokens, tile after tile: [tiles · P, output_dim].

    Raises ValueError for tiles of another number, size or layout than the config knows.
    """
    c, tiles = config, pixels.tiles
    rows, columns = pixels.ratio
    if (rows, columns) not in c.ratios or tuple(tiles.shape) != (rows * columns, 3, c.image_size, c.image_size):
        raise ValueError(f"tiles {list(tiles.shape)} in {rows} rows and {columns} columns are no picture of this model")
    x = linear(_patches(tiles, c), weights.patch)  # [tiles, side², dim]
    x = ops.pad(x.reshape(len(tiles), -1), c.max_tiles).reshape(c.max_tiles, -1, c.dim)
    places = ops.positions(x[:1, :, 0])[0]
    ratio = places[:1] + (c.ratios.index((rows, columns)) + 1)
    x = x + _of_tiles(weights.pre_tile, ratio, c)[:, None]
    x = ops.concat([weights.class_embedding, x])
    x = x + _of_places(weights.position, ratio, x, c)
    x = ops.layer_norm(x, weights.pre_norm.weight, weights.pre_norm.bias, LAYER_NORM_EPS)

    x = ops.pad(x, c.padded_tokens).reshape(-1, c.dim)
    order, seen = _picture_first(c, len(tiles))
    x = x[order]
    taken = []
    for i, layer in enumerate(weights.layers):
        if i in c.taken:
            taken.append(x[:seen].reshape(seen, 1, c.dim))
        x = block(layer, c, x, seen)
    x = ops.layer_norm(x, weights.post_norm.weight, weights.post_norm.bias, LAYER_NORM_EPS)
    x = x + _of_tiles(weights.post_tile, ratio, c)[[row // c.padded_tokens for row in order]]
    for layer in weights.global_layers:
        x = block(layer, c, x, seen)
    if not taken:
        return x[:seen]
    # The taken states are interleaved, number by number: that is how the projector's columns are sorted.
    others = ops.concat(taken).swapaxes(1, 2).reshape(seen, -1)
    return ops.concat([x[:seen], others], axis=-1)


def _patches(tiles: Array, config: MllamaVisionConfig) -> Array:
    """Tiles [T, 3, S, S] cut into patches, row by row: [T, side², 3 · p · p]."""
    n, side, p = len(tiles), config.side, config.patch_size
    cut = tiles.reshape(n, 3, side, p, side, p).swapaxes(1, 2)  # [T, i, 3, a, j, b]
    return cut.swapaxes(2, 4).swapaxes(3, 4).reshape(n, side * side, 3 * p * p)  # [T, i, j, 3, a, b]


def _of_tiles(embedding: TileEmbedding, ratio: Array, config: MllamaVisionConfig) -> Array:
    """What each tile of a layout adds to its tokens: [max_tiles, dim]."""
    row = ops.embedding(embedding.embedding, ratio).reshape(config.max_tiles, config.dim)
    return ops.gated(row, embedding.gate)


def _of_places(position: Position, ratio: Array, x: Array, config: MllamaVisionConfig) -> Array:
    """What each token's place adds to it, [max_tiles, P, dim]: (1 − tanh g) · its place in its tile + tanh g · both."""
    in_tile = ops.embedding(position.embedding, ops.positions(x[:1, :, 0])[0])
    in_picture = ops.embedding(position.tiles, ratio).reshape(config.max_tiles, -1, config.dim)
    return (in_tile - ops.gated(in_tile, position.gate)) + ops.gated(in_picture, position.gate)


def _picture_first(config: MllamaVisionConfig, tiles: int) -> tuple[list[int], int]:
    """The rows of all padded tiles, those that are the picture's first, and how many they are."""
    each = config.padded_tokens
    own = [tile * each + token for tile in range(tiles) for token in range(config.tile_tokens)]
    there = set(own)
    return own + [row for row in range(config.max_tiles * each) if row not in there], len(own)


def block(layer: Block, config: MllamaVisionConfig, x: Array, seen: int) -> Array:
    """One layer of either stage: x [N, dim] → [N, dim]; rows from `seen` on are padding, which does not see padding."""
    y = ops.layer_norm(x, layer.attention_norm.weight, layer.attention_norm.bias, config.norm_eps)
    q, k, v = (linear(y, part).reshape(-1, config.heads, config.head_dim) for part in (layer.q, layer.k, layer.v))
    parts = (ops.attend(q[:seen], k, v), ops.attend(q[seen:], k[:seen], v[:seen]))
    y = linear(ops.concat([part.reshape(-1, config.dim) for part in parts]), layer.o)
    x = x + (y if layer.attention_gate is None else ops.gated(y, layer.attention_gate))
    y = ops.layer_norm(x, layer.mlp_norm.weight, layer.mlp_norm.bias, config.norm_eps)
    y = linear(ops.gelu(linear(y, layer.up)), layer.down)
    return x + (y if layer.mlp_gate is None else ops.gated(y, layer.mlp_gate))


def shapes(config: MllamaVisionConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name → shape of every parameter of the encoder, in order."""
    c = config
    rows = len(c.ratios) + 1
    table: dict[str, tuple[int, ...]] = {
        "vision.patch.weight": (c.dim, 3 * c.patch_size**2),
        "vision.class_embedding": (c.dim,),
        "vision.position.embedding": (c.tile_tokens, c.dim),
        "vision.position.tiles": (rows, c.max_tiles * c.tile_tokens * c.dim),
        "vision.position.gate": (1,),
        "vision.pre_tile.embedding": (rows, c.max_tiles * c.dim),
        "vision.pre_tile.gate": (1,),
        "vision.post_tile.embedding": (rows, c.max_tiles * c.dim),
        "vision.post_tile.gate": (1,),
    }
    for norm in ("pre_norm", "post_norm"):
        table |= {f"vision.{norm}.{kind}": (c.dim,) for kind in ("weight", "bias")}
    for stage, count in (("layers", c.layers), ("global_layers", c.global_layers)):
        for name in (f"vision.{stage}.{j}" for j in range(count)):
            table |= {f"{name}.attention_norm.{kind}": (c.dim,) for kind in ("weight", "bias")}
            table |= {f"{name}.{part}.weight": (c.dim, c.dim) for part in ("q", "k", "v", "o")}
            table |= {f"{name}.mlp_norm.{kind}": (c.dim,) for kind in ("weight", "bias")}
            table |= {f"{name}.up.weight": (c.hidden_dim, c.dim), f"{name}.up.bias": (c.hidden_dim,)}
            table |= {f"{name}.down.weight": (c.dim, c.hidden_dim), f"{name}.down.bias": (c.dim,)}
            if stage == "global_layers":
                table |= {f"{name}.attention_gate": (1,), f"{name}.mlp_gate": (1,)}
    return table


def build(config: MllamaVisionConfig, parameter: Callable[[str], Leaf]) -> Encoder:
    """The encoder's tree, its leaves by canonical name."""

    def norm(name: str) -> Norm:
        return Norm(parameter(f"vision.{name}.weight"), parameter(f"vision.{name}.bias"))

    def layer(name: str, gated: bool) -> Block:
        def matrix(part: str) -> Linear:
            return Linear(parameter(f"vision.{name}.{part}.weight"))

        def biased(part: str) -> Linear:
            return Linear(parameter(f"vision.{name}.{part}.weight"), parameter(f"vision.{name}.{part}.bias"))

        return Block(
            attention_norm=norm(f"{name}.attention_norm"),
            q=matrix("q"),
            k=matrix("k"),
            v=matrix("v"),
            o=matrix("o"),
            mlp_norm=norm(f"{name}.mlp_norm"),
            up=biased("up"),
            down=biased("down"),
            attention_gate=parameter(f"vision.{name}.attention_gate") if gated else None,
            mlp_gate=parameter(f"vision.{name}.mlp_gate") if gated else None,
        )

    def tile(name: str) -> TileEmbedding:
        return TileEmbedding(parameter(f"vision.{name}.embedding"), parameter(f"vision.{name}.gate"))

    return Encoder(
        patch=Linear(parameter("vision.patch.weight")),
        class_embedding=parameter("vision.class_embedding"),
        position=Position(*(parameter(f"vision.position.{part}") for part in ("embedding", "tiles", "gate"))),
        pre_tile=tile("pre_tile"),
        post_tile=tile("post_tile"),
        pre_norm=norm("pre_norm"),
        post_norm=norm("post_norm"),
        layers=tuple(layer(f"layers.{j}", False) for j in range(config.layers)),
        global_layers=tuple(layer(f"global_layers.{j}", True) for j in range(config.global_layers)),
    )
