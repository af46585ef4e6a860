"""The readers of config.json and params.json: real files, both spellings of rope, and everything they must refuse."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from puna.errors import ConfigError
from puna.models import decoder, llama3
from puna.models.config import DecoderConfig, read_hub, read_meta, write_hub, write_meta
from puna.models.rope import Llama3Scaling, Rope

HUB: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "vocab_size": 61,
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": [2, 5],
}  # fmt: skip
SCALED = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
META: dict[str, Any] = {"dim": 24, "n_layers": 3, "n_heads": 4, "vocab_size": 61, "multiple_of": 8, "norm_eps": 1e-5}


def without(data: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in data.items() if k != key}


# --- config.json -----------------------------------------------------------------------------------------------------


def test_hub_config() -> None:
    read = read_hub(HUB)
    assert read.config == DecoderConfig(
        "llama2", 61, 24, 3, 4, 2, 6, 40, 1e-5, Rope(6, 10000.0), 4096, interleaved_rope=False
    )
    assert (read.bos_id, read.eos_ids, read.dtype, read.unknown) == (1, (2, 5), "bfloat16", ())


def test_a_real_config_with_two_foreign_keys(reference: Path) -> None:
    data = json.loads((reference / "configs" / "Llama-3.2-1B-Instruct.config.unsloth.json").read_text())
    read = read_hub(data)
    assert read.unknown == ("unsloth_fixed", "unsloth_version")
    assert read.config == DecoderConfig(
        "llama3.2", 128256, 2048, 16, 32, 8, 64, 8192, 1e-5, Rope(64, 500000.0, llama3=llama3.SCALING_3_2), 131072,
        tied_head=True,
    )  # fmt: skip
    assert decoder.parameter_count(read.config) == 1_235_814_400
    assert (read.bos_id, read.eos_ids) == (128000, (128009,))


def test_both_spellings_of_rope_give_one_config() -> None:
    old = read_hub(HUB | {"rope_theta": 500000.0, "rope_scaling": SCALED}).config
    new = read_hub(without(HUB, "rope_theta") | {"rope_parameters": SCALED | {"rope_theta": 500000.0}}).config
    both = read_hub(HUB | {"rope_theta": 500000.0, "rope_parameters": SCALED | {"rope_theta": 500000.0}}).config
    assert old == new == both
    assert old.rope == Rope(6, 500000.0, llama3=Llama3Scaling(8.0, 1.0, 4.0, 8192))
    assert read_hub(HUB | {"rope_scaling": None}).config == read_hub(HUB).config
    older = read_hub(HUB | {"rope_scaling": {"type": "linear", "factor": 4.0}}).config
    assert older.rope == Rope(6, 10000.0, linear_factor=4.0)


def test_llama_1_and_2_files_without_rope_theta_have_llama_configs_default() -> None:
    assert read_hub(without(HUB, "rope_theta")).config.rope.theta == 10000.0


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"model_type": "mistral"}, "model_type"),
        ({"model_type": "deberta-v2"}, "Prompt Guard"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"architectures": 5}, "architectures"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "type"),
        ({"rope_scaling": {"rope_type": "llama3", "type": "linear", "factor": 2.0}}, "type"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 32}}, "beta_fast"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_scaling": SCALED | {"high_freq_factor": 0.5}}, "high_freq_factor"),
        ({"rope_scaling": [1]}, "rope_scaling"),
        ({"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}, "rope_theta"),
        ({"rope_parameters": {"rope_theta": 10000.0}, "rope_scaling": SCALED}, "rope_scaling"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"vocab_size": "61"}, "vocab_size"),
        ({"vocab_size": True}, "vocab_size"),
        ({"vocab_size": 61.0}, "vocab_size"),
        ({"hidden_size": 10**12}, "hidden_size"),
        ({"hidden_size": 25}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"num_key_value_heads": 3}, "heads"),
        ({"head_dim": 5}, "head_dim"),
        ({"eos_token_id": "2"}, "eos_token_id"),
        ({"bos_token_id": -1}, "bos_token_id"),
    ],
)
def test_hub_values_that_are_refused_by_name(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key) as caught:
        read_hub(HUB | changes, "the/config.json")
    assert "the/config.json" in str(caught.value)


@pytest.mark.parametrize(
    "key",
    ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
     "max_position_embeddings", "rms_norm_eps"],
)  # fmt: skip
def test_hub_keys_that_must_be_there(key: str) -> None:
    with pytest.raises(ConfigError, match=f"'{key}' is missing"):
        read_hub(without(HUB, key))


def test_transformers_writes_what_we_read_and_reads_what_we_write() -> None:
    from transformers import LlamaConfig

    theirs = LlamaConfig(
        vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=131072, rms_norm_eps=1e-5, attention_bias=True,
        rope_parameters=SCALED | {"rope_theta": 500000.0}, tie_word_embeddings=True,
    )  # fmt: skip
    read = read_hub(theirs.to_dict())
    assert read.unknown == ()
    assert read.config == DecoderConfig(
        "llama3.1", 61, 24, 3, 4, 2, 8, 40, 1e-5, Rope(8, 500000.0, llama3=llama3.SCALING_3_1), 131072,
        tied_head=True, attention_bias=True,
    )  # fmt: skip
    written = write_hub(read.config, dtype="bfloat16", bos_id=1, eos_ids=(2,))
    again = LlamaConfig.from_dict(json.loads(json.dumps(written))).to_dict()
    for key, value in theirs.to_dict().items():
        if key not in ("architectures", "dtype", "bos_token_id", "eos_token_id", "transformers_version"):
            assert again[key] == value, key
    assert read_hub(json.loads(json.dumps(written))).config == read.config


# --- params.json -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count", "generation", "context"),
    [
        ("Llama-3.1-8B", 8_030_261_248, "llama3.1", 131072),
        ("Meta-Llama-3-70B-Instruct", 70_553_706_496, "llama3", 8192),
        ("Meta-Llama-3-70B", 70_553_706_496, "llama3", 8192),
        ("Meta-Llama-3-8B-Instruct", 8_030_261_248, "llama3", 8192),
    ],
)
def test_real_params(reference: Path, name: str, count: int, generation: str, context: int) -> None:
    data = json.loads((reference / "configs" / "params" / f"{name}.params.json").read_text())
    read = read_meta(data, vocab_size=128256)
    assert read.unknown == ()
    assert decoder.parameter_count(read.config) == count
    assert (read.config.generation, read.config.context_length) == (generation, context)
    assert read.config.rope.llama3 == (llama3.SCALING_3_1 if generation == "llama3.1" else None)
    assert read.config.interleaved_rope


def test_meta_params_of_the_first_llamas_leave_the_vocabulary_to_the_embedding() -> None:
    llama_7b = {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-06, "vocab_size": -1}
    read = read_meta(llama_7b, vocab_size=32000)
    assert decoder.parameter_count(read.config) == 6_738_415_616
    assert (read.config.generation, read.config.context_length, read.config.kv_heads) == ("llama1", 2048, 32)
    llama_65b = llama_7b | {"dim": 8192, "n_heads": 64, "n_layers": 80, "norm_eps": 1e-05}
    llama_33b = llama_7b | {"dim": 6656, "n_heads": 52, "n_layers": 60, "norm_eps": 1e-05}
    for params in (llama_33b, llama_65b):
        config = read_meta(params, vocab_size=32000).config
        assert (config.generation, config.context_length) == ("llama1", 2048)
    llama2_13b = llama_7b | {"dim": 5120, "n_heads": 40, "n_layers": 40, "norm_eps": 1e-05}
    config = read_meta(llama2_13b, vocab_size=32000).config
    assert (config.generation, config.context_length) == ("llama2", 4096)
    llama2_70b = {
        "dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8, "n_layers": 80,
        "norm_eps": 1e-05, "vocab_size": -1,
    }  # fmt: skip
    read = read_meta(llama2_70b, vocab_size=32000)
    assert decoder.parameter_count(read.config) == 68_976_648_192
    assert (read.config.generation, read.config.context_length) == ("llama2", 4096)
    with pytest.raises(ConfigError, match="vocab_size"):
        read_meta(llama_7b)
    with pytest.raises(ConfigError, match="vocab_size"):
        read_meta(llama_7b | {"vocab_size": 31999}, vocab_size=32000)


CODE_70B: dict[str, Any] = {
    "dim": 8192, "n_layers": 80, "n_heads": 64, "n_kv_heads": 8, "multiple_of": 4096, "ffn_dim_multiplier": 1.3,
    "norm_eps": 1e-5, "vocab_size": 32016,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "generation", "context"),
    [
        ({"rope_theta": 1e6}, "codellama", 16384),
        ({"rope_theta": 1e4}, "codellama", 4096),  # Instruct and Python
        ({}, "codellama", 4096),
        ({"rope_theta": 1e4, "vocab_size": 32000}, "llama2", 4096),
        ({"rope_theta": 1e4, "n_layers": 79}, "llama2", 4096),
    ],
)
def test_code_llama_70b_is_known_whatever_its_rope(changes: dict[str, Any], generation: str, context: int) -> None:
    config = read_meta(CODE_70B | changes).config
    assert (config.generation, config.context_length) == (generation, context)
    again = read_hub(write_hub(config, dtype="bfloat16", bos_id=1, eos_ids=(2,))).config
    assert again == dataclasses.replace(config, interleaved_rope=False)


def test_the_factor_of_scaled_rope_follows_from_the_width() -> None:
    llama_1b = {
        "dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "ffn_dim_multiplier": 1.5,
        "multiple_of": 256, "norm_eps": 1e-05, "rope_theta": 500000.0, "use_scaled_rope": True,
    }  # fmt: skip
    read = read_meta(llama_1b | {"tied_embeddings": True})
    assert read.config.rope.llama3 == llama3.SCALING_3_2
    assert decoder.parameter_count(read.config) == 1_235_814_400


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"dim": None}, "dim"),
        ({"dim": 25}, "dim"),
        ({"n_heads": "4"}, "n_heads"),
        ({"multiple_of": None}, "multiple_of"),
        ({"norm_eps": None}, "norm_eps"),
        ({"norm_eps": -1.0}, "norm_eps"),
        ({"use_scaled_rope": "yes"}, "use_scaled_rope"),
        ({"n_kv_heads": 3}, "heads"),
        ({"quantization_args": {"group_size": 32}}, "quantization_args"),
        ({"lora_args": {"rank": 16}}, "lora_args"),
        ({"vision_chunk_size": 448, "vision_max_num_chunks": 4}, "vision_num_cross_attention_layers"),
        ({"moe_args": {"num_experts": 16}, "vision_args": {"dim": 1408}}, "vision_args: 'image_size'"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"n_layers": 10**9}, "n_layers"),
    ],
)
def test_meta_values_that_are_refused_by_name(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        read_meta(META | changes)


def test_unknown_meta_keys_are_listed() -> None:
    assert read_meta(META | {"moe_args": None, "experts": 4, "dropout": 0.0}).unknown == ("experts", "dropout")


# --- there and back --------------------------------------------------------------------------------------------------

BASE = read_hub(HUB).config


@pytest.mark.parametrize(
    "rope",
    [
        Rope(6, 10000.0),
        Rope(6, 1e6),
        Rope(6, 500000.0, llama3=llama3.SCALING_3_1),
        Rope(6, 500000.0, llama3=llama3.SCALING_3_2),
        Rope(6, 500000.0, llama3=Llama3Scaling(16.0, 1.0, 2.0, 8192)),
    ],
)
def test_written_configs_read_back_equal(rope: Rope) -> None:
    config = read_hub(write_hub(dataclasses.replace(BASE, rope=rope), dtype="float32", bos_id=None, eos_ids=())).config
    assert config.rope == rope
    hub = read_hub(json.loads(json.dumps(write_hub(config, dtype="float32", bos_id=1, eos_ids=(2, 3)))))
    assert (hub.config, hub.bos_id, hub.eos_ids, hub.dtype, hub.unknown) == (config, 1, (2, 3), "float32", ())
    for changed in (
        config,
        dataclasses.replace(config, context_length=77, hidden_dim=1),
        dataclasses.replace(config, dim=26, hidden_dim=69),  # not a multiple of the heads
        dataclasses.replace(config, kv_heads=config.heads, hidden_dim=64),
    ):
        meta = read_meta(json.loads(json.dumps(write_meta(changed))))
        want = dataclasses.replace(changed, interleaved_rope=True, generation=meta.config.generation)
        assert (meta.config, meta.unknown) == (want, ())


def test_params_are_written_in_the_keys_of_metas_own_code(reference: Path) -> None:
    """`ModelArgs` of llama-models takes these and no others, and works out the width of the feed-forward layer."""
    known = {
        "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps",
        "rope_theta", "use_scaled_rope",
    }  # fmt: skip
    files = sorted((reference / "configs" / "params").glob("*.params.json"))
    assert files
    for file in files:
        config = read_meta(json.loads(file.read_text()), vocab_size=128256).config
        params = write_meta(config)
        assert params.keys() <= known
        width = int(params.get("ffn_dim_multiplier", 1) * int(2 * (4 * params["dim"]) / 3))
        step = params["multiple_of"]
        assert step * ((width + step - 1) // step) == config.hidden_dim
        assert read_meta(params).config == config


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True},
        {"mlp_bias": True},
        {"rope": Rope(6, 10000.0, linear_factor=2.0)},
        {"rope": Rope(6, 10000.0, llama3=Llama3Scaling(8.0, 2.0, 4.0, 8192))},
    ],
)
def test_what_metas_layout_cannot_say_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="Meta's layout") as caught:
        write_meta(dataclasses.replace(BASE, **changes))
    assert "safetensors" in caught.value.remedy


@pytest.mark.parametrize("rows", [None, 0])
def test_a_vocabulary_that_nothing_tells_is_refused(rows: int | None) -> None:
    with pytest.raises(ConfigError, match="vocab_size"):
        read_meta({**META, "vocab_size": -1}, vocab_size=rows)


@pytest.mark.parametrize("data", [[], META | {"n_kv_heads": 3}, META | {"head_dim": 5}])
def test_errors_of_no_single_key_say_what_to_do(data: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        read_meta(data)
    assert "fetch it again" in caught.value.remedy


# --- anything at all -------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def changed(data: dict[str, Any], more: tuple[str, ...]) -> st.SearchStrategy[dict[str, Any]]:
    """The config with some keys replaced by anything."""
    keys = st.sampled_from((*data, *more))
    return st.dictionaries(keys, JSON, max_size=3).map(lambda other: data | other)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(changed(HUB, ("rope_scaling", "rope_parameters", "head_dim", "attention_bias", "quantization_config")))
def test_any_hub_value_is_read_or_refused(data: dict[str, Any]) -> None:
    with contextlib.suppress(ConfigError):
        assert decoder.parameter_count(read_hub(data).config) > 0


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(changed(META, ("n_kv_heads", "head_dim", "hidden_dim", "rope_theta", "use_scaled_rope", "ffn_dim_multiplier")))
def test_any_meta_value_is_read_or_refused(data: dict[str, Any]) -> None:
    with contextlib.suppress(ConfigError):
        assert decoder.parameter_count(read_meta(data, vocab_size=61).config) > 0
