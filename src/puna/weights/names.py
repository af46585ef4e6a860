"""What each format calls a parameter, and how their q and k rows are ordered.

What it is: tables between the canonical names of dense models (`decoder.shapes`) and those of the hub, of Meta
(llama2.c writes the same), of torchtune and of GGUF; `plan`, which says for any model of the family where its
parameters lie; and the permutation between the two pairings of rope.
What it is not: shapes, or anything read from a file. Llama 4's and Llama 3.2 Vision's names are `names_llama4`'s and
`names_mllama`'s.
What is surprising: nothing is permuted on load. `DecoderConfig.interleaved_rope` says which pairing the rows have, and
only writing a checkpoint of the other kind moves them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from puna.errors import CheckpointError
from puna.models.config import DecoderConfig
from puna.models.llama3_vision_config import MllamaConfig
from puna.models.llama4_config import Llama4Config
from puna.models.registry import definition
from puna.weights import names_llama4, names_mllama
from puna.weights.parts import Plan, Shape

Convention = Literal["hub", "meta", "torchtune", "gguf"]

_TOP: dict[Convention, dict[str, str]] = {
    "hub": {"embedding": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"},
    "meta": {"embedding": "tok_embeddings.weight", "norm": "norm.weight", "head": "output.weight"},
    "torchtune": {"embedding": "tok_embeddings.weight", "norm": "norm.scale", "head": "output.weight"},
    "gguf": {"embedding": "token_embd.weight", "norm": "output_norm.weight", "head": "output.weight"},
}

_LAYER: dict[Convention, dict[str, str]] = {
    "hub": {
        "attention_norm": "input_layernorm.weight", "mlp_norm": "post_attention_layernorm.weight",
        "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
        "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
    },
    "meta": {
        "attention_norm": "attention_norm.weight", "mlp_norm": "ffn_norm.weight",
        "q": "attention.wq", "k": "attention.wk", "v": "attention.wv", "o": "attention.wo",
        "gate": "feed_forward.w1", "up": "feed_forward.w3", "down": "feed_forward.w2",
    },
    "torchtune": {
        "attention_norm": "sa_norm.scale", "mlp_norm": "mlp_norm.scale",
        "q": "attn.q_proj", "k": "attn.k_proj", "v": "attn.v_proj", "o": "attn.output_proj",
        "gate": "mlp.w1", "up": "mlp.w3", "down": "mlp.w2",
    },
    "gguf": {
        "attention_norm": "attn_norm.weight", "mlp_norm": "ffn_norm.weight",
        "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output",
        "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
    },
}  # fmt: skip

_LAYERS_PREFIX: dict[Convention, str] = {
    "hub": "model.layers.", "meta": "layers.", "torchtune": "layers.", "gguf": "blk.",
}  # fmt: skip

_IGNORABLE = re.compile(
    r"(?:model\.)?(?:layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"  # older transformers saved its rope tables
    r"|rope\.freqs|layers\.\d+\.attention\.inner_attention\.rope\.freqs"  # Meta's
    r"|blk\.\d+\.attn_rot_embd"  # GGUF of 2023; its rope_freqs.weight is read, see `checkpoint`
    r"|freqs_cos|freqs_sin|layers\.\d+\.attention\.mask"  # llama2.c's buffers
)


def foreign(name: str, convention: Convention) -> str:
    """What `convention` calls the parameter with the canonical `name`, for example `layers.0.q.weight`."""
    if name in _TOP[convention]:
        return _TOP[convention][name]
    _, layer, part, *kind = name.split(".")
    return ".".join((_LAYERS_PREFIX[convention] + layer, _LAYER[convention][part], *kind))


_CALLED: dict[Convention, str] = {"hub": "the hub", "meta": "Meta", "torchtune": "torchtune", "gguf": "GGUF"}


IN_MEMORY = "model.language_model.embed_tokens.weight"
"""Where transformers keeps the embedding of a model that sees, in a state dict of some; in a file it is elsewhere."""


def plan(
    config: DecoderConfig, convention: Convention, stored: Mapping[str, Shape] | None = None, shards: int = 1
) -> Plan:
    """Where the parameters of a model of this config lie in files of `convention`.

    `stored` are the names and shapes that are there, where a layout spells one thing in several ways; None for a file
    to be written. `shards` counts Meta's files of one model. Raises CheckpointError for a layout the model has not.
    """
    shapes, have = definition(config).shapes(config), stored or {}
    if isinstance(config, Llama4Config):
        if convention == "hub":
            return names_llama4.hub(shapes, have)
        if convention == "meta":
            return names_llama4.meta(shapes, have, shards)
        if convention == "gguf":
            return names_llama4.gguf(shapes)
    if isinstance(config, MllamaConfig):
        if convention == "hub":
            return names_mllama.hub(shapes, have)
        if convention == "meta":
            return names_mllama.meta(shapes, have, shards, head_rows=config.vocab_size)
    if isinstance(config, Llama4Config | MllamaConfig):
        kind = "Llama 4" if isinstance(config, Llama4Config) else "Llama 3.2 Vision"
        raise CheckpointError(
            f"{kind} has no layout of {_CALLED[convention]} that Puna reads or writes.",
            remedy="Convert to safetensors, or to meta.",
        )
    dense = Plan()
    for name, shape in shapes.items():
        dense.whole(name, foreign(name, convention), shape)
    return dense


def ignorable(name: str) -> bool:
    """Whether a stored tensor is known by name not to change the arithmetic, so that it may be left over."""
    if names_llama4.ignorable(name) or names_mllama.ignorable(name):
        return True
    return _IGNORABLE.fullmatch(name) is not None


def to_halves(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Reorder q or k rows [heads · D, …] (or a bias) from neighbours (2i, 2i+1) to halves (i, i + D/2): a copy.

    Meta's order to the hub's, as transformers' conversion script does it.
    """
    split = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return np.ascontiguousarray(np.swapaxes(split, 1, 2)).reshape(rows.shape)


def to_neighbours(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """The inverse of `to_halves`: the hub's order to Meta's; a copy."""
    split = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return np.ascontiguousarray(np.swapaxes(split, 1, 2)).reshape(rows.shape)


def repair(name: str, rows: np.ndarray[Any, Any], config: DecoderConfig, *, interleaved: bool) -> np.ndarray[Any, Any]:
    """The parameter as it is stored where rope pairs neighbours (`interleaved`) or halves: q and k rows in that order.

    `config` says how they are ordered now. Anything but q and k, and rows already so, come back as they are; so do
    Llama 4's, which pair neighbours in every layout, and those of cross-attention layers, which have no rope.
    """
    part = name.split(".")[2] if name.startswith("layers.") else ""
    heads = {"q": config.heads, "k": config.kv_heads}.get(part)
    if heads is None or config.interleaved_rope == interleaved or isinstance(config, Llama4Config):
        return rows
    if isinstance(config, MllamaConfig) and int(name.split(".")[1]) in config.cross_layers:
        return rows
    return to_neighbours(rows, heads) if interleaved else to_halves(rows, heads)
