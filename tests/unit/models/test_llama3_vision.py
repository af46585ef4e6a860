"""Llama 3.2 Vision without transformers: its configs, its counts, its cache, and what it refuses.

What is surprising: the agreement with transformers, and what a picture does to logits, is tests/agreement.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.engine.adapters import Adapters
from puna.engine.native_runner import host_runner
from puna.engine.runner import Batch, page_bytes
from puna.errors import ConfigError
from puna.kernels.layouts import page_table
from puna.models import llama3_vision, llama3_vision_encoder
from puna.models.config import DecoderConfig, read_hub, read_meta, write_hub, write_meta
from puna.models.llama3_vision_config import MllamaConfig, MllamaVisionConfig
from puna.models.registry import definition
from puna.models.rope import Llama3Scaling, Rope
from puna.models.tree import Linear, MllamaWeights, Pixels, Placed, leaves

META: dict[str, Any] = {
    "dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "ffn_dim_multiplier": 1.3,
    "multiple_of": 1024, "norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": True, "vision_chunk_size": 560,
    "vision_max_num_chunks": 4, "vision_num_cross_attention_layers": 8,
}  # fmt: skip
"""As Meta released the 11B Instruct's."""

TEXT: dict[str, Any] = {
    "model_type": "mllama_text_model", "hidden_act": "silu", "vocab_size": 61, "hidden_size": 24,
    "intermediate_size": 40, "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2,
    "cross_attention_layers": [1, 3], "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": [2, 5, 7],
    "pad_token_id": 4, "use_cache": True, "initializer_range": 0.02, "dropout": 0, "add_cross_attention": False,
    "bad_words_ids": None, "num_beams": 1, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "max_length": 20,
}  # fmt: skip
VISION: dict[str, Any] = {
    "model_type": "mllama_vision_model", "hidden_act": "gelu", "num_channels": 3, "hidden_size": 12,
    "attention_heads": 3, "num_hidden_layers": 3, "num_global_layers": 2, "intermediate_size": 20, "image_size": 8,
    "patch_size": 4, "norm_eps": 1e-5, "max_num_tiles": 2, "intermediate_layers_indices": [0, 2],
    "vision_output_dim": 36, "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]], "torch_dtype": "bfloat16",
    "num_beams": 1, "tie_word_embeddings": True,
}  # fmt: skip
HUB: dict[str, Any] = {
    "architectures": ["MllamaForConditionalGeneration"], "model_type": "mllama", "image_token_index": 61,
    "text_config": TEXT, "vision_config": VISION, "torch_dtype": "bfloat16", "transformers_version": "4.45.0.dev0",
}  # fmt: skip
SCALING = Llama3Scaling(8.0, 1.0, 4.0, 8192)
SMALL = MllamaConfig(
    "llama3.2", 61, 24, 5, 4, 2, 6, 40, 1e-5, Rope(6, 500000.0, llama3=SCALING), 4096, cross_layers=(1, 3),
    image_token=61,
    vision=MllamaVisionConfig(8, 12, 3, 2, 3, 20, 4, 1e-5, 2, ((1, 1), (1, 2), (2, 1)), (0, 2)),
)  # fmt: skip


def hub(text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None, **top: Any) -> dict[str, Any]:
    return HUB | {"text_config": TEXT | (text or {}), "vision_config": VISION | (vision or {})} | top


def random_weights(config: MllamaConfig) -> MllamaWeights:
    random = np.random.default_rng(8)
    shapes = llama3_vision.shapes(config)
    return llama3_vision.build(config, lambda name: random.standard_normal(shapes[name], dtype=np.float32) / 4)


def test_the_hub_s_config_in_the_spelling_of_the_release() -> None:
    read = read_hub(HUB)
    assert read.config == SMALL
    assert (read.bos_id, read.eos_ids, read.dtype, read.unknown) == (1, (2, 5, 7), "bfloat16", ())
    later = hub({"rope_scaling": None, "rope_theta": None, "rope_parameters": TEXT["rope_scaling"]})
    assert read_hub(later).config == SMALL  # transformers 5, and a base that goes without saying
    assert read_hub(hub({"fancy": 1}, {"plain": 2}, other=3)).unknown == (
        "other", "text_config.fancy", "vision_config.plain",
    )  # fmt: skip


def test_a_decoder_by_itself() -> None:
    read = read_hub(TEXT | {"architectures": ["MllamaForCausalLM"]})
    assert read.config == dataclasses.replace(SMALL, vision=None, image_token=128256)
    names = llama3_vision.shapes(read.config)
    assert not [name for name in names if name.startswith(("vision", "projector"))]
    weights = random_weights(read.config)
    assert weights.vision is None
    with pytest.raises(ValueError, match="without its vision encoder"):
        llama3_vision.see(weights, read.config, Pixels(np.zeros((1, 3, 8, 8), np.float32), (1, 1), 1))


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (hub({"cross_attention_layers": [1, 5]}), "cross_attention_layers"),
        (hub({"cross_attention_layers": [3, 1]}), "cross_attention_layers"),
        (hub({"cross_attention_layers": [1, 1]}), "cross_attention_layers"),
        (hub({"cross_attention_layers": [True]}), "cross_attention_layers"),
        (hub({"cross_attention_layers": None}), "cross_attention_layers"),
        (hub({"cross_attention_layers": [0, 1, 2, 3, 4]}), "all 5 layers"),
        (hub({"head_dim": 8}), "head_dim"),
        (hub({"tie_word_embeddings": True}), "tie_word_embeddings"),
        (hub({"attention_bias": True}), "attention_bias"),
        (hub({"hidden_act": "gelu"}), "hidden_act"),
        (hub({"model_type": "llama"}), "model_type"),
        (hub({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}), "rope_type"),
        (hub({"vocab_size": "61"}), "vocab_size"),
        (hub(vision={"hidden_act": "quick_gelu"}), "hidden_act"),
        (hub(vision={"attention_heads": 5}), "hidden_size"),
        (hub(vision={"image_size": 9}), "image_size"),
        (hub(vision={"image_size": 0}), "image_size"),
        (hub(vision={"vision_output_dim": 48}), "vision_output_dim"),
        (hub(vision={"intermediate_layers_indices": [0, 3]}), "intermediate_layers_indices"),
        (hub(vision={"intermediate_layers_indices": [-1]}), "intermediate_layers_indices"),
        (hub(vision={"supported_aspect_ratios": [[1, 3]]}), "supported_aspect_ratios"),
        (hub(vision={"supported_aspect_ratios": [[1, 1], [1, 1]]}), "supported_aspect_ratios"),
        (hub(vision={"supported_aspect_ratios": [[1, 1], [2, 1]]}), "supported_aspect_ratios.*must be all"),
        (hub(vision={"supported_aspect_ratios": [[1, 1], [2, 1], [1, 2]]}), "supported_aspect_ratios.*in order"),
        (hub(vision={"supported_aspect_ratios": [[1, 1, 1]]}), "supported_aspect_ratios"),
        (hub(vision={"supported_aspect_ratios": None}), "supported_aspect_ratios"),
        (hub(vision={"norm_eps": -1.0}), "norm_eps"),
        (hub(image_token_index=69), "image_token_index"),
        (hub(architectures=["MllamaForCausalLM"]), "architectures"),
        (hub(quantization_config={"bits": 4}), "quantization_config"),
        (hub(text_config=None), "text_config"),
        (hub(vision_config=7), "vision_config"),
    ],
)
def test_a_wrong_value_is_refused_by_name(data: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        read_hub(data)


@given(st.sampled_from(sorted({*TEXT, *VISION})), st.one_of(st.none(), st.integers(), st.text(), st.lists(st.floats())))
def test_any_value_gives_a_config_or_an_error(key: str, value: Any) -> None:
    for data in (hub({key: value}), hub(vision={key: value})):
        with contextlib.suppress(ConfigError):
            assert isinstance(read_hub(data).config, MllamaConfig)


def test_meta_s_params() -> None:
    read = read_meta(META)
    assert read.unknown == ()
    assert read.config == MllamaConfig(
        "llama3.2", 128256, 4096, 40, 32, 8, 128, 14336, 1e-5, Rope(128, 500000.0, llama3=SCALING), 131072,
        interleaved_rope=True, cross_layers=(3, 8, 13, 18, 23, 28, 33, 38), vision=MllamaVisionConfig(560),
    )  # fmt: skip
    # Two of seven stand before the decoder's layers 2 and 6, which are then 3 and 8: Meta counts from the end.
    odd = read_meta(META | {"n_layers": 7, "vision_num_cross_attention_layers": 2}).config
    assert isinstance(odd, MllamaConfig)
    assert (odd.layers, odd.cross_layers) == (9, (2, 7))
    for change, named in (
        ({"vision_num_cross_attention_layers": 33}, "vision_num_cross_attention_layers"),
        ({"vision_num_cross_attention_layers": None}, "vision_num_cross_attention_layers"),
        ({"vision_max_num_chunks": 9}, "vision_max_num_chunks"),
        ({"vision_chunk_size": 561}, "vision_chunk_size"),
    ):
        with pytest.raises(ConfigError, match=named):
            read_meta(META | change)


def test_written_configs_are_read_as_they_were() -> None:
    big = read_meta(META).config
    assert read_meta(write_meta(big)).config == big
    for config in (SMALL, dataclasses.replace(big, interleaved_rope=False)):
        read = read_hub(json.loads(json.dumps(write_hub(config, dtype="bfloat16", bos_id=1, eos_ids=(2, 5)))))
        assert (read.config, read.unknown, read.bos_id, read.eos_ids) == (config, (), 1, (2, 5))
    alone = dataclasses.replace(SMALL, vision=None, image_token=128256)
    assert read_hub(write_hub(alone, dtype="float32", bos_id=None, eos_ids=())).config == alone
    for config in (SMALL, dataclasses.replace(big, cross_layers=(0, 1)), dataclasses.replace(big, vision=None)):
        with pytest.raises(ConfigError, match="built in"):
            write_meta(config)


def test_every_released_size_has_its_published_count(reference: Path) -> None:
    models = json.loads((reference / "llama_models.json").read_text())["models"]
    counts = {}
    tracemalloc.start()
    for facts in models:
        if not facts.get("cross_attention_layer_ids"):
            continue
        sizes = facts["vision_config"]["image_size"]
        for size in sizes.values() if isinstance(sizes, dict) else (sizes,):
            heads, dim = facts["heads"], facts["dim"]
            config = read_meta(
                META | {"dim": dim, "n_heads": heads, "n_layers": facts["self_attention_layers"]}
                | {"multiple_of": dim // 4, "vision_num_cross_attention_layers": facts["cross_attention_layers"]}
                | {"vision_chunk_size": size}
            ).config  # fmt: skip
            assert isinstance(config, MllamaConfig)
            assert config.vision is not None
            assert config.cross_layers == tuple(facts["cross_attention_layer_ids"])
            seen = facts["vision_config"]
            assert (config.hidden_dim, config.layers) == (facts["ffn_dim"], facts["layers"])
            assert config.vision.tile_tokens == seen["tokens_per_tile"][str(size)]
            assert (config.vision.dim, config.vision.output_dim) == (seen["hidden"], seen["output_dim"])
            counts[facts["name"], size] = count = llama3_vision.parameter_count(config)
            assert count / 1e9 == pytest.approx(float(facts["params_stated"].removesuffix("B")), rel=0.01)
    assert tracemalloc.get_traced_memory()[1] < 4_000_000
    tracemalloc.stop()
    assert counts == {  # of the published safetensors
        ("Llama-3.2-11B-Vision", 448): 10_642_941_475, ("Llama-3.2-11B-Vision", 560): 10_670_220_835,
        ("Llama-3.2-90B-Vision", 560): 88_593_355_323, ("Llama-Guard-3-11B-Vision", 560): 10_670_220_835,
    }  # fmt: skip


def test_the_tree_has_every_parameter_in_its_place() -> None:
    weights = random_weights(SMALL)
    named = dict(leaves(weights))
    assert named.pop("inv_freq").shape == (3,)
    assert {name: leaf.shape for name, leaf in named.items()} == llama3_vision.shapes(SMALL)
    assert llama3_vision.parameter_count(SMALL) == sum(math.prod(leaf.shape) for leaf in named.values())
    assert definition(SMALL) is llama3_vision


def test_only_the_decoder_s_own_layers_have_pages() -> None:
    cache = llama3_vision.make_cache(SMALL, 3, 16, lambda shape: np.zeros(shape, np.float32))
    assert [array.shape for array in (*cache.keys, *cache.values)] == [(3, 16, 2, 6)] * 6
    assert page_bytes(SMALL, "fp32", 16) == sum(array[0].nbytes for array in (*cache.keys, *cache.values))


def test_the_engine_s_runner_computes_text() -> None:
    weights = random_weights(SMALL)
    runner = host_runner(SMALL, weights, "fp32", 16)
    runner.allocate(2)
    ids = np.array([3, 60, 61, 7, 9], np.int32)
    table = page_table([0], [5], [[1]])
    logits = runner.run(Batch(ids, table, np.array([4], np.int32)))
    whole = llama3_vision.logits(weights, llama3_vision.forward(weights, SMALL, ids[None]))[0]
    assert np.max(np.abs(logits[0] - whole[4])) < 1e-4
    assert logits.shape == (1, 61)
    page = runner.read_page(1)
    assert len(page) == runner.page_bytes
    assert any(page)


def test_pictures_that_do_not_fit_are_refused() -> None:
    weights = random_weights(SMALL)
    tiles = np.zeros((2, 3, 8, 8), np.float32)
    for wrong in (
        Pixels(tiles, (1, 1), 1),
        Pixels(tiles, (3, 1), 1),
        Pixels(tiles[:, :, :4], (1, 2), 1),
        Pixels(np.zeros((3, 3, 8, 8), np.float32), (1, 3), 1),
    ):
        with pytest.raises(ValueError, match="no picture of this model"):
            llama3_vision.see(weights, SMALL, wrong)
    sight = llama3_vision.see(weights, SMALL, Pixels(tiles, (2, 1), 1))
    assert [(k.shape, v.shape) for k, v in sight] == [((10, 2, 6), (10, 2, 6))] * 2
    ids = np.array([[61, 3, 4]], np.int32)
    with pytest.raises(ValueError, match="not one of the 1"):
        llama3_vision.forward(weights, SMALL, ids, placed=[Placed(1, 0, sight)])
    with pytest.raises(ValueError, match="two pictures stand at one place"):
        llama3_vision.forward(weights, SMALL, ids, placed=[Placed(0, 1, sight), Placed(0, 1, sight)])
    with pytest.raises(ValueError, match="belong together"):
        llama3_vision.forward(weights, SMALL, ids[0], page_table([0], [3], [[0]]))


def test_padding_sees_the_picture_and_no_padding() -> None:
    """Of the block's rows the picture's see all; those of padding only the picture's."""
    vision = SMALL.vision
    assert vision is not None
    layer = random_weights(SMALL).vision.layers[0]
    x = np.random.default_rng(2).standard_normal((16, 12)).astype(np.float32)
    first = llama3_vision_encoder.block(layer, vision, x, 10)
    moved = x.copy()
    moved[15] = np.flip(moved[15]).copy() * 3
    second = llama3_vision_encoder.block(layer, vision, moved, 10)
    assert np.min(np.max(np.abs(second - first)[:10], axis=1)) > 1e-5
    assert np.array_equal(second[10:15], first[10:15])


def test_a_dense_config_is_no_picture_model() -> None:
    read = read_meta({k: v for k, v in META.items() if not k.startswith("vision")})
    assert type(read.config) is DecoderConfig


def test_an_adapter_beside_a_picture_changes_its_own_sequence() -> None:
    weights = random_weights(SMALL)
    random = np.random.default_rng(5)
    down, up = random.standard_normal((2, 24), dtype=np.float32), random.standard_normal((24, 2), dtype=np.float32)
    adapters = Adapters()
    adapters.load(0, {"layers.0.q": (down, up)})
    sight = llama3_vision.see(weights, SMALL, Pixels(np.ones((1, 3, 8, 8), np.float32), (1, 1), 1))
    ids = np.array([3, 61, 7, 9, 4, 61, 5], np.int32)
    placed = [Placed(0, 1, sight), Placed(1, 1, sight)]
    table = page_table([0, 0], [4, 3], [[0], [1]])

    def hidden(tree: MllamaWeights) -> Any:
        cache = llama3_vision.make_cache(SMALL, 2, 16, lambda shape: np.zeros(shape, np.float32))
        return llama3_vision.forward(tree, SMALL, ids, table, cache, placed)

    changed = adapters.upon(weights, np.array([-1, 0], np.int32), table.starts)
    assert isinstance(changed, MllamaWeights)
    merged = dataclasses.replace(weights.layers[0], q=Linear(weights.layers[0].q.weight + up @ down))
    with_it = hidden(dataclasses.replace(weights, layers=(merged, *weights.layers[1:])))
    plain, got = hidden(weights), hidden(changed)
    assert np.max(np.abs(got[:4] - plain[:4])) < 1e-5
    assert np.max(np.abs(got[4:] - with_it[4:])) < 1e-4
    assert np.max(np.abs(got[4:] - plain[4:])) > 1e-2
