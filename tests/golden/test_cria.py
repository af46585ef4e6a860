"""The embedded model: that it is whole, small, what its card says, and tells the story that was recorded with it.

The recorded text is `recipes/cria/results.json`, written by the recipe's evaluation from the same weights.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from puna import LLM
from puna.kernels import cpu, ops
from puna.models import decoder
from puna.weights.find import find_model

RECIPE = Path(__file__).parents[2] / "recipes" / "cria"
STORY = "Once upon a time, there was a little girl named Lily. She had a big red ball.\nOne day, she lost it."


@pytest.fixture(scope="module")
def recorded() -> dict[str, object]:
    data: dict[str, object] = json.loads((RECIPE / "results.json").read_text())
    return data


@pytest.fixture(scope="module")
def cria() -> LLM:
    return LLM("cria")


@pytest.fixture(autouse=True)
def _auto_kernels():
    yield
    ops.select("auto")


def test_the_files_are_small_and_the_ones_that_were_measured(recorded):
    folder = find_model("cria")
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert set(sizes) == {
        "LICENSE",
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(sizes.values()) <= 8_000_000
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert digest == recorded["model_sha256"]


def test_it_is_what_its_card_says(cria):
    assert decoder.parameter_count(cria.config) == 3_476_224
    assert (cria.config.vocab_size, cria.config.context_length, cria.config.tied_head) == (2048, 512, True)
    assert (cria.tokenizer.bos_id, cria.tokenizer.stop_ids, cria.chat_format) == (0, frozenset({1}), None)
    assert cria.notes == ()


def test_the_tokenizer_adds_nothing_and_gives_the_text_back(cria):
    ids = cria.tokenizer.encode(STORY, bos=False)
    assert 0 not in ids
    assert cria.tokenizer.decode(ids) == STORY
    assert cria.encode(STORY) == [0, *ids]


@pytest.mark.parametrize("kernels", ["reference", *cpu.isas()])
def test_it_tells_the_recorded_stories(kernels, recorded):
    """At temperature 0 and drawn by seed, each in full to its end, whichever kernels compute it in float32.

    The first three: longer ones hold a draw so close to a border that the last bit of a float32 sum decides it.
    """
    llm = LLM("cria", dtype="fp32", kernels=kernels)
    for sample in recorded["samples"][:3]:
        answer = llm.generate(sample["prompt"], temperature=sample["temperature"], seed=sample["seed"])
        assert (answer.text, answer.finish_reason) == (sample["text"], sample["finish_reason"])
    assert recorded["samples"][0]["finish_reason"] == "stop"


def test_the_readme_shows_the_recorded_figures_and_stories(recorded):
    readme = (RECIPE / "README.md").read_text()
    assert f"{recorded['held_out']['nats_per_token']:.3f} nats a token" in readme
    assert f"{recorded['held_out']['bits_per_byte']:.3f} bits a byte" in readme
    unwrapped = " ".join(readme.replace("\n>", "\n").split())
    for sample in recorded["samples"]:
        assert " ".join((sample["prompt"] + sample["text"]).split()) in unwrapped


def test_transformers_reads_the_folder_and_agrees(cria):
    """The weights in float32 on both sides: logits within 1e-4 of their scale; the same token at every position."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = find_model("cria")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.encode(STORY)
    assert ids == cria.encode(STORY)
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits[0].numpy()
    ours = LLM("cria", dtype="fp32").logits(ids)
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()
    assert (ours.argmax(-1) == theirs.argmax(-1)).all()
