"""What a Llama 3.2 Vision (11B, 90B; September 2024) is, in numbers, and the strict readers of the files that say so.

What it is: `MllamaConfig` (the hub calls this kind of model mllama), `MllamaVisionConfig`, and both spellings: the
hub's `config.json`, whose `text_config` is a Llama's and two keys more, and Meta's `params.json`, which is a Llama's
and three keys more.
What it is not: arithmetic (`llama3_vision`, `llama3_vision_encoder`).
What is surprising: Meta counts the decoder's own layers and the cross-attention layers apart, the hub counts them
together. Meta's code has the whole vision encoder built in. And the states that the encoder gives besides its last are
taken *before* the layers named (Meta's `VisionEncoder`, transformers until 4.54); transformers 4.55 to 5.23 takes them
after, one layer later than what the weights were trained with.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

from puna.errors import ConfigError
from puna.models import config as dense
from puna.models import llama3
from puna.models.config import ANOTHER, DecoderConfig, Fields, ReadConfig

EXTRA_ROWS = 8
"""Rows of the embedding past the vocabulary; the first is `<|image|>`'s. They are never predicted, so the head has
none (Meta's `learnable_embedding`)."""

LAYER_NORM_EPS = 1e-5
"""Of the norms before and after the first encoder: torch's default, whatever `norm_eps` says."""

MULTIPLE = 8
"""A tile's tokens are padded to a multiple of this, and the padding takes part in attention."""


@dataclass(frozen=True)
class MllamaVisionConfig:
    """The numbers of the vision encoder, whose defaults are those that Meta's code has built in.

    A picture is up to `max_tiles` square tiles of `image_size` pixels, laid out as one of `ratios` (rows, columns of
    tiles). `layers` blocks, then `global_layers` gated ones. Of the first, the states before the layers in `taken` go
    beside the last state to the projector.
    """

    image_size: int
    dim: int = 1280
    layers: int = 32
    global_layers: int = 8
    heads: int = 16
    hidden_dim: int = 5120
    patch_size: int = 14
    norm_eps: float = 1e-5
    max_tiles: int = 4
    ratios: tuple[tuple[int, int], ...] = ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))
    taken: tuple[int, ...] = (3, 7, 15, 23, 30)

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def side(self) -> int:
        """Patches along a side of a tile."""
        return self.image_size // self.patch_size

    @property
    def tile_tokens(self) -> int:
        """Tokens that a tile becomes: its patches, and one for itself."""
        return self.side**2 + 1

    @property
    def padded_tokens(self) -> int:
        """Those, and the padding."""
        return -(-self.tile_tokens // MULTIPLE) * MULTIPLE

    @property
    def output_dim(self) -> int:
        """Width of a token that the projector takes."""
        return self.dim * (1 + len(self.taken))


@dataclass(frozen=True, kw_only=True)
class MllamaConfig(DecoderConfig):
    """The numbers of a Llama 3.2 Vision; `layers` counts those in `cross_layers` too.

    The embedding has `vocab_size` + `extra_rows` rows, the head `vocab_size`. `image_token` stands in a text where a
    picture belongs. `vision` is None for a decoder by itself, which then reads text only.
    """

    cross_layers: tuple[int, ...]
    extra_rows: int = EXTRA_ROWS
    image_token: int = llama3.VOCAB_SIZE
    vision: MllamaVisionConfig | None = None

    @property
    def cached_layers(self) -> int:
        """Layers with keys and values in the cache: cross layers read the picture's, which `see` makes once."""
        return self.layers - len(self.cross_layers)


# What transformers writes, or in the first files wrote, into each part: settings of generation and of training.
_AT_REST = (
    "_name_or_path", "chunk_size_feed_forward", "id2label", "initializer_range", "is_encoder_decoder", "label2id",
    "output_attentions", "output_hidden_states", "problem_type", "return_dict", "transformers_version",
    "add_cross_attention", "bad_words_ids", "begin_suppress_tokens", "cross_attention_hidden_size",
    "decoder_start_token_id", "diversity_penalty", "do_sample", "dropout", "early_stopping",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id",
    "forced_eos_token_id", "is_decoder", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size",
    "num_beam_groups", "num_beams", "num_return_sequences", "output_scores", "prefix", "pruned_heads",
    "remove_invalid_values", "repetition_penalty", "return_dict_in_generate", "sep_token_id", "suppress_tokens",
    "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "top_k", "top_p",
    "torchscript", "typical_p", "use_bfloat16", "_attn_implementation_autoset",
)  # fmt: skip


def read_hub(data: Mapping[str, Any], source: str = "config.json") -> ReadConfig:
    """Read the hub's `config.json` of a MllamaForConditionalGeneration or a MllamaForCausalLM.

    Raises ConfigError naming the key for a missing, wrong or unimplemented value.
    """
    top = Fields(data, source)
    if top.choice("model_type", ("mllama", "mllama_text_model"), "mllama") == "mllama_text_model":
        return _read_text(top, "MllamaForCausalLM", None, llama3.VOCAB_SIZE)
    _architecture(top, "MllamaForConditionalGeneration")
    if top.has("quantization_config"):
        raise top.fault(
            "quantization_config", "asks for packed weights, which Puna does not read from safetensors", remedy=ANOTHER
        )
    top.choice("tie_word_embeddings", (False,), False)
    vision, unread = _read_hub_vision(top.child("vision_config"))
    token = top.integer("image_token_index", llama3.VOCAB_SIZE, least=0, most=1 << 24)
    read = _read_text(top.child("text_config"), None, vision, token)
    assert isinstance(read.config, MllamaConfig)
    if token >= read.config.vocab_size + EXTRA_ROWS:
        raise top.fault("image_token_index", f"is {token}, past the {read.config.vocab_size + EXTRA_ROWS} rows")
    dtype = data.get("dtype", data.get("torch_dtype"))
    top.ignore("dtype", "torch_dtype", *_AT_REST)
    top.ignore("bos_token_id", "eos_token_id", "pad_token_id", "use_cache")  # text_config's are those that count
    unknown = (*top.unread(), *(f"text_config.{key}" for key in read.unknown), *unread)
    return ReadConfig(read.config, unknown, read.bos_id, read.eos_ids, dtype if isinstance(dtype, str) else read.dtype)


def _architecture(f: Fields, name: str) -> None:
    if f.has("architectures") and f.data["architectures"] != [name]:
        raise f.fault("architectures", f"is {f.data['architectures']!r:.80}; Puna runs {name} here", remedy=ANOTHER)


def _read_text(f: Fields, architecture: str | None, vision: MllamaVisionConfig | None, token: int) -> ReadConfig:
    """The keys of a Llama, read as one, and `cross_attention_layers`."""
    f.choice("model_type", ("mllama_text_model",), "mllama_text_model")
    if architecture is not None:
        _architecture(f, architecture)
    for key, neutral in (("attention_bias", False), ("mlp_bias", False), ("tie_word_embeddings", False)):
        f.choice(key, (neutral,), neutral)
    ours = {"model_type", "architectures", "cross_attention_layers", *_AT_REST}
    rope = f.data.get("rope_parameters")
    theta = {} if f.has("rope_theta") or (isinstance(rope, Mapping) and "rope_theta" in rope) else {
        "rope_theta": llama3.ROPE_THETA
    }  # fmt: skip
    read = dense.read_hub({key: value for key, value in f.data.items() if key not in ours} | theta, f.source)
    if read.config.head_dim * read.config.heads != read.config.dim:
        raise f.fault("head_dim", f"is {read.config.head_dim}; this kind of model has hidden_size / heads")
    layers = read.config.layers
    cross = _numbers(f, "cross_attention_layers", layers - 1)
    config = MllamaConfig(
        **_dense(read.config) | {"generation": "llama3.2"}, cross_layers=cross, image_token=token, vision=vision
    )
    _settled(config, f.source)
    return ReadConfig(config, read.unknown, read.bos_id, read.eos_ids, read.dtype)


def _numbers(f: Fields, key: str, most: int) -> tuple[int, ...]:
    """A list of whole numbers from 0 to `most`, ascending."""
    value = f.data.get(key)
    f.ignore(key)
    if value is None:
        raise f.fault(key, "is missing")
    whole = isinstance(value, list) and all(type(n) is int and 0 <= n <= most for n in value)
    if not whole or value != sorted(set(value)):
        raise f.fault(key, f"must be a list of whole numbers from 0 to {most}, ascending, not {value!r:.80}")
    return tuple(value)


def _read_hub_vision(f: Fields) -> tuple[MllamaVisionConfig, tuple[str, ...]]:
    f.choice("model_type", ("mllama_vision_model",), "mllama_vision_model")
    f.choice("hidden_act", ("gelu",), "gelu")
    f.choice("num_channels", (3,), 3)
    layers = f.integer("num_hidden_layers", most=4096)
    config = MllamaVisionConfig(
        image_size=f.integer("image_size", most=1 << 14),
        dim=f.integer("hidden_size"),
        layers=layers,
        global_layers=f.integer("num_global_layers", most=4096),
        heads=f.integer("attention_heads") if f.has("attention_heads") else f.integer("num_attention_heads"),
        hidden_dim=f.integer("intermediate_size"),
        patch_size=f.integer("patch_size", most=1 << 14),
        norm_eps=f.number("norm_eps"),
        max_tiles=f.integer("max_num_tiles", most=1 << 8),
        ratios=_ratios(f),
        taken=_numbers(f, "intermediate_layers_indices", layers - 1),
    )
    if config.dim % config.heads:
        raise f.fault("hidden_size", f"({config.dim}) is not a multiple of attention_heads ({config.heads})")
    if config.image_size % config.patch_size:
        raise f.fault("image_size", f"({config.image_size}) is not a multiple of patch_size ({config.patch_size})")
    if any(rows * columns > config.max_tiles for rows, columns in config.ratios):
        raise f.fault("supported_aspect_ratios", f"has one of more than {config.max_tiles} tiles")
    tiles = range(1, config.max_tiles + 1)
    # What makes pictures ready lays them out as any of these, and transformers counts their ids in this order.
    if config.ratios != tuple((rows, columns) for rows in tiles for columns in tiles if rows * columns <= tiles[-1]):
        raise f.fault(
            "supported_aspect_ratios", f"must be all layouts of up to {tiles[-1]} tiles, in order", remedy=ANOTHER
        )
    if (said := f.integer("vision_output_dim", most=1 << 24)) != config.output_dim:
        raise f.fault("vision_output_dim", f"is {said}, and the states that are taken make {config.output_dim}")
    f.ignore(
        "architectures", "attention_dropout", "dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id",
        "tie_word_embeddings", "num_attention_heads", *_AT_REST,
    )  # fmt: skip
    return config, tuple(f"vision_config.{key}" for key in f.unread())


def _ratios(f: Fields) -> tuple[tuple[int, int], ...]:
    """Rows and columns of tiles, in the order of their ids, which begin at 1."""
    value = f.data.get("supported_aspect_ratios")
    f.ignore("supported_aspect_ratios")
    if value is None:
        raise f.fault("supported_aspect_ratios", "is missing")
    pairs = isinstance(value, list) and all(
        isinstance(one, list) and len(one) == 2 and all(type(n) is int and 1 <= n <= 1 << 8 for n in one)
        for one in value
    )
    if not pairs or not 1 <= len(value) <= 1 << 12 or len({tuple(one) for one in value}) != len(value):
        raise f.fault("supported_aspect_ratios", f"must be a list of different pairs of numbers, not {value!r:.80}")
    return tuple((rows, columns) for rows, columns in value)


def write_hub(config: MllamaConfig, *, dtype: str, bos_id: int | None, eos_ids: Collection[int]) -> dict[str, Any]:
    """The hub's `config.json` for this config. Raises ConfigError for what it cannot express."""
    text = dense.write_hub(DecoderConfig(**_dense(config)), dtype=dtype, bos_id=bos_id, eos_ids=eos_ids)
    for key in ("attention_bias", "mlp_bias", "head_dim"):
        del text[key]
    text |= {"model_type": "mllama_text_model", "cross_attention_layers": list(config.cross_layers)}
    v = config.vision
    if v is None:
        return text | {"architectures": ["MllamaForCausalLM"]}
    return {
        "architectures": ["MllamaForConditionalGeneration"], "model_type": "mllama", "torch_dtype": dtype,
        "image_token_index": config.image_token, "text_config": text | {"architectures": None},
        "vision_config": {
            "model_type": "mllama_vision_model", "hidden_act": "gelu", "num_channels": 3, "image_size": v.image_size,
            "patch_size": v.patch_size, "hidden_size": v.dim, "intermediate_size": v.hidden_dim,
            "attention_heads": v.heads, "num_hidden_layers": v.layers, "num_global_layers": v.global_layers,
            "norm_eps": v.norm_eps, "max_num_tiles": v.max_tiles, "vision_output_dim": v.output_dim,
            "intermediate_layers_indices": list(v.taken), "supported_aspect_ratios": [list(one) for one in v.ratios],
        },
    }  # fmt: skip


_META = ("vision_chunk_size", "vision_max_num_chunks", "vision_num_cross_attention_layers")


def read_meta(data: Mapping[str, Any], source: str = "params.json", *, vocab_size: int | None = None) -> ReadConfig:
    """Read Meta's `params.json`; `vocab_size` counts the embedding's rows without the extra ones.

    Raises ConfigError naming the key for a missing, wrong or unimplemented value.
    """
    f = Fields(data, source)
    read = dense.read_meta({k: v for k, v in data.items() if k not in _META}, source, vocab_size=vocab_size)
    own, added = read.config.layers, f.integer("vision_num_cross_attention_layers", most=4096)
    if added > own:
        raise f.fault("vision_num_cross_attention_layers", f"is {added}, and there are {own} layers to stand before")
    if (tiles := f.integer("vision_max_num_chunks", 4)) != 4:
        raise f.fault("vision_max_num_chunks", f"is {tiles}; Puna knows the layouts of 4 tiles", remedy=ANOTHER)
    vision = MllamaVisionConfig(image_size=f.integer("vision_chunk_size", most=1 << 14))
    if vision.image_size % vision.patch_size:
        raise f.fault("vision_chunk_size", f"({vision.image_size}) is not a multiple of {vision.patch_size}")
    numbers = _dense(read.config) | {"generation": "llama3.2", "layers": own + added}
    config = MllamaConfig(
        **numbers,
        cross_layers=_schedule(own, added),
        image_token=read.config.vocab_size,
        vision=vision,
    )
    _settled(config, source)
    return ReadConfig(config, read.unknown)


def _schedule(own: int, added: int) -> tuple[int, ...]:
    """Which of own + added layers are cross layers: each stands before the last of a group of the decoder's own.

    Meta's `init_fusion_schedule`: of the decoder's layers counted from the end, each ceil(own / added)-th.
    """
    before = list(range(own))[:: -math.ceil(own / added)][:added][::-1]
    return tuple(layer + i for i, layer in enumerate(before))


def write_meta(config: MllamaConfig) -> dict[str, Any]:
    """Meta's `params.json`. Raises ConfigError for a vision encoder or layers other than those it has built in."""
    added, vision = len(config.cross_layers), config.vision
    own = config.layers - added
    if (
        vision is None
        or vision != MllamaVisionConfig(vision.image_size)
        or not 0 < added <= own
        or (config.cross_layers, config.extra_rows, config.image_token)
        != (_schedule(own, added), EXTRA_ROWS, config.vocab_size)
    ):
        raise ConfigError(
            "Meta's layout has the vision encoder and the places of the cross-attention layers built in, and this "
            "model's differ.",
            remedy="Convert to safetensors.",
        )
    text = dense.write_meta(DecoderConfig(**_dense(config) | {"layers": own}))
    return text | dict(zip(_META, (vision.image_size, vision.max_tiles, added), strict=True))


def _dense(config: DecoderConfig) -> dict[str, Any]:
    """The numbers that every decoder has."""
    return {one.name: getattr(config, one.name) for one in fields(DecoderConfig)}


def _settled(config: MllamaConfig, source: str) -> None:
    """What no single key can show wrong. Raises ConfigError."""
    if config.layers == len(config.cross_layers):
        raise ConfigError(f"{source}: all {config.layers} layers are cross-attention layers.", remedy=ANOTHER)
