"""Llama 3.2 Vision's checkpoints: what transformers saved, Meta's shards of it, and the way from one to the other.

What is surprising: Meta's code has the vision encoder's sizes built in, so a small model of Meta's is no file that a
config can be read from; its tensors are read and written here by the table alone.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.unit.weights.family_models import MLLAMA_TEXT, mllama, save, saved_state
from tests.unit.weights.tiny_models import bits, mapped

from puna.cli.show import architecture
from puna.errors import CheckpointError, ConfigError
from puna.models.llama3_vision_config import MllamaConfig
from puna.models.registry import definition
from puna.weights import names, parts
from puna.weights.checkpoint import open_checkpoint
from puna.weights.convert import convert
from puna.weights.files import LazyTensor, raw, wrap
from puna.weights.load import load_weights

RATIOS = [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(mllama(), tmp_path_factory.mktemp("mllama") / "hub", torch.float32)


def test_the_hubs_tensors_are_what_they_are_called(hub: Path) -> None:
    state, checkpoint = saved_state(hub), open_checkpoint(hub)
    text = "language_model.model."
    expected = {
        "embedding": state[f"{text}embed_tokens.weight"], "head": state["language_model.lm_head.weight"],
        "layers.0.q.weight": state[f"{text}layers.0.self_attn.q_proj.weight"],
        "layers.1.k.weight": state[f"{text}layers.1.cross_attn.k_proj.weight"],
        "layers.1.q_norm": state[f"{text}layers.1.cross_attn.q_norm.weight"],
        "layers.4.attention_gate": state[f"{text}layers.4.cross_attn_attn_gate"],
        "layers.4.mlp_gate": state[f"{text}layers.4.cross_attn_mlp_gate"],
        "layers.4.down.weight": state[f"{text}layers.4.mlp.down_proj.weight"],
        "vision.patch.weight": state["vision_model.patch_embedding.weight"].reshape(16, 588),
        "vision.position.tiles": state["vision_model.gated_positional_embedding.tile_embedding.weight"],
        "vision.layers.2.down.bias": state["vision_model.transformer.layers.2.mlp.fc2.bias"],
        "vision.global_layers.1.mlp_gate": state["vision_model.global_transformer.layers.1.gate_ffn"],
        "vision.post_tile.gate": state["vision_model.post_tile_positional_embedding.gate"],
        "projector.bias": state["multi_modal_projector.bias"],
    }  # fmt: skip
    for name, tensor in expected.items():
        weight = checkpoint.tensors[name].read()
        assert np.array_equal(bits(weight), bits(tensor)), name
        assert mapped(weight)
    config = checkpoint.config
    assert checkpoint.tensors["embedding"].shape == (config.vocab_size + 8, config.dim)  # and the head has no such rows
    assert checkpoint.tensors["head"].shape == (config.vocab_size, config.dim)
    assert not checkpoint.notes
    assert "2 layers that attend to the picture, with a vision encoder" in architecture(config)
    weights, _ = load_weights(checkpoint)
    assert weights.vision is not None  # type: ignore[union-attr]


@pytest.mark.parametrize("vision", [True, False])
def test_the_hub_and_back(vision: bool, hub: Path, tmp_path: Path) -> None:
    folder = hub if vision else save(mllama(vision=False), tmp_path / "text")
    made = convert(folder, tmp_path / "again")
    state, written = saved_state(folder), saved_state(made.path)
    assert state.keys() == written.keys()
    assert all(torch.equal(state[name], written[name]) for name in state)
    assert open_checkpoint(made.path).config == open_checkpoint(folder).config


def test_a_state_dict_has_other_prefixes(hub: Path, tmp_path: Path) -> None:
    """transformers 4.52 moved the text into `model.language_model`; it renames on saving, torch.save does not."""
    model = mllama()
    assert "model.language_model.embed_tokens.weight" in model.state_dict()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    shutil.copy(hub / "config.json", tmp_path)
    found, saved = open_checkpoint(tmp_path / "model.pt"), open_checkpoint(hub)
    for name, tensor in saved.tensors.items():
        assert np.array_equal(bits(tensor.read()), bits(found.tensors[name].read())), name


def test_the_head_is_never_the_embedding(hub: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = shutil.copytree(hub, tmp_path / "hub")
    state = saved_state(folder)
    del state["language_model.lm_head.weight"]
    save_file(state, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 of \d+ tensors missing: language_model\.lm_head\.weight"):
        open_checkpoint(folder)


def meta_shards(state: dict[str, torch.Tensor], shards: int) -> list[dict[str, torch.Tensor]]:
    """Meta's tensors made of the hub's, by the rules of Meta's code and of transformers' conversion, turned round."""
    ranks: list[dict[str, torch.Tensor]] = [{} for _ in range(shards)]

    def by(name: str, tensor: torch.Tensor, axis: int | None) -> None:
        for rank, part in zip(ranks, [tensor] * shards if axis is None else tensor.chunk(shards, axis), strict=True):
            rank[name] = part.contiguous()

    def neighbours(rows: torch.Tensor, heads: int) -> torch.Tensor:
        return rows.view(heads, 2, -1, rows.shape[1]).transpose(1, 2).reshape(rows.shape)

    text, vocab = "language_model.model.", MLLAMA_TEXT["vocab_size"]
    embedding = state[f"{text}embed_tokens.weight"]
    by("text_model.tok_embeddings.weight", embedding[:vocab], 0)
    by("text_model.learnable_embedding.weight", embedding[vocab:], 0)
    by("text_model.norm.weight", state[f"{text}norm.weight"], None)
    by("text_model.output.weight", state["language_model.lm_head.weight"], 0)
    own = crossed = 0
    for i in range(MLLAMA_TEXT["num_hidden_layers"]):
        cross = i in MLLAMA_TEXT["cross_attention_layers"]
        theirs = f"text_model.cross_attention_layers.{crossed}." if cross else f"text_model.layers.{own}."
        crossed, own = crossed + cross, own + (not cross)
        ours = f"{text}layers.{i}."
        kind = "cross_attn" if cross else "self_attn"
        for letter, heads in (("q", 6), ("k", 2), ("v", 0), ("o", 0)):
            rows = state[f"{ours}{kind}.{letter}_proj.weight"]
            rows = neighbours(rows, heads) if heads and not cross else rows
            by(f"{theirs}attention.w{letter}.weight", rows, 1 if letter == "o" else 0)
        for name, stored in (("attention_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")):
            by(f"{theirs}{name}.weight", state[f"{ours}{stored}.weight"], None)
        for name, stored, axis in (("w1", "gate", 0), ("w2", "down", 1), ("w3", "up", 0)):
            by(f"{theirs}feed_forward.{name}.weight", state[f"{ours}mlp.{stored}_proj.weight"], axis)
        if cross:
            for letter in "qk":
                by(f"{theirs}attention.{letter}_norm.weight", state[f"{ours}cross_attn.{letter}_norm.weight"], None)
            by(f"{theirs}gate_attn", state[f"{ours}cross_attn_attn_gate"].repeat(24), None)  # a row of one number
            by(f"{theirs}gate_ffwd", state[f"{ours}cross_attn_mlp_gate"].view(1, 1, 1), None)
    encoder = "vision_model.vision_encoder."
    by(encoder + "conv1._linear.weight", state["vision_model.patch_embedding.weight"].flatten(1), 0)
    by(encoder + "class_embedding", state["vision_model.class_embedding"], None)
    gated = "vision_model.gated_positional_embedding."
    by(encoder + "positional_embedding", state[gated + "embedding"], None)
    by(encoder + "gated_positional_embedding", grid(state[gated + "tile_embedding.weight"], 5), None)
    by(encoder + "gated_positional_embedding_gate", state[gated + "gate"], None)
    for name in ("pre", "post"):
        tiles = f"vision_model.{name}_tile_positional_embedding."
        by(f"{encoder}{name}_tile_pos_embed.embedding", grid(state[tiles + "embedding.weight"], 1), None)
        by(f"{encoder}{name}_tile_pos_embed.gate", state[tiles + "gate"], None)
        for part in ("weight", "bias"):
            by(f"{encoder}ln_{name}.{part}", state[f"vision_model.layernorm_{name}.{part}"], None)
    for stack, count in (("transformer", 3), ("global_transformer", 2)):
        for j in range(count):
            ours, theirs = f"vision_model.{stack}.layers.{j}.", f"{encoder}{stack}.resblocks.{j}."
            for letter in "qkvo":
                by(f"{theirs}attn.w{letter}.weight", state[f"{ours}self_attn.{letter}_proj.weight"], int(letter == "o"))
            by(theirs + "mlp.c_fc.weight", state[ours + "mlp.fc1.weight"], 0)
            by(theirs + "mlp.c_fc.bias", state[ours + "mlp.fc1.bias"], 0)
            by(theirs + "mlp.c_proj.weight", state[ours + "mlp.fc2.weight"], 1)
            by(theirs + "mlp.c_proj.bias", state[ours + "mlp.fc2.bias"], None)
            for name, stored in (("ln_1", "input_layernorm"), ("ln_2", "post_attention_layernorm")):
                for part in ("weight", "bias"):
                    by(f"{theirs}{name}.{part}", state[f"{ours}{stored}.{part}"], None)
            if stack == "global_transformer":
                for gate in ("gate_attn", "gate_ffn"):
                    by(theirs + gate, state[ours + gate], None)
    by("vision_model.vision_projection.weight", state["multi_modal_projector.weight"], 0)
    by("vision_model.vision_projection.bias", state["multi_modal_projector.bias"], 0)
    return ranks


def grid(unrolled: torch.Tensor, patches: int) -> torch.Tensor:
    """[ratios + 1, tiles · patches · width] → [4, 4, patches, width], of tiles that are the same in every ratio."""
    found = torch.zeros(4, 4, patches, 16)
    for i, (h, w) in enumerate(RATIOS):
        found[:h, :w] = unrolled[i + 1].view(4, patches, 16)[: h * w].view(h, w, patches, 16)
    return found


def unroll(tiles: torch.Tensor) -> torch.Tensor:
    """The inverse, as transformers' conversion does it (`pre_compute_positional_embedding`)."""
    found = torch.zeros(len(RATIOS) + 1, 4, *tiles.shape[2:])
    for i, (h, w) in enumerate(RATIOS):
        found[i + 1, : h * w] = tiles[:h, :w].reshape(h * w, *tiles.shape[2:])
    return found.flatten(1)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub folder whose tile embeddings came from a grid, as all real ones did."""
    model = mllama(seed=1)
    with torch.no_grad():
        vision = model.model.vision_model
        for module, patches in (
            (vision.gated_positional_embedding.tile_embedding, 5),
            (vision.pre_tile_positional_embedding.embedding, 1), (vision.post_tile_positional_embedding.embedding, 1),
        ):  # fmt: skip
            module.weight.copy_(unroll(torch.randn(4, 4, patches, 16)))
    return save(model, tmp_path_factory.mktemp("mllama") / "converted", torch.float32)


def lazy(tensors: dict[str, torch.Tensor]) -> dict[str, LazyTensor]:
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    return {name: LazyTensor(name, a.shape, "fp32", lambda a=a: a) for name, a in arrays.items()}


@pytest.mark.parametrize("shards", [1, 2])
def test_metas_shards(shards: int, converted: Path) -> None:
    """Split axes, layers counted apart, the extra rows, the unrolled tiles, gates of odd shapes, q and k in order."""
    hub, ranks = open_checkpoint(converted), [lazy(rank) for rank in meta_shards(saved_state(converted), shards)]
    config = dataclasses.replace(hub.config, interleaved_rope=True)
    plan = names.plan(config, "meta", {name: tensor.shape for name, tensor in ranks[0].items()}, shards)
    assert plan.shapes == {name: tensor.shape for name, tensor in ranks[0].items()}
    found = parts.read(plan, definition(config).shapes(config), ranks, "meta")
    for name, tensor in hub.tensors.items():
        rows = names.repair(name, raw(found[name].read()), config, interleaved=False)
        assert np.array_equal(bits(rows), bits(tensor.read())), name


def test_metas_tensors_written(converted: Path) -> None:
    hub, expected = open_checkpoint(converted), meta_shards(saved_state(converted), 1)[0]

    def prepared(tensor: LazyTensor) -> LazyTensor:
        rows = names.repair(tensor.name, raw(tensor.read()), hub.config, interleaved=True)
        return dataclasses.replace(tensor, read=lambda: wrap(rows))

    tensors = {name: prepared(tensor) for name, tensor in hub.tensors.items()}
    written = {t.name: t for t in parts.write(names.plan(hub.config, "meta"), tensors, "x")}
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        made = raw(written[name].read())
        assert np.array_equal(bits(made).reshape(-1), bits(tensor).reshape(-1)[: made.size]), name
        assert "gate_" in name or made.shape == tuple(tensor.shape)


def test_tiles_that_no_grid_gives(hub: Path) -> None:
    """Random numbers differ from ratio to ratio; Meta's grid would lose some of them."""
    checkpoint = open_checkpoint(hub)
    tensors = {
        tensor.name: tensor for tensor in parts.write(names.plan(checkpoint.config, "meta"), checkpoint.tensors, hub)
    }
    with pytest.raises(CheckpointError, match=r"vision\.position\.tiles has other numbers for a tile"):
        tensors["vision_model.vision_encoder.gated_positional_embedding"].read()


def test_what_is_refused_by_name(hub: Path, reference: Path, tmp_path: Path) -> None:
    tokenizer = reference / "checkpoints" / "stories260K" / "tok512.bin"
    with pytest.raises(CheckpointError, match=r"Llama 3\.2 Vision has no layout of GGUF"):
        convert(hub, tmp_path / "x.gguf", to="gguf", tokenizer=tokenizer)
    assert isinstance(open_checkpoint(hub).config, MllamaConfig)
    with pytest.raises(ConfigError, match="vision encoder and the places of the cross-attention layers built in"):
        convert(hub, tmp_path / "meta", to="meta")
    assert not (tmp_path / "meta").exists()
