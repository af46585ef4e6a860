"""The host runner whose steps are one native call each, and the choice between it and the plain one.

What it is: `HostRunner` with `kernels.cpu.Decoder` in place of `models.decoder` or of the text of `models.llama4`: the
same ops on the same weights in the same order, without Python between them.
What it is not: another model. Their `forward` stays the definition, and tests compare the two bit by bit;
`HostRunner` itself is how to run the plain one on the same C++ ops.
What is surprising: the last layer is computed only for rows whose logits are wanted (see kernels/cpu/forward.cpp). A
step with a picture in it runs an op at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from puna.engine.runner import PAGE, Batch, Hidden, HostRunner, Logits
from puna.kernels import ops
from puna.models import decoder, llama4
from puna.models.config import DecoderConfig
from puna.models.llama4_config import Llama4Config
from puna.models.registry import definition
from puna.models.tree import DecoderWeights, ExpertLayer, Layer, Leaf, Llama4Weights, Weights
from puna.types import KV_TYPES

if TYPE_CHECKING:
    from puna.kernels.cpu import Decoder

NATIVE, PLAIN = "one native call", "an op at a time"


class NativeRunner(HostRunner):
    """The model on the CPU, a step one call into C++."""

    def __init__(
        self,
        config: DecoderConfig,
        weights: DecoderWeights | Llama4Weights,
        kv_type: str = KV_TYPES[0],
        page: int = PAGE,
    ) -> None:
        """Raises TypeError for a weight that the C++ does not read, ValueError for one of the wrong shape."""
        super().__init__(config, weights, kv_type, page)
        self._decoder = native_decoder(config, weights)

    def run(self, batch: Batch) -> Logits:
        """See Runner. A batch with adapters or pictures runs an op at a time."""
        if batch.placed or self.adapters.used(batch.adapters):
            return super().run(batch)
        return self._ready().logits(batch.tokens, batch.wanted, batch.table, self._cache.keys, self._cache.values)

    def hidden(self, batch: Batch) -> Hidden:
        """See Runner."""
        if batch.placed or self.adapters.used(batch.adapters):
            return super().hidden(batch)
        return self._ready().hidden(batch.tokens, batch.wanted, batch.table, self._cache.keys, self._cache.values)

    def all_logits(self, tokens: Sequence[int]) -> Logits:
        """See Runner."""
        return self._ready().logits(np.array(tokens, np.int32), np.arange(len(tokens), dtype=np.int32))

    def _ready(self) -> Decoder:
        """The decoder for the next step."""
        self._regroup()
        return self._decoder

    def _regroup(self) -> bool:
        regrouped = super()._regroup()
        if regrouped and isinstance(self._weights, DecoderWeights | Llama4Weights):
            self._decoder = native_decoder(self.config, self._weights)
        return regrouped


def native_decoder(config: DecoderConfig, weights: DecoderWeights | Llama4Weights) -> Decoder:
    """The whole forward in C++ over a tree of weights. Raises what `kernels.cpu.Decoder` does."""
    from puna.kernels.cpu import Decoder, Manner

    def manner(i: int, layer: Layer | ExpertLayer) -> Manner:
        """What `llama4.attention` and `llama4.feed_forward` settle of a layer."""
        assert isinstance(config, Llama4Config)
        experts, far = len(layer.experts) if isinstance(layer, ExpertLayer) else 0, i in config.global_layers
        if far:
            return Manner(experts, turned=False, tempered=config.temperature_tuning)
        return Manner(experts, config.chunk, normed=config.qk_norm)

    more: dict[str, Any] = {}
    if isinstance(config, Llama4Config):
        more["manners"] = [manner(i, layer) for i, layer in enumerate(weights.layers)]
        more["experts_per_token"] = config.experts_per_token
        if config.temperature_tuning:
            more["temperature"] = config.temperature_floor, config.temperature_scale
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
        **more,
    )


def _parts(layer: Layer | ExpertLayer) -> list[Leaf | None]:
    attention = [part for linear in (layer.q, layer.k, layer.v, layer.o) for part in (linear.weight, linear.bias)]
    before = [layer.attention_norm, *attention, layer.mlp_norm]
    if isinstance(layer, ExpertLayer):
        gated = [matrix for part in (layer.shared, *layer.experts) for matrix in part.matrices()]
        return [*before, layer.router.weight, *gated]
    mlp = [part for linear in (layer.gate, layer.up, layer.down) for part in (linear.weight, linear.bias)]
    return [*before, *mlp]


def steps(config: DecoderConfig | None = None) -> tuple[str, str]:
    """How the settled table runs a step of a model, and why: NATIVE or PLAIN, and a reason (`puna doctor` shows it).

    Without a config, of a dense decoder.
    """
    if ops.threads() is None:
        return PLAIN, next(choice.reason for choice in ops.table() if choice.op == "linear")
    if config is not None and definition(config) not in (decoder, llama4):
        return PLAIN, f"the native call knows decoders of text only, and this is a {config.generation}"
    from puna.kernels.cpu import PAGE_MULTIPLE

    if config is not None and config.chunk % PAGE_MULTIPLE:
        return PLAIN, f"the native call takes chunks of a multiple of {PAGE_MULTIPLE} tokens, not of {config.chunk}"
    return NATIVE, "the C++ ops follow one another without Python between them"


def host_runner(config: DecoderConfig, weights: Weights, kv_type: str = KV_TYPES[0], page: int = PAGE) -> HostRunner:
    """The runner for the settled table (`ops.select`): native where C++ serves and knows the model.

    Raises what `HostRunner` does.
    """
    if steps(config)[0] == NATIVE and isinstance(weights, DecoderWeights | Llama4Weights):
        return NativeRunner(config, weights, kv_type, page)
    return HostRunner(config, weights, kv_type, page)
