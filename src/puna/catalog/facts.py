"""What is known of a Llama beyond its dimensions: languages, knowledge, released forms, published scores, memory.

What it is: `facts.toml` read into records, and the arithmetic of weights and KV cache that choosing needs.
What it is not: a plan. `kv_bytes` and `weight_bytes` are estimates from dimensions, for comparing models; activations,
the runtime, and what this machine has are left out.
What is surprising: scores are compared only within one benchmark, one setup and one form (base or instruct). Two cards
that say MMLU may mean two things.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from puna.catalog import models
from puna.catalog.market import Source, read_sources
from puna.catalog.models import CatalogEntry
from puna.catalog.tables import Table, read_resource
from puna.errors import CatalogError

BITS = {"BF16": 16.0, "Q8_0": 8.5, "Q6_K": 6.5625, "Q5_K_M": 5.70, "Q4_K_M": 4.89}
"""Bits a weight. Q8_0 and Q6_K follow from their blocks (34 and 210 bytes for 32 and 256 weights); Q5_K_M and Q4_K_M
mix block types, and these are llama.cpp's figures for Llama 3.1 8B (tools/quantize/README.md)."""

KV_BYTES = 2
"""Bytes of one number in the KV cache: fp16."""

_CHUNK, _GLOBAL_EVERY = 8192, 4
"""Llama 4: three layers of four see only their chunk of so many tokens (its model card's reference code)."""


@dataclass(frozen=True, slots=True)
class Score:
    """One published figure. `setup` and `of` (base or instruct) are part of what it means."""

    benchmark: str
    setup: str
    of: str
    value: float
    source: Source

    @property
    def key(self) -> tuple[str, str, str]:
        """What two scores must share to be compared."""
        return self.benchmark, self.setup, self.of


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of one size of Llama; its forms (base, instruct) share it. `active` parameters serve one token."""

    languages: tuple[str, ...]
    sees: bool
    training_tokens: str
    cutoff: str
    formats: tuple[str, ...]
    quantized: tuple[str, ...]
    parameters: int
    active: int
    experts: int
    notes: tuple[str, ...]
    scores: tuple[Score, ...]
    source: Source

    def score(self, benchmark: str, of: str | None = None) -> Score | None:
        """The first score of that benchmark (and form), as the file lists them."""
        return next((s for s in self.scores if s.benchmark == benchmark and of in (None, s.of)), None)

    def at(self, key: tuple[str, str, str]) -> Score | None:
        """The score with that key, or None."""
        return next((s for s in self.scores if s.key == key), None)


@dataclass(frozen=True, slots=True)
class Correction:
    """What is said to somebody who asks for a model that never was."""

    says: str
    see: tuple[str, ...]
    source: Source


def facts(entry: CatalogEntry) -> Facts:
    """What is known of the size that a checkpoint is of."""
    return _all()[0][size_of(entry)]


def size_of(entry: CatalogEntry) -> str:
    """The short name of a checkpoint's size: its default form's."""
    return next(each.short_name for each in models.entries() if each.name == entry.name)


def correction(name: str) -> Correction | None:
    """What to say about a name that articles made up, or None."""
    asked = name.strip().lower().rpartition("/")[2].removeprefix("meta-")
    asked = asked.replace(" ", "").replace(":", "-").replace("llama-", "llama")
    for known, wrong in _all()[1].items():
        if asked == known or (known.endswith("*") and asked.startswith(known[:-1])):
            return wrong
    return None


def widest(benchmark: str) -> tuple[str, str, str]:
    """The key of a benchmark's scores, setup and form, under which most models have one.

    Raises CatalogError for a benchmark that no score is of.
    """
    counts = Counter(score.key for known in _all()[0].values() for score in known.scores)
    found = [key for key in counts if key[0].lower() == benchmark.lower()]
    if not found:
        raise CatalogError(
            f"--benchmark {benchmark!r:.40}: no score of it is in the catalog.",
            remedy=f"One of {', '.join(sorted({key[0] for key in counts}))}.",
        )
    return max(found, key=lambda key: (counts[key], key))


def weight_bytes(entry: CatalogEntry, quant: str = "Q4_K_M") -> float:
    """About how many bytes the weights take in a type of BITS."""
    return facts(entry).parameters * BITS[quant] / 8


def kv_bytes(entry: CatalogEntry, tokens: int) -> int:
    """Bytes of the fp16 KV cache of one conversation. Llama 4's local layers keep their chunk only."""
    per_layer = 2 * entry.kv_heads * entry.head_dim * KV_BYTES
    if entry.generation == "llama4":
        everywhere = entry.layers // _GLOBAL_EVERY
        local = entry.layers - everywhere
        return per_layer * (everywhere * tokens + local * min(tokens, _CHUNK))
    return per_layer * self_attention_layers(entry) * tokens


def self_attention_layers(entry: CatalogEntry) -> int:
    """Layers whose cache grows with the text: of Llama 3.2 Vision every fifth attends to the picture instead."""
    return entry.layers - entry.layers // 5 if entry.architecture == "vision" else entry.layers


def memory_bytes(entry: CatalogEntry, tokens: int, quant: str = "Q4_K_M") -> float:
    """Weights and cache together."""
    return weight_bytes(entry, quant) + kv_bytes(entry, tokens)


@cache
def _all() -> tuple[Mapping[str, Facts], Mapping[str, Correction]]:
    table = read_resource("facts.toml")
    sources = read_sources(table)

    def source(each: Table) -> Source:
        said = each.text("source")
        if said not in sources:
            raise CatalogError(f"{each.where}: there is no source {said!r}.", remedy="Describe it in [sources.NAME].")
        return sources[said]

    generations = {}
    for name, each in table.named("generations"):
        generations[name] = (
            each.texts("languages"),
            bool(each.truth_or_none("sees")),
            each.text_or("training_tokens"),
            each.text_or("cutoff"),
            each.texts("formats"),
            each.texts("quantized"),
            each.text_or("note"),
            source(each),
        )
        each.finish()
    sizes = {}
    for name, each in table.named("sizes"):
        sizes[name] = (
            each.text_or("training_tokens"),
            each.text_or("cutoff"),
            each.texts("quantized"),
            each.count_or_none("active"),
            each.count_or_none("experts"),
        )
        each.finish()
    scores: dict[str, list[Score]] = {}
    for each in table.tables("scores"):
        benchmark, setup, of = (
            each.text("benchmark"),
            each.text_or("setup"),
            each.text("of", one_of=("base", "instruct")),
        )
        said = source(each)
        for name, value in each.numbers("values").items():
            scores.setdefault(name, []).append(Score(benchmark, setup, of, value, said))
        each.finish()
    corrections: dict[str, Correction] = {}
    for each in table.tables("corrections"):
        wrong = Correction(each.text("says"), each.texts("see"), source(each))
        corrections |= dict.fromkeys(each.texts("names"), wrong)
        each.finish()
    notes: dict[str, list[str]] = {}
    for each in table.tables("notes"):
        said_note = each.text("says")
        for name in each.texts("models"):
            notes.setdefault(name, []).append(said_note)
        source(each)
        each.finish()
    table.finish()
    found = {}
    for entry in models.entries():
        size = size_of(entry)
        if size in found:
            continue
        languages, sees, tokens, cutoff, formats, quantized, note, where = generations[entry.generation]
        own = sizes.get(size, ("", "", (), None, None))
        found[size] = Facts(
            languages,
            sees,
            own[0] or tokens,
            own[1] or cutoff,
            formats,
            tuple(each.format(name=entry.name) for each in own[2] or quantized),
            entry.params,
            own[3] or entry.params - entry.vision_params,
            own[4] or 0,
            tuple(filter(None, (note, *notes.get(size, ())))),
            tuple(scores.get(size, ())),
            where,
        )
    return found, corrections
