"""The host runner whose steps are one native call each, and the choice between it and the plain one.

What it is: `HostRunner` with `kernels.cpu.Decoder` in place of `models.decoder`: the same ops on the same weights in
the same order, without Python between them.
What it is not: another model. `decoder.forward` stays the definition, and tests compare the two bit by bit;
`HostRunner` itself is how to run the plain one on the same C++ ops.
What is surprising: a prompt's last layer is computed for its last token only (see kernels/cpu/forward.cpp).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from puna.engine.runner import HostRunner, Ids, Logits
from puna.kernels import ops
from puna.models.config import DecoderConfig
from puna.models.tree import DecoderWeights, KVCache, Layer, Leaf
from puna.types import KV_TYPES

if TYPE_CHECKING:
    from puna.kernels.cpu import Decoder

NATIVE, PLAIN = "one native call", "an op at a time"


class NativeRunner(HostRunner):
    """The model on the CPU, a step one call into C++."""

    def __init__(self, config: DecoderConfig, weights: DecoderWeights, kv_type: str = KV_TYPES[0]) -> None:
        """Raises TypeError for a weight that the C++ does not read, ValueError for one of the wrong shape."""
        super().__init__(config, weights, kv_type)
        self._decoder = native_decoder(config, weights)

    def step(self, ids: Ids, positions: Ids, cache: KVCache) -> Logits:
        """See HostRunner."""
        return self._decoder.logits(ids, positions, cache.keys, cache.values)

    def all_logits(self, tokens: list[int]) -> Logits:
        """See Runner."""
        rows = np.arange(len(tokens), dtype=np.int32)
        return self._decoder.logits(np.array([tokens], np.int32), rows[None], rows=rows)


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


def host_runner(config: DecoderConfig, weights: DecoderWeights, kv_type: str = KV_TYPES[0]) -> HostRunner:
    """The runner for the settled table (`ops.select`): native where C++ serves. Raises what `HostRunner` does."""
    return (NativeRunner if steps()[0] == NATIVE else HostRunner)(config, weights, kv_type)
