"""The strict reader of a GGUF file's metadata: `llama.*` keys to a `DecoderConfig` (`llama4.*`: see `llama4_config`).

What it is: the third spelling beside those in `config`; the keys are those of ggml's docs/gguf.md and of llama.cpp's
`llama-arch.cpp`.
What it is not: a reader of files (`puna.weights.gguf`), or of the vocabulary (`puna.text.tokenizer_gguf`).
What is surprising: a GGUF has no word for Llama 3.1's rope. Its converter stores what the rule comes to, a divisor for
each frequency, as a tensor; where those are the divisors of a rule of the family, the rule is taken for them, so that
frequencies are Meta's to the last bit and the model can be written in other formats. And q and k rows pair neighbours,
as in Meta's files, whatever the model was converted from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from puna.errors import ConfigError
from puna.kernels.layouts import F32
from puna.models import llama1, llama3
from puna.models.config import ANOTHER, DecoderConfig, Fields, ReadConfig, check, generation_of
from puna.models.rope import Llama3Scaling, Rope

ARCHITECTURES = ("llama", "llama4")

# What would change the arithmetic, and the one value with which it does not. llama.cpp reads these for a llama.
_NEUTRAL: dict[str, Any] = {
    "expert_count": 0, "expert_used_count": 0, "attention.causal": True, "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0, "attention.scale": 0.0, "attention.sliding_window": 0,
    "attn_logit_softcapping": 0.0, "final_logit_softcapping": 0.0, "logit_scale": 0.0, "residual_scale": 0.0,
    "embedding_scale": 0.0, "use_parallel_residual": False, "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0, "pooling_type": 0,
}  # fmt: skip

_LARGEST_RATIO = 1e-5
"""How far a stored divisor may be from a rule's and still be it; float32 in another order of steps differs by 1e-7."""


def read_gguf(
    data: Mapping[str, Any],
    source: str,
    *,
    vocab_size: int,
    tied_head: bool,
    attention_bias: bool,
    mlp_bias: bool,
    rope_factors: F32 | None,
) -> ReadConfig:
    """Read the metadata of a whole GGUF model; what only its tensors say comes as arguments.

    `vocab_size` is the embedding's rows, `rope_factors` the numbers of `rope_freqs.weight` [head_dim/2]. Raises
    ConfigError naming file and key for a missing, wrong or unimplemented value.
    """
    architecture = data.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ConfigError(
            f"{source}: 'general.architecture' is {architecture!r:.80}; Puna runs {' and '.join(ARCHITECTURES)} from a "
            "GGUF.",
            remedy=ANOTHER,
        )
    f = Fields({key: data[key] for key in data if key.startswith(f"{architecture}.")}, source)
    if architecture == "llama4":
        from puna.models import llama4_config

        return llama4_config.read_gguf(
            f, vocab_size, tied_head=tied_head, attention_bias=attention_bias, mlp_bias=mlp_bias, factors=rope_factors
        )
    refuse(f, "llama", _NEUTRAL)
    dim, heads, head_dim = heads_of(f, "llama", vocab_size)
    context, layers = f.integer("llama.context_length", most=1 << 26), f.integer("llama.block_count", most=4096)
    rope = rope_of(f, "llama", head_dim, rope_factors)
    config = DecoderConfig(
        generation=generation_of(vocab_size, layers, context, rope),
        vocab_size=vocab_size,
        dim=dim,
        layers=layers,
        heads=heads,
        kv_heads=f.integer("llama.attention.head_count_kv", heads),
        head_dim=head_dim,
        hidden_dim=f.integer("llama.feed_forward_length"),
        norm_eps=f.number("llama.attention.layer_norm_rms_epsilon"),
        rope=rope,
        context_length=context,
        tied_head=tied_head,
        attention_bias=attention_bias,
        mlp_bias=mlp_bias,
        interleaved_rope=True,
    )
    check(config, source)
    f.ignore("llama.tensor_data_layout")  # of 2023, when Meta's order had to be told from another
    return ReadConfig(config, f.unread())


def refuse(f: Fields, name: str, neutral: Mapping[str, Any]) -> None:
    """Raise ConfigError where a key of the architecture `name` has another value than the one that changes nothing."""
    for key, allowed in neutral.items():
        if not f.has(f"{name}.{key}"):
            continue
        value = f.data[f"{name}.{key}"]
        if not isinstance(value, int | float) or value != allowed:  # an array is neither, and has no one answer to !=
            what = "is a mixture of experts" if key == "expert_count" else "asks for something Puna does not implement"
            raise f.fault(f"{name}.{key}", f"({value!r:.80}) {what}", remedy=ANOTHER)


def heads_of(f: Fields, name: str, vocab_size: int) -> tuple[int, int, int]:
    """dim, heads and head_dim. Raises ConfigError where keys contradict each other, or the embedding's rows."""
    dim, heads = f.integer(f"{name}.embedding_length"), f.integer(f"{name}.attention.head_count")
    if not f.has(f"{name}.attention.key_length") and dim % heads:
        raise f.fault(f"{name}.embedding_length", f"({dim}) is not a multiple of {name}.attention.head_count ({heads})")
    head_dim = f.integer(f"{name}.attention.key_length", max(1, dim // heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        if (said := f.integer(f"{name}.{key}", head_dim)) != head_dim:
            raise f.fault(f"{name}.{key}", f"is {said}, and each head has {head_dim} numbers", remedy=ANOTHER)
    if (said := f.integer(f"{name}.vocab_size", vocab_size, most=1 << 24)) != vocab_size:
        raise f.fault(f"{name}.vocab_size", f"is {said}, and the embedding has {vocab_size} rows")
    return dim, heads, head_dim


def rope_of(f: Fields, name: str, head_dim: int, factors: F32 | None) -> Rope:
    """Rope of the keys and of `rope_freqs.weight`. Raises ConfigError for what is not implemented."""
    theta = f.number(f"{name}.rope.freq_base", llama1.ROPE_THETA)
    kind = f.choice(f"{name}.rope.scaling.type", ("none", "linear"), "linear")
    f.ignore(f"{name}.rope.scaling.original_context_length", f"{name}.rope.scaling.finetuned")
    # The factor's older name, `rope.scale_linear`, is still in files of 2023.
    old, new = (f.number(f"{name}.rope.{key}", 1.0) for key in ("scale_linear", "scaling.factor"))
    if f.has(f"{name}.rope.scale_linear") and f.has(f"{name}.rope.scaling.factor") and old != new:
        raise f.fault(f"{name}.rope.scale_linear", f"is {old}, and '{name}.rope.scaling.factor' is {new}")
    linear = old if f.has(f"{name}.rope.scale_linear") else new
    rope = Rope(head_dim, theta, linear_factor=1.0 if kind == "none" else linear)
    if factors is None:
        return rope
    if factors.shape != (head_dim // 2,) or not np.all(np.isfinite(factors)) or not np.all(factors > 0):
        raise ConfigError(
            f"{f.source}: 'rope_freqs.weight' must hold {head_dim // 2} positive numbers.",
            remedy="The file may be damaged: fetch it again.",
        )
    if np.all(factors == 1):
        return rope
    for rule in (llama3.SCALING_3_1, llama3.SCALING_3_2, llama3.SCALING_4):
        if rope.linear_factor == 1.0 and _is_rule(rope, rule, factors):
            return Rope(head_dim, theta, llama3=rule)
    return Rope(head_dim, theta, linear_factor=rope.linear_factor, factors=tuple(factors.tolist()))


def _is_rule(rope: Rope, rule: Llama3Scaling, factors: F32) -> bool:
    """Whether the divisors are those that Llama 3.1's rule comes to, for these numbers."""
    expected = rope.inv_freq() / Rope(rope.head_dim, rope.theta, llama3=rule).inv_freq()
    return bool(np.all(np.abs(factors / expected - 1) < _LARGEST_RATIO))
