"""The host runner whose steps are one native call each, and the choice between it and the plain one.

What it is: `HostRunner` with `kernels.cpu.Decoder` in place of `models.decoder`: the same ops on the same weights in
the same order, without Python between them.
What it is not: another model. `decoder.forward` stays the definition, and tests compare the two bit by bit;
`HostRunner` itself is how to run the plain one on the same C++ ops.
What is surprising: the last layer is computed only for rows whose logits are wanted (see kernels/cpu/forward.cpp). And
packed matrices in a mapped file are not regrouped before the first answer, which is there sooner without: each step
after it regroups a share before it computes. The bits are the same either way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from puna.engine.runner import PAGE, Batch, Hidden, HostRunner, Logits
from puna.kernels import ops
from puna.kernels.layouts import Mapped
from puna.models.config import DecoderConfig
from puna.models.tree import DecoderWeights, Layer, Leaf, leaves, tree_map
from puna.types import KV_TYPES

if TYPE_CHECKING:
    from puna.kernels.cpu import Decoder

NATIVE, PLAIN = "one native call", "an op at a time"

SHARES = 4
"""Steps that the regrouping of a model is spread over, about."""


class NativeRunner(HostRunner):
    """The model on the CPU, a step one call into C++."""

    def __init__(
        self, config: DecoderConfig, weights: DecoderWeights, kv_type: str = KV_TYPES[0], page: int = PAGE
    ) -> None:
        """Raises TypeError for a weight that the C++ does not read, ValueError for one of the wrong shape."""
        super().__init__(config, weights, kv_type, page)
        self._decoder = native_decoder(config, weights)
        self._mapped = [leaf for _, leaf in leaves(weights) if isinstance(leaf, Mapped)]
        self._share = sum(leaf.nbytes for leaf in self._mapped) / SHARES
        self._answered = False

    def run(self, batch: Batch) -> Logits:
        """See Runner. A batch with adapters runs an op at a time."""
        if self.adapters.used(batch.adapters):
            return super().run(batch)
        return self._ready().logits(batch.tokens, batch.wanted, batch.table, self._cache.keys, self._cache.values)

    def hidden(self, batch: Batch) -> Hidden:
        """See Runner."""
        if self.adapters.used(batch.adapters):
            return super().hidden(batch)
        return self._ready().hidden(batch.tokens, batch.wanted, batch.table, self._cache.keys, self._cache.values)

    def all_logits(self, tokens: Sequence[int]) -> Logits:
        """See Runner."""
        return self._ready().logits(np.array(tokens, np.int32), np.arange(len(tokens), dtype=np.int32))

    def _ready(self) -> Decoder:
        """The decoder for the next step; from the second on, with a further share of the matrices regrouped."""
        if self._answered and self._mapped:
            count, size = 0, 0
            while count < len(self._mapped) and size < self._share:
                size += self._mapped[count].nbytes
                count += 1
            share = self._mapped[:count]
            panels = dict(zip(map(id, share), ops.prepare_mapped(share), strict=True))
            self._weights = tree_map(lambda leaf: panels.get(id(leaf), leaf), self._weights)
            self._decoder = native_decoder(self.config, self._weights)
            del self._mapped[:count]
        self._answered = True
        return self._decoder


def native_decoder(config: DecoderConfig, weights: DecoderWeights) -> Decoder:
    """The whole forward in C++ over a tree of weights. Raises what `kernels.cpu.Decoder` does."""
    from puna.kernels.cpu import Decoder

    return Decoder(
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        eps=config.norm_eps,
        interleaved=config.interleaved_rope,
        inv_freq=weights.inv_freq,
        embedding=weights.embedding,
        layers=[_parts(layer) for layer in weights.layers],
        norm=weights.norm,
        head=weights.head,
    )


def _parts(layer: Layer) -> list[Leaf | None]:
    attention = [part for linear in (layer.q, layer.k, layer.v, layer.o) for part in (linear.weight, linear.bias)]
    mlp = [part for linear in (layer.gate, layer.up, layer.down) for part in (linear.weight, linear.bias)]
    return [layer.attention_norm, *attention, layer.mlp_norm, *mlp]


def steps() -> tuple[str, str]:
    """How the settled table runs a step, and why: NATIVE or PLAIN, and a reason (`puna doctor` shows it)."""
    if ops.threads() is not None:
        return NATIVE, "the C++ ops follow one another without Python between them"
    reason = next(choice.reason for choice in ops.table() if choice.op == "linear")
    return PLAIN, reason


def host_runner(
    config: DecoderConfig, weights: DecoderWeights, kv_type: str = KV_TYPES[0], page: int = PAGE
) -> HostRunner:
    """The runner for the settled table (`ops.select`): native where C++ serves. Raises what `HostRunner` does."""
    return (NativeRunner if steps()[0] == NATIVE else HostRunner)(config, weights, kv_type, page)
