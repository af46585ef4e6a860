"""LoRA adapters beside a model that serves many: each sequence of a batch may use another one, or none.

What it is: the adapters a runner holds, by number, and the tree of weights with what they add to the rows of one batch.
What it is not: a reader (`weights.adapter`), or arithmetic (`ops.linear` of a `layouts.Adapted`).
What is surprising: the model's weights stay as they are, packed or not; only the tree around them is made anew for a
batch, which takes a tenth of a millisecond. The low-rank products are dense float32, whatever the model's type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from puna.kernels.layouts import Adapted, AdapterRows
from puna.models.tree import CrossLayer, ExpertLayer, Layer, Linear, Weights

Pairs = Mapping[str, tuple[Any, Any]]
"""An adapter: canonical name of a matrix (`layers.0.q`) → A [r, in] and B [out, r], the scale in B."""

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
"""The matrices of a layer to which an adapter may add."""


class Adapters:
    """Adapters by number. `move` brings an array to where the model is, in the type it computes with."""

    def __init__(self, move: Callable[[npt.NDArray[np.float32]], Any] = lambda array: array) -> None:
        self._move = move
        self._held: dict[int, Pairs] = {}

    def load(self, number: int, pairs: Pairs) -> None:
        """Hold an adapter under a number that is free."""
        self._held[number] = {name: (self._move(down), self._move(up)) for name, (down, up) in pairs.items()}

    def drop(self, number: int) -> None:
        """Forget an adapter that no sequence uses any more."""
        del self._held[number]

    @staticmethod
    def used(numbers: npt.NDArray[np.int32] | None) -> bool:
        """Whether any sequence of a batch (`Batch.adapters`) uses one."""
        return numbers is not None and bool((numbers >= 0).any())

    def upon(self, weights: Weights, numbers: npt.NDArray[np.int32] | None, starts: npt.NDArray[np.int32]) -> Weights:
        """The tree for a batch of `numbers` [B] and `starts` [B + 1]; without adapters, the same tree."""
        if numbers is None or not self.used(numbers):
            return weights
        rows: list[tuple[slice, Pairs]] = []
        first = 0
        for b, number in enumerate(numbers):  # neighbours with the same adapter are multiplied together
            if b + 1 < len(numbers) and numbers[b + 1] == number:
                continue
            if number >= 0:
                rows.append((slice(int(starts[first]), int(starts[b + 1])), self._held[int(number)]))
            first = b + 1

        def matrix(name: str, linear: Linear) -> Linear:
            parts = tuple(AdapterRows(which, *pairs[name]) for which, pairs in rows if name in pairs)
            return replace(linear, weight=Adapted(linear.weight, parts)) if parts else linear

        def layer(i: int, old: Layer | ExpertLayer | CrossLayer) -> Layer | ExpertLayer | CrossLayer:
            if isinstance(old, CrossLayer):  # it takes some rows of the batch only; `read_adapter` refuses to add to it
                return old
            there = [name for name in MATRICES if hasattr(old, name)]  # a mixture has its feed-forward elsewhere
            changed: dict[str, Any] = {name: matrix(f"layers.{i}.{name}", getattr(old, name)) for name in there}
            node: Any = old
            return cast("Layer | ExpertLayer", replace(node, **changed))

        layers: Any = tuple(layer(i, old) for i, old in enumerate(weights.layers))
        return replace(weights, layers=layers)
