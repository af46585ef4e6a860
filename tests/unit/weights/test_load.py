"""Loading: mapped as stored, converted when asked and never in silence, with the right tokenizer and chat format."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import bits, meta_config, random_state, save_meta

from puna.errors import CheckpointError, TokenizerError, UsageError
from puna.kernels.layouts import BF16
from puna.models.tree import leaves
from puna.weights.checkpoint import open_checkpoint
from puna.weights.load import load, load_weights


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_meta(tmp_path / "model", random_state(meta_config()))


def test_auto_is_as_stored(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    weights, notes = load_weights(checkpoint)
    tree = dict(leaves(weights))
    inv_freq = tree.pop("inv_freq")
    assert inv_freq.dtype == np.float32
    assert list(tree) == [name for name in tree if name in checkpoint.tensors]
    assert tree.keys() == checkpoint.tensors.keys()
    assert all(isinstance(leaf, BF16) for leaf in tree.values())
    assert notes == ("stored and not needed: rope.freqs",)


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("fp32", torch.float32), ("fp16", torch.float16)])
def test_a_conversion_is_torchs_and_is_said(dtype: str, torch_dtype: torch.dtype, folder: Path) -> None:
    weights, notes = load_weights(open_checkpoint(folder), dtype)
    assert f"the weights were converted from bf16 to {dtype}" in notes
    state = random_state(meta_config())
    assert np.array_equal(bits(weights.embedding), bits(state["tok_embeddings.weight"].to(torch_dtype)))
    down = state["layers.1.feed_forward.w2.weight"]
    assert np.array_equal(bits(weights.layers[1].down.weight), bits(down.to(torch_dtype)))


def test_asking_for_the_stored_type_is_no_conversion(folder: Path) -> None:
    assert load_weights(open_checkpoint(folder), "bf16")[1] == ("stored and not needed: rope.freqs",)


def test_types_that_do_not_exist_or_do_not_fit(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--dtype q4"):
        load_weights(open_checkpoint(folder), "q4")
    state = random_state(meta_config())
    state["norm.weight"][0] = 1e10
    with pytest.raises(CheckpointError, match="norm: a weight is larger"):
        load_weights(open_checkpoint(save_meta(tmp_path / "large", state)), "fp16")


def test_unknown_keys_are_said(folder: Path) -> None:
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps(params | {"new_key": 1, "other\x1b[2J": 2}))
    notes = load_weights(open_checkpoint(folder))[1]
    assert notes[0] == "the config has keys Puna does not know: new_key, 'other\\x1b[2J'"


def test_the_tokenizer_lies_beside_or_is_named(reference: Path, tmp_path: Path) -> None:
    source = reference / "checkpoints" / "stories260K"
    model = load(source / "stories260K.bin")
    assert (model.tokenizer.kind, model.tokenizer.vocab_size) == ("llama2c", 512)
    assert model.chat_format is None
    assert model.config == model.checkpoint.config
    alone = Path(shutil.copy(source / "stories260K.bin", tmp_path))
    with pytest.raises(TokenizerError, match="no tokenizer beside the weights") as caught:
        load(alone)
    assert "--tokenizer" in caught.value.remedy
    assert load(alone, tokenizer=source / "tok512.bin").tokenizer.vocab_size == 512
    with pytest.raises(TokenizerError, match=r"32000 tokens, and the model an embedding for 512"):
        load(alone, tokenizer=reference / "tokenizers" / "llama2" / "tokenizer.model")


def test_a_fault_of_the_weights_comes_before_the_tokenizers(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(*_: object, **__: object) -> None:
        raise CheckpointError("damaged")

    monkeypatch.setattr("puna.weights.load.load_weights", damaged)
    alone = Path(shutil.copy(reference / "checkpoints" / "stories260K" / "stories260K.bin", tmp_path))
    with pytest.raises(CheckpointError, match="damaged"):
        load(alone)
    assert not [thread for thread in threading.enumerate() if thread.name == "puna-tokenizer"]


def test_a_template_left_behind_by_another_tokenizer_is_said(reference: Path, tmp_path: Path) -> None:
    wide = meta_config(vocab_size=128256, n_layers=1)
    folder = save_meta(tmp_path / "model", random_state(wide), vocab_size=128256, n_layers=1)
    ranks = reference / "tokenizers" / "llama3" / "tokenizer.model"
    shutil.copy(ranks, folder)
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}")
    assert load(folder).chat_format is not None
    other = load(folder, tokenizer=ranks)
    assert other.chat_format is None
    assert any("chat template beside the model is not used" in note for note in other.notes)


def test_metas_tokenizer_may_lie_one_folder_up(tmp_path: Path) -> None:
    folder = save_meta(tmp_path / "7B", random_state(meta_config()))
    assert open_checkpoint(folder).tokenizer is None
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    assert open_checkpoint(folder).tokenizer == tmp_path / "tokenizer.model"
    (folder / "tokenizer.model").write_bytes(b"x")
    assert open_checkpoint(folder).tokenizer == folder / "tokenizer.model"


@pytest.mark.parametrize(
    ("name", "chats"),
    [("Llama3.1-8B-Instruct", True), ("Llama3.1-8B", False), ("Llama-3.1-8B-Instruct/original", True)],
)
def test_metas_folder_name_says_whether_it_chats(name: str, chats: bool, reference: Path, tmp_path: Path) -> None:
    wide = meta_config(vocab_size=128256, n_layers=1)
    folder = save_meta(tmp_path / name, random_state(wide), vocab_size=128256, n_layers=1)
    shutil.copy(reference / "tokenizers" / "llama3" / "tokenizer.model", folder)
    model = load(folder)
    assert (model.chat_format is not None) == chats
    assert model.config.generation == "llama3"


@pytest.mark.parametrize(
    ("rope_theta", "vocab_size", "n_layers", "name"),
    [
        (1e4, 32016, 80, "codellama70b"),
        (1e6, 32016, 80, "codellama70b"),
        (1e6, 32016, 2, "codellama"),
        (1e4, 32000, 80, "llama2"),
    ],
)
def test_code_llama_70b_has_a_chat_format_of_its_own(
    rope_theta: float, vocab_size: int, n_layers: int, name: str, reference: Path, tmp_path: Path
) -> None:
    """Its Instruct has Llama 2's rope: the size must tell it from Llama 2."""
    sizes: dict[str, Any] = {
        "rope_theta": rope_theta, "vocab_size": vocab_size, "n_layers": n_layers, "dim": 8, "n_heads": 4,
        "n_kv_heads": 2,
    }  # fmt: skip
    folder = save_meta(tmp_path / "Tiny-Instruct", random_state(meta_config(**sizes)), **sizes)
    shutil.copy(reference / "tokenizers" / "llama2" / "tokenizer.model", folder)
    chat = load(folder).chat_format
    assert chat is not None
    assert chat.name == f"built-in chat format of {name}"


MEASURE = """
import re, sys
from pathlib import Path
from puna.weights.checkpoint import open_checkpoint
from puna.weights.load import load_weights
from puna.models.tree import leaves
from puna.weights.files import raw

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

before = peak()
checkpoint = open_checkpoint(Path(sys.argv[1]))
weights, _ = load_weights(checkpoint)
opened = peak()
for _, leaf in leaves(weights):
    raw(leaf).view("u1").max()
print(checkpoint.nbytes, opened - before, peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_weights_take_no_memory_before_they_are_read_and_once_their_size_after(tmp_path: Path) -> None:
    """Peak resident memory of a process that reads every weight of a 60 MB file: under 1.1 times the file."""
    changes = {"dim": 1024, "vocab_size": 8192, "n_layers": 1, "multiple_of": 512}
    folder = save_meta(tmp_path, random_state(meta_config(**changes)), **changes)
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder)], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    size, opened, after = map(int, result.stdout.split())
    assert size > 50_000_000
    assert opened < 0.1 * size
    assert 0.9 * size < after < 1.1 * size
