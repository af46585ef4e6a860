"""Made-up models: their numbers are the shape's, other readers agree with what is written, nothing is written twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from puna.bench import shapes
from puna.catalog import models as catalog
from puna.errors import UsageError
from puna.kernels.layouts import Packed, to_float32
from puna.models import decoder, llama4
from puna.models.llama4_config import Llama4Config
from puna.weights.checkpoint import open_checkpoint


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PUNA_HOME", str(tmp_path))
    return tmp_path


def test_the_shape_of_a_catalog_model() -> None:
    config, entry = shapes.config_of("llama3.2:1b"), catalog.lookup("llama3.2:1b")
    assert decoder.parameter_count(config) == entry.params
    assert (config.layers, config.heads, config.kv_heads, config.rope.theta) == (16, 32, 8, 500_000.0)
    assert config.rope.llama3 is not None


def test_the_shapes_of_llama2c() -> None:
    assert decoder.parameter_count(shapes.config_of("stories15M")) == 15_191_712  # llama2.c's file has as many
    assert shapes.config_of("stories110M").hidden_dim == 2048


def test_a_small_scout_has_the_ratios_of_the_large_one() -> None:
    small, large = shapes.config_of("scout-2b"), shapes.config_of("llama4:scout")
    assert isinstance(small, Llama4Config)
    assert isinstance(large, Llama4Config)
    assert llama4.parameter_count(small) == 1_781_095_680
    for part in ("dim", "layers", "heads", "kv_heads", "expert_hidden_dim", "vocab_size"):
        assert getattr(large, part) == 4 * getattr(small, part)
    for part in ("head_dim", "experts", "experts_per_token", "chunk", "rope", "qk_norm", "vision"):
        assert getattr(large, part) == getattr(small, part)
    assert small.moe_layers == tuple(range(12))
    assert small.global_layers == (3, 7, 11)


def test_a_made_up_mixture() -> None:
    """Another reader finds a layer's experts in one tensor, and so does ours each for itself."""
    gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
    config = replace(
        shapes.config_of("scout-2b"), dim=256, layers=4, heads=4, kv_heads=2, hidden_dim=512, expert_hidden_dim=256,
        vocab_size=512, moe_layers=(0, 1, 2, 3), global_layers=(3,),
    )  # fmt: skip
    path = shapes.random_gguf("tiny", config, "Q4_K_M", lambda _: None)
    reader = gguf.GGUFReader(path)
    assert str(reader.fields["general.architecture"].contents()) == "llama4"
    stored = next(tensor for tensor in reader.tensors if tensor.name == "blk.2.ffn_up_exps.weight")
    values = gguf.dequantize(stored.data, stored.tensor_type)
    assert values.shape == (16, 256, 256)
    opened = open_checkpoint(path)
    assert opened.config == replace(config, generation=opened.config.generation)
    found = opened.tensors["layers.2.experts.5.up.weight"].read()
    np.testing.assert_array_equal(to_float32(found), values[5])


def test_every_shape_has_room_for_the_longest_work() -> None:
    assert all(shapes.config_of(name).context_length >= shapes.LONGEST for name in shapes.names_of_shapes())


@pytest.mark.parametrize(
    ("name", "said"), [("llama9:1b", "no such shape"), ("llama3.2-vision:11b", "no layout in GGUF")]
)
def test_an_unknown_shape_is_refused_by_name(name: str, said: str) -> None:
    with pytest.raises(UsageError, match=f"--shape {name}: .*{said}") as error:
        shapes.config_of(name)
    assert "stories15M" in error.value.remedy


def test_an_unknown_type_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="--type Q9_9"):
        shapes.random_gguf("cria", shapes.config_of("cria"), "Q9_9", print)


@pytest.mark.parametrize("mix", ["F32", "Q8_0"])
def test_a_made_up_gguf(mix: str) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
    said: list[str] = []
    config = shapes.config_of("cria")
    path = shapes.random_gguf("cria", config, mix, said.append)
    assert str(path) in said[-1]
    # Another reader finds the same tensors, and numbers of the spread that keeps activations where they belong.
    reader = gguf.GGUFReader(path)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    values = gguf.dequantize(stored["blk.0.ffn_up.weight"].data, stored["blk.0.ffn_up.weight"].tensor_type)
    assert values.shape == (config.hidden_dim, config.dim)
    assert values.std() == pytest.approx(shapes.SPREAD, rel=0.05)
    assert abs(values.mean()) < shapes.SPREAD / 10
    assert (stored["output_norm.weight"].data == 1).all()
    opened = open_checkpoint(path)
    assert decoder.shapes(opened.config) == decoder.shapes(config)
    found = opened.tensors["layers.0.up.weight"].read()
    np.testing.assert_array_equal(to_float32(found), values)
    assert isinstance(found, Packed) == (mix != "F32")
    # The second time it is there.
    changed = path.stat().st_mtime_ns
    said.clear()
    assert shapes.random_gguf("cria", config, mix, said.append) == path
    assert path.stat().st_mtime_ns == changed
    assert said == []


def test_a_made_up_hub_folder() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = shapes.config_of("cria")
    folder = shapes.random_hub_folder("cria", config, lambda _: None)
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    assert model.num_parameters() == decoder.parameter_count(config)
    assert model.model.layers[0].mlp.up_proj.weight.float().std().item() == pytest.approx(shapes.SPREAD, rel=0.05)
    assert transformers.AutoTokenizer.from_pretrained(folder).vocab_size == config.vocab_size


def test_a_vocabulary_that_is_too_small_is_refused() -> None:
    with pytest.raises(UsageError, match="vocabulary of 100"):
        shapes._words(100)
