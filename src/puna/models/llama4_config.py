"""What a Llama 4 is, in numbers, and the strict readers and writers of the files that say so.

What it is: `Llama4Config`, `Llama4VisionConfig`, and their three spellings: the hub's `config.json` (a model that sees
has `text_config` and `vision_config` in it, a text model has the keys of `text_config` by themselves), Meta's
`params.json`, and a GGUF's `llama4.*` keys.
What it is not: arithmetic (`llama4`, `llama4_vision`). Llama Guard 4 is one of these too, without experts or chunks.
What is surprising: rope pairs neighbours in every layout, the hub's too, so no rows are ever permuted. Scout's rope has
one number for both of its factors: a step where Llama 3.1 has a ramp. And llama.cpp, whose GGUF this reads, has the
chunk, the temperature and which layers see all built in, and leaves QK norm out where there are 128 experts: a model
that differs there cannot be written as one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from puna.errors import ConfigError
from puna.kernels.layouts import F32
from puna.models import llama3
from puna.models.config import ANOTHER, DecoderConfig, Fields, ReadConfig, check, hub_rest, hub_rope
from puna.models.config_gguf import heads_of, refuse, rope_of
from puna.models.rope import Llama3Scaling, Rope

ROPE_THETA = 500_000.0
SCALING = llama3.SCALING_4
"""Scout's rope; Maverick's is not stretched."""

CHUNK = 8192
GLOBAL_EVERY = 4
FLOOR, SCALE = 8192, 0.1
"""Of the temperature: tokens before it first rises, and by how much (transformers' and Meta's `floor_scale`,
`attn_scale`)."""

CONTEXT = 1 << 20
"""Maverick Instruct's, and what transformers' conversion gives any mixture but Scout."""

CONTEXT_SCOUT = 10 << 20
CONTEXT_DENSE = 131072
"""Llama Guard 4's."""

EXPERTS_SCOUT, EXPERTS_MAVERICK = 16, 128
MOST_EXPERTS = 1 << 13
"""Of all layers; Maverick has 3,072."""

PICTURE_TOKENS = {"boi_token_index": 200080, "eoi_token_index": 200081, "image_token_index": 200092}
"""`<|image_start|>`, `<|image_end|>` and `<|patch|>` of the vocabulary of Llama 4; config.json says them."""

VISION_ROPE_THETA = 10_000.0
LAYER_NORM_EPS = 1e-5
"""Of the vision encoder: transformers and Meta leave torch's default, whatever `norm_eps` says."""


@dataclass(frozen=True)
class Llama4VisionConfig:
    """The numbers of the vision encoder: a square tile of `image_size` pixels in patches of `patch_size`.

    `output_dim` is the width after the pixel shuffle and its MLP; `shuffle` (0.5) the ratio by which the shuffle
    shrinks either side of the grid of patches.
    """

    dim: int
    layers: int
    heads: int
    hidden_dim: int
    image_size: int
    patch_size: int
    output_dim: int
    shuffle: float = 0.5
    rope_theta: float = VISION_ROPE_THETA
    norm_eps: float = LAYER_NORM_EPS

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def side(self) -> int:
        """Patches along a side of a tile."""
        return self.image_size // self.patch_size

    @property
    def tile_tokens(self) -> int:
        """Tokens that a tile is in the text, after the shuffle."""
        return round(self.side * self.shuffle) ** 2

    @property
    def shuffled_dim(self) -> int:
        """Width of a token after the shuffle, before its MLP."""
        return round(self.dim / self.shuffle**2)


@dataclass(frozen=True, kw_only=True)
class Llama4Config(DecoderConfig):
    """The numbers of a Llama 4; `models.llama4` computes with nothing else.

    `hidden_dim` is the width of the feed-forward of layers that are not in `moe_layers`, `expert_hidden_dim` that of an
    expert and of the shared one. Layers in `global_layers` have no rope and see everything; the others have rope, QK
    norm if `qk_norm`, and see their chunk. In global layers, with `temperature_tuning`, queries at position p are
    multiplied by 1 + temperature_scale · log(1 + ⌊(p + 1) / temperature_floor⌋).
    """

    expert_hidden_dim: int
    experts: int
    experts_per_token: int
    moe_layers: tuple[int, ...]
    qk_norm: bool
    temperature_tuning: bool = True
    temperature_floor: int = FLOOR
    temperature_scale: float = SCALE
    vision: Llama4VisionConfig | None = None


def every(step: int, layers: int) -> tuple[int, ...]:
    """Each `step`-th of the layers, the last of every group; none for 0."""
    return tuple(range(step - 1, layers, step)) if step else ()


def read_hub(data: Mapping[str, Any], source: str = "config.json") -> ReadConfig:
    """Read the hub's `config.json` of a Llama4ForConditionalGeneration or Llama4ForCausalLM.

    Raises ConfigError naming the key for a missing, wrong or unimplemented value.
    """
    top = Fields(data, source)
    if top.choice("model_type", ("llama4", "llama4_text"), "llama4") == "llama4_text":
        _architecture(top, "Llama4ForCausalLM")
        config = _read_hub_text(top, None)
        rest = hub_rest(top)
        return ReadConfig(config, top.unread(), *rest)
    _architecture(top, "Llama4ForConditionalGeneration")
    text = top.child("text_config")
    text.choice("model_type", ("llama4_text",), "llama4_text")
    vision, unread = _read_hub_vision(top.child("vision_config"))
    config = _read_hub_text(text, vision)
    for key, default in PICTURE_TOKENS.items():  # what places pictures knows these tokens by name
        top.integer(key, default, least=0, most=1 << 24)
    if top.boolean("tie_word_embeddings", config.tied_head) != config.tied_head:
        raise top.fault("tie_word_embeddings", "differs from text_config's")
    bos, eos, dtype = hub_rest(text)
    above = hub_rest(top)
    unknown = (*top.unread(), *(f"text_config.{key}" for key in text.unread()), *unread)
    return ReadConfig(config, unknown, above[0] if bos is None else bos, eos or above[1], dtype or above[2])


def _architecture(f: Fields, name: str) -> None:
    if f.has("architectures") and f.data["architectures"] != [name]:
        raise f.fault("architectures", f"is {f.data['architectures']!r:.80}; Puna runs {name} here", remedy=ANOTHER)
    if f.has("quantization_config"):
        raise f.fault(
            "quantization_config", "asks for packed weights, which Puna does not read from safetensors", remedy=ANOTHER
        )


def _read_hub_text(f: Fields, vision: Llama4VisionConfig | None) -> Llama4Config:
    f.choice("hidden_act", ("silu",), "silu")
    dim, heads = f.integer("hidden_size"), f.integer("num_attention_heads")
    layers = f.integer("num_hidden_layers", most=4096)
    if not f.has("head_dim") and dim % heads:
        raise f.fault("hidden_size", f"({dim}) is not a multiple of num_attention_heads ({heads})")
    head_dim = f.integer("head_dim", max(1, dim // heads))
    for key in ("use_qk_norm", "num_local_experts"):
        if not f.has(key):
            raise f.fault(key, "is missing")
    if "attention_chunk_size" not in f.data:
        raise f.fault("attention_chunk_size", "is missing")
    chunk = f.integer("attention_chunk_size", 0, most=1 << 26)
    global_layers = _global_layers(f, layers)
    kinds = [("full" if i in global_layers else "chunked") + "_attention" for i in range(layers)]
    if f.has("layer_types") and (said := f.data["layer_types"]) != kinds:
        if said != ["full_attention"] * layers:
            raise f.fault("layer_types", "gives other layers a chunk than those with rope", remedy=ANOTHER)
        chunk = 0
    experts = f.integer("num_local_experts", least=0, most=1 << 12)
    moe_layers = _moe_layers(f, layers)
    used = f.integer("num_experts_per_tok", 1 if experts else 0, least=0, most=1 << 12)
    config = Llama4Config(
        generation="llama4",
        vocab_size=f.integer("vocab_size", most=1 << 24),
        dim=dim,
        layers=layers,
        heads=heads,
        kv_heads=f.integer("num_key_value_heads", heads),
        head_dim=head_dim,
        hidden_dim=f.integer("intermediate_size_mlp"),
        norm_eps=f.number("rms_norm_eps"),
        rope=hub_rope(f, head_dim, ROPE_THETA),
        context_length=f.integer("max_position_embeddings", most=1 << 26),
        tied_head=f.boolean("tie_word_embeddings", False),
        attention_bias=f.boolean("attention_bias", False),
        interleaved_rope=True,
        chunk=chunk,
        global_layers=global_layers,
        expert_hidden_dim=f.integer("intermediate_size"),
        experts=experts if moe_layers else 0,
        experts_per_token=used if moe_layers else 0,
        moe_layers=moe_layers,
        qk_norm=f.boolean("use_qk_norm", True),
        temperature_tuning=_switch(f, "attn_temperature_tuning"),
        temperature_floor=f.integer("floor_scale", FLOOR, most=1 << 26),
        temperature_scale=f.number("attn_scale", SCALE, positive=False),
        vision=vision,
    )
    settled(config, f.source)
    f.choice("router_jitter_noise", (0, 0.0), 0.0)
    f.ignore("router_aux_loss_coef", "output_router_logits", "for_llm_compressor", "cache_implementation",
             "_attn_implementation_autoset")  # fmt: skip
    return config


def _switch(f: Fields, key: str) -> bool:
    """True or false, or a number that the first files of Llama 4 had in their place."""
    if f.has(key) and type(f.data[key]) is int:
        return f.integer(key, least=0) > 0
    return f.boolean(key, True)


def _numbers(f: Fields, key: str, most: int, length: int) -> list[int]:
    """A list of at most `length` whole numbers from 0 to `most`."""
    value = f.data[key]
    if not isinstance(value, list) or len(value) > length or not all(type(n) is int and 0 <= n <= most for n in value):
        raise f.fault(key, f"must be a list of whole numbers from 0 to {most}, not {value!r:.80}")
    return value


def _global_layers(f: Fields, layers: int) -> tuple[int, ...]:
    """Layers without rope: a 0 in `no_rope_layers`; each `no_rope_layer_interval`-th where that list is empty."""
    step = f.integer("no_rope_layer_interval", GLOBAL_EVERY)
    if f.has("no_rope_layers") and (rope := _numbers(f, "no_rope_layers", 1, 1 << 16)):
        if len(rope) < layers:
            raise f.fault("no_rope_layers", f"has {len(rope)} entries for {layers} layers")
        return tuple(i for i in range(layers) if not rope[i])
    return every(step, layers)


def _moe_layers(f: Fields, layers: int) -> tuple[int, ...]:
    """`moe_layers`, else each `interleave_moe_layer_step`-th."""
    step = f.integer("interleave_moe_layer_step", 1, least=0, most=4096)
    if not f.has("moe_layers"):
        return every(step, layers)
    return tuple(sorted(set(_numbers(f, "moe_layers", layers - 1, layers))))


def _read_hub_vision(f: Fields) -> tuple[Llama4VisionConfig, tuple[str, ...]]:
    f.choice("model_type", ("llama4_vision_model",), "llama4_vision_model")
    f.choice("hidden_act", ("gelu",), "gelu")
    f.choice("num_channels", (3,), 3)
    f.choice("vision_feature_select_strategy", ("default",), "default")
    f.choice("multi_modal_projector_bias", (False,), False)
    heads, dim = f.integer("num_attention_heads"), f.integer("hidden_size")
    theta = VISION_ROPE_THETA
    if f.has("rope_parameters"):
        rope = f.child("rope_parameters")
        rope.choice("rope_type", ("default",), "default")
        theta = rope.number("rope_theta", theta)
    elif f.has("rope_theta"):
        theta = f.number("rope_theta")
    config = Llama4VisionConfig(
        dim=dim,
        layers=f.integer("num_hidden_layers", most=4096),
        heads=heads,
        hidden_dim=f.integer("intermediate_size"),
        image_size=f.integer("image_size", most=1 << 14),
        patch_size=f.integer("patch_size", most=1 << 14),
        output_dim=f.integer("vision_output_dim"),
        shuffle=f.number("pixel_shuffle_ratio", 0.5),
        rope_theta=theta,
    )
    for key in ("projector_input_dim", "projector_output_dim"):
        if (said := f.integer(key)) != config.output_dim:
            raise f.fault(key, f"is {said}, and vision_output_dim {config.output_dim}", remedy=ANOTHER)
    settled_vision(config, f.source)
    f.ignore("norm_eps", "projector_dropout", "rope_theta")
    f.ignore("architectures")
    hub_rest(f)
    return config, tuple(f"vision_config.{key}" for key in f.unread())


def write_hub(config: Llama4Config, *, dtype: str, bos_id: int | None, eos_ids: Collection[int]) -> dict[str, Any]:
    """The hub's `config.json`, as transformers reads it since 4.51.

    Raises ConfigError for rope factors of the model's own.
    """
    if config.rope.factors is not None:
        raise ConfigError("config.json has no word for this model's rope.", remedy="Keep it as GGUF.")
    eos = list(eos_ids)
    text: dict[str, Any] = {
        "model_type": "llama4_text", "hidden_act": "silu", "vocab_size": config.vocab_size, "hidden_size": config.dim,
        "intermediate_size": config.expert_hidden_dim, "intermediate_size_mlp": config.hidden_dim,
        "num_hidden_layers": config.layers, "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads, "head_dim": config.head_dim,
        "max_position_embeddings": config.context_length, "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta, "rope_scaling": _hub_scaling(config.rope),
        "tie_word_embeddings": config.tied_head, "attention_bias": config.attention_bias,
        "num_local_experts": config.experts, "num_experts_per_tok": config.experts_per_token,
        "moe_layers": list(config.moe_layers),
        "interleave_moe_layer_step": config.moe_layers[0] + 1 if config.moe_layers else 0,
        "use_qk_norm": config.qk_norm,
        "no_rope_layers": [int(i not in config.global_layers) for i in range(config.layers)],
        "attention_chunk_size": config.chunk or None,
        "layer_types": [
            ("chunked" if config.chunk and i not in config.global_layers else "full") + "_attention"
            for i in range(config.layers)
        ],
        "attn_temperature_tuning": config.temperature_tuning, "floor_scale": config.temperature_floor,
        "attn_scale": config.temperature_scale,
        "bos_token_id": bos_id, "eos_token_id": eos[0] if len(eos) == 1 else (eos or None), "torch_dtype": dtype,
    }  # fmt: skip
    if config.vision is None:
        return {"architectures": ["Llama4ForCausalLM"], **text}
    v = config.vision
    vision = {
        "model_type": "llama4_vision_model", "hidden_act": "gelu", "num_channels": 3, "hidden_size": v.dim,
        "num_hidden_layers": v.layers, "num_attention_heads": v.heads, "intermediate_size": v.hidden_dim,
        "image_size": v.image_size, "patch_size": v.patch_size, "vision_output_dim": v.output_dim,
        "projector_input_dim": v.output_dim, "projector_output_dim": v.output_dim,
        "pixel_shuffle_ratio": v.shuffle, "norm_eps": v.norm_eps, "multi_modal_projector_bias": False,
        "rope_theta": v.rope_theta, "vision_feature_select_strategy": "default",
    }  # fmt: skip
    return {
        "architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4", **PICTURE_TOKENS,
        "text_config": text, "vision_config": vision, "tie_word_embeddings": config.tied_head, "torch_dtype": dtype,
    }  # fmt: skip


def _hub_scaling(rope: Rope) -> dict[str, Any] | None:
    if (s := rope.llama3) is not None:
        return {
            "rope_type": "llama3", "factor": s.factor, "low_freq_factor": s.low_freq_factor,
            "high_freq_factor": s.high_freq_factor, "original_max_position_embeddings": s.original_context,
        }  # fmt: skip
    return None if rope.linear_factor == 1.0 else {"rope_type": "linear", "factor": rope.linear_factor}


def read_meta(data: Mapping[str, Any], source: str = "params.json", *, vocab_size: int | None = None) -> ReadConfig:
    """Read Meta's `params.json` of a Llama 4 (llama-models, models/llama4/args.py), on its own or under `model`.

    `vocab_size` (the embedding's rows) fills in where the file says -1. Raises ConfigError naming the key for a
    missing, wrong or unimplemented value.
    """
    f = Fields(data, source)
    if f.has("model"):
        f = f.child("model")
    dim, heads, layers = f.integer("dim"), f.integer("n_heads"), f.integer("n_layers", most=4096)
    said_vocab = f.integer("vocab_size", -1, least=-1, most=1 << 24)
    vocab = said_vocab if said_vocab > 0 else vocab_size
    if not vocab:
        raise f.fault("vocab_size", "is -1 and there is no embedding to count the rows of")
    if vocab_size is not None and vocab != vocab_size:
        raise f.fault("vocab_size", f"is {vocab}, and the embedding has {vocab_size} rows")
    if dim % heads:
        raise f.fault("dim", f"({dim}) is not a multiple of n_heads ({heads})")
    head_dim = dim // heads  # Meta's attention has no other; a head_dim that differs is refused
    if (said := f.integer("head_dim", head_dim)) != head_dim:
        raise f.fault("head_dim", f"is {said}, and dim / n_heads {head_dim}", remedy=ANOTHER)
    multiple, multiplier = f.integer("multiple_of", 256), f.number("ffn_dim_multiplier", 1.0)
    moe = f.child("moe_args") if f.has("moe_args") else None
    width = f.number("ffn_exp", 4.0)
    dense = _up(int(multiplier * int(2 * int(4 * dim) / 3)), multiple)
    experts = used = expert_width = step = 0
    if moe is not None:
        experts, used = moe.integer("num_experts", most=1 << 12), moe.integer("top_k", 1, most=1 << 12)
        step = moe.integer("interleave_moe_layer_step", 1, most=4096)
        share = moe.number("capacity_factor", 1.0) + 1 if moe.boolean("auto_scale_F", True) else 1
        expert_width = _up(int(int(multiplier * int(2 * int(width * dim) / 3)) / share), multiple)
    scaling = None
    if f.boolean("use_scaled_rope", False):
        scaling = Llama3Scaling(
            factor=f.number("rope_scaling_factor", SCALING.factor),
            low_freq_factor=SCALING.low_freq_factor,
            high_freq_factor=f.number("rope_high_freq_factor", SCALING.high_freq_factor),
            original_context=SCALING.original_context,
        )
        if scaling.high_freq_factor < scaling.low_freq_factor:
            raise f.fault("rope_high_freq_factor", f"must not be smaller than {scaling.low_freq_factor}")
    vision, unread = _read_meta_vision(f.child("vision_args")) if f.has("vision_args") else (None, ())
    floor = f.number("floor_scale", float(FLOOR))
    if floor != int(floor):
        raise f.fault("floor_scale", f"must be whole, not {floor}", remedy=ANOTHER)
    context = CONTEXT_DENSE if moe is None else CONTEXT_SCOUT if experts == EXPERTS_SCOUT else CONTEXT
    config = Llama4Config(
        generation="llama4",
        vocab_size=vocab,
        dim=dim,
        layers=layers,
        heads=heads,
        kv_heads=f.integer("n_kv_heads", heads),
        head_dim=head_dim,
        hidden_dim=dense,
        norm_eps=f.number("norm_eps"),
        rope=Rope(head_dim, f.number("rope_theta", ROPE_THETA), llama3=scaling),
        context_length=f.integer("max_seq_len", context, most=1 << 26),
        interleaved_rope=True,
        chunk=f.integer("attention_chunk_size", 0, most=1 << 26),
        global_layers=every(f.integer("nope_layer_interval", 0, most=4096), layers),
        expert_hidden_dim=expert_width or dense,
        experts=experts,
        experts_per_token=used,
        moe_layers=every(step, layers),
        qk_norm=f.boolean("use_qk_norm", False),
        # The released config.json of the same weights have it on; the file of Meta's that says nothing leaves it to us.
        temperature_tuning=f.boolean("attn_temperature_tuning", True),
        temperature_floor=int(floor),
        temperature_scale=f.number("attn_scale", SCALE, positive=False),
        vision=vision,
    )
    settled(config, f.source)
    f.ignore("max_batch_size", "model_parallel_size", "lora_args", "quantization_args")
    for key in ("lora_args", "quantization_args"):
        if f.has(key):
            raise f.fault(key, "asks for something Puna does not implement", remedy=ANOTHER)
    unknown = f.unread() if moe is None else (*f.unread(), *(f"moe_args.{key}" for key in moe.unread()))
    return ReadConfig(config, (*unknown, *unread))


def _up(width: int, multiple: int) -> int:
    return -(-width // multiple) * multiple


def _read_meta_vision(f: Fields) -> tuple[Llama4VisionConfig, tuple[str, ...]]:
    size, patch = _square(f, "image_size"), _square(f, "patch_size")
    dim = f.integer("dim")
    config = Llama4VisionConfig(
        dim=dim,
        layers=f.integer("n_layers", most=4096),
        heads=f.integer("n_heads"),
        hidden_dim=int(dim * f.number("mlp_ratio")),
        image_size=size,
        patch_size=patch,
        output_dim=f.integer("output_dim"),
        shuffle=f.number("pixel_shuffle_ratio"),
    )
    settled_vision(config, f.source)
    return config, tuple(f"vision_args.{key}" for key in f.unread())


def _square(f: Fields, key: str) -> int:
    sides = f.child(key)
    height, width = sides.integer("height", most=1 << 14), sides.integer("width", most=1 << 14)
    if height != width:
        raise f.fault(key, f"is {height} × {width}; Puna knows squares", remedy=ANOTHER)
    return height


def write_meta(config: Llama4Config) -> dict[str, Any]:
    """Meta's `params.json`, in the keys that Meta's own code knows.

    Raises ConfigError for what the layout cannot express: biases, a tied head, layers or widths by no rule of theirs.
    """
    remedy = "Convert to safetensors."
    if config.attention_bias or config.tied_head:
        raise ConfigError("Meta's layout of Llama 4 has no biases and no tied head.", remedy=remedy)
    if config.rope.linear_factor != 1.0 or config.rope.factors is not None:
        raise ConfigError("Meta's layout has no word for this model's rope.", remedy=remedy)
    params: dict[str, Any] = {
        "dim": config.dim, "n_layers": config.layers, "n_heads": config.heads, "n_kv_heads": config.kv_heads,
        "vocab_size": config.vocab_size, "norm_eps": config.norm_eps, "rope_theta": config.rope.theta,
        "attention_chunk_size": config.chunk or None, "use_qk_norm": config.qk_norm,
        "nope_layer_interval": _step(config.global_layers, config.layers),
        "attn_temperature_tuning": config.temperature_tuning, "floor_scale": config.temperature_floor,
        "attn_scale": config.temperature_scale, "use_scaled_rope": config.rope.llama3 is not None,
    }  # fmt: skip
    if (s := config.rope.llama3) is not None:
        params |= {"rope_scaling_factor": s.factor, "rope_high_freq_factor": s.high_freq_factor}
    # As for Llama 2: a multiple that rounds up to the width; ffn_exp, which only the experts' width heeds, is the rest.
    params["multiple_of"] = config.hidden_dim
    params["ffn_dim_multiplier"] = (config.hidden_dim - 0.5) / int(2 * int(4 * config.dim) / 3)
    if config.moe_layers:
        params["ffn_exp"] = 4.0
        params["moe_args"] = {
            "num_experts": config.experts, "top_k": config.experts_per_token,
            "interleave_moe_layer_step": _step(config.moe_layers, config.layers),
            "capacity_factor": 1.0, "auto_scale_F": True,
        }  # fmt: skip
        _fit_widths(config, params)
    if config.vision is not None:
        v = config.vision
        params["vision_args"] = {
            "image_size": {"height": v.image_size, "width": v.image_size},
            "patch_size": {"height": v.patch_size, "width": v.patch_size}, "dim": v.dim, "n_layers": v.layers,
            "n_heads": v.heads, "mlp_ratio": v.hidden_dim / v.dim, "output_dim": v.output_dim,
            "pixel_shuffle_ratio": v.shuffle,
        }  # fmt: skip
    understood = read_meta(params).config
    if understood.context_length != config.context_length:
        params["max_seq_len"] = config.context_length
        understood = read_meta(params).config
    if understood != config:
        differ = [name for name in config.__dataclass_fields__ if getattr(understood, name) != getattr(config, name)]
        raise ConfigError(f"Meta's layout cannot say this model's {', '.join(differ)}.", remedy=remedy)
    return params


def _fit_widths(config: Llama4Config, params: dict[str, Any]) -> None:
    """Numbers from which both widths come by Meta's rule, with the experts' width as the multiple where it divides."""
    narrow, wide = config.expert_hidden_dim, config.hidden_dim
    if wide % narrow == 0:
        params["multiple_of"] = narrow
        params["ffn_exp"] = 4.0 * 2 * narrow / wide
    else:
        params["multiple_of"] = 1
        params["ffn_dim_multiplier"] = (wide + 0.5) / int(2 * int(4 * config.dim) / 3)
        target = (2 * narrow + 1) / params["ffn_dim_multiplier"]
        params["ffn_exp"] = (1.5 * target) / config.dim


# What would change the arithmetic, and the one value with which it does not.
_NEUTRAL: dict[str, Any] = {
    "attention.causal": True, "attention.clamp_kqv": 0.0, "attention.max_alibi_bias": 0.0, "attention.scale": 0.0,
    "attention.sliding_window_pattern": GLOBAL_EVERY, "attn_logit_softcapping": 0.0, "final_logit_softcapping": 0.0,
    "logit_scale": 0.0, "residual_scale": 0.0, "embedding_scale": 0.0, "use_parallel_residual": False,
    "rope.scaling.attn_factor": 1.0, "rope.scaling.yarn_log_multiplier": 0.0, "pooling_type": 0,
    "expert_weights_scale": 0.0, "expert_shared_count": 1,
}  # fmt: skip


def read_gguf(
    f: Fields, vocab_size: int, *, tied_head: bool, attention_bias: bool, mlp_bias: bool, factors: F32 | None
) -> ReadConfig:
    """Read the `llama4.*` keys `f` of a GGUF (llama.cpp, src/models/llama4.cpp), the text model's.

    Raises ConfigError naming the key for a missing, wrong or unimplemented value.
    """
    refuse(f, "llama4", _NEUTRAL)
    if mlp_bias:
        raise ConfigError(f"{f.source}: its feed-forward has biases, which Llama 4 knows none of.", remedy=ANOTHER)
    dim, heads, head_dim = heads_of(f, "llama4", vocab_size)
    layers = f.integer("llama4.block_count", most=4096)
    experts = f.integer("llama4.expert_count", most=1 << 12)
    local = f.choice("llama4.attention.sliding_window", (0, CHUNK), CHUNK) != 0
    rope = rope_of(f, "llama4", head_dim, factors)
    if (said := f.number("llama4.rope.freq_base_swa", rope.theta)) != rope.theta:
        raise f.fault("llama4.rope.freq_base_swa", f"is {said}, and llama4.rope.freq_base {rope.theta}", remedy=ANOTHER)
    config = Llama4Config(
        generation="llama4",
        vocab_size=vocab_size,
        dim=dim,
        layers=layers,
        heads=heads,
        kv_heads=f.integer("llama4.attention.head_count_kv", heads),
        head_dim=head_dim,
        hidden_dim=f.integer("llama4.feed_forward_length"),
        norm_eps=f.number("llama4.attention.layer_norm_rms_epsilon"),
        rope=rope,
        context_length=f.integer("llama4.context_length", most=1 << 26),
        tied_head=tied_head,
        attention_bias=attention_bias,
        interleaved_rope=True,
        chunk=CHUNK if local else 0,
        global_layers=every(GLOBAL_EVERY, layers) if local else (),
        expert_hidden_dim=f.integer("llama4.expert_feed_forward_length"),
        experts=experts,
        experts_per_token=f.integer("llama4.expert_used_count", most=1 << 12),
        moe_layers=every(f.integer("llama4.interleave_moe_layer_step", most=4096), layers),
        qk_norm=experts != EXPERTS_MAVERICK,
    )
    settled(config, f.source)
    return ReadConfig(config, f.unread())


def write_gguf(config: Llama4Config) -> dict[str, Any]:
    """The `llama4.*` keys of the text model. Raises ConfigError for what llama.cpp has built in otherwise.

    Llama 3.1's rule of rope, Scout's, is a tensor in a GGUF and not said here.
    """
    keys: dict[str, Any] = {
        "llama4.block_count": config.layers,
        "llama4.context_length": config.context_length,
        "llama4.embedding_length": config.dim,
        "llama4.feed_forward_length": config.hidden_dim,
        "llama4.vocab_size": config.vocab_size,
        "llama4.attention.head_count": config.heads,
        "llama4.attention.head_count_kv": config.kv_heads,
        "llama4.attention.key_length": config.head_dim,
        "llama4.attention.value_length": config.head_dim,
        "llama4.attention.layer_norm_rms_epsilon": config.norm_eps,
        "llama4.rope.dimension_count": config.head_dim,
        "llama4.rope.freq_base": config.rope.theta,
        "llama4.expert_count": config.experts,
        "llama4.expert_used_count": config.experts_per_token,
        "llama4.expert_feed_forward_length": config.expert_hidden_dim,
        "llama4.interleave_moe_layer_step": _step(config.moe_layers, config.layers) or 0,
    }
    if config.rope.linear_factor != 1.0:
        keys |= {"llama4.rope.scaling.type": "linear", "llama4.rope.scaling.factor": config.rope.linear_factor}
    if not config.chunk and not config.global_layers:
        keys["llama4.attention.sliding_window"] = 0
    built_in = {
        "experts": config.moe_layers != (),
        "chunk": config.chunk in ((CHUNK,) if config.global_layers else (0,)),
        "global_layers": config.global_layers in (every(GLOBAL_EVERY, config.layers), ()),
        "temperature": not config.global_layers
        or (config.temperature_tuning, config.temperature_floor, config.temperature_scale) == (True, FLOOR, SCALE),
        "qk_norm": config.qk_norm == (config.experts != EXPERTS_MAVERICK),
    }
    if wrong := [name for name, right in built_in.items() if not right]:
        raise ConfigError(
            f"A GGUF of Llama 4 cannot say this model's {', '.join(wrong)}: what reads it has its own built in.",
            remedy="Convert to safetensors.",
        )
    return keys


def _step(chosen: tuple[int, ...], layers: int) -> int | None:
    """The step of which `chosen` are the layers; None for none. Raises ConfigError for layers by no step."""
    if not chosen:
        return None
    step = chosen[0] + 1
    if every(step, layers) != chosen:
        raise ConfigError(
            "This model's layers do not alternate by one number, and the layout has no other word for them.",
            remedy="Convert to safetensors.",
        )
    return step


def settled(config: Llama4Config, source: str) -> None:
    """What no single key can show wrong. Raises ConfigError."""
    check(config, source)
    damaged = "The file may be damaged: fetch it again."
    if len(config.moe_layers) * config.experts > MOST_EXPERTS:  # a list of their names would fill the memory
        raise ConfigError(
            f"{source}: {len(config.moe_layers)} layers of {config.experts} experts are more than any Llama has.",
            remedy=damaged,
        )
    if config.moe_layers and not 1 <= config.experts_per_token <= config.experts:
        raise ConfigError(
            f"{source}: a token cannot pass {config.experts_per_token} of {config.experts} experts.", remedy=damaged
        )


def settled_vision(config: Llama4VisionConfig, source: str) -> None:
    """What no single key of a vision encoder can show wrong. Raises ConfigError."""
    damaged = "The file may be damaged: fetch it again."
    if config.dim % config.heads or config.head_dim % 4:
        raise ConfigError(
            f"{source}: {config.heads} heads cannot share {config.dim} numbers in fours, as the 2-D rope asks.",
            remedy=damaged,
        )
    side = config.side * config.shuffle
    if config.image_size % config.patch_size or not 0 < config.shuffle <= 1 or side != int(side) or side < 1:
        raise ConfigError(
            f"{source}: patches of {config.patch_size} do not divide a tile of {config.image_size} pixels into a grid "
            f"that shrinks by {config.shuffle}.",
            remedy=damaged,
        )
    if config.dim / config.shuffle**2 != config.shuffled_dim:
        raise ConfigError(f"{source}: a width of {config.dim} cannot be shuffled by {config.shuffle}.", remedy=damaged)
