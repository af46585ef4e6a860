"""llama2.c's two formats on real files, torchtune's real `.pt` files, and what either must refuse."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import assert_holds, bits, hub_model, meta_config, random_state

from puna.errors import CheckpointError, ConfigError, PunaError
from puna.models import decoder
from puna.weights.checkpoint import open_checkpoint

# --- llama2.c's .bin -------------------------------------------------------------------------------------------------

HEADER = (8, 12, 2, 4, 2, 10, 16)
"""dim, hidden, layers, heads, kv heads, vocabulary, context; head_dim 2."""


def bin_file(
    path: Path, header: tuple[int, ...] = HEADER, seed: int = 0
) -> tuple[Path, dict[str, np.ndarray[Any, Any]]]:
    """A version 0 file, and its parts in the order of run.c's `memory_map_weights`."""
    dim, hidden, layers, heads, kv_heads, vocab, context = header
    kv_dim, vocab_rows = dim * kv_heads // heads, abs(vocab)
    shapes = {
        "token_embedding_table": (vocab_rows, dim), "rms_att_weight": (layers, dim), "wq": (layers, dim, dim),
        "wk": (layers, kv_dim, dim), "wv": (layers, kv_dim, dim), "wo": (layers, dim, dim),
        "rms_ffn_weight": (layers, dim), "w1": (layers, hidden, dim), "w2": (layers, dim, hidden),
        "w3": (layers, hidden, dim), "rms_final_weight": (dim,), "freq_cis_real": (context, dim // heads // 2),
        "freq_cis_imag": (context, dim // heads // 2), "wcls": (vocab_rows, dim),
    }  # fmt: skip
    if vocab > 0:
        del shapes["wcls"]
    random = np.random.default_rng(seed)
    parts = {name: random.standard_normal(shape).astype("<f4") for name, shape in shapes.items()}
    path.write_bytes(struct.pack("<7i", *header) + b"".join(part.tobytes() for part in parts.values()))
    return path, parts


@pytest.mark.parametrize("vocab", [10, -10])
def test_every_part_lies_where_run_c_says(vocab: int, tmp_path: Path) -> None:
    path, parts = bin_file(tmp_path / "model.bin", (*HEADER[:5], vocab, 16))
    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    assert (config.dim, config.hidden_dim, config.layers, config.heads, config.kv_heads) == HEADER[:5]
    assert (config.vocab_size, config.context_length, config.head_dim) == (10, 16, 2)
    assert (config.norm_eps, config.rope.theta, config.interleaved_rope) == (1e-5, 10000.0, True)
    assert config.tied_head == (vocab > 0)
    assert list(checkpoint.tensors) == list(decoder.shapes(config))
    expected = {"embedding": parts["token_embedding_table"], "norm": parts["rms_final_weight"]}
    for i in range(2):
        for name, part in (
            ("attention_norm", "rms_att_weight"), ("q.weight", "wq"), ("k.weight", "wk"), ("v.weight", "wv"),
            ("o.weight", "wo"), ("mlp_norm", "rms_ffn_weight"), ("gate.weight", "w1"), ("down.weight", "w2"),
            ("up.weight", "w3"),
        ):  # fmt: skip
            expected[f"layers.{i}.{name}"] = parts[part][i]
    if vocab < 0:
        expected["head"] = parts["wcls"]
    for name, tensor in checkpoint.tensors.items():
        assert np.array_equal(tensor.read(), expected[name]), name


@pytest.mark.parametrize("change", [-4, -1, 1, 4, 10**6])
def test_a_bin_of_another_size_is_refused(change: int, tmp_path: Path) -> None:
    path, _ = bin_file(tmp_path / "model.bin")
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + b"\0" * change)
    with pytest.raises(CheckpointError, match=rf"takes {len(data)} bytes, not {len(data) + change}") as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "header",
    [
        (0, *HEADER[1:]),
        (9, *HEADER[1:]),
        (*HEADER[:4], 3, 10, 16),
        (-8, *HEADER[1:]),
        (*HEADER[:2], 10**6, *HEADER[3:]),
    ],
)
def test_headers_that_are_no_model(header: tuple[int, ...], tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(struct.pack("<7i", *header) + b"\0" * 4000)
    with pytest.raises(CheckpointError, match="no format that Puna reads"):
        open_checkpoint(path)


def test_a_head_of_odd_width_is_refused(tmp_path: Path) -> None:
    path, _ = bin_file(tmp_path / "model.bin", (12, 12, 1, 4, 4, 10, 16))
    with pytest.raises(ConfigError, match="head_dim is 3"):
        open_checkpoint(path)


@pytest.mark.parametrize("version", [1, 2, 7])
def test_later_versions_are_refused_by_number(version: int, tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(struct.pack("<Ii", 0x616B3432, version) + b"\0" * 4000)
    with pytest.raises(CheckpointError, match=f"format version {version}; Puna reads version 0"):
        open_checkpoint(path)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_damage_to_a_bin_is_the_same_shape_or_a_typed_error(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path, _ = bin_file(tmp_path_factory.mktemp("bin") / "model.bin")
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, 40))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        checkpoint = open_checkpoint(path)
        assert {name: tensor.read().shape for name, tensor in checkpoint.tensors.items()} == decoder.shapes(
            checkpoint.config
        )
    except PunaError as error:
        assert str(path) in str(error)  # noqa: PT017


# --- the real files --------------------------------------------------------------------------------------------------


def test_a_real_run_is_the_same_as_pt_and_as_bin(reference: Path) -> None:
    folder = reference / "checkpoints" / "llama2xs"
    pt, bin_ = open_checkpoint(folder / "ckpt.pt"), open_checkpoint(folder / "model.bin")
    assert (pt.format, bin_.format) == ("pt", "llama2c")
    assert pt.config == bin_.config
    assert (pt.config.layers, pt.config.hidden_dim, pt.config.tied_head) == (5, 192, True)
    for name, tensor in bin_.tensors.items():
        assert np.array_equal(bits(tensor.read()), bits(pt.tensors[name].read())), name
    assert set(pt.ignored) >= {"optimizer", "iter_num", "config"}
    state = torch.load(folder / "ckpt.pt", weights_only=True, map_location="cpu")["model"]
    assert_holds(pt, state)
    with pytest.raises(CheckpointError, match=r"several models: ckpt\.pt, model\.bin"):
        open_checkpoint(folder)


TORCHTUNE = {
    "tiny_fair_checkpoint.pt": ({"dim": 32, "n_layers": 2, "n_heads": 4, "multiple_of": 256, "vocab_size": -1}, "meta"),
    "tiny_llama2_checkpoint.pt": (
        {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 256, "vocab_size": 100},
        "torchtune",
    ),
}


@pytest.mark.parametrize("name", TORCHTUNE)
def test_real_state_dicts_need_a_config_beside_them(name: str, reference: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(reference / "checkpoints" / "torchtune_tiny" / name, tmp_path))
    with pytest.raises(CheckpointError, match="holds weights and no config") as caught:
        open_checkpoint(path)
    assert "params.json" in caught.value.remedy
    params, convention = TORCHTUNE[name]
    (tmp_path / "params.json").write_text(json.dumps(params | {"norm_eps": 1e-5}))
    checkpoint = open_checkpoint(path)
    state = torch.load(path, weights_only=True)
    assert_holds(checkpoint, state.get("model", state), convention)  # type: ignore[arg-type]
    assert checkpoint.config.interleaved_rope
    assert (checkpoint.config.dim, checkpoint.config.hidden_dim) == (params["dim"], 256)
    assert list(open_checkpoint(tmp_path).tensors) == list(checkpoint.tensors)


# --- other .pt files -------------------------------------------------------------------------------------------------

ARGS = {"dim": 64, "n_layers": 2, "n_heads": 16, "n_kv_heads": 8, "vocab_size": 56, "multiple_of": 8, "max_seq_len": 99}


def save_llama2c(path: Path, **changes: Any) -> dict[str, torch.Tensor]:
    state = random_state(meta_config(), dtype="fp32")
    value: dict[str, Any] = {
        "model": state,
        "model_args": ARGS | {"dropout": 0.1},
        "iter_num": 5,
        "optimizer": {"s": [1]},
    }
    torch.save(value | changes, path)
    return state


def test_compiled_models_and_their_buffers(tmp_path: Path) -> None:
    state = random_state(meta_config(), dtype="fp32")
    buffers = {"freqs_cos": torch.ones(99, 2), "layers.0.attention.mask": torch.zeros(1, 1, 9, 9)}
    save_llama2c(tmp_path / "ckpt.pt", model={f"_orig_mod.{name}": t for name, t in (state | buffers).items()})
    checkpoint = open_checkpoint(tmp_path / "ckpt.pt")
    assert_holds(checkpoint, state)
    assert set(checkpoint.ignored) == {"iter_num", "optimizer", "freqs_cos", "layers.0.attention.mask"}
    assert (checkpoint.config.context_length, checkpoint.config.norm_eps) == (99, 1e-5)
    both = {"norm.weight": state["norm.weight"] * 2} | {f"_orig_mod.{name}": t for name, t in state.items()}
    save_llama2c(tmp_path / "ckpt.pt", model=both)
    with pytest.raises(CheckpointError, match=r"stand there twice, with the prefix _orig_mod"):
        open_checkpoint(tmp_path / "ckpt.pt")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_args": ARGS | {"dim": [64]}}, "model_args: holds more than numbers"),
        ({"model_args": ARGS | {"n_heads": 5}}, "not a multiple of n_heads"),
        ({"model_args": {}}, "'dim' is missing"),
        ({"model": {}}, "no state dict"),
        ({"model": {"a": torch.ones(1)}}, "no Llama that Puna knows"),
        ({"model": {"a": 1}}, "'a' is a int|a is a int"),
    ],
)
def test_odd_llama2c_checkpoints(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    save_llama2c(tmp_path / "ckpt.pt", **changes)
    with pytest.raises(PunaError, match=words) as caught:
        open_checkpoint(tmp_path / "ckpt.pt")
    assert "ckpt.pt" in str(caught.value)


def test_a_hub_state_dict_beside_its_config(tmp_path: Path) -> None:
    model = hub_model()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    checkpoint = open_checkpoint(tmp_path)
    assert_holds(checkpoint, model.state_dict(), "hub")
    assert not checkpoint.config.interleaved_rope


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_damage_to_the_pickle_of_a_pt_is_the_same_model_or_a_typed_error(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Without checksums, so that the damage reaches the pickle machine and what is made of its records."""
    path = tmp_path_factory.mktemp("pt") / "ckpt.pt"
    torch.serialization.set_crc32_options(False)
    save_llama2c(path)
    torch.serialization.set_crc32_options(True)
    content = bytearray(path.read_bytes())
    end = content.index(b"ckpt/.format_version")
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(60, end))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        checkpoint = open_checkpoint(path)
        for name, shape in decoder.shapes(checkpoint.config).items():
            assert checkpoint.tensors[name].read().shape == shape
    except PunaError as error:
        assert str(path) in str(error)  # noqa: PT017


@pytest.mark.parametrize("content", [b"", b"hello", b"GGUF\3\0\0\0", b"\x80\x04N.", b"PK\3\4" + b"\0" * 50, b"\0" * 64])
def test_files_that_are_no_checkpoint(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.bin") as caught:
        open_checkpoint(tmp_path / "x.bin")
    assert caught.value.remedy


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="no weights in this folder"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a file of weights"):
        open_checkpoint(tmp_path / "config.json")


def test_a_folder_without_a_model_says_what_it_has(tmp_path: Path) -> None:
    def refused(path: Path, words: str) -> str:
        with pytest.raises(CheckpointError, match=words) as caught:
            open_checkpoint(path)
        return caught.value.remedy

    (tmp_path / "training_args.bin").write_bytes(b"PK\3\4" + b"\0" * 50)
    (tmp_path / "empty.bin").write_bytes(b"")
    assert "Puna reads Hugging Face safetensors" in refused(tmp_path, "no weights in this folder")
    path, _ = bin_file(tmp_path / "stories.bin")
    assert refused(tmp_path, r"no weights but llama2\.c's: stories\.bin") == f"Name the file: {path}"
    assert open_checkpoint(path).format == "llama2c"


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_is_no_model(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\2\0\0\0\0\0\0\0{}")
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "optimizer.pt").write_bytes(b"x")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(CheckpointError, match=r"a LoRA adapter .* not a model") as caught:
            open_checkpoint(path)
        assert "Merge it into its base model" in caught.value.remedy
    # The whole model beside its adapter is a model.
    model = hub_model()
    model.save_pretrained(tmp_path)
    assert_holds(open_checkpoint(tmp_path), model.state_dict(), "hub")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "optimizer.pt").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert_holds(open_checkpoint(tmp_path), model.state_dict(), "hub")
