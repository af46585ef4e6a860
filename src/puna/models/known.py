"""The config of a model of the catalog, from its facts: for what is asked of a model that is not here.

What it is: `config_of`, which spells an entry as the hub would and reads that as any other file.
What it is not: a file that was read. A checkpoint's own config goes before it.
"""

from __future__ import annotations

from typing import Any

from puna.catalog.models import CatalogEntry
from puna.models.config import DecoderConfig, read_hub


def config_of(entry: CatalogEntry) -> DecoderConfig:
    """The numbers of a model of the catalog. Raises ConfigError for facts that do not go together."""
    scaling = None if entry.rope_scaling is None else dict(entry.rope_scaling)
    text: dict[str, Any] = {
        "model_type": "llama", "vocab_size": entry.vocab_size, "hidden_size": entry.dim,
        "intermediate_size": entry.ffn_dim, "num_hidden_layers": entry.layers, "num_attention_heads": entry.heads,
        "num_key_value_heads": entry.kv_heads, "head_dim": entry.head_dim, "rope_scaling": scaling,
        "max_position_embeddings": entry.context_length, "rms_norm_eps": entry.rms_norm_eps,
        "rope_theta": entry.rope_theta, "tie_word_embeddings": entry.tied,
    }  # fmt: skip
    if entry.text_config:
        kind = {"vision": "mllama", "llama4": "llama4"}[entry.architecture]
        inner = text | {"model_type": _TEXT[kind]} | dict(entry.text_config)
        if kind == "mllama":
            del inner["head_dim"]
        text = {"model_type": kind, "text_config": inner, "vision_config": dict(entry.vision_config)}
    return read_hub(text, entry.short_name).config


_TEXT = {"mllama": "mllama_text_model", "llama4": "llama4_text"}
