"""What each format calls a parameter, and how their q and k rows are ordered.

What it is: tables between Puna's canonical names (`decoder.shapes`) and those of the hub, of Meta (llama2.c writes the
same), of torchtune and of GGUF, and the permutation between the two pairings of rope.
What it is not: shapes, or anything read from a file.
What is surprising: nothing is permuted on load. `DecoderConfig.interleaved_rope` says which pairing the rows have, and
only writing a checkpoint of the other kind moves them.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import numpy as np

from puna.models.config import DecoderConfig

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


def ignorable(name: str) -> bool:
    """Whether a stored tensor is a table that the arithmetic recomputes, known by name, so that it may be left over."""
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

    `config` says how they are ordered now. Anything but q and k, and rows already so, come back as they are.
    """
    part = name.split(".")[2] if name.startswith("layers.") else ""
    heads = {"q": config.heads, "k": config.kv_heads}.get(part)
    if heads is None or config.interleaved_rope == interleaved:
        return rows
    return to_neighbours(rows, heads) if interleaved else to_halves(rows, heads)
