"""Conversions: the same bits there and back, files that other programs load, and nothing half-finished ever."""

from __future__ import annotations

import errno
import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import TORCH_DTYPES, assert_holds, bits, hub_model, mapped, meta_config, random_state, save_meta

from puna.errors import CheckpointError, ConfigError, PunaError, TokenizerError, UsageError
from puna.kernels import ops
from puna.kernels.layouts import to_float32
from puna.models import decoder
from puna.models.tree import tree_map
from puna.weights import convert as convert_module
from puna.weights import save
from puna.weights.checkpoint import Checkpoint, open_checkpoint
from puna.weights.convert import convert
from puna.weights.load import load_weights

SCALED = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.fixture
def meta_folder(tmp_path: Path) -> Path:
    return save_meta(tmp_path / "meta", random_state(meta_config()), shards=2)


def same_bits(one: Checkpoint, other: Checkpoint) -> bool:
    return one.tensors.keys() == other.tensors.keys() and all(
        tensor.dtype == other.tensors[name].dtype
        and np.array_equal(bits(tensor.read()), bits(other.tensors[name].read()))
        for name, tensor in one.tensors.items()
    )


def our_logits(checkpoint: Checkpoint, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    weights = tree_map(lambda leaf: to_float32(leaf), load_weights(checkpoint)[0])
    result: np.ndarray[Any, Any] = decoder.logits(weights, decoder.forward(weights, checkpoint.config, ids))
    return result


def their_logits(folder: Path, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        result: np.ndarray[Any, Any] = model(torch.tensor(ids.astype(np.int64))).logits.numpy()
    return result


# --- by value --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_metas_model_converted_is_transformers_model(dtype: str, tied: bool, tmp_path: Path) -> None:
    """The proof of the row order: transformers, on the converted file, gives the logits of the original pairing."""
    config = meta_config(tied_embeddings=tied, use_scaled_rope=True)
    state = random_state(config, dtype=dtype)
    source = save_meta(tmp_path / "meta", state, shards=2, tied_embeddings=tied, use_scaled_rope=True)
    made = convert(source, tmp_path / "hub")
    assert made.files == ("model.safetensors", "config.json")
    ids = np.random.default_rng(0).integers(0, 56, (2, 20)).astype(np.int32)
    ops.select("reference")
    ours, theirs = our_logits(open_checkpoint(source), ids), their_logits(tmp_path / "hub", ids)
    ops.select("auto")
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()
    assert json.loads((tmp_path / "hub" / "config.json").read_text())["torch_dtype"] == str(TORCH_DTYPES[dtype])[6:]


@pytest.mark.parametrize("shards", [1, 4])
def test_meta_to_hub_and_back_is_bit_equal(shards: int, tmp_path: Path) -> None:
    state = random_state(meta_config())
    source = save_meta(tmp_path / "meta", state, shards=shards)
    convert(source, tmp_path / "hub")
    convert(tmp_path / "hub", tmp_path / "back", to="meta")
    back = open_checkpoint(tmp_path / "back")
    assert_holds(back, state)
    assert back.config == open_checkpoint(source).config
    loaded = torch.load(tmp_path / "back" / "consolidated.00.pth", weights_only=True)
    by_mmap = torch.load(tmp_path / "back" / "consolidated.00.pth", weights_only=True, mmap=True)
    with zipfile.ZipFile(tmp_path / "back" / "consolidated.00.pth") as archive:
        assert archive.testzip() is None  # every checksum is right
    assert loaded.keys() == by_mmap.keys() == state.keys()
    for name, tensor in state.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
        assert torch.equal(by_mmap[name], tensor)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "rope_parameters": SCALED}])
def test_hub_to_meta_and_back_is_bit_equal(changes: dict[str, Any], tmp_path: Path) -> None:
    model = hub_model(**changes).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "hub")
    convert(tmp_path / "hub", tmp_path / "meta", to="meta")
    convert(tmp_path / "meta", tmp_path / "back")
    before, after = open_checkpoint(tmp_path / "hub"), open_checkpoint(tmp_path / "back")
    assert before.config == after.config
    assert same_bits(before, after)
    assert_holds(after, model.state_dict(), "hub")
    loaded = torch.load(tmp_path / "meta" / "consolidated.00.pth", weights_only=True)
    shared = loaded["output.weight"].data_ptr() == loaded["tok_embeddings.weight"].data_ptr()
    assert shared == before.config.tied_head  # Meta's code wants the key; it costs no bytes


def test_biases_keep_their_rows_order_and_metas_layout_refuses_them(tmp_path: Path) -> None:
    model = hub_model(attention_bias=True, mlp_bias=True)
    model.save_pretrained(tmp_path / "hub")
    convert(tmp_path / "hub", tmp_path / "copy")
    assert_holds(open_checkpoint(tmp_path / "copy"), model.state_dict(), "hub")
    with pytest.raises(ConfigError, match="no biases"):
        convert(tmp_path / "hub", tmp_path / "meta", to="meta")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy", "hub"]


def test_a_type_may_be_asked_for(meta_folder: Path, tmp_path: Path) -> None:
    made = convert(meta_folder, tmp_path / "fp32", dtype="fp32")
    assert "the weights were converted from bf16 to fp32" in made.notes
    state = {name: tensor.float() for name, tensor in random_state(meta_config()).items()}
    convert(tmp_path / "fp32", tmp_path / "back", to="meta")
    assert_holds(open_checkpoint(tmp_path / "back"), state)
    assert made.nbytes == 4 * decoder.parameter_count(meta_config())


def test_numbers_too_large_for_fp16_stop_the_conversion(tmp_path: Path) -> None:
    state = random_state(meta_config())
    state["norm.weight"][3] = 1e30
    save_meta(tmp_path / "meta", state)
    with pytest.raises(CheckpointError, match=r"norm: .* larger than fp16"):
        convert(tmp_path / "meta", tmp_path / "fp16", dtype="fp16")
    assert [p.name for p in tmp_path.iterdir()] == ["meta"]


def test_shards_and_their_index(tmp_path: Path) -> None:
    """5 GB is the real limit; here a smaller one, smaller than the first tensor."""
    folder = save_meta(tmp_path / "meta", random_state(meta_config()))
    tensors = list(open_checkpoint(folder).tensors.values())
    files = save.write_safetensors(tmp_path, tensors, lambda _: None, largest_shard=5_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert files[-1] == "model.safetensors.index.json"
    assert files[0] == f"model-00001-of-{len(files) - 1:05d}.safetensors"
    assert set(index["weight_map"].values()) == set(files[:-1])
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors)
    from safetensors import safe_open

    for tensor in tensors:
        with safe_open(tmp_path / index["weight_map"][tensor.name], "pt") as file:
            assert np.array_equal(bits(file.get_tensor(tensor.name)), bits(tensor.read()))
    assert all((tmp_path / name).stat().st_size < 23_500 for name in files)


def test_every_tensor_can_be_mapped_whatever_the_mix_of_types(tmp_path: Path) -> None:
    """An embedding of 55 · 21 bf16 numbers would bring the float32 norm after it to half a number's place."""
    model = hub_model(hidden_size=21, vocab_size=55, num_attention_heads=3, num_key_value_heads=1).to(torch.bfloat16)
    model.model.norm.to(torch.float32)
    model.save_pretrained(tmp_path / "hub")
    made = convert(tmp_path / "hub", tmp_path / "copy")
    assert any("several types: 1 × fp32, 20 × bf16" in note for note in made.notes)
    copy = open_checkpoint(made.path)
    assert_holds(copy, model.state_dict(), "hub")
    assert all(mapped(tensor.read()) for tensor in copy.tensors.values())


# --- what comes along ------------------------------------------------------------------------------------------------


def test_tokenizer_stop_tokens_and_licences_come_along(tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    hub_model().save_pretrained(hub)
    for name in ("tokenizer.json", "tokenizer_config.json", "LICENSE.txt", "USE_POLICY.md", "README.md"):
        (hub / name).write_text(f'{{"{name}": 1}}')
    (hub / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    made = convert(hub, tmp_path / "out", to="meta")
    assert set(made.files) == {
        "consolidated.00.pth", "params.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
        "LICENSE.txt", "USE_POLICY.md",
    }  # fmt: skip
    assert set(made.files) == {p.name for p in made.path.iterdir()}
    assert (made.path / "tokenizer.json").read_bytes() == (hub / "tokenizer.json").read_bytes()
    assert any("Meta's code may want a tokenizer.model" in note for note in made.notes)


def test_the_stop_tokens_of_a_tokenizer_go_into_the_config(reference: Path, tmp_path: Path) -> None:
    folder = reference / "checkpoints" / "stories260K"
    made = convert(folder / "stories260K.bin", tmp_path / "out")
    config = json.loads((made.path / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    assert (made.path / "tok512.bin").read_bytes() == (folder / "tok512.bin").read_bytes()
    assert open_checkpoint(made.path).tokenizer == made.path / "tok512.bin"


def test_a_tokenizer_that_is_not_there(meta_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="absent") as caught:
        convert(meta_folder, tmp_path / "out", tokenizer=tmp_path / "absent.model")
    assert caught.value.remedy
    assert "there was no tokenizer to copy" in convert(meta_folder, tmp_path / "out").notes


def test_a_copy_that_loses_its_chat_format_says_so(tmp_path: Path) -> None:
    source = save_meta(tmp_path / "Tiny-Instruct", random_state(meta_config()))
    lost = "the copy has no chat_template"
    assert any(lost in note for note in convert(source, tmp_path / "hub").notes)
    assert any(lost in note for note in convert(source, tmp_path / "meta", to="meta").notes)
    assert not any(lost in note for note in convert(source, tmp_path / "Copy-Instruct", to="meta").notes)


def test_progress_goes_up_to_the_total(meta_folder: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    made = convert(meta_folder, tmp_path / "out", progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (made.nbytes, made.nbytes)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert len(calls) == 21


# --- all or nothing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["safetensors", "meta"])
@pytest.mark.parametrize("after", [0, 5, 20])
def test_an_interruption_leaves_nothing(to: str, after: int, meta_folder: Path, tmp_path: Path) -> None:
    seen: list[set[str]] = []

    def interrupt(done: int, total: int) -> None:
        seen.append({p.name for p in tmp_path.iterdir()})
        if len(seen) > after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(meta_folder, tmp_path / "out", to=to, progress=interrupt)
    assert all("out" not in names for names in seen)
    assert [p.name for p in tmp_path.iterdir()] == ["meta"]


def test_no_moment_of_a_conversion_looks_finished(meta_folder: Path, tmp_path: Path) -> None:
    """Not even the hidden folder can be opened before the very end, should a power cut leave it there."""

    def check(done: int, total: int) -> None:
        (hidden,) = (p for p in tmp_path.iterdir() if p.name != "meta")
        assert hidden.name.startswith(".out.unfinished-")
        with pytest.raises(CheckpointError):
            open_checkpoint(hidden)

    convert(meta_folder, tmp_path / "out", progress=check)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["meta", "out"]


@pytest.mark.parametrize("to", ["safetensors", "meta"])
def test_a_disk_that_fills_up(to: str, meta_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(save, "sync", full)
    with pytest.raises(PunaError, match="No space left on device") as caught:
        convert(meta_folder, tmp_path / "out", to=to)
    assert caught.value.exit_code == 1
    assert "Nothing was left" in caught.value.remedy
    assert [p.name for p in tmp_path.iterdir()] == ["meta"]


def test_a_disk_too_small_is_noticed_before_anything_is_written(
    meta_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert_module.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))  # type: ignore[attr-defined]
    with pytest.raises(PunaError, match="GB are free"):
        convert(meta_folder, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["meta"]


def test_a_damaged_source_is_found_while_converting(meta_folder: Path, tmp_path: Path) -> None:
    path = meta_folder / "consolidated.01.pth"
    data = bytearray(path.read_bytes())
    words = bits(torch.load(path, weights_only=True)["layers.1.feed_forward.w1.weight"]).tobytes()
    data[data.index(words) + 10] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="its checksum differs"):
        convert(meta_folder, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["meta"]


@pytest.mark.parametrize("other", [False, True])
def test_folders_made_for_a_conversion_that_fails_are_removed(other: bool, meta_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()

    def interrupt(done: int, total: int) -> None:
        assert (tmp_path / "mine" / "a" / "b").is_dir()
        if other:
            (tmp_path / "mine" / "a" / "of another.txt").write_text("keep")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(meta_folder, tmp_path / "mine" / "a" / "b" / "out", progress=interrupt)
    left = sorted(str(p.relative_to(tmp_path)) for p in (tmp_path / "mine").rglob("*"))
    assert left == (["mine/a", "mine/a/of another.txt"] if other else [])
    assert (tmp_path / "mine").is_dir()


def test_existing_destinations(meta_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    (tmp_path / "file").write_text("keep")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for name in ("full", "file", "link", "meta"):
        with pytest.raises(UsageError, match="already exists"):
            convert(meta_folder, tmp_path / name)
    assert (tmp_path / "full" / "mine.txt").read_text() == "keep"
    for dest in (Path(), tmp_path / "new" / ".."):
        with pytest.raises(UsageError, match="not the name of a new folder"):
            convert(meta_folder, dest)
    for dest in (tmp_path / "empty", tmp_path / "new" / "deeper"):
        assert open_checkpoint(convert(meta_folder, dest).path).format == "safetensors"


def test_unknown_layouts_and_types(meta_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--to ggml"):
        convert(meta_folder, tmp_path / "out", to="ggml")
    with pytest.raises(UsageError, match="--dtype int8"):
        convert(meta_folder, tmp_path / "out", dtype="int8")
