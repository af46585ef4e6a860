"""The catalog's facts agree with arithmetic and with the collected sources; its names find one model each."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from datetime import date
from pathlib import Path

import pytest

from puna.catalog.models import CatalogEntry, entries, find, lookup
from puna.errors import HubError
from puna.models.known import config_of
from puna.models.registry import definition

# Facts that carry the same name here and in the collected sources.
SAME = ["layers", "dim", "heads", "kv_heads", "head_dim", "ffn_dim", "vocab_size"]
SAME += ["rms_norm_eps", "rope_theta", "context_length"]
DENSE = [entry for entry in entries() if entry.architecture == "dense"]


def by_name(entry: CatalogEntry) -> str:
    return entry.short_name


@pytest.mark.parametrize("entry", DENSE, ids=by_name)
def test_parameter_count_is_what_the_dimensions_give(entry: CatalogEntry) -> None:
    attention = entry.dim * entry.head_dim * 2 * (entry.heads + entry.kv_heads)
    layer = attention + 3 * entry.dim * entry.ffn_dim + 2 * entry.dim
    embeddings = entry.vocab_size * entry.dim * (1 if entry.tied else 2)
    assert entry.params == entry.layers * layer + entry.dim + embeddings
    assert entry.download_bytes == 2 * entry.params


@pytest.mark.parametrize("entry", [e for e in entries() if e.vision_config], ids=by_name)
def test_parameter_counts_of_models_that_see_are_those_of_their_weights(entry: CatalogEntry) -> None:
    config = config_of(entry)
    counts = {name: math.prod(shape) for name, shape in definition(config).shapes(config).items()}
    seeing = {name: count for name, count in counts.items() if name.startswith(("vision.", "projector."))}
    assert (entry.params, entry.vision_params) == (sum(counts.values()), sum(seeing.values()))


@pytest.mark.parametrize("entry", entries(), ids=by_name)
def test_facts_are_sound(entry: CatalogEntry) -> None:
    assert re.fullmatch(r"[a-z0-9.-]+:[a-z0-9-]+", entry.short_name)
    assert re.fullmatch(r"(meta-llama|codellama|huggyllama)/[\w.-]+", entry.hub_id)
    assert entry.gated == entry.hub_id.startswith("meta-llama/")
    assert entry.licence_page == f"https://huggingface.co/{entry.hub_id}"
    assert entry.heads * entry.head_dim == entry.dim
    assert entry.heads % entry.kv_heads == 0
    assert date(2023, 2, 24) <= date.fromisoformat(entry.released) <= date(2025, 12, 31)
    assert bool(entry.meta_folders) == bool(entry.meta_shards)
    if entry.rope_scaling is not None:
        assert set(entry.rope_scaling) == {
            "rope_type",
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        }
    assert bool(entry.vision_params) == bool(entry.vision_config)


def test_every_name_means_one_checkpoint() -> None:
    counts = Counter(name for entry in entries() for name in (entry.short_name, *entry.aliases))
    counts.update(entry.hub_id.split("/")[1].lower().removesuffix("-hf") for entry in entries())
    assert [name for name, count in counts.items() if count > 1] == []


@pytest.mark.parametrize(
    ("name", "hub_id"),
    [
        ("llama3.2:1b", "meta-llama/Llama-3.2-1B-Instruct"),
        ("llama3.2:1b-instruct", "meta-llama/Llama-3.2-1B-Instruct"),
        ("llama3.2:1b-base", "meta-llama/Llama-3.2-1B"),
        (" LLaMA3.1:405B ", "meta-llama/Llama-3.1-405B-Instruct"),
        ("llama2:7b", "meta-llama/Llama-2-7b-chat-hf"),
        ("llama1:7b", "huggyllama/llama-7b"),
        ("llama1:30b-base", "huggyllama/llama-30b"),
        ("llama3.3:70b", "meta-llama/Llama-3.3-70B-Instruct"),
        ("codellama:34b-python", "codellama/CodeLlama-34b-Python-hf"),
        ("llama-guard3:1b", "meta-llama/Llama-Guard-3-1B"),
        ("llama4:scout", "meta-llama/Llama-4-Scout-17B-16E-Instruct"),
        ("meta-llama/llama-3.2-3b", "meta-llama/Llama-3.2-3B"),
        ("Llama-2-13b", "meta-llama/Llama-2-13b-hf"),
    ],
)
def test_lookup(name: str, hub_id: str) -> None:
    assert lookup(name).hub_id == hub_id


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("llama3.2", "Name the size too: llama3.2:1b, llama3.2:1b-base, llama3.2:3b, llama3.2:3b-base."),
        ("lama3.2:1b", "Did you mean llama3.2:1b"),
        ("llama3.2:1b-chat", "Did you mean llama3.2:1b or llama3.2:1b-base?"),
        ("Llama-3.2-1B-Instuct", "Did you mean llama3.2:1b"),
        ("mistral", "`puna models` lists the short names"),
        ("", "`puna models` lists the short names"),
    ],
)
def test_unknown_name_is_answered_with_the_nearest(name: str, remedy: str) -> None:
    assert find(name) is None
    with pytest.raises(HubError, match="no model called") as caught:
        lookup(name)
    assert caught.value.remedy.startswith(remedy)


def test_python_form_of_code_llama_has_no_infilling_tokens() -> None:
    assert (lookup("codellama:7b").vocab_size, lookup("codellama:7b-python").vocab_size) == (32016, 32000)


@pytest.mark.parametrize(
    ("name", "rope_theta", "context_length"),
    [
        ("codellama:70b", 1e4, 4096),
        ("codellama:70b-python", 1e4, 4096),
        ("codellama:70b-base", 1e6, 16384),
        ("codellama:34b", 1e6, 16384),
    ],
)
def test_only_the_base_of_code_llama_70b_has_a_long_context(name: str, rope_theta: float, context_length: int) -> None:
    entry = lookup(name)
    assert (entry.rope_theta, entry.context_length) == (rope_theta, context_length)


def test_facts_agree_with_the_collected_sources(reference: Path) -> None:
    sources = json.loads((reference / "llama_models.json").read_text())["models"]
    known = {entry.name: entry for entry in entries() if not entry.short_name.endswith("-python")}
    assert {source["name"] for source in sources if source["family"] != "prompt_guard"} == set(known)
    for source in sources:
        if source["family"] == "prompt_guard":
            continue
        entry = known[source["name"]]
        assert {key: getattr(entry, key) for key in SAME} == {key: source[key] for key in SAME}
        # The sources count what serves text, and not at all where pictures have layers of their own.
        assert entry.params - entry.vision_params == (source["params_computed"] or entry.params - entry.vision_params)
        assert entry.tied == source["tie_word_embeddings"]
        assert entry.released == source["release_date"]
        hub_ids = {e.hub_id for e in entries() if e.name == entry.name}
        for key in ("huggingface_id", "huggingface_id_instruct"):
            assert source[key] is None or source[key].split(" ")[0] in hub_ids
        scaling = {k: v for k, v in (source["rope_scaling"] or {}).items() if k != "type"}
        assert {k: v for k, v in (entry.rope_scaling or {}).items() if k != "rope_type"} == scaling
