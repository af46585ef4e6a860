"""LoRA adapters that PEFT wrote: read as PEFT computes with them, and refused where Puna does not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tests.unit.weights.family_models import llama4, mllama, save
from transformers import LlamaConfig, LlamaForCausalLM

from puna.engine.native_runner import host_runner
from puna.engine.runner import Batch
from puna.errors import CheckpointError, ConfigError
from puna.kernels import ops
from puna.kernels.layouts import PageTable
from puna.models.llama3_vision_config import MllamaConfig
from puna.weights.adapter import CONFIG, TENSORS, read_adapter
from puna.weights.checkpoint import open_checkpoint
from puna.weights.load import load_weights

CONFIG_TINY = LlamaConfig(
    vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
    num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


@pytest.fixture(autouse=True)
def settled() -> Iterator[None]:
    yield
    ops.select()


def lora(**options: Any) -> peft.LoraConfig:
    named = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"]} | options
    return peft.LoraConfig(task_type="CAUSAL_LM", **named)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and two adapters of it with B's that are not zero."""
    root: Path = tmp_path_factory.mktemp("lora")
    torch.manual_seed(3)
    model = LlamaForCausalLM(CONFIG_TINY)
    model.save_pretrained(root / "model")
    for name, options in (
        ("one", {}),
        ("two", {"r": 8, "use_rslora": True, "target_modules": "all-linear", "rank_pattern": {"o_proj": 2}}),
    ):
        adapted = peft.get_peft_model(LlamaForCausalLM.from_pretrained(root / "model"), lora(**options))
        for key, parameter in adapted.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(parameter, std=0.2)
        adapted.save_pretrained(root / name)
    return root


def expected(folder: Path, adapter: str | None, tokens: list[int]) -> np.ndarray:
    model = LlamaForCausalLM.from_pretrained(folder / "model")
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, folder / adapter)
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].numpy()


@pytest.mark.parametrize("kernels", ["reference", "auto"])
def test_a_batch_of_several_adapters_gives_what_peft_gives(folder: Path, kernels: str) -> None:
    ops.select(kernels)
    checkpoint = open_checkpoint(folder / "model")
    weights, _ = load_weights(checkpoint, "auto", None)
    runner = host_runner(checkpoint.config, weights, page=16)
    runner.allocate(5)
    for number, name in enumerate(("one", "two")):
        runner.adapters.load(number, read_adapter(folder / name, checkpoint.config).pairs)
    texts = [[1, 5, 9, 33], [1, 70, 71], [1, 8, 13, 21, 34], [1, 40], [1, 41, 42]]
    numbers = [1, -1, 0, 0, 1]
    lengths = [len(text) for text in texts]
    starts = np.cumsum([0, *lengths]).astype(np.int32)
    table = PageTable(
        np.concatenate([np.arange(n) for n in lengths]).astype(np.int32), starts, np.arange(5, dtype=np.int32)[:, None]
    )
    tokens = np.concatenate(texts).astype(np.int32)
    got = runner.run(Batch(tokens, table, np.arange(len(tokens), dtype=np.int32), np.array(numbers, np.int32)))
    for b, text in enumerate(texts):
        want = expected(folder, {0: "one", 1: "two"}.get(numbers[b]), text)
        np.testing.assert_allclose(got[starts[b] : starts[b + 1]], want, atol=2e-5)
    assert np.abs(expected(folder, "one", texts[2]) - expected(folder, None, texts[2])).max() > 0.1


def test_rows_of_q_and_k_follow_the_order_of_the_model(folder: Path) -> None:
    config = open_checkpoint(folder / "model").config
    halves = read_adapter(folder / "one", config).pairs["layers.1.q"][1]
    neighbours = read_adapter(folder / "one", replace(config, interleaved_rope=True)).pairs["layers.1.q"][1]
    np.testing.assert_array_equal(neighbours.reshape(6, 4, 2, 4).swapaxes(1, 2).reshape(halves.shape), halves)


def changed(folder: Path, tmp_path: Path, **keys: Any) -> Path:
    target = tmp_path / "adapter"
    shutil.copytree(folder / "one", target)
    config = json.loads((target / CONFIG).read_text()) | keys
    (target / CONFIG).write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"use_dora": True}, "use_dora"), ({"bias": "all"}, "bias"), ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "IA3"}, "peft_type"), ({"r": 0}, "'r'"), ({"lora_alpha": None}, "lora_alpha"),
        ({"rank_pattern": {"(.*)+q": 3}}, "rank_pattern"), ({"rank_pattern": {"q_proj": 0.5}}, "whole numbers"),
        ({"peft_type": None}, "peft_type"),
    ],
)  # fmt: skip
def test_what_is_not_computed_is_refused_by_name(folder: Path, tmp_path: Path, keys: dict[str, Any], said: str) -> None:
    config = open_checkpoint(folder / "model").config
    with pytest.raises(ConfigError, match=said):
        read_adapter(changed(folder, tmp_path, **keys), config)


def test_adapters_of_other_models_and_damaged_ones(folder: Path, tmp_path: Path) -> None:
    config = open_checkpoint(folder / "model").config
    with pytest.raises(CheckpointError, match="this model takes"):
        read_adapter(changed(folder, tmp_path / "a", r=5), config)
    target = changed(folder, tmp_path / "b")
    tensors = load_file(target / TENSORS)
    half = next(name for name in tensors if "lora_A" in name)

    def saved(parts: dict[str, np.ndarray]) -> Path:
        save_file(parts, target / TENSORS)
        return target

    with pytest.raises(CheckpointError, match="without its other half"):
        read_adapter(saved({name: part for name, part in tensors.items() if name != half}), config)
    with pytest.raises(CheckpointError, match="not finite"):
        read_adapter(saved(tensors | {half: np.full_like(tensors[half], np.nan)}), config)
    with pytest.raises(CheckpointError, match="no matrices"):
        read_adapter(saved({}), config)
    with pytest.raises(CheckpointError, match="belongs to no matrix"):
        read_adapter(saved(tensors | {"base_model.model.lm_head.lora_A.weight": tensors[half]}), config)
    (target / TENSORS).unlink()
    with pytest.raises(CheckpointError, match="there is no adapter_model"):
        read_adapter(target, config)


@pytest.mark.parametrize("make", [llama4, mllama])
def test_models_that_see_have_other_names(make: Callable[..., Any], tmp_path: Path) -> None:
    """The text's matrices, in the hub's order whatever the model's: neighbours of a Llama 4 stay where they are."""
    config = open_checkpoint(save(make(), tmp_path / "hub", torch.float32)).config
    adapted = adapted_queries(make(), "self", tmp_path / "adapter")
    found = read_adapter(tmp_path / "adapter", config)
    cross = config.cross_layers if isinstance(config, MllamaConfig) else ()
    assert list(found.pairs) == [f"layers.{i}.q" for i in range(config.layers) if i not in cross]
    saved = {name: tensor for name, tensor in adapted.state_dict().items() if "layers.2." in name and "lora_B" in name}
    (rows,) = saved.values()
    assert np.array_equal(found.pairs["layers.2.q"][1], rows.numpy())


def test_an_adapter_of_layers_that_look_at_pictures_is_refused(tmp_path: Path) -> None:
    config = open_checkpoint(save(mllama(), tmp_path / "hub", torch.float32)).config
    adapted_queries(mllama(), "cross", tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"layers\.1\.cross_attn\.q_proj.* belongs to no matrix"):
        read_adapter(tmp_path / "adapter", config)


def adapted_queries(model: Any, kind: str, folder: Path) -> Any:
    """The model with an adapter of PEFT's on the queries of its `kind` of attention, which is saved."""
    target = rf"(.*language_model\..*layers\.\d+\.{kind}_attn\.q_proj)"
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, lora_alpha=2, target_modules=target, init_lora_weights=False)
    )
    adapted.save_pretrained(folder)
    return adapted
