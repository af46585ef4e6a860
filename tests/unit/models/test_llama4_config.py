"""Llama 4's numbers: readers and writers of three spellings, what they refuse, and the counts of released models."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.errors import ConfigError
from puna.models import decoder, llama4
from puna.models.config import DecoderConfig, read_hub, read_meta, write_hub, write_meta
from puna.models.config_gguf import read_gguf
from puna.models.llama4_config import SCALING, Llama4Config, Llama4VisionConfig, every, write_gguf
from puna.models.registry import definition
from puna.models.rope import Rope

VISION = Llama4VisionConfig(
    dim=1408, layers=34, heads=16, hidden_dim=5632, image_size=336, patch_size=14, output_dim=4096
)


def released(name: str, reference: Path) -> tuple[Llama4Config, int]:
    """A released model's text config from the collected facts, and the count of its parameters there."""
    models = json.loads((reference / "llama_models.json").read_text())["models"]
    facts = next(m for m in models if m["name"] == name)
    scout = facts["rope_scaling"] is not None
    if scout:
        assert {k: v for k, v in facts["rope_scaling"].items() if k != "type"} == {
            "factor": SCALING.factor, "low_freq_factor": SCALING.low_freq_factor,
            "high_freq_factor": SCALING.high_freq_factor, "original_max_position_embeddings": SCALING.original_context,
        }  # fmt: skip
    config = Llama4Config(
        generation="llama4",
        vocab_size=facts["vocab_size"],
        dim=facts["dim"],
        layers=facts["layers"],
        heads=facts["heads"],
        kv_heads=facts["kv_heads"],
        head_dim=facts["head_dim"],
        hidden_dim=facts["dense_ffn_dim"],
        norm_eps=facts["rms_norm_eps"],
        rope=Rope(facts["head_dim"], facts["rope_theta"], llama3=SCALING if scout else None),
        context_length=facts["context_length"],
        interleaved_rope=True,
        chunk=facts["attention_chunk_size"],
        global_layers=every(facts["no_rope_layer_interval"], facts["layers"]),
        expert_hidden_dim=facts["moe_ffn_dim"],
        experts=facts["num_experts"],
        experts_per_token=facts["experts_per_token"],
        moe_layers=every(facts["moe_layer_interval"], facts["layers"]),
        qk_norm=facts["use_qk_norm"],
    )
    return config, facts["params_computed"]


SMALL = Llama4Config(
    "llama4", 61, 48, 5, 6, 2, 8, 80, 1e-5, Rope(8, 5e5, llama3=SCALING), 1024, interleaved_rope=True, chunk=8192,
    global_layers=(3,), expert_hidden_dim=40, experts=4, experts_per_token=1, moe_layers=(0, 1, 2, 3, 4), qk_norm=True,
    vision=Llama4VisionConfig(16, 2, 2, 64, 28, 7, 24),
)  # fmt: skip
PARAMS: dict[str, Any] = {
    "dim": 5120, "ffn_dim_multiplier": 1.2, "ffn_exp": 4.0, "multiple_of": 2048, "n_heads": 40, "n_kv_heads": 8,
    "n_layers": 48, "norm_eps": 1e-05, "rope_theta": 500000.0, "use_scaled_rope": True, "vocab_size": 202048,
    "attention_chunk_size": 8192, "nope_layer_interval": 4, "use_qk_norm": True,
    "moe_args": {
        "num_experts": 16, "capacity_factor": 1.0, "auto_scale_F": True, "top_k": 1, "interleave_moe_layer_step": 1,
    },
    "vision_args": {
        "image_size": {"height": 336, "width": 336}, "patch_size": {"height": 14, "width": 14}, "dim": 1408,
        "n_layers": 34, "n_heads": 16, "mlp_ratio": 4.0, "output_dim": 4096, "pixel_shuffle_ratio": 0.5,
    },
}  # fmt: skip
"""Scout's, as llama-models (args.py, moe.py) and transformers' conversion script read it."""


@pytest.mark.parametrize("name", ["Llama-4-Scout-17B-16E", "Llama-4-Maverick-17B-128E"])
def test_released_models_have_their_counts_in_every_spelling(name: str, reference: Path) -> None:
    config, count = released(name, reference)
    tracemalloc.start()
    assert llama4.parameter_count(config) == count
    assert tracemalloc.get_traced_memory()[1] < 30_000_000  # names alone: no weight is allocated
    tracemalloc.stop()
    for whole in (config, replace(config, vision=VISION)):
        hub = write_hub(whole, dtype="bfloat16", bos_id=200000, eos_ids=[200001, 200008])
        read = read_hub(json.loads(json.dumps(hub)))
        assert (read.config, read.bos_id, read.eos_ids, read.unknown) == (whole, 200000, (200001, 200008), ())
        assert read_meta(json.loads(json.dumps(write_meta(whole)))).config == whole
    assert gguf(config) == config


def gguf(config: Llama4Config, extra: Mapping[str, Any] | None = None) -> DecoderConfig:
    """The config after a GGUF's keys, and its tensor of rope factors."""
    s = config.rope.llama3
    plain = Rope(config.rope.head_dim, config.rope.theta).inv_freq()
    factors = None if s is None else (plain / config.rope.inv_freq()).astype(np.float32)
    data = {"general.architecture": "llama4", **write_gguf(config), **(extra or {})}
    return read_gguf(
        data, "x.gguf", vocab_size=config.vocab_size, tied_head=config.tied_head, attention_bias=config.attention_bias,
        mlp_bias=False, rope_factors=factors,
    ).config  # fmt: skip


def test_scout_by_metas_own_file() -> None:
    for data in (PARAMS, {"model": PARAMS}):
        read = read_meta(data)
        assert read.unknown == ()
        assert isinstance(read.config, Llama4Config)
        assert (read.config.hidden_dim, read.config.expert_hidden_dim) == (16384, 8192)
        assert (read.config.experts, len(read.config.moe_layers), read.config.global_layers[:2]) == (16, 48, (3, 7))
        assert (read.config.rope.llama3, read.config.vision) == (SCALING, VISION)
        assert read.config.context_length == 10 << 20
    assert (
        llama4.parameter_count(read.config) - llama4.parameter_count(replace(read.config, vision=None)) == 871_932_416
    )
    maverick = PARAMS | {"use_qk_norm": False, "use_scaled_rope": False}
    maverick["moe_args"] = PARAMS["moe_args"] | {"num_experts": 128, "interleave_moe_layer_step": 2}
    config = read_meta(maverick).config
    assert isinstance(config, Llama4Config)
    assert (config.moe_layers[:2], config.rope.llama3, config.context_length) == ((1, 3), None, 1 << 20)
    assert (config.hidden_dim, config.expert_hidden_dim) == (16384, 8192)


def test_transformers_reads_what_is_written_as_it_was_meant() -> None:
    transformers = pytest.importorskip("transformers")
    hub = write_hub(SMALL, dtype="bfloat16", bos_id=1, eos_ids=[2])
    theirs = transformers.Llama4Config(**hub)
    text = theirs.text_config
    assert (text.moe_layers, text.no_rope_layers, text.layer_types[3]) == (
        [0, 1, 2, 3, 4], [1, 1, 1, 0, 1], "full_attention",
    )  # fmt: skip
    assert (text.attention_chunk_size, text.rope_parameters["factor"]) == (8192, 16.0)
    assert theirs.vision_config.vision_output_dim == 24
    assert read_hub(json.loads(json.dumps(theirs.to_dict()))).config == SMALL


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"num_local_experts": None}, "num_local_experts"),
        ({"use_qk_norm": None}, "use_qk_norm"),
        ({"intermediate_size_mlp": None}, "intermediate_size_mlp"),
        ({"num_experts_per_tok": 5}, "experts"),
        ({"num_experts_per_tok": 0}, "experts"),
        ({"moe_layers": [5]}, "moe_layers"),
        ({"moe_layers": "all"}, "moe_layers"),
        ({"moe_layers": None, "interleave_moe_layer_step": -1}, "interleave_moe_layer_step"),
        ({"no_rope_layers": [1, 1]}, "no_rope_layers"),
        ({"no_rope_layers": [2] * 5}, "no_rope_layers"),
        ({"layer_types": ["chunked_attention"] * 5}, "layer_types"),
        ({"attention_chunk_size": 0}, "attention_chunk_size"),
        ({"floor_scale": 0.5}, "floor_scale"),
        ({"attn_scale": "x"}, "attn_scale"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"router_jitter_noise": 0.1}, "router_jitter_noise"),
        ({"quantization_config": {}}, "quantization_config"),
        ({"head_dim": 7}, "head_dim"),
        ({"architectures": ["LlamaForCausalLM"]}, "architectures"),
    ],
)
def test_hub_values_that_are_refused_by_name(changes: dict[str, Any], key: str) -> None:
    data = write_hub(replace(SMALL, vision=None), dtype="bfloat16", bos_id=1, eos_ids=[2]) | changes
    with pytest.raises(ConfigError, match=key):
        read_hub(data)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"num_channels": 1}, "num_channels"),
        ({"projector_input_dim": 25}, "projector_input_dim"),
        ({"multi_modal_projector_bias": True}, "multi_modal_projector_bias"),
        ({"image_size": 30}, "patches of 7"),
        ({"pixel_shuffle_ratio": 0.3}, "patches of 7"),
        ({"num_attention_heads": 3}, "2-D rope"),
        ({"image_size": [28, 28]}, "image_size"),
    ],
)
def test_vision_values_that_are_refused_by_name(changes: dict[str, Any], key: str) -> None:
    data = write_hub(SMALL, dtype="bfloat16", bos_id=1, eos_ids=[2])
    with pytest.raises(ConfigError, match=key):
        read_hub(data | {"vision_config": data["vision_config"] | changes})


def test_a_missing_chunk_is_not_taken_for_none() -> None:
    data = write_hub(replace(SMALL, vision=None), dtype="bfloat16", bos_id=1, eos_ids=[2])
    del data["attention_chunk_size"]
    with pytest.raises(ConfigError, match="attention_chunk_size"):
        read_hub(data)


def test_keys_nobody_knows_are_told() -> None:
    data = write_hub(SMALL, dtype="bfloat16", bos_id=1, eos_ids=[2])
    data["text_config"] |= {"surprise": 1}
    data["vision_config"] |= {"another": 2}
    assert read_hub(data | {"third": 3}).unknown == ("third", "text_config.surprise", "vision_config.another")


def test_what_a_layout_cannot_say_is_refused() -> None:
    uneven = replace(SMALL, moe_layers=(1, 2))
    assert read_hub(write_hub(uneven, dtype="bfloat16", bos_id=1, eos_ids=[2])).config == uneven
    for write in (write_meta, write_gguf):
        with pytest.raises(ConfigError, match="do not alternate"):
            write(uneven)
    for change in ({"chunk": 16}, {"temperature_floor": 9}, {"qk_norm": False}, {"global_layers": (1, 3)}):
        with pytest.raises(ConfigError):
            write_gguf(replace(SMALL, **change))
    for change in ({"tied_head": True}, {"attention_bias": True}, {"head_dim": 10, "rope": Rope(10, 5e5)}):
        with pytest.raises(ConfigError):
            write_meta(replace(SMALL, **change))


def test_a_gguf_without_chunks_has_rope_everywhere() -> None:
    config = replace(SMALL, chunk=0, global_layers=(), vision=None, temperature_tuning=True)
    assert gguf(config) == config
    for key, value in (
        ("attention.sliding_window", 4096), ("attention.sliding_window_pattern", 2), ("rope.freq_base_swa", 1e4),
        ("expert_count", 0), ("expert_used_count", 9), ("interleave_moe_layer_step", 0),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=key if key not in ("expert_used_count",) else "experts"):
            gguf(config, {f"llama4.{key}": value})


def test_the_registry_knows_each_kind() -> None:
    assert definition(SMALL) is llama4
    dense = DecoderConfig("llama3", 61, 48, 2, 6, 2, 8, 80, 1e-5, Rope(8, 5e5), 64)
    assert definition(dense) is decoder
    assert (dense.chunk, dense.global_layers) == (0, ())


def test_layers_have_pages_of_their_own_only_beside_others() -> None:
    """Else a page of what every layer keeps would be one of no bytes."""
    from puna.engine.runner import local_page_bytes, page_bytes, window

    config = replace(SMALL, chunk=8, global_layers=(1,))
    assert config.local_layers == tuple(i for i in range(config.layers) if i != 1)
    for other in (replace(config, global_layers=()), replace(config, chunk=0)):
        assert other.local_layers == ()
        assert (local_page_bytes(other, "fp16"), window(other)) == (0, 0)
        assert page_bytes(other, "fp16") == page_bytes(config, "fp16") + local_page_bytes(config, "fp16")


def test_the_tree_has_the_names_of_the_shapes() -> None:
    from puna.models.tree import TABLES, leaves

    config = replace(SMALL, moe_layers=(1, 3), attention_bias=True)
    shapes = llama4.shapes(config)
    tree = llama4.build(config, lambda name: np.zeros(shapes[name], np.float32))
    found = {name: leaf.shape for name, leaf in leaves(tree) if name not in TABLES}
    assert found == shapes
    assert "layers.1.experts.3.down.weight" in found
    assert "vision.layers.1.q.bias" in found


def test_scouts_rope_is_a_step() -> None:
    plain, stretched = Rope(128, 5e5).inv_freq(), Rope(128, 5e5, llama3=SCALING).inv_freq()
    long = 2 * np.pi / plain.astype(np.float64) > 8192
    assert 0 < long.sum() < 64
    np.testing.assert_array_equal(stretched, np.where(long, plain / np.float32(16), plain))


values = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 9), st.floats(), st.text(max_size=3), st.sampled_from([[1], {}])
)
TEXT = write_hub(replace(SMALL, vision=None), dtype="bfloat16", bos_id=1, eos_ids=[2])


@given(st.dictionaries(st.sampled_from(sorted(PARAMS)), values, min_size=1, max_size=3))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_params_give_a_config_or_a_typed_error(changes: dict[str, Any]) -> None:
    with suppress(ConfigError):
        assert read_meta(PARAMS | changes).config.layers > 0


@given(st.dictionaries(st.sampled_from(sorted(set(TEXT) - {"model_type"})), values, min_size=1, max_size=3))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_config_json_gives_a_config_or_a_typed_error(changes: dict[str, Any]) -> None:
    with suppress(ConfigError):
        assert read_hub(TEXT | changes).config.layers > 0
