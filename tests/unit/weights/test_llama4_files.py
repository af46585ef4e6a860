"""Llama 4's checkpoints: what transformers saved, what Meta's shards hold, GGUF, and the way from each to each."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize, quantize
from tests.unit.weights.family_models import LLAMA4_TEXT, llama4, llama4_meta, save, saved_state
from tests.unit.weights.tiny_models import bits, mapped

from puna.cli.show import architecture
from puna.errors import CheckpointError, ConfigError, PunaError, UsageError
from puna.kernels import ops
from puna.kernels.layouts import BF16, Packed, to_float32
from puna.models.registry import definition
from puna.models.tree import leaves
from puna.weights import mixes
from puna.weights.checkpoint import Checkpoint, open_checkpoint
from puna.weights.convert import convert
from puna.weights.files import raw
from puna.weights.load import load_weights


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(llama4(), tmp_path_factory.mktemp("llama4") / "hub")


@pytest.fixture(scope="module")
def tokenizer(reference: Path) -> Path:
    return reference / "checkpoints" / "stories260K" / "tok512.bin"


def assert_same(one: Checkpoint, other: Checkpoint) -> None:
    """The same parameters, in the same types, bit for bit."""
    assert list(one.tensors) == list(other.tensors) == list(definition(one.config).shapes(one.config))
    for name, tensor in one.tensors.items():
        assert np.array_equal(bits(raw(tensor.read())), bits(raw(other.tensors[name].read()))), name


def test_the_hubs_tensors_are_what_they_are_called(hub: Path) -> None:
    """By value: experts are transposed, gate is the first half; q, k and the router are as they lie."""
    state, found = saved_state(hub), open_checkpoint(hub).tensors
    layer, width = "language_model.model.layers.1.", LLAMA4_TEXT["intermediate_size"]
    expected = {
        "embedding": state["language_model.model.embed_tokens.weight"],
        "head": state["language_model.lm_head.weight"],
        "layers.1.q.weight": state[layer + "self_attn.q_proj.weight"],
        "layers.1.k.weight": state[layer + "self_attn.k_proj.weight"],
        "layers.1.mlp_norm": state[layer + "post_attention_layernorm.weight"],
        "layers.1.router.weight": state[layer + "feed_forward.router.weight"],
        "layers.1.shared.up.weight": state[layer + "feed_forward.shared_expert.up_proj.weight"],
        "layers.1.shared.down.weight": state[layer + "feed_forward.shared_expert.down_proj.weight"],
        "layers.0.gate.weight": state["language_model.model.layers.0.feed_forward.gate_proj.weight"],
        "vision.layers.1.up.bias": state["vision_model.model.layers.1.mlp.fc1.bias"],
        "vision.adapter.down.weight": state["vision_model.vision_adapter.mlp.fc2.weight"],
        "vision.pre_norm.bias": state["vision_model.layernorm_pre.bias"],
        "projector.weight": state["multi_modal_projector.linear_1.weight"],
    }
    fused, down = state[layer + "feed_forward.experts.gate_up_proj"], state[layer + "feed_forward.experts.down_proj"]
    for e in range(3):
        expected[f"layers.1.experts.{e}.gate.weight"] = fused[e][:, :width].T
        expected[f"layers.1.experts.{e}.up.weight"] = fused[e][:, width:].T
        expected[f"layers.1.experts.{e}.down.weight"] = down[e].T
    for name, tensor in expected.items():
        assert np.array_equal(bits(found[name].read()), bits(tensor)), name
        assert mapped(found[name].read()) == (".experts." not in name), name


def test_what_is_said_of_it(hub: Path) -> None:
    checkpoint = open_checkpoint(hub)
    assert "lie transposed in the file" in checkpoint.notes[0]
    text = architecture(checkpoint.config)
    assert text == "Llama 4 decoder, 3 experts in 2 layers, 1 a token, with a vision encoder (llama4)"


@pytest.mark.parametrize("as_state_dict", [False, True])
def test_the_text_alone(as_state_dict: bool, tmp_path: Path) -> None:
    model = llama4(vision=False)
    folder = save(model, tmp_path / "text")
    saved = open_checkpoint(folder)
    if as_state_dict:
        torch.save(model.state_dict(), tmp_path / "model.pt")
        shutil.copy(folder / "config.json", tmp_path)
        assert_same(saved, open_checkpoint(tmp_path / "model.pt"))
    assert not any(name.startswith("vision") for name in saved.tensors)
    again = convert(folder, tmp_path / "again")
    state, written = saved_state(folder), saved_state(again.path)
    assert state.keys() == written.keys()
    assert all(torch.equal(state[name], written[name]) for name in state)


@pytest.mark.parametrize(("shards", "fused"), [(1, True), (2, True), (2, False), (1, False)])
def test_metas_shards(shards: int, fused: bool, hub: Path, tmp_path: Path) -> None:
    folder = llama4_meta(tmp_path / "meta", saved_state(hub), shards=shards, fused=fused)
    found = open_checkpoint(folder)
    assert_same(open_checkpoint(hub), found)
    assert found.config.interleaved_rope
    assert any(name.endswith("global_gate_stats_3E") for name in found.ignored)
    assert any(name.endswith("._extra_state") for name in found.ignored)
    for tensor in found.tensors.values():
        tensor.check()


def test_the_one_shard_may_have_no_number(hub: Path, tmp_path: Path) -> None:
    folder = llama4_meta(tmp_path / "meta", saved_state(hub), shards=1, notes=False)
    (folder / "consolidated.00.pth").rename(folder / "consolidated.pth")
    assert_same(open_checkpoint(hub), open_checkpoint(folder))
    shutil.copy(folder / "consolidated.pth", folder / "consolidated.00.pth")
    with pytest.raises(CheckpointError, match=r"both consolidated\.00\.pth and consolidated\.pth are there"):
        open_checkpoint(folder)


def test_a_shard_missing_is_named(hub: Path, tmp_path: Path) -> None:
    folder = llama4_meta(tmp_path / "meta", saved_state(hub), shards=2)
    (folder / "consolidated.01.pth").unlink()
    with pytest.raises(CheckpointError, match=r"shards missing: consolidated\.01\.pth"):
        open_checkpoint(folder)


def test_tensors_that_every_shard_holds_must_be_the_same(hub: Path, tmp_path: Path) -> None:
    folder = llama4_meta(tmp_path / "meta", saved_state(hub), shards=2, notes=False)
    shard = torch.load(folder / "consolidated.01.pth")
    shard["layers.1.feed_forward.router_DE"][0, 0] += 1
    torch.save(shard, folder / "consolidated.01.pth")
    found = open_checkpoint(folder)
    for use in (found.tensors["layers.1.router.weight"].read, found.tensors["layers.1.router.weight"].check):
        with pytest.raises(CheckpointError, match=r"router_DE should be the same in the 2 shards"):
            use()


def test_a_file_of_bytes_under_another_name_is_no_tensor(hub: Path, tmp_path: Path) -> None:
    folder = llama4_meta(tmp_path / "meta", saved_state(hub), shards=1)
    shard = torch.load(folder / "consolidated.00.pth", weights_only=False)
    shard["norm.weight"] = shard["layers.1.attention.wqkv._extra_state"]
    torch.save(shard, folder / "consolidated.00.pth")
    with pytest.raises(CheckpointError, match=r"norm\.weight is a file of bytes and not a tensor"):
        open_checkpoint(folder)


def test_meta_and_back(hub: Path, tmp_path: Path) -> None:
    """Our folder of Meta's has the tensors that Meta's own has, and is read as the model it was."""
    made = convert(hub, tmp_path / "meta", to="meta")
    assert_same(open_checkpoint(hub), open_checkpoint(made.path))
    theirs = llama4_meta(tmp_path / "theirs", saved_state(hub), shards=1, notes=False)
    ours, expected = torch.load(made.path / "consolidated.00.pth"), torch.load(theirs / "consolidated.00.pth")
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert open_checkpoint(made.path).config == open_checkpoint(hub).config


def test_gguf_and_back(tokenizer: Path, tmp_path: Path) -> None:
    """Text only: config.json of a model that sees wants the whole vocabulary."""
    folder = save(llama4(vision=False), tmp_path / "hub", torch.float32)
    made = convert(folder, tmp_path / "x.gguf", to="gguf", tokenizer=tokenizer)
    found = open_checkpoint(made.path)
    assert_same(open_checkpoint(folder), found)
    assert found.config == dataclasses.replace(open_checkpoint(folder).config)
    back = convert(made.path, tmp_path / "back")
    state, written = saved_state(folder), saved_state(back.path)
    assert state.keys() == written.keys()
    assert all(torch.equal(state[name], written[name]) for name in state)
    meta = convert(made.path, tmp_path / "meta", to="meta")
    assert_same(found, open_checkpoint(meta.path))


def test_a_gguf_as_the_gguf_package_reads_it(hub: Path, tokenizer: Path, tmp_path: Path) -> None:
    """By value against what transformers saved: names, orientation, types; the vision encoder in a file of its own."""
    made = convert(hub, tmp_path / "x.gguf", to="gguf", dtype="Q8_0", tokenizer=tokenizer)
    assert any("mmproj-x.gguf" in note for note in made.notes)
    state, prefix = saved_state(hub), "language_model.model.layers.3."
    tensors = {tensor.name: tensor for tensor in GGUFReader(made.path).tensors}
    kinds = GGMLQuantizationType
    assert tensors["blk.3.ffn_gate_inp.weight"].tensor_type == kinds.F32
    router = state[prefix + "feed_forward.router.weight"].float().numpy()
    assert np.array_equal(tensors["blk.3.ffn_gate_inp.weight"].data, router)
    gate = state[prefix + "feed_forward.experts.gate_up_proj"][:, :, :20].transpose(1, 2).float().numpy()
    # Rows of 24 and of 20 numbers: no block of 32 divides them.
    assert tensors["blk.3.ffn_gate_exps.weight"].tensor_type == kinds.F16
    assert np.array_equal(tensors["blk.3.ffn_gate_exps.weight"].data, gate.astype(np.float16))
    down = state[prefix + "feed_forward.experts.down_proj"].transpose(1, 2).float().numpy()
    assert np.array_equal(tensors["blk.3.ffn_down_exps.weight"].data, down.astype(np.float16))
    assert "blk.3.ffn_up_shexp.weight" in tensors
    assert "blk.0.ffn_gate.weight" in tensors
    query = state[prefix + "self_attn.q_proj.weight"].float().numpy().astype(np.float16)
    assert np.array_equal(tensors["blk.3.attn_q.weight"].data, query)
    reader = GGUFReader(tmp_path / "mmproj-x.gguf")
    vision = {tensor.name: tensor for tensor in reader.tensors}
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "clip"
    assert fields["clip.projector_type"] == "llama4"
    assert fields["clip.vision.projector.scale_factor"] == 2
    assert fields["clip.vision.projection_dim"] == 24
    assert vision["v.class_embd"].tensor_type == vision["v.patch_embd.weight"].tensor_type == kinds.F32
    assert vision["v.blk.1.ffn_up.weight"].tensor_type == kinds.BF16  # as it was stored: not packed
    stored = vision["mm.model.mlp.2.weight"].data.view(np.uint16)
    assert np.array_equal(stored, bits(state["vision_model.vision_adapter.mlp.fc2.weight"]))
    assert not any(name.startswith(("v.", "mm.")) for name in tensors)
    assert_same_text_and_vision(open_checkpoint(hub), open_checkpoint(made.path))


def assert_same_text_and_vision(hub: Checkpoint, found: Checkpoint) -> None:
    """The vision encoder's bits are those of the hub's; the keys say the same config."""
    assert found.config.__dict__ == hub.config.__dict__
    for name, tensor in hub.tensors.items():
        if name.startswith(("vision.", "projector.")):
            other = found.tensors[name].read()
            assert np.array_equal(to_float32(other), to_float32(tensor.read())), name


def packed_model(tmp_path: Path, tokenizer: Path, mix: str) -> tuple[Path, Path]:
    """A model whose rows blocks of 256 divide, and its GGUF."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "intermediate_size_mlp": 512,
             "head_dim": 64, "num_attention_heads": 4}  # fmt: skip
    folder = save(llama4(vision=False, **sizes), tmp_path / "hub", torch.float32)
    return folder, convert(folder, tmp_path / f"{mix}.gguf", to="gguf", dtype=mix, tokenizer=tokenizer).path


def test_packed_experts_are_views_of_the_file(tokenizer: Path, tmp_path: Path) -> None:
    folder, path = packed_model(tmp_path, tokenizer, "Q8_0")
    state, found = saved_state(folder), open_checkpoint(path)
    fused = state["model.layers.1.feed_forward.experts.gate_up_proj"].transpose(1, 2).numpy()
    for e, name, rows in ((2, "gate", slice(0, 256)), (0, "up", slice(256, 512))):
        expert = found.tensors[f"layers.1.experts.{e}.{name}.weight"]
        weight = expert.read()
        assert isinstance(weight, Packed)
        assert mapped(weight)
        assert (weight.shape, expert.dtype, expert.nbytes) == ((256, 256), "Q8_0", 256 * 8 * 34)
        expected = dequantize(quantize(fused[e, rows], GGMLQuantizationType.Q8_0), GGMLQuantizationType.Q8_0)
        assert np.array_equal(to_float32(weight), expected)
    weights, _ = load_weights(found)
    assert len(weights.layers[1].experts) == 3  # type: ignore[union-attr]
    again = convert(path, tmp_path / "again.gguf", to="gguf")
    assert_same(found, open_checkpoint(again.path))
    with pytest.raises(UsageError, match="its weights are packed"):
        convert(path, tmp_path / "hub2")


def test_packing_on_load_gives_the_numbers_of_the_file(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "prepare", lambda weight, keep=False: weight)  # which lays it out for the kernels
    folder, path = packed_model(tmp_path, tokenizer, "Q4_K_M")
    found = open_checkpoint(path)
    assert {t.dtype for t in found.tensors.values() if len(t.shape) == 2} == {"fp32", "Q4_K", "Q6_K"}
    loaded, _ = load_weights(open_checkpoint(folder), quant="Q4_K_M")
    expert: Any = loaded.layers[1].experts[1]  # type: ignore[union-attr]
    for part in ("gate", "up", "down"):
        expected = to_float32(found.tensors[f"layers.1.experts.1.{part}.weight"].read())
        assert np.array_equal(to_float32(getattr(expert, part).weight), expected), part


def test_which_tensors_get_more_bits(hub: Path) -> None:
    """llama.cpp's rule: the layer's number decides for an expert's `down` and the shared one's, the router is F32."""
    config = dataclasses.replace(open_checkpoint(hub).config, layers=16, moe_layers=tuple(range(1, 16, 2)), vision=None)  # type: ignore[call-arg]
    shapes = {
        name: (256, 256) if len(shape) == 2 else shape for name, shape in definition(config).shapes(config).items()
    }
    kinds, notes = mixes.choose(mixes.MIXES["Q4_K_M"], config, shapes)
    assert not notes
    more = {i for i in range(16) if i < 2 or i >= 14 or (i - 2) % 3 == 2}
    for i in range(16):
        kind = "Q6_K" if i in more else "Q4_K"
        downs = [n for n in kinds if n.startswith(f"layers.{i}.") and n.endswith("down.weight")]
        assert len(downs) == (4 if i % 2 else 1)
        assert {kinds[name] for name in [*downs, f"layers.{i}.v.weight"]} == {kind}
    assert kinds["layers.1.router.weight"] == "F32"
    assert kinds["layers.1.experts.2.gate.weight"] == kinds["layers.1.shared.up.weight"] == "Q4_K"
    assert kinds["head"] == "Q6_K"
    seeing = {
        "vision.patch.weight": (16, 147),
        "vision.layers.0.q.weight": (256, 256),
        "vision.layers.0.q.bias": (256,),
    }
    assert mixes.choose(mixes.MIXES["Q4_K_M"], config, seeing)[0] == {
        "vision.patch.weight": "F32", "vision.layers.0.q.bias": "F32",
    }  # fmt: skip


def test_vision_files_beside_a_model(hub: Path, tokenizer: Path, tmp_path: Path) -> None:
    made = convert(hub, tmp_path / "x.gguf", to="gguf", tokenizer=tokenizer).path
    projector = tmp_path / "mmproj-x.gguf"
    assert open_checkpoint(tmp_path).path == made  # a folder's models are the models alone
    assert {path.name for path in open_checkpoint(made).files} == {"x.gguf", "mmproj-x.gguf"}
    with pytest.raises(CheckpointError, match="the vision encoder of a model, not the model"):
        open_checkpoint(projector)
    shutil.copy(projector, tmp_path / "mmproj-y.gguf")
    with pytest.raises(UsageError, match=r"mmproj-y\.gguf: already exists"):
        convert(hub, tmp_path / "y.gguf", to="gguf", tokenizer=tokenizer)
    projector.rename(tmp_path / "other-MMPROJ.gguf")
    blind = open_checkpoint(made)
    assert "several vision encoders lie beside it (mmproj-y.gguf, other-MMPROJ.gguf)" in blind.notes[-1]
    assert not any(name.startswith("vision") for name in blind.tensors)
    (tmp_path / "mmproj-y.gguf").unlink()
    assert "vision.patch.weight" in open_checkpoint(made).tensors
    damaged = (tmp_path / "other-MMPROJ.gguf").read_bytes().replace(b"v.class_embd", b"v.class_emb_")
    (tmp_path / "other-MMPROJ.gguf").write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"tensors missing: v\.class_embd"):
        open_checkpoint(made)


def changed(hub: Path, tmp_path: Path, **text: Any) -> Path:
    """The hub's folder with other numbers in its config."""
    folder = shutil.copytree(hub, tmp_path / "changed")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= text
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ({"num_local_experts": 4}, r"has the shape \[3, .*config says \[4, "),
        ({"num_local_experts": 2}, r"has the shape \[3, "),
        ({"intermediate_size": 10}, r"has the shape "),
        ({"moe_layers": [1]}, r"tensors missing: .*layers\.3\.feed_forward\.down_proj"),
        ({"moe_layers": [0, 1, 3]}, r"layers\.0\.feed_forward\.experts\.down_proj"),
    ],
)
def test_configs_of_other_models(text: dict[str, Any], words: str, hub: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(changed(hub, tmp_path, **text))


def test_many_experts_claimed_and_few_there(hub: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="3 layers of 4096 experts are more than any Llama has"):
        open_checkpoint(changed(hub, tmp_path, num_local_experts=4096, moe_layers=[0, 1, 3]))


def test_what_the_layouts_cannot_say(hub: Path, tokenizer: Path, tmp_path: Path) -> None:
    folder = changed(hub, tmp_path, attention_chunk_size=16)
    with pytest.raises(ConfigError, match="cannot say this model's chunk"):
        convert(folder, tmp_path / "x.gguf", to="gguf", tokenizer=tokenizer)
    assert not list(tmp_path.glob("*.gguf"))


def test_experts_of_several_types(tmp_path: Path, tokenizer: Path) -> None:
    """One tensor of experts has one type."""
    folder = save(llama4(vision=False), tmp_path / "hub", torch.float32)
    found = open_checkpoint(folder)
    one = found.tensors["layers.1.experts.0.gate.weight"]
    odd = dataclasses.replace(one, dtype="bf16", read=lambda: BF16(np.zeros(one.shape, np.uint16)))
    from puna.weights import names, parts

    mixed = dict(found.tensors) | {one.name: odd}
    with pytest.raises(CheckpointError, match=r"gate_up_proj holds several .* bf16, fp32"):
        parts.write(names.plan(found.config, "hub"), mixed, folder)


@pytest.mark.parametrize("which", ["x.gguf", "mmproj-x.gguf"])
def test_damaged_bytes_end_in_an_error_of_ours(which: str, hub: Path, tokenizer: Path, tmp_path: Path) -> None:
    """One byte of a header after the other, changed: opened as a model all the same, or refused, and nothing else."""
    made = convert(hub, tmp_path / "x.gguf", to="gguf", tokenizer=tokenizer).path
    path, random = tmp_path / which, np.random.default_rng(0)
    whole = path.read_bytes()
    keys = [
        whole.rindex(word) for word in (b".attention.head_count", b".block_count", b".weight", b".embedding_length")
    ]
    places = [int(at + step) for at in keys for step in random.integers(-30, 60, 40)]
    for at in places:
        damaged = bytearray(whole)
        damaged[at] = int(random.integers(0, 256))
        path.write_bytes(damaged)
        with contextlib.suppress(PunaError):
            open_checkpoint(made)


def test_experts_wait_in_the_file_before_the_rest_does(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, path = packed_model(tmp_path, tokenizer, "Q8_0")
    checkpoint = open_checkpoint(path)
    sizes = {name: tensor.nbytes for name, tensor in checkpoint.tensors.items() if tensor.dtype == "Q8_0"}
    experts = sum(nbytes for name, nbytes in sizes.items() if ".experts." in name)
    rest = sum(sizes.values()) - experts
    assert experts
    for room, kept in ((10 * (experts + rest), set()), (2 * rest, {True}), (rest, {True, False})):
        monkeypatch.setattr("puna.weights.limits.available", lambda room=room: int(room))
        weights, notes = load_weights(checkpoint)
        told = [note for note in notes if "used as they lie in the file" in note]
        in_file = {".experts." in name for name, leaf in leaves(weights) if type(leaf) is Packed}
        assert in_file == kept
        assert bool(told) == bool(kept)
        assert ("the experts are used" in "".join(told)) == (kept == {True})
