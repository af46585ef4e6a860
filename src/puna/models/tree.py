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


class KVCache(NamedTuple):
    """Keys and values so far: one array [pages, page, G, D] a layer. A `layouts.PageTable` says whose they are."""

    keys: tuple[Any, ...]
    values: tuple[Any, ...]


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
