"""Facts of the family agree with the collected sources; memory is counted by hand; made-up names are explained."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from puna.catalog import models
from puna.catalog.facts import (
    BITS,
    correction,
    facts,
    kv_bytes,
    memory_bytes,
    size_of,
    weight_bytes,
    widest,
)
from puna.errors import CatalogError, HubError


def sizes() -> list[models.CatalogEntry]:
    return [entry for entry in models.entries() if entry.short_name == size_of(entry)]


def test_facts_agree_with_the_collected_sources(reference: Path) -> None:
    sources = {m["name"]: m for m in json.loads((reference / "llama_models.json").read_text())["models"]}
    for entry in sizes():
        source, known = sources[entry.name], facts(entry)
        assert known.sees == ("image" in source["modalities_in"])
        assert known.cutoff == (source.get("knowledge_cutoff") or known.cutoff)
        assert known.training_tokens == (source.get("training_tokens") or "")
        assert known.experts == source["num_experts"]
        stated = float(source["active_params_stated"].removesuffix("B")) * 1e9
        assert known.active == pytest.approx(stated, rel=0.25)
        assert known.active == source.get("active_params_computed_text", known.active)
        assert set(known.quantized) == {each.split(" ")[0] for each in source["quantized_releases"]}


def test_a_cutoff_that_the_sources_lack_comes_from_a_card() -> None:
    """The collected sources have none for Llama 2; its card has."""
    assert facts(models.lookup("llama2:7b")).cutoff == "2022-09"
    assert facts(models.lookup("llama3:8b")).cutoff == "2023-03"
    assert facts(models.lookup("llama3:70b")).cutoff == "2023-12"


def test_scores_have_a_source_and_are_percentages() -> None:
    seen = 0
    for entry in sizes():
        for score in facts(entry).scores:
            seen += 1
            assert 0 < score.value < 100
            assert score.source.url.startswith("https://")
            assert score.of in ("base", "instruct")
    assert seen > 110
    assert facts(models.lookup("codellama:7b")).scores == ()


def test_scores_as_the_cards_have_them() -> None:
    def score(name: str, benchmark: str, of: str) -> float:
        found = facts(models.lookup(name)).score(benchmark, of)
        assert found is not None
        return found.value

    assert score("llama3.1:405b", "MMLU-Pro", "instruct") == 73.3
    assert score("llama4:maverick", "GPQA Diamond", "instruct") == 69.8
    assert score("llama3.2-vision:90b", "MMMU", "instruct") == 60.3
    assert score("llama1:65b", "MMLU", "base") == 63.4


def test_the_widest_setup_of_a_benchmark() -> None:
    assert widest("mmlu") == ("MMLU", "5-shot, macro average", "base")
    with pytest.raises(CatalogError) as caught:
        widest("Elo")
    assert "MMLU-Pro" in caught.value.remedy


@pytest.mark.parametrize(
    "name",
    [
        *("llama4.1", "Llama 4.1", "meta-llama/Llama-4.1-8B-Instruct", "LLAMA4:405b", "llama3.3:8b", "Llama-3.2-8B"),
        *("meta-llama/Prompt-Guard-86M", "Llama-Prompt-Guard-2-22M", "prompt-guard"),
    ],
)
def test_a_model_that_never_was_is_explained(name: str) -> None:
    wrong = correction(name)
    assert wrong is not None
    with pytest.raises(HubError) as caught:
        models.lookup(name)
    assert caught.value.message == wrong.says
    assert all(each in caught.value.remedy for each in wrong.see)
    assert all(models.find(each) is not None for each in wrong.see)


def test_a_model_that_is_is_not_explained_away() -> None:
    assert [
        entry.short_name for entry in models.entries() if correction(entry.hub_id) or correction(entry.short_name)
    ] == []
    assert correction("llama3.2-vision:11b") is None


def test_the_ten_million_tokens_are_scouts() -> None:
    assert [e.short_name for e in models.entries() if e.context_length == 10 << 20] == [
        "llama4:scout",
        "llama4:scout-base",
    ]
    assert models.lookup("llama4:maverick").context_length == 1 << 20
    assert "405b" in models.lookup("llama3.1:405b").hub_id.lower()


def test_memory_by_hand() -> None:
    entry = models.lookup("llama3.1:8b")
    # 32 layers, keys and values, 8 heads of 128 numbers of 2 bytes
    assert kv_bytes(entry, 1000) == 32 * 2 * 8 * 128 * 2 * 1000
    assert weight_bytes(entry, "BF16") == 2 * 8_030_261_248
    assert weight_bytes(entry, "Q8_0") == pytest.approx(8_030_261_248 * 34 / 32)
    assert memory_bytes(entry, 1000, "BF16") == weight_bytes(entry, "BF16") + kv_bytes(entry, 1000)
    assert BITS["Q6_K"] == 210 * 8 / 256


def test_llama_4_keeps_chunks_in_three_layers_of_four() -> None:
    scout = models.lookup("llama4:scout")
    each = 2 * 8 * 128 * 2
    assert kv_bytes(scout, 8192) == 48 * each * 8192
    assert kv_bytes(scout, 1 << 20) == each * (12 * (1 << 20) + 36 * 8192)


def test_a_picture_layer_has_no_cache_that_grows() -> None:
    eleven = models.lookup("llama3.2-vision:11b")
    assert kv_bytes(eleven, 10) == kv_bytes(models.lookup("llama3.1:8b"), 10)
    assert math.isclose(weight_bytes(eleven, "BF16"), 2 * 10_670_220_835)
