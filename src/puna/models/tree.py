"""A model's weights as a tree, and the cache a decoder reads and writes.

What it is: frozen records. A leaf is anything `ops.linear` and `ops.embedding` accept: a NumPy array, `layouts.BF16`, a
torch tensor; later a packed matrix, or one with LoRA. A model file never asks which.
What it is not: a module with state. `tree_map` makes one tree from another (to move it to a device, to convert it).
What is surprising: a tied head is not a second leaf: `head` is None and the embedding serves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, NamedTuple, TypeVar, cast

from puna.kernels.layouts import Pixels as Pixels  # `text.pictures` makes them, and may import no model

Leaf = Any
Node = TypeVar("Node")


@dataclass(frozen=True, slots=True)
class Linear:
    """weight [out, in], and bias [out] where the config asks for one."""

    weight: Leaf
    bias: Leaf | None = None


@dataclass(frozen=True, slots=True)
class Layer:
    """One block: attention (q, k, v, o) and the gated feed-forward (gate, up, down), a norm before each."""

    attention_norm: Leaf
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    mlp_norm: Leaf
    gate: Linear
    up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class Gated:
    """A gated feed-forward of its own: gate and up [hidden, dim], down [dim, hidden]."""

    gate: Linear
    up: Linear
    down: Linear

    def matrices(self) -> tuple[Leaf, Leaf, Leaf]:
        """gate, up, down, as `ops.experts` takes them."""
        return self.gate.weight, self.up.weight, self.down.weight


@dataclass(frozen=True, slots=True)
class ExpertLayer:
    """A block whose feed-forward is a mixture: a router [E, dim], E experts, and one that every token passes."""

    attention_norm: Leaf
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    mlp_norm: Leaf
    router: Linear
    experts: tuple[Gated, ...]
    shared: Gated


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """A dense decoder: embedding [V, dim], its layers, the last norm [dim], and the head [V, dim] unless it is tied.

    `inv_freq` [D/2] is not a parameter: it is rope's table, settled when the model is built and kept here so that it
    moves to a device with the rest. It stays float32 whatever the weights' type.
    """

    embedding: Leaf
    layers: tuple[Layer, ...]
    norm: Leaf
    head: Leaf | None
    inv_freq: Leaf


@dataclass(frozen=True, slots=True)
class Llama4Weights:
    """Llama 4: as `DecoderWeights`, some or all layers mixtures; and the vision encoder and its projector, if any."""

    embedding: Leaf
    layers: tuple[Layer | ExpertLayer, ...]
    norm: Leaf
    head: Leaf | None
    inv_freq: Leaf
    vision: Any = None
    projector: Linear | None = None


@dataclass(frozen=True, slots=True)
class CrossLayer:
    """A block that looks at pictures: q from the text, k and v from the picture; both halves are gated [1]."""

    attention_norm: Leaf
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    q_norm: Leaf
    k_norm: Leaf
    attention_gate: Leaf
    mlp_norm: Leaf
    gate: Linear
    up: Linear
    down: Linear
    mlp_gate: Leaf


@dataclass(frozen=True, slots=True)
class MllamaWeights:
    """Llama 3.2 Vision: as `DecoderWeights`, some layers cross layers, the embedding with rows past the vocabulary; and
    the vision encoder and its projector, if any."""

    embedding: Leaf
    layers: tuple[Layer | CrossLayer, ...]
    norm: Leaf
    head: Leaf
    inv_freq: Leaf
    vision: Any = None
    projector: Linear | None = None


Weights = DecoderWeights | Llama4Weights | MllamaWeights
"""The tree of any model; `registry.definition(config)` says what computes with it."""


class Placed(NamedTuple):
    """A picture's place in a step: what `see` gave for it stands in a sequence from a position on.

    `sequence` is the row of the batch's table (or of tokens [B, T]), `at` the position of the picture's first token in
    that sequence, which may lie before or after the tokens of this step.
    """

    sequence: int
    at: int
    sight: Any


class KVCache(NamedTuple):
    """Keys and values so far: one array [pages, page, G, D] a layer. A `layouts.PageTable` says whose they are."""

    keys: tuple[Any, ...]
    values: tuple[Any, ...]


TABLES = ("inv_freq", "vision.rope_cos", "vision.rope_sin")
"""Leaves that are no parameters: settled when the model is built, float32 whatever the weights' type."""


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Leaf]]:
    """(canonical name, leaf) of a tree, in order: `layers.0.q.weight`, `norm`."""
    if node is None:
        return
    if isinstance(node, tuple):
        for i, child in enumerate(node):
            yield from leaves(child, f"{prefix}.{i}")
    elif is_dataclass(node):
        for part in fields(node):
            yield from leaves(getattr(node, part.name), f"{prefix}.{part.name}" if prefix else part.name)
    else:
        yield prefix, node


def tree_map(function: Callable[[Leaf], Leaf], node: Node) -> Node:
    """The same tree with `function` applied to each leaf."""
    if node is None:
        return node
    if isinstance(node, tuple):
        return cast("Node", tuple(tree_map(function, child) for child in node))
    if is_dataclass(node):
        parts = {part.name: tree_map(function, getattr(node, part.name)) for part in fields(node)}
        return cast("Node", replace(cast("Any", node), **parts))
    return cast("Node", function(node))
