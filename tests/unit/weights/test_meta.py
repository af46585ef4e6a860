"""Meta's folders: every count of shards, both ways to split the embedding, and folders that lack or mix something."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import assert_holds, bits, mapped, meta_config, random_state, save_meta, split

from puna.errors import CheckpointError, ConfigError, PunaError
from puna.weights.checkpoint import open_checkpoint
from puna.weights.files import raw


@pytest.mark.parametrize("embedding_by", ["dim", "vocab"])
@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_shards_are_joined_bit_for_bit(shards: int, embedding_by: str, tmp_path: Path) -> None:
    state = random_state(meta_config())
    # Llama 1 and 2, which split by dim, leave the vocabulary out of params.json.
    vocab = -1 if embedding_by == "dim" else 56
    folder = save_meta(tmp_path, state, shards=shards, embedding_by=embedding_by, vocab_size=vocab)
    checkpoint = open_checkpoint(folder)
    assert_holds(checkpoint, state)
    assert (checkpoint.format, len(checkpoint.files), checkpoint.ignored) == ("meta", shards, ("rope.freqs",))
    assert checkpoint.config == meta_config()
    assert checkpoint.config.interleaved_rope
    for tensor in checkpoint.tensors.values():
        tensor.check()


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_more_shards_than_key_value_heads(kv_heads: int, tmp_path: Path) -> None:
    state = random_state(meta_config(n_kv_heads=kv_heads))
    checkpoint = open_checkpoint(save_meta(tmp_path, state, shards=8, n_kv_heads=kv_heads))
    assert_holds(checkpoint, state)


def test_one_shard_is_mapped(tmp_path: Path) -> None:
    folder = save_meta(tmp_path, random_state(meta_config()))
    for path in (folder, folder / "consolidated.00.pth"):
        for tensor in open_checkpoint(path).tensors.values():
            assert mapped(tensor.read())
            assert not raw(tensor.read()).flags.writeable


@pytest.mark.parametrize("shape", ["shared", "equal", "absent"])
def test_a_head_that_is_the_embedding_is_kept_once(shape: str, tmp_path: Path) -> None:
    state = random_state(meta_config())
    state["output.weight"] = state["tok_embeddings.weight"].clone()
    if shape == "absent":
        del state["output.weight"]
    folder = save_meta(tmp_path, state)
    if shape == "shared":
        state["output.weight"] = state["tok_embeddings.weight"]
        torch.save(state, folder / "consolidated.00.pth")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config == meta_config(tied_embeddings=True)
    assert "head" not in checkpoint.tensors
    assert bool(checkpoint.notes) == (shape == "absent")
    assert (shape == "absent") or "output.weight (a copy of tok_embeddings.weight)" in checkpoint.ignored


def test_params_that_say_tied_against_the_file(tmp_path: Path) -> None:
    folder = save_meta(tmp_path, random_state(meta_config()), tied_embeddings=True)
    with pytest.raises(CheckpointError, match=r"output\.weight differs from tok_embeddings\.weight"):
        open_checkpoint(folder)


@pytest.mark.parametrize("gone", [0, 1, 3])
def test_missing_shards_are_named(gone: int, tmp_path: Path) -> None:
    folder = save_meta(tmp_path, random_state(meta_config()), shards=4, embedding_by="dim")
    (folder / f"consolidated.{gone:02d}.pth").unlink()
    with pytest.raises(CheckpointError, match=rf"shards missing: consolidated\.{gone:02d}\.pth"):
        open_checkpoint(folder)


def test_the_last_shards_missing_leave_no_gap_and_are_named_all_the_same(tmp_path: Path) -> None:
    folder = save_meta(tmp_path, random_state(meta_config()), shards=4)
    for i in (1, 2, 3):
        (folder / f"consolidated.{i:02d}.pth").unlink()
    with pytest.raises(CheckpointError, match=r"consolidated\.01\.pth, consolidated\.02\.pth, consolidated\.03\.pth"):
        open_checkpoint(folder)


def resave(folder: Path, rank: int, change: Any) -> None:
    path = folder / f"consolidated.{rank:02d}.pth"
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("norm.weight"), r"differ in norm\.weight"),
        (lambda s: s.update(extra=torch.ones(1)), "differ in extra"),
        (lambda s: s.update({"norm.weight": torch.ones(63)}), r"norm\.weight has different shapes"),
        (lambda s: s.update({"norm.weight": torch.ones(64)}), r"norm\.weight has different shapes or types"),
    ],
)
def test_shards_of_different_models(change: Any, words: str, tmp_path: Path) -> None:
    folder = save_meta(tmp_path, random_state(meta_config()), shards=2)
    resave(folder, 1, change)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(folder)


def test_norms_must_be_the_same_in_every_shard(tmp_path: Path) -> None:
    folder = save_meta(tmp_path, random_state(meta_config()), shards=2)
    resave(folder, 1, lambda s: s["norm.weight"].add_(1))
    with pytest.raises(CheckpointError, match=r"norm should be the same|norm\.weight should be the same"):
        open_checkpoint(folder).tensors["norm"].read()


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("layers.0.attention.wq.weight", (65, 64)),
        ("layers.0.attention.wo.weight", (64, 66)),
        ("layers.1.feed_forward.w2.weight", (176, 64)),
        ("tok_embeddings.weight", (60, 64)),
        ("output.weight", (56, 60)),
        ("norm.weight", (8, 8)),
        ("layers.1.attention.wk.weight", ()),
    ],
)
def test_wrong_shapes_are_named(name: str, shape: tuple[int, ...], shards: int, tmp_path: Path) -> None:
    folder = save_meta(tmp_path, random_state(meta_config()), shards=shards)
    for rank in range(shards):
        resave(folder, rank, lambda s: s.update({name: torch.ones(shape, dtype=torch.bfloat16)}))
    with pytest.raises(PunaError, match=f"{name}|vocab_size") as caught:
        open_checkpoint(folder)
    assert str(folder) in str(caught.value)
    assert caught.value.exit_code == 2


def test_integer_weights_and_unknown_tensors(tmp_path: Path) -> None:
    folder = save_meta(tmp_path, random_state(meta_config()))
    resave(folder, 0, lambda s: s.update({"norm.weight": torch.ones(64, dtype=torch.int8)}))
    with pytest.raises(CheckpointError, match=r"norm\.weight is stored as int8"):
        open_checkpoint(folder)
    folder = save_meta(tmp_path, random_state(meta_config()))
    resave(folder, 0, lambda s: s.update({"layers.0.attention.wq.scale": torch.ones(1)}))
    with pytest.raises(CheckpointError, match=r"no use for: layers\.0\.attention\.wq\.scale"):
        open_checkpoint(folder)


def test_params_missing_and_wrong(tmp_path: Path) -> None:
    folder = save_meta(tmp_path, random_state(meta_config()))
    params = folder / "params.json"
    good = json.loads(params.read_text())
    for change, error, words in (
        ({"dim": 128}, CheckpointError, "missing: consolidated"),
        ({"n_layers": 3}, CheckpointError, "9 of 30 tensors missing"),
        ({"n_layers": 1}, CheckpointError, "9 tensors that this model has no use for"),
        ({"n_heads": None}, ConfigError, "n_heads"),
        ({"vocab_size": 57}, ConfigError, "vocab_size"),
        ({"multiple_of": 256}, CheckpointError, "feed_forward"),
    ):
        params.write_text(json.dumps(good | change))
        with pytest.raises(error, match=words):
            open_checkpoint(folder)
    params.unlink()
    with pytest.raises(CheckpointError, match=r"no params\.json"):
        open_checkpoint(folder)


def test_two_models_in_one_folder(tmp_path: Path) -> None:
    folder = save_meta(tmp_path, random_state(meta_config()))
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"both model\.safetensors and consolidated\.00\.pth"):
        open_checkpoint(folder)


def test_the_splitter_of_these_tests_splits_as_fairscale_does() -> None:
    """Rank r of a column-parallel layer computes rows r of the output, of a row-parallel one columns r of the input."""
    state = random_state(meta_config(), dtype="fp32")
    ranks = split(state, 4, "dim")
    x = torch.randn(3, 64)
    whole = x @ state["layers.0.attention.wq.weight"].T @ state["layers.0.attention.wo.weight"].T
    parts = [x @ r["layers.0.attention.wq.weight"].T @ r["layers.0.attention.wo.weight"].T for r in ranks]
    assert torch.allclose(torch.stack(parts).sum(0), whole, atol=1e-4)
    assert np.array_equal(
        bits(torch.cat([r["tok_embeddings.weight"] for r in ranks], 1)), bits(state["tok_embeddings.weight"])
    )
