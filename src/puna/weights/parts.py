"""How one layout stores a model's parameters: which tensor of a file holds which numbers of which parameter.

What it is: `Plan`, a table of parts, and the two ways to use it: `read` makes the parameters of a file's tensors,
`write` a file's tensors of the parameters. One table serves both, so what was written is read back bit for bit.
What it is not: the tables. They stand beside each family's names (`names`, `names_llama4`, `names_mllama`).
What is surprising: shards, fused matrices, experts in one tensor of three dimensions and transposition are all the same
thing here, a slice of a stored tensor that is a slice of a parameter. A parameter that is one untransposed slice stays
a view of the mapped file; any other is copied when it is read, and not before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import numpy as np

from puna.errors import CheckpointError
from puna.kernels.blocks import TYPES
from puna.kernels.layouts import Packed, Weight
from puna.weights.files import ITEM_SIZE, LazyTensor, listed, raw, release, same_bits, wrap

Index = tuple[int | slice, ...]
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """Some numbers: `at` in the tensor `stored` of shard `shard`, transposed if so, are `into` of the parameter.

    An empty index means all of it; the numbers are then taken in order, whatever the two shapes.
    """

    stored: str
    at: Index = ()
    into: Index = ()
    transposed: bool = False
    shard: int = 0


@dataclass
class Plan:
    """Where each parameter lies in a file, or in `shards` files that have the same names and shapes.

    `shapes`: stored name → shape in each shard. `parts`: canonical name → its parts. `same`: stored names that every
    shard holds whole. `filled`: parameters that begin as zeros, because the parts do not cover them.
    """

    shards: int = 1
    shapes: dict[str, Shape] = field(default_factory=dict)
    parts: dict[str, list[Part]] = field(default_factory=dict)
    same: set[str] = field(default_factory=set)
    filled: set[str] = field(default_factory=set)

    def whole(self, name: str, stored: str, shape: Shape) -> None:
        """One tensor that is one parameter, in every shard the same."""
        self.shapes[stored] = shape
        self.parts[name] = [Part(stored)]
        self.same.add(stored)

    def rows(self, name: str, stored: str, shape: Shape) -> None:
        """Split over the shards by rows (fairscale's ColumnParallelLinear, VocabParallelEmbedding); `shape` in all."""
        self.blocks(stored, ((name, shape),))

    def blocks(self, stored: str, of: Sequence[tuple[str, Shape]]) -> None:
        """Several parameters one below the other in each shard, each of them split over the shards by rows."""
        columns = of[0][1][1:]
        at = 0
        for name, shape in of:
            height = divided(shape[0], self.shards, name)
            for s in range(self.shards):
                into: Index = () if self.shards == 1 else (slice(s * height, (s + 1) * height),)
                alone = len(of) == 1
                part = Part(stored, () if alone else (slice(at, at + height),), into, shard=s)
                self.parts.setdefault(name, []).append(part)
            at += height
        self.shapes[stored] = (at, *columns)

    def columns(self, name: str, stored: str, shape: Shape) -> None:
        """Split over the shards by columns (fairscale's RowParallelLinear); `shape` is that of the parameter."""
        width = divided(shape[1], self.shards, name)
        self.shapes[stored] = (shape[0], width)
        for s in range(self.shards):
            into: Index = () if self.shards == 1 else (slice(None), slice(s * width, (s + 1) * width))
            self.parts.setdefault(name, []).append(Part(stored, (), into, shard=s))


def divided(size: int, shards: int, name: str) -> int:
    """`size` in each of the shards. Raises CheckpointError where they do not share it evenly."""
    if size % shards:
        raise CheckpointError(
            f"{name} has {size} rows or columns, which {shards} shards do not share evenly.",
            remedy="params.json and the shards are not of one model, or a shard is missing.",
        )
    return size // shards


def read(
    plan: Plan, shapes: Mapping[str, Shape], stored: Sequence[Mapping[str, LazyTensor]], source: object
) -> dict[str, LazyTensor]:
    """The parameters, by canonical name and in the order of `shapes`, of the tensors in each shard; nothing is read.

    Raises CheckpointError for a tensor of another shape or type than the plan says, or one that differs between shards.
    """
    for i, shard in enumerate(stored):
        for name, shape in plan.shapes.items():
            tensor = shard[name]
            if tensor.shape != shape:
                where = f" (shard {i} of {len(stored)})" if len(stored) > 1 else ""
                raise CheckpointError(
                    f"{source}: {name}{where} has the shape {list(tensor.shape)}, and the config says {list(shape)}.",
                    remedy="The config is another model's: fetch both again.",
                )
            if tensor.dtype != stored[0][name].dtype:
                raise CheckpointError(
                    f"{source}: {name} has different types in different shards.",
                    remedy="They are not shards of one model: fetch them again.",
                )
            if tensor.dtype not in ITEM_SIZE and not (tensor.dtype in TYPES and len(tensor.shape) > 1):
                raise CheckpointError(
                    f"{source}: {name} is stored as {tensor.dtype}; Puna reads it in float32, bfloat16 and float16.",
                    remedy="Save the model in one of those types.",
                )
    checks = {name: _once([shard[name] for shard in stored], name in plan.same, source) for name in plan.shapes}
    return {name: _parameter(name, shape, plan, stored, source, checks) for name, shape in shapes.items()}


def _once(tensors: Sequence[LazyTensor], same: bool, source: object) -> Callable[[], None]:
    """A check of checksums that reads the bytes once, however many parameters lie in them."""

    @cache
    def check() -> None:
        for tensor in tensors:
            tensor.check()
        if same and len(tensors) > 1:
            _equal(tensors, source)

    return check


def _equal(tensors: Sequence[LazyTensor], source: object) -> None:
    first = tensors[0].read()
    if not all(same_bits(first, tensor.read()) for tensor in tensors[1:]):
        raise CheckpointError(
            f"{source}: {tensors[0].name} should be the same in the {len(tensors)} shards that hold it, and is not.",
            remedy="They are not shards of one model: fetch them again.",
        )


def _parameter(
    name: str,
    shape: Shape,
    plan: Plan,
    stored: Sequence[Mapping[str, LazyTensor]],
    source: object,
    checks: Mapping[str, Callable[[], None]],
) -> LazyTensor:
    parts = plan.parts[name]
    first = stored[parts[0].shard][parts[0].stored]
    if len({stored[part.shard][part.stored].dtype for part in parts}) > 1:
        raise CheckpointError(
            f"{source}: the tensors that make up {name} ({listed({p.stored for p in parts})}) have several types.",
            remedy="Save them in one type.",
        )
    copied = len(parts) > 1 or parts[0].transposed or name in plan.filled
    if first.dtype not in ITEM_SIZE and (copied or math.prod(first.shape[-1:]) != shape[-1]):
        raise CheckpointError(
            f"{source}: {first.name} is packed ({first.dtype}) across the rows of {name}, so it cannot be taken apart.",
            remedy="Save it in float32, bfloat16 or float16.",
        )

    def check() -> None:
        for part in parts:
            checks[part.stored]()

    def load() -> Weight:
        if len(parts) == 1 and parts[0].stored in plan.same and len(stored) > 1:
            _equal([shard[parts[0].stored] for shard in stored], source)
        if not copied:
            return _taken(first.read(), parts[0], shape)
        whole: np.ndarray[Any, Any] | None = None
        for part in parts:
            weight = stored[part.shard][part.stored].read()
            piece = raw(weight)[part.at] if part.at else raw(weight)
            if whole is None:
                whole = (np.zeros if name in plan.filled else np.empty)(shape, piece.dtype)
            _fill(whole[part.into] if part.into else whole, piece, part.transposed)
            release(wrap(raw(weight)[part.at[0]] if part.at else raw(weight)))
        assert whole is not None
        return wrap(whole)

    at = first.at if not copied and not parts[0].at else None
    return LazyTensor(name, shape, first.dtype, load, at, check)


_STRIP = 32
"""Rows that are transposed at a time: a matrix of 5,120 × 8,192 bf16 at 0.8 GB/s here, and at 0.17 all at once."""


def _fill(target: np.ndarray[Any, Any], numbers: np.ndarray[Any, Any], transposed: bool) -> None:
    """Copy numbers into a slice of another array, whatever their shapes, or the transpose of a matrix."""
    if not transposed:
        target[...] = numbers.reshape(target.shape)
        return
    for at in range(0, len(numbers), _STRIP):
        target[:, at : at + _STRIP] = numbers[at : at + _STRIP].T


def _taken(weight: Weight, part: Part, shape: Shape) -> Weight:
    """One slice of a stored tensor, as it lies there: no number is copied."""
    data = raw(weight)[part.at] if part.at else raw(weight)
    if isinstance(weight, Packed):
        return Packed(weight.kind, shape, data.reshape(*shape[:-1], data.shape[-1]))
    return wrap(data.reshape(shape))


def copied_bytes(plan: Plan, tensors: Mapping[str, LazyTensor]) -> int:
    """Bytes of the parameters that lie transposed in the file, so that loading them means copying them."""
    return sum(tensors[name].nbytes for name, parts in plan.parts.items() if any(part.transposed for part in parts))


def write(plan: Plan, tensors: Mapping[str, LazyTensor], source: object) -> list[LazyTensor]:
    """The tensors of a file in one piece, by their names there, from the parameters; nothing is read.

    A tensor of several parameters gives them `pieces` by pieces, so that no more of it than one expert is held. Raises
    CheckpointError where the parameters of one tensor have several types.
    """
    holders: dict[str, list[tuple[LazyTensor, Part]]] = {name: [] for name in plan.shapes}
    folded: dict[str, str] = {}
    for name, parts in plan.parts.items():
        if name in plan.filled:
            folded[parts[0].stored] = name
        for part in parts:
            holders[part.stored].append((tensors[name], part))
    return [
        _folded(name, plan, tensors[folded[name]], held, source)
        if name in folded
        else _stored(name, plan.shapes[name], held, source)
        for name, held in holders.items()
    ]


def _folded(
    name: str, plan: Plan, tensor: LazyTensor, held: list[tuple[LazyTensor, Part]], source: object
) -> LazyTensor:
    """A stored tensor that says each number once where the parameter repeats it, and leaves out its zeros."""

    def fold() -> Weight:
        numbers = raw(tensor.read())
        whole, back = np.zeros(plan.shapes[name], numbers.dtype), np.zeros(tensor.shape, numbers.dtype)
        for _, part in held:
            whole[part.at] = numbers[part.into].reshape(whole[part.at].shape)
        for _, part in held:
            back[part.into] = whole[part.at].reshape(back[part.into].shape)
        if not same_bits(wrap(back), wrap(numbers)):
            raise CheckpointError(
                f"{source}: {tensor.name} has other numbers for a tile in one aspect ratio than in another, "
                f"and {name} says them once.",
                remedy="Convert to safetensors.",
            )
        return wrap(whole)

    return LazyTensor(name, plan.shapes[name], tensor.dtype, fold)


def _stored(name: str, shape: Shape, held: list[tuple[LazyTensor, Part]], source: object) -> LazyTensor:
    first, part = held[0]
    if len(held) == 1 and not part.at and not part.into and not part.transposed:

        def reshaped() -> Weight:
            weight = first.read()
            return weight if isinstance(weight, Packed) else wrap(raw(weight).reshape(shape))

        return replace(first, name=name, shape=shape, read=first.read if first.shape == shape else reshaped)
    kinds = {tensor.dtype for tensor, _ in held}
    if len(kinds) > 1:
        raise CheckpointError(
            f"{source}: {name} holds several of this model's tensors, and they are stored as {listed(kinds)}.",
            remedy="Say with --type which one type to write them in.",
        )
    groups: dict[tuple[int, int], list[tuple[LazyTensor, Part]]] = {}
    for tensor, part in held:
        first_axis = part.at[0] if part.at else slice(None)
        begin, end = (first_axis, first_axis + 1) if isinstance(first_axis, int) else first_axis.indices(shape[0])[:2]
        groups.setdefault((begin, end), []).append((tensor, part))
    pieces = partial(_pieces, shape, sorted(groups.items(), key=lambda item: item[0]))

    def joined() -> Weight:
        return wrap(np.concatenate([raw(piece) for piece in pieces()]))

    return LazyTensor(name, shape, first.dtype, joined, pieces=pieces)


def _pieces(shape: Shape, groups: Iterable[tuple[tuple[int, int], list[tuple[LazyTensor, Part]]]]) -> Iterator[Weight]:
    """The rows of a stored tensor, group after group, each made of the parameters that lie in it."""
    for (begin, end), held in groups:
        block: np.ndarray[Any, Any] | None = None
        for tensor, part in held:
            weight = tensor.read()
            numbers = raw(weight)[part.into] if part.into else raw(weight)
            if block is None:
                block = np.empty((end - begin, *shape[1:]), numbers.dtype)
            inner = part.at[1:]
            target = block[(0, *inner)] if part.at and isinstance(part.at[0], int) else block[(slice(None), *inner)]
            _fill(target, numbers, part.transposed)
            release(weight)
        assert block is not None
        yield wrap(block)
