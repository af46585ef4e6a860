"""Reads Meta's own folders: `params.json` and one `consolidated.NN.pth` for each rank of model parallelism.

What it is: the joining of shards. Meta splits a matrix over its output rows (wq, wk, wv, w1, w3, output: fairscale's
ColumnParallelLinear) or its input columns (wo, w2: RowParallelLinear) and stores every norm in every shard.
What it is not: the container (`torch_file`), or the meaning of `params.json` (`puna.models.config`).
What is surprising: the embedding is split by columns in Llama 1 and 2 and by rows in Llama 3; its shape tells. And one
shard needs no joining, so its weights stay views of the file, while joined ones are copies. Llama 4 and Llama 3.2
Vision come in other pieces: their shards are handed on as they are, for `names.plan` says how they join.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from puna.errors import CheckpointError
from puna.kernels.layouts import Weight
from puna.models.config import DecoderConfig, Fields, ReadConfig, read_meta
from puna.models.registry import definition
from puna.weights import names
from puna.weights.files import LazyTensor, listed, raw, release, same_bits, wrap
from puna.weights.torch_file import apart, open_torch, state_tensors

PARAMS_NAME = "params.json"
SHARD_NAME = re.compile(r"consolidated(?:\.(\d\d))?\.pth")
"""The one shard of the smaller models has no number in some releases."""

_KEYS_VALUES = re.compile(r"layers\.\d+\.attention\.w[kv]\.weight")
_COLUMNS = re.compile(r"layers\.\d+\.(?:attention\.wo|feed_forward\.w2)\.weight")


def shard_paths(folder: Path) -> list[Path]:
    """The shards in order. Raises CheckpointError when a number is missing between the first and the last."""
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        if m := SHARD_NAME.fullmatch(path.name):
            if int(m[1] or 0) in found:
                raise CheckpointError(
                    f"{folder}: both {found[0].name} and {path.name} are there.",
                    remedy="Name one model a folder: remove the other.",
                )
            found[int(m[1] or 0)] = path
    absent = [f"consolidated.{i:02d}.pth" for i in range(max(found, default=0) + 1) if i not in found]
    if absent:
        raise _absent(folder, absent)
    return [found[i] for i in range(len(found))]


def _absent(folder: Path, absent: Sequence[str]) -> CheckpointError:
    return CheckpointError(f"{folder}: shards missing: {listed(absent)}.", remedy="Fetch them into that folder.")


def read(folder: Path, params: Mapping[str, Any]) -> tuple[ReadConfig, list[Mapping[str, LazyTensor]], tuple[str, ...]]:
    """Config; tensors by Meta's names, of a dense model joined over the shards, of others those of each shard, which
    `names.plan` knows how to join; and what lies there besides and is no tensor.

    Raises CheckpointError for shards that are missing or do not fit together, ConfigError for `params`.
    """
    source = str(folder / PARAMS_NAME)
    if isinstance(params.get("model"), Mapping):  # where some releases keep the model's numbers
        params = params["model"]
    shards, besides = [], dict[str, None]()
    for path in shard_paths(folder):
        file = open_torch(path)
        opaque, state = apart(file.value)
        besides |= dict.fromkeys(opaque)
        shards.append(state_tensors(file, state))
    first = shards[0]
    for i, shard in enumerate(shards):
        if odd := shard.keys() ^ first.keys():
            raise CheckpointError(
                f"{folder}: consolidated.{i:02d}.pth and consolidated.00.pth differ in {listed(odd)}.",
                remedy="They are not shards of one model: fetch them again.",
            )
    parts = {name: [shard[name] for shard in shards] for name in first}
    _check_count(folder, params, parts)
    read_config = read_meta(params, source, vocab_size=_vocabulary(folder, params, parts))
    config = read_config.config
    if type(config) is not DecoderConfig:
        return read_config, list(shards), tuple(besides)
    shapes = {names.foreign(name, "meta"): shape for name, shape in definition(config).shapes(config).items()}
    # A tied model may still store its head, which is laid out like the one of an untied model.
    shapes.setdefault("output.weight", (config.vocab_size, config.dim))
    whole = {
        name: joined(folder, name, pieces, shapes[name]) if name in shapes else pieces[0]
        for name, pieces in parts.items()
    }
    return read_config, [whole], tuple(besides)


def _check_count(folder: Path, params: Mapping[str, Any], parts: Mapping[str, list[LazyTensor]]) -> None:
    """The number of shards, from the rows of wq (Llama 4: of wqkv) in one of them: a missing last shard leaves no gap
    in the numbers."""
    f = Fields(params, str(folder / PARAMS_NAME))
    dim, heads = f.integer("dim"), f.integer("n_heads")
    fused = "layers.0.attention.wqkv.weight"
    every = heads + 2 * f.integer("n_kv_heads", heads) if fused in parts else heads
    rows_in_all = every * f.integer("head_dim", max(1, dim // heads))
    names = (fused, "layers.0.attention.wq.weight", "text_model.layers.0.attention.wq.weight")
    pieces: list[LazyTensor] = next((parts[name] for name in names if name in parts), [])
    rows = pieces[0].shape[0] if pieces and pieces[0].shape else 0
    if not rows or rows_in_all % rows:
        return  # the comparison of every shape says it better
    needed = rows_in_all // rows
    if needed > len(pieces):
        raise _absent(folder, [f"consolidated.{i:02d}.pth" for i in range(len(pieces), min(needed, 100))])


def _vocabulary(folder: Path, params: Mapping[str, Any], parts: Mapping[str, list[LazyTensor]]) -> int | None:
    """Rows of the whole embedding, which Llama 1 and 2 leave out of `params.json`."""
    pieces = parts.get("tok_embeddings.weight") or parts.get("text_model.tok_embeddings.weight")
    if not pieces or len(pieces[0].shape) != 2:
        return None
    rows, columns = pieces[0].shape
    dim = Fields(params, str(folder / PARAMS_NAME)).integer("dim")
    # One shard has all columns, and Llama 3 and later split the rows.
    return rows if columns != dim and columns * len(pieces) == dim else rows * len(pieces)


def joined(folder: Path, name: str, pieces: list[LazyTensor], shape: tuple[int, ...]) -> LazyTensor:
    """One tensor of the whole `shape` from its pieces in every shard. Raises CheckpointError when they do not fit."""
    first = pieces[0]
    if any((piece.shape, piece.dtype) != (first.shape, first.dtype) for piece in pieces):
        raise CheckpointError(
            f"{folder}: {name} has different shapes or types in different shards.",
            remedy="They are not shards of one model: fetch them again.",
        )
    count = len(pieces)
    if count == 1:
        return first
    if first.shape == shape and len(shape) == 1:
        return _whole(name, shape, pieces, partial(_replicated, folder, name, pieces))
    by_columns = (first.shape[0], first.shape[1] * count) if len(first.shape) == 2 else None
    if by_columns == shape and (_COLUMNS.fullmatch(name) or name == "tok_embeddings.weight"):
        return _whole(name, shape, pieces, partial(_concatenated, pieces, 1))
    by_rows = (first.shape[0] * count, *first.shape[1:]) if first.shape else None
    if by_rows == shape and not _COLUMNS.fullmatch(name):
        return _whole(name, shape, pieces, partial(_concatenated, pieces, 0))
    # More shards than key/value heads: neighbouring shards hold the same head.
    repeats, rest = divmod(by_rows[0], shape[0]) if by_rows and by_rows[1:] == shape[1:] else (0, 0)
    if repeats > 1 and not rest and not count % repeats and _KEYS_VALUES.fullmatch(name):
        return _whole(name, shape, pieces, partial(_deduplicated, folder, name, pieces, repeats))
    raise CheckpointError(
        f"{folder}: {name} is {list(first.shape)} in each of {count} shards, which do not make {list(shape)}.",
        remedy="params.json and the shards are not of one model, or a shard is missing.",
    )


def _whole(name: str, shape: tuple[int, ...], pieces: Sequence[LazyTensor], read: Callable[[], Weight]) -> LazyTensor:
    def check() -> None:
        for piece in pieces:
            piece.check()

    return LazyTensor(name, shape, pieces[0].dtype, read, check=check)


def _concatenated(pieces: Sequence[LazyTensor], axis: int) -> Weight:
    weights = [piece.read() for piece in pieces]
    whole = wrap(np.concatenate([raw(weight) for weight in weights], axis))
    for weight in weights:
        release(weight)
    return whole


def _replicated(folder: Path, name: str, pieces: Sequence[LazyTensor]) -> Weight:
    weight = pieces[0].read()
    if not all(same_bits(weight, piece.read()) for piece in pieces[1:]):
        raise CheckpointError(
            f"{folder}: {name} should be the same in the {len(pieces)} shards that hold it, and is not.",
            remedy="They are not shards of one model: fetch them again.",
        )
    return weight


def _deduplicated(folder: Path, name: str, pieces: Sequence[LazyTensor], repeats: int) -> Weight:
    groups = [pieces[i : i + repeats] for i in range(0, len(pieces), repeats)]
    return wrap(np.concatenate([raw(_replicated(folder, name, group)) for group in groups]))
