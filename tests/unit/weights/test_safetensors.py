"""safetensors as its own library and transformers write it, and everything that only looks like it."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny_models import assert_holds, bits, hub_model, mapped

from puna.errors import CheckpointError, PunaError
from puna.kernels.layouts import BF16
from puna.models import decoder
from puna.weights.checkpoint import open_checkpoint
from puna.weights.convert import convert
from puna.weights.files import MappedFile
from puna.weights.safetensors import read_header

SMALL = {"a": torch.arange(6, dtype=torch.float32).reshape(2, 3), "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16)}


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    hub_model().to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sharded_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    hub_model().save_pretrained(folder, max_shard_size="20KB")
    return folder


def raw_file(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    """A file with any header: JSON of an object, or bytes as they are."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(shape: list[Any], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


# --- what is read ----------------------------------------------------------------------------------------------------


def test_the_librarys_files_are_read_by_value(tmp_path: Path) -> None:
    tensors = SMALL | {"c": torch.tensor([[0.5]], dtype=torch.float16), "d": torch.tensor([1, 2, 3])}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    entries = read_header(MappedFile(tmp_path / "x.safetensors"))
    assert {name: (e.dtype, e.shape) for name, e in entries.items()} == {
        "a": ("F32", (2, 3)), "b": ("BF16", (2,)), "c": ("F16", (1, 1)), "d": ("I64", (3,)),
    }  # fmt: skip
    for name in "abc":
        assert np.array_equal(bits(entries[name].lazy().read()), bits(tensors[name]))


@pytest.mark.parametrize("kind", ["hub_folder", "sharded_folder"])
def test_transformers_models_single_and_sharded(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    assert (folder / "model.safetensors.index.json").exists() == (kind == "sharded_folder")
    checkpoint = open_checkpoint(folder)
    model = hub_model() if kind == "sharded_folder" else hub_model().to(torch.bfloat16)
    assert_holds(checkpoint, model.state_dict(), "hub")
    assert (checkpoint.format, checkpoint.ignored, checkpoint.tokenizer) == ("safetensors", (), None)
    assert len(checkpoint.files) == len(list(folder.glob("*.safetensors"))) > (kind == "sharded_folder")
    assert not checkpoint.config.interleaved_rope
    shard = checkpoint.files[0]
    assert list(open_checkpoint(shard).tensors) == list(checkpoint.tensors)


def test_weights_are_views_of_the_file_that_cannot_be_written(hub_folder: Path) -> None:
    tensor = open_checkpoint(hub_folder).tensors["layers.1.down.weight"]
    weight = tensor.read()
    assert isinstance(weight, BF16)
    assert mapped(weight)
    assert not weight.bits.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        weight.bits[0, 0] = 1


def test_opening_reads_no_weights(tmp_path: Path) -> None:
    hub_model(hidden_size=256, intermediate_size=2048, vocab_size=4096).save_pretrained(tmp_path)
    tracemalloc.start()
    checkpoint = open_checkpoint(tmp_path)
    weights = [tensor.read() for tensor in checkpoint.tensors.values()]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(weight.nbytes for weight in weights) == checkpoint.nbytes > 20_000_000
    assert peak < 1_000_000


def test_a_tied_head_may_be_stored_when_it_is_the_embedding(tmp_path: Path) -> None:
    hub_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = {name: torch.from_numpy(e.lazy().read().copy()) for name, e in read_header(MappedFile(file)).items()}
    assert open_checkpoint(tmp_path).config.tied_head
    save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}, file)
    checkpoint = open_checkpoint(tmp_path)
    assert "head" not in checkpoint.tensors
    assert checkpoint.ignored == ("lm_head.weight (a copy of model.embed_tokens.weight)",)
    save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"] + 1}, file)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        open_checkpoint(tmp_path)


def test_known_tables_are_ignored_and_said(hub_folder: Path, tmp_path: Path) -> None:
    state = {k: v.contiguous() for k, v in hub_model().state_dict().items()}
    shutil.copy(hub_folder / "config.json", tmp_path)
    save_file(state | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path).ignored == ("model.layers.0.self_attn.rotary_emb.inv_freq",)


# --- a model that is not what its config says ------------------------------------------------------------------------


def resaved(folder: Path, source: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    shutil.copy(source / "config.json", folder)
    state = {k: v.contiguous() for k, v in hub_model().to(torch.bfloat16).state_dict().items()}
    save_file(change(state), folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda s: {k: v for k, v in s.items() if k != "model.norm.weight"},
            "1 of 21 tensors missing: model.norm.weight",
        ),
        (
            lambda s: s | {"model.layers.0.mlp.extra.weight": torch.ones(2)},
            "no use for: model.layers.0.mlp.extra.weight",
        ),
        (lambda s: s | {"model.norm.weight": torch.ones(25)}, r"model.norm.weight has the shape \[25\]"),
        (
            lambda s: s | {"model.norm.weight": torch.ones(24, dtype=torch.float64)},
            "model.norm.weight is stored as F64",
        ),
        (lambda s: s | {"model.norm.weight": torch.ones(24, dtype=torch.int8)}, "model.norm.weight is stored as I8"),
        (
            lambda s: s | {"lm_head.weight": s["lm_head.weight"].T.contiguous()},
            r"lm_head.weight has the shape \[24, 56\]",
        ),
    ],
)
def test_missing_left_over_and_odd_tensors(change: Any, words: str, hub_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        open_checkpoint(resaved(tmp_path, hub_folder, change))
    assert "model.safetensors" in str(caught.value)
    assert caught.value.remedy


def test_a_config_that_is_missing_or_broken(hub_folder: Path, tmp_path: Path) -> None:
    shutil.copy(hub_folder / "model.safetensors", tmp_path)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_checkpoint(tmp_path)
    for text, words in (
        ('{"a": 1, "a": 2}', "'a' stands there twice"),
        ("{", "not valid JSON"),
        ("[]", "a JSON object was expected"),
        ('{"a": NaN}', "NaN is not JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=words):
            open_checkpoint(tmp_path)


# --- shards ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(sharded_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded_folder, tmp_path / "copy"))


def edit_index(folder: Path, change: Callable[[Any], object]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def test_a_missing_shard_is_named(shards: Path) -> None:
    gone = sorted(shards.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=rf"shards missing: {gone.name}"):
        open_checkpoint(shards)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "model.bin", 7, None])
def test_an_index_may_only_name_its_neighbours(shards: Path, name: object) -> None:
    edit_index(shards, lambda index: index["weight_map"].update({"model.norm.weight": name}))
    with pytest.raises(CheckpointError, match="no safetensors file name"):
        open_checkpoint(shards)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda i: i["weight_map"].pop("model.norm.weight"), "also holds model.norm.weight"),
        (lambda i: i["weight_map"].update({"new": i["weight_map"]["model.norm.weight"]}), "lacks new"),
        (lambda i: i["metadata"].update(total_size=10**9), "total_size"),
        (lambda i: i["metadata"].update(total_size="many"), "total_size"),
        (lambda i: i.update(weight_map={}), "weight_map"),
        (lambda i: i.update(weight_map=[1]), "weight_map"),
    ],
)
def test_index_and_shards_must_agree(shards: Path, change: Callable[[Any], object], words: str) -> None:
    edit_index(shards, change)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(shards)


def test_shards_without_an_index(shards: Path) -> None:
    (shards / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors\.index\.json"):
        open_checkpoint(shards)


# --- hostile headers -------------------------------------------------------------------------------------------------

TEN_GB = 10 * 1000**3


@pytest.mark.parametrize(
    ("header", "data", "length", "words"),
    [
        ({}, b"", TEN_GB, "claims a header of 10000000000 bytes"),
        ({}, b"", (1 << 64) - 1, "claims a header"),
        ({}, b"", 3, "claims a header of 3 bytes, and 2 follow"),
        (b"[]", b"", None, "does not begin with {"),
        (b"{}}", b"", None, "not valid JSON"),
        (b'{"a":{},"a":{}}', b"", None, "'a' stands there twice"),
        (b"\xff{}", b"", None, "does not begin"),
        (b'{"\xff": 1}', b"", None, "not valid JSON"),
        ({"a": 5}, b"", None, "'a' must have dtype"),
        ({"a": entry([1], 0, 4) | {"more": 1}}, b"0000", None, "'a' must have dtype"),
        ({"a": entry([1], 0, 4, "F31")}, b"0000", None, "dtype 'F31'"),
        ({"a": entry([1], 0, 4) | {"dtype": [1]}}, b"0000", None, "dtype"),
        ({"a": entry([-1], 0, 4)}, b"0000", None, "shape"),
        ({"a": entry([1.0], 0, 4)}, b"0000", None, "shape"),
        ({"a": entry([True], 0, 4)}, b"0000", None, "shape"),
        ({"a": entry([2], 0, 4)}, b"0000", None, "8 bytes, and has 4"),
        ({"a": entry([1 << 60] * 32, 0, 4)}, b"0000", None, "and has 4"),
        ({"a": entry([3], 0, 1, "F4")}, b"0", None, "and has 1"),
        ({"a": entry([1], 4, 0)}, b"0000", None, "data_offsets"),
        ({"a": entry([1], 0, 4) | {"data_offsets": [0, 4, 8]}}, b"0000", None, "data_offsets"),
        ({"a": entry([1], 0, 4), "b": entry([1], 2, 6)}, b"000000", None, "'b' begins at byte 2"),
        ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, b"0" * 12, None, "'b' begins at byte 8"),
        ({"a": entry([1], 4, 8)}, b"0" * 8, None, "'a' begins at byte 4"),
        ({"a": entry([1], 0, 4)}, b"0000x", None, "take 4 bytes, and 5 follow"),
        ({"a": entry([1], 0, 4)}, b"000", None, "take 4 bytes, and 3 follow"),
        ({"__metadata__": {"format": 1}}, b"", None, "__metadata__"),
        (b"{" + b" " * (9 << 20) + b"}", b"", None, "more than"),
    ],
)
def test_headers_that_lie(header: Any, data: bytes, length: int | None, words: str, tmp_path: Path) -> None:
    path = raw_file(tmp_path / "x.safetensors", header, data, length=length)
    with pytest.raises(CheckpointError, match=words) as caught:
        read_header(MappedFile(path))
    assert str(path) in str(caught.value)
    assert caught.value.remedy
    assert caught.value.exit_code == 2


def test_a_truncated_or_empty_file(hub_folder: Path, tmp_path: Path) -> None:
    whole = (hub_folder / "model.safetensors").read_bytes()
    shutil.copy(hub_folder / "config.json", tmp_path)
    for size in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError, match="follow the header"):
        open_checkpoint(tmp_path)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_flip_is_the_same_model_or_a_typed_error(
    data: st.DataObject, hub_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = bytearray((hub_folder / "model.safetensors").read_bytes())
    header = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    folder = tmp_path_factory.mktemp("flip")
    shutil.copy(hub_folder / "config.json", folder)
    (folder / "model.safetensors").write_bytes(whole)
    try:
        checkpoint = open_checkpoint(folder)
        for tensor in checkpoint.tensors.values():
            assert tensor.read().shape == tensor.shape
    except PunaError:
        pass


def test_a_header_that_was_not_padded_costs_no_copy_and_no_bit(hub_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(hub_folder, tmp_path / "odd"))
    data = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    (folder / "model.safetensors").write_bytes(
        (size + 1).to_bytes(8, "little") + data[8 : 8 + size] + b" " + data[8 + size :]
    )
    states = []
    for each in (hub_folder, folder):
        checkpoint = open_checkpoint(each)
        config = checkpoint.config
        weights = decoder.build(config, lambda name, held=checkpoint: held.tensors[name].read())
        assert mapped(weights.embedding)
        ids = np.arange(9, dtype=np.int32)[None]
        states.append(decoder.logits(weights, decoder.forward(weights, config, ids)))
    np.testing.assert_array_equal(states[0], states[1])
    convert(folder, tmp_path / "again", to="safetensors")
    again = open_checkpoint(tmp_path / "again").tensors
    for name, tensor in open_checkpoint(hub_folder).tensors.items():
        np.testing.assert_array_equal(bits(tensor.read()), bits(again[name].read()), err_msg=name)
