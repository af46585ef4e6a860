"""Every released dense size has the parameter count it was published with, computed without allocating one."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from puna.models import decoder, llama3
from puna.models.config import DecoderConfig
from puna.models.rope import Rope

BILLIONS = {
    "LLaMA-7B": 6.7, "LLaMA-13B": 13.0, "LLaMA-33B": 32.5, "LLaMA-65B": 65.2, "Llama-2-7b": 6.7, "Llama-2-13b": 13.0,
    "Llama-2-70b": 69.0, "Meta-Llama-3-8B": 8.03, "Meta-Llama-3-70B": 70.6, "Llama-3.1-8B": 8.03, "Llama-3.1-70B": 70.6,
    "Llama-3.1-405B": 406.0, "Llama-3.2-1B": 1.23, "Llama-3.2-3B": 3.21, "Llama-3.3-70B-Instruct": 70.6,
    "CodeLlama-7b": 6.74, "CodeLlama-13b": 13.0, "CodeLlama-34b": 33.7, "CodeLlama-70b": 69.0,
}  # fmt: skip
"""As the papers and model cards print them (Llama 1: table 2; the others: their hub pages)."""


def dense(facts: dict[str, Any]) -> DecoderConfig:
    return DecoderConfig(
        generation=facts["family"],
        vocab_size=facts["vocab_size"],
        dim=facts["dim"],
        layers=facts["layers"],
        heads=facts["heads"],
        kv_heads=facts["kv_heads"],
        head_dim=facts["head_dim"],
        hidden_dim=facts["ffn_dim"],
        norm_eps=facts["rms_norm_eps"],
        rope=Rope(facts["head_dim"], facts["rope_theta"]),
        context_length=facts["context_length"],
        tied_head=facts["tie_word_embeddings"],
    )


def test_every_released_size_has_its_published_count(reference: Path) -> None:
    models = json.loads((reference / "llama_models.json").read_text())["models"]
    text = [m for m in models if m.get("num_experts") == 0 and m["modalities_in"] == ["text"]]
    counts = {m["name"]: decoder.parameter_count(dense(m)) for m in text}
    assert counts == {m["name"]: m["params_computed"] for m in text}
    for name, billions in BILLIONS.items():
        assert counts[name] / 1e9 == pytest.approx(billions, rel=0.006), name


def test_counting_the_largest_allocates_nothing_of_its_size() -> None:
    config = DecoderConfig(
        "llama3.1", llama3.VOCAB_SIZE, 16384, 126, 128, 8, 128, 53248, 1e-5, Rope(128, 500000.0), 131072
    )
    tracemalloc.start()
    assert decoder.parameter_count(config) == 405_853_388_800
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


def test_a_tied_head_and_biases_are_counted_once_each() -> None:
    config = DecoderConfig("llama3.2", 10, 6, 1, 2, 1, 4, 5, 1e-5, Rope(4, 1e4), 16, tied_head=True)
    embedding, attention, mlp, norms = 10 * 6, 6 * (8 + 4 + 4) + 8 * 6, 3 * 5 * 6, 3 * 6
    assert decoder.parameter_count(config) == embedding + attention + mlp + norms
    biased = DecoderConfig("llama3.2", 10, 6, 1, 2, 1, 4, 5, 1e-5, Rope(4, 1e4), 16, attention_bias=True, mlp_bias=True)
    assert decoder.parameter_count(biased) == 2 * embedding + attention + mlp + norms + (8 + 4 + 4 + 6) + (5 + 5 + 6)
