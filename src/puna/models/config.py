"""What a dense Llama is, in numbers, and the strict readers of the files that say so.

What it is: `DecoderConfig`, and its readers and writers in the two spellings found in the world: the hub's
`config.json` (old: `rope_theta` + `rope_scaling`; transformers 5: `rope_parameters`) and Meta's `params.json`.
What it is not: defaults taken on faith. A missing value that changes the arithmetic is an error, a value this code does
not implement is refused by name, and a key it does not know is reported to the caller, who shows it.
What is surprising: `params.json` leaves out what Meta's code of that day had built in (context length, the factor of
the scaled rope, often the vocabulary); those facts come from the generation pages.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from puna.errors import ConfigError
from puna.models import llama1, llama2, llama3
from puna.models.rope import Llama3Scaling, Rope

ANOTHER = "This model cannot run here; `puna models` lists those that can."

_DAMAGED = "The file may be damaged: fetch it again."

_SMALLEST, _LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127
"""float32's smallest and largest magnitudes; the arithmetic knows no others."""

LARGEST_SIZE = 1 << 20
"""No released Llama has a dimension near this; a larger number in a file is damage or an attack."""


@dataclass(frozen=True)
class DecoderConfig:
    """The numbers of a dense Llama decoder; `models.decoder` computes with nothing else.

    `interleaved_rope` says how the stored q and k rows pair up (Meta's files True, the hub's False), so that neither
    kind of file has to be permuted on load. `chunk` is how many tokens the attention of most layers sees at the most (a
    token sees those of its own chunk), 0 where every layer sees all; `global_layers` see all even so. `generation`
    names the page (`"llama3.2"`); it decides chat formats and what is shown, never arithmetic.
    """

    generation: str
    vocab_size: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden_dim: int
    norm_eps: float
    rope: Rope
    context_length: int
    tied_head: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    interleaved_rope: bool = False
    chunk: int = 0
    global_layers: tuple[int, ...] = ()

    @property
    def cached_layers(self) -> int:
        """Layers with keys and values in the cache."""
        return self.layers

    @property
    def local_layers(self) -> tuple[int, ...]:
        """The layers that see one chunk only, whose cache holds no more; none where there is no other kind beside them:
        a page of a sequence is then one of every layer, as in a dense model, and stays."""
        if not self.chunk or not self.global_layers:
            return ()
        return tuple(i for i in range(self.layers) if i not in self.global_layers)


@dataclass(frozen=True)
class ReadConfig:
    """A config, and what its file said that the reader did not use: ids of tokens, and keys it does not know."""

    config: DecoderConfig
    unknown: tuple[str, ...] = ()
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    dtype: str | None = None


@dataclass
class Fields:
    """Typed getters over a JSON object; every error names file and key; `unread()` lists what was never asked."""

    data: Mapping[str, Any]
    source: str
    asked: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        if not isinstance(self.data, Mapping):
            raise ConfigError(
                f"{self.source}: expected a JSON object, found {type(self.data).__name__}.", remedy=_DAMAGED
            )

    def has(self, key: str) -> bool:
        """Whether the key is there with a value other than null."""
        self.asked.add(key)
        return self.data.get(key) is not None

    def integer(self, key: str, default: int | None = None, *, least: int = 1, most: int = LARGEST_SIZE) -> int:
        """An integer in [least, most]; a missing key gives the default, or an error where there is none."""
        if not self.has(key):
            if default is None:
                raise self.fault(key, "is missing")
            return default
        value = self.data[key]
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.fault(key, f"must be a whole number from {least} to {most}, not {value!r:.80}")
        return value

    def number(self, key: str, default: float | None = None, *, positive: bool = True) -> float:
        """A number that float32 has, which computes; above zero unless told otherwise."""
        if not self.has(key):
            if default is None:
                raise self.fault(key, "is missing")
            return default
        value = self.data[key]
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        if not fits or not (value == 0 or _SMALLEST <= abs(value) <= _LARGEST) or (positive and value <= 0):
            sign = "positive " if positive else ""
            raise self.fault(key, f"must be a {sign}number of float32's range, not {value!r:.80}")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        """True or false."""
        if not self.has(key):
            return default
        value = self.data[key]
        if not isinstance(value, bool):
            raise self.fault(key, f"must be true or false, not {value!r:.80}")
        return value

    def choice(self, key: str, allowed: Collection[Any], default: Any) -> Any:
        """One of `allowed`; anything else is something Puna does not implement."""
        if not self.has(key):
            return default
        value = self.data[key]
        if not isinstance(value, str | int | float) or value not in allowed:  # not a list, nor a GGUF's array
            names = ", ".join(repr(a) for a in allowed)
            raise self.fault(key, f"is {value!r:.80}, which Puna does not implement; it knows {names}", remedy=ANOTHER)
        return value

    def child(self, key: str) -> Fields:
        """The object under a key."""
        self.asked.add(key)
        value = self.data.get(key)
        if not isinstance(value, Mapping):
            raise self.fault(key, f"must be an object, not {value!r:.80}")
        return Fields(value, f"{self.source}: {key}")

    def ignore(self, *keys: str) -> None:
        """Keys that are known and do not change what an inference computes."""
        self.asked.update(keys)

    def unread(self) -> tuple[str, ...]:
        """Keys that no getter asked for."""
        return tuple(str(key)[:80] for key in self.data if key not in self.asked)

    def fault(self, key: str, what: str, *, remedy: str = _DAMAGED) -> ConfigError:
        """The error for a key."""
        return ConfigError(f"{self.source}: {key!r} {what}.", remedy=remedy)


def read_hub(data: Mapping[str, Any], source: str = "config.json") -> ReadConfig:
    """Read the hub's `config.json` of a `LlamaForCausalLM`, in either spelling of rope.

    Raises ConfigError naming the key for a missing, wrong or unimplemented value.
    """
    if isinstance(data, Mapping) and data.get("model_type") in ("llama4", "llama4_text"):
        from puna.models import llama4_config

        return llama4_config.read_hub(data, source)
    if isinstance(data, Mapping) and data.get("model_type") in ("mllama", "mllama_text_model"):
        from puna.models import llama3_vision_config

        return llama3_vision_config.read_hub(data, source)
    f = Fields(data, source)
    if data.get("model_type") == "deberta-v2":
        raise f.fault(
            "model_type",
            "is 'deberta-v2', the encoder that Prompt Guard is; Puna runs decoders",
            remedy="A Llama Guard judges what is asked and answered (`puna serve --guard`); of attacks on the prompt "
            "alone, which Prompt Guard looks for, none that Puna runs was trained to judge.",
        )
    f.choice("model_type", ("llama",), "llama")
    if f.has("architectures") and data["architectures"] != ["LlamaForCausalLM"]:
        raise f.fault(
            "architectures",
            f"is {data['architectures']!r:.80}; Puna runs LlamaForCausalLM from this file",
            remedy=ANOTHER,
        )
    if f.has("quantization_config"):
        raise f.fault(
            "quantization_config", "asks for packed weights, which Puna does not read from safetensors", remedy=ANOTHER
        )
    f.choice("hidden_act", ("silu",), "silu")
    dim, heads = f.integer("hidden_size"), f.integer("num_attention_heads")
    kv_heads = f.integer("num_key_value_heads", heads)
    if not f.has("head_dim") and dim % heads:
        raise f.fault("hidden_size", f"({dim}) is not a multiple of num_attention_heads ({heads})")
    head_dim = f.integer("head_dim", max(1, dim // heads))
    context = f.integer("max_position_embeddings", most=1 << 26)
    rope = hub_rope(f, head_dim)
    vocab, layers = f.integer("vocab_size", most=1 << 24), f.integer("num_hidden_layers", most=4096)
    config = DecoderConfig(
        generation=generation_of(vocab, layers, context, rope),
        vocab_size=vocab,
        dim=dim,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        hidden_dim=f.integer("intermediate_size"),
        norm_eps=f.number("rms_norm_eps"),
        rope=rope,
        context_length=context,
        tied_head=f.boolean("tie_word_embeddings", False),
        attention_bias=f.boolean("attention_bias", False),
        mlp_bias=f.boolean("mlp_bias", False),
    )
    check(config, source)
    rest = hub_rest(f)
    return ReadConfig(config, f.unread(), *rest)


def hub_rest(f: Fields) -> tuple[int | None, tuple[int, ...], str | None]:
    """The ids of BOS and EOS and the stored type, and the keys that change nothing.

    Raises ConfigError for ids that are none.
    """
    data = f.data
    bos = f.integer("bos_token_id", least=0, most=1 << 24) if f.has("bos_token_id") else None
    eos = data.get("eos_token_id")
    eos_ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    if not all(type(e) is int and 0 <= e < 1 << 24 for e in eos_ids):
        raise f.fault("eos_token_id", f"must be a token id or a list of them, not {eos!r:.80}")
    f.ignore(
        "eos_token_id", "pad_token_id", "attention_dropout", "initializer_range", "pretraining_tp", "use_cache",
        "transformers_version", "_name_or_path", "return_dict", "output_hidden_states", "output_attentions",
        "chunk_size_feed_forward", "is_encoder_decoder", "problem_type", "id2label", "label2id", "max_sequence_length",
    )  # fmt: skip
    dtype = data.get("dtype", data.get("torch_dtype"))
    f.ignore("dtype", "torch_dtype")
    return bos, eos_ids, dtype if isinstance(dtype, str) else None


def hub_rope(f: Fields, head_dim: int, default_theta: float = llama1.ROPE_THETA) -> Rope:
    """Rope in both spellings; where a file has both (transformers 5 writes only the new one) they must agree."""
    f.choice("partial_rotary_factor", (1, 1.0), 1.0)
    new = f.child("rope_parameters") if f.has("rope_parameters") else None
    old = f.child("rope_scaling") if f.has("rope_scaling") else None
    theta = f.number("rope_theta") if f.has("rope_theta") else None
    if new is not None and old is not None and dict(new.data) != {**old.data, "rope_theta": new.data.get("rope_theta")}:
        raise f.fault("rope_scaling", "differs from rope_parameters")
    inner = new or old
    if inner is not None:
        inner_theta = inner.number("rope_theta", theta if theta is not None else default_theta)
        if theta is not None and theta != inner_theta:
            raise f.fault("rope_theta", f"is {theta} here and {inner_theta} in rope_parameters")
        theta = inner_theta
        inner.choice("partial_rotary_factor", (1, 1.0), 1.0)
    if theta is None:
        theta = default_theta  # LlamaConfig's default: the Llama 1 and 2 files were written without the key
    if inner is None:
        return Rope(head_dim, theta)
    for key in ("rope_type", "type"):
        inner.choice(key, ("default", "linear", "llama3"), None)
    kind = inner.data.get("rope_type") or inner.data.get("type") or "default"
    if (inner.data.get("type") or kind) != kind:
        raise inner.fault("type", f"is {inner.data['type']!r}, and 'rope_type' is {kind!r}")
    rope = Rope(head_dim, theta)
    if kind == "linear":
        rope = Rope(head_dim, theta, linear_factor=inner.number("factor"))
    elif kind == "llama3":
        scaling = Llama3Scaling(
            factor=inner.number("factor"),
            low_freq_factor=inner.number("low_freq_factor"),
            high_freq_factor=inner.number("high_freq_factor"),
            original_context=inner.integer("original_max_position_embeddings", most=1 << 26),
        )
        if scaling.high_freq_factor < scaling.low_freq_factor:
            raise inner.fault("high_freq_factor", "must not be smaller than low_freq_factor")
        rope = Rope(head_dim, theta, llama3=scaling)
    inner.ignore("original_max_position_embeddings")
    if inner.unread():
        raise inner.fault(inner.unread()[0], f"means nothing for rope type {kind!r}")
    return rope


def write_hub(config: DecoderConfig, *, dtype: str, bos_id: int | None, eos_ids: Collection[int]) -> dict[str, Any]:
    """The hub's `config.json` for this config, in the spelling that every transformers since 4.43 reads.

    Raises ConfigError for what it cannot express (rope factors of a model's own).
    """
    from puna.models import llama3_vision_config, llama4_config

    if isinstance(config, llama4_config.Llama4Config):
        return llama4_config.write_hub(config, dtype=dtype, bos_id=bos_id, eos_ids=eos_ids)
    if isinstance(config, llama3_vision_config.MllamaConfig):
        return llama3_vision_config.write_hub(config, dtype=dtype, bos_id=bos_id, eos_ids=eos_ids)
    if config.rope.factors is not None:
        raise ConfigError(
            "config.json has no word for this model's rope: each frequency is stretched by a factor of its own.",
            remedy="Keep it as GGUF.",
        )
    scaling: dict[str, Any] | None = None
    if config.rope.llama3 is not None:
        s = config.rope.llama3
        scaling = {
            "rope_type": "llama3", "factor": s.factor, "low_freq_factor": s.low_freq_factor,
            "high_freq_factor": s.high_freq_factor, "original_max_position_embeddings": s.original_context,
        }  # fmt: skip
    elif config.rope.linear_factor != 1.0:
        scaling = {"rope_type": "linear", "factor": config.rope.linear_factor}
    eos = list(eos_ids)
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": config.vocab_size, "hidden_size": config.dim, "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.layers, "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads, "head_dim": config.head_dim,
        "max_position_embeddings": config.context_length, "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta, "rope_scaling": scaling, "tie_word_embeddings": config.tied_head,
        "attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias,
        "bos_token_id": bos_id, "eos_token_id": eos[0] if len(eos) == 1 else (eos or None), "torch_dtype": dtype,
    }  # fmt: skip


def read_meta(data: Mapping[str, Any], source: str = "params.json", *, vocab_size: int | None = None) -> ReadConfig:
    """Read Meta's `params.json`. `vocab_size` (the embedding's rows) fills in for Llama 1 and 2, which say -1.

    Raises ConfigError naming the key for a missing, wrong or unimplemented value.
    """
    f = Fields(data, source)
    if any(map(f.has, ("model", "moe_args", "nope_layer_interval", "attention_chunk_size", "vision_args"))):
        from puna.models import llama4_config

        return llama4_config.read_meta(data, source, vocab_size=vocab_size)
    if f.has("vision_chunk_size"):
        from puna.models import llama3_vision_config

        return llama3_vision_config.read_meta(data, source, vocab_size=vocab_size)
    dim, heads = f.integer("dim"), f.integer("n_heads")
    said_vocab = f.integer("vocab_size", -1, least=-1, most=1 << 24)
    vocab = said_vocab if said_vocab > 0 else vocab_size
    if not vocab:
        raise f.fault("vocab_size", "is -1 and there is no embedding to count the rows of")
    if vocab_size is not None and vocab != vocab_size:
        raise f.fault("vocab_size", f"is {vocab}, and the embedding has {vocab_size} rows")
    if not f.has("head_dim") and dim % heads:
        raise f.fault("dim", f"({dim}) is not a multiple of n_heads ({heads})")
    head_dim = f.integer("head_dim", max(1, dim // heads))
    multiplier = f.number("ffn_dim_multiplier", 1.0)
    hidden = (
        f.integer("hidden_dim") if f.has("hidden_dim") else llama2.hidden_dim(dim, f.integer("multiple_of"), multiplier)
    )
    f.ignore("multiple_of")
    theta = f.number("rope_theta", llama1.ROPE_THETA)
    scaling = None
    if f.boolean("use_scaled_rope", False):
        # Meta's code of 3.1 has factor 8 built in; the 3.2 text models (1B, 3B), which alone are this narrow, use 32.
        small = dim < llama3.NARROWEST_3_1
        scaling = Llama3Scaling(
            factor=f.number("rope_scaling_factor", llama3.SCALING_3_2.factor if small else llama3.SCALING_3_1.factor),
            low_freq_factor=llama3.SCALING_3_1.low_freq_factor,
            high_freq_factor=f.number("rope_high_freq_factor", llama3.SCALING_3_1.high_freq_factor),
            original_context=llama3.SCALING_3_1.original_context,
        )
    rope = Rope(head_dim, theta, llama3=scaling)
    # Llama 1's norm_eps is 1e-6 in the 7B and 13B and 1e-5 in the 33B and 65B. Llama 2's is 1e-5; its 7B and 13B have
    # no other key that tells them, and its 70B, as wide as the 65B, has those of grouped attention. So have the two
    # Code Llama 70B with Llama 2's rope and context.
    grouped = f.has("n_kv_heads") or f.has("ffn_dim_multiplier")
    second = grouped or (f.number("norm_eps") == 1e-5 and dim <= llama2.WIDEST_UNGROUPED)
    context = _meta_context(f, vocab, rope, llama2.CONTEXT if second else llama1.CONTEXT)
    layers = f.integer("n_layers", most=4096)
    config = DecoderConfig(
        generation=generation_of(vocab, layers, context, rope),
        vocab_size=vocab,
        dim=dim,
        layers=layers,
        heads=heads,
        kv_heads=f.integer("n_kv_heads", heads),
        head_dim=head_dim,
        hidden_dim=hidden,
        norm_eps=f.number("norm_eps"),
        rope=rope,
        context_length=context,
        tied_head=f.boolean("tied_embeddings", False),
        interleaved_rope=True,
    )
    check(config, source)
    f.ignore("max_batch_size", "model_parallel_size", "lora_args", "quantization_args")
    for key in ("lora_args", "quantization_args", "moe_args", "vision_args", "vision_chunk_size"):
        if f.has(key):
            raise f.fault(key, "asks for something Puna does not implement", remedy=ANOTHER)
    return ReadConfig(config, f.unread())


def _meta_context(f: Fields, vocab: int, rope: Rope, early: int) -> int:
    """Context length as trained (`early` for a Llama 1 or 2).

    `params.json` does not say it; `max_seq_len`, a setting of Meta's code, may.
    """
    known = {"codellama": llama2.CODE_CONTEXT, "llama3": llama3.CONTEXT_3, "llama3.1": llama3.CONTEXT_3_1}
    if rope.llama3 is not None:
        default = known["llama3.1"]
    elif vocab >= llama3.VOCAB_SIZE:
        default = known["llama3"]
    elif rope.theta == llama2.CODE_ROPE_THETA:
        default = known["codellama"]
    else:
        default = early
    return f.integer("max_seq_len", default, most=1 << 26)


def write_meta(config: DecoderConfig) -> dict[str, Any]:
    """Meta's `params.json` for this config, in the keys that Meta's own code knows.

    It refuses others, so `head_dim`, `max_seq_len` and the factors of the scaled rope, which it has built in, are said
    only for a model that differs there. Raises ConfigError for what the layout cannot express (biases, linear rope
    scaling).
    """
    from puna.models import llama3_vision_config, llama4_config

    if isinstance(config, llama4_config.Llama4Config):
        return llama4_config.write_meta(config)
    if isinstance(config, llama3_vision_config.MllamaConfig):
        return llama3_vision_config.write_meta(config)
    if config.attention_bias or config.mlp_bias:
        raise ConfigError("Meta's layout has no biases, and this model has some.", remedy="Convert to safetensors.")
    if config.rope.linear_factor != 1.0:
        raise ConfigError("Meta's layout has no linear rope scaling.", remedy="Convert to safetensors.")
    if config.rope.factors is not None:
        raise ConfigError("Meta's layout has no rope factors of a model's own.", remedy="Keep it as GGUF.")
    params: dict[str, Any] = {
        "dim": config.dim, "n_layers": config.layers, "n_heads": config.heads, "vocab_size": config.vocab_size,
        "norm_eps": config.norm_eps, "multiple_of": config.hidden_dim,
    }  # fmt: skip
    # Any width up to `multiple_of` is rounded up to it; a larger one must be made smaller first.
    if (width := llama2.hidden_dim(config.dim, 1)) > config.hidden_dim:
        params["ffn_dim_multiplier"] = (config.hidden_dim + 0.5) / width
    if config.kv_heads != config.heads:
        params["n_kv_heads"] = config.kv_heads
    if config.rope.theta != llama1.ROPE_THETA:
        params["rope_theta"] = config.rope.theta
    if config.head_dim * config.heads != config.dim:
        params["head_dim"] = config.head_dim
    if (s := config.rope.llama3) is not None:
        params["use_scaled_rope"] = True
        built_in = llama3.SCALING_3_1
        if (s.low_freq_factor, s.original_context) != (built_in.low_freq_factor, built_in.original_context):
            raise ConfigError(
                "Meta's layout has low_freq_factor and the original context built in, and this model's differ.",
                remedy="Convert to safetensors.",
            )
    understood = read_meta(params).config
    if s is not None and understood.rope.llama3 != s:
        params |= {"rope_scaling_factor": s.factor, "rope_high_freq_factor": s.high_freq_factor}
    if understood.context_length != config.context_length:
        params["max_seq_len"] = config.context_length
    return params


def generation_of(vocab: int, layers: int, context: int, rope: Rope) -> str:
    """Which page the numbers belong to. Llama 3.3 has 3.1's numbers and 3.1's chat format, so it is called 3.1 here."""
    if rope.factors is not None:
        return "llama3.1"
    if rope.llama3 is not None:
        return "llama3.2" if rope.llama3.factor == llama3.SCALING_3_2.factor else "llama3.1"
    if vocab >= llama3.VOCAB_SIZE:
        return "llama3"
    code_70b = (vocab, layers) == (llama2.CODE_70B_VOCAB_SIZE, llama2.CODE_70B_LAYERS)
    if rope.theta == llama2.CODE_ROPE_THETA or code_70b:
        return "codellama"
    return "llama2" if context > llama1.CONTEXT else "llama1"


def check(config: DecoderConfig, source: str) -> None:
    """What no single key can show wrong."""
    if config.heads % config.kv_heads:
        raise ConfigError(
            f"{source}: {config.heads} heads cannot share {config.kv_heads} key/value heads evenly.", remedy=_DAMAGED
        )
    if config.head_dim % 2:
        raise ConfigError(
            f"{source}: head_dim is {config.head_dim}; rope turns pairs, so it must be even.", remedy=_DAMAGED
        )
