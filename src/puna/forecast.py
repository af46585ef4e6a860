"""How much memory a model will take on a machine, and how fast it will be there.

What it is: arithmetic over a model's config and the types of its weights; `bench` measures what is foretold here.
What it is not: a look at this machine, or a measurement: who asks brings `Machine`. Nor a budget (`plan`).
What is surprising: a mixture of experts is read by what its tokens choose, so one stream touches few of its weights and
many streams touch nearly all. And time is the sum of reading and multiplying, not the larger of both: on a processor
the same cores do both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from puna.kernels.blocks import TYPES
from puna.models import decoder
from puna.models.config import DecoderConfig
from puna.models.llama4_config import Llama4Config
from puna.models.registry import definition

KV_KINDS = {"fp32": "F32", "bf16": "BF16", "fp16": "F16", "q8_0": "Q8_0"}
"""The block type of each type of cache."""

PROGRAM = 51 << 20
"""Bytes of Python, NumPy, the kernels and Puna before a model (Linux, CPython 3.11): 24 MB of pages of libraries, 21 of
objects, 9 of what threads keep to themselves (stacks, and the copies that products and attention make of their rows).
"""

WORD = 420
"""Bytes that a token of the vocabulary takes in the tokenizer (Llama 3's 420, Llama 4's 440, Llama 2's 330)."""

CHUNK = 512
"""Tokens of a prompt that a step computes at most (the engine's PREFILL_CHUNK; a test holds the two together)."""

READS, MULTIPLIES = 0.97, 0.70
"""Shares of what the probes of `puna bench` reach on this processor that steps reach: the memory's bandwidth, and the
products' peak (bench/results: one stream reads at 86 to 96 %, a prefill multiplies at 66 to 72 %)."""

CARD_READS, CARD_MULTIPLIES = 0.75, 0.5
"""The same of a graphics card's data sheet: what is usual, measured by nobody here."""


@dataclass(frozen=True)
class Machine:
    """What computes: `cards` alike of `memory` bytes each, which read `read` bytes a second and multiply `peaks`
    operations a second, by kind of product (int8, bf16, fp32). `disk` bytes a second come from the disk. `measured`:
    by probes just now, else by a data sheet."""

    name: str
    memory: int
    read: float
    peaks: Mapping[str, float]
    disk: float
    cards: int = 1
    measured: bool = False

    @property
    def shares(self) -> tuple[float, float]:
        """Of reading and of multiplying, that steps reach."""
        return (READS, MULTIPLIES) if self.measured else (CARD_READS, CARD_MULTIPLIES)

    def peak(self, product: str) -> float:
        """Operations a second of all cards; a product without instructions of its own is computed in fp32."""
        return self.cards * (self.peaks.get(product) or self.peaks["fp32"])


@dataclass(frozen=True)
class Load:
    """How a model is used: `users` at once, each with `context` tokens of prompt and answer."""

    context: int
    users: int = 1


@dataclass(frozen=True)
class Footprint:
    """Bytes of memory, by what they are for."""

    weights: int
    cache: int
    activations: int
    program: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.activations + self.program


@dataclass(frozen=True)
class Speed:
    """Tokens a second: of a prompt that is read, and of answers (of one user, and of all together); seconds to load
    from the disk, and until the first token of a prompt that fills half of the context."""

    prefill: float
    decode: float
    decode_all: float
    load: float
    first_token: float


def cache_bytes(config: DecoderConfig, kv_type: str, tokens: int, page: int) -> int:
    """Bytes of the cache of one sequence of so many tokens, in pages of `page` tokens.

    A chunked layer keeps the pages of the chunk that is under way, both of whose ends may lie within one.
    """
    row = 2 * config.kv_heads * TYPES[KV_KINDS[kv_type]].row_bytes(config.head_dim)
    local, pages = len(config.local_layers), -(-tokens // page)
    window = min(pages, -(-config.chunk // page) + (config.chunk % page > 0))
    return row * page * (pages * (config.cached_layers - local) + window * local)


def weight_bytes(shapes: Mapping[str, tuple[int, ...]], kinds: Mapping[str, str]) -> dict[str, int]:
    """Canonical name → bytes, by block types (`F32`, `BF16`, `Q4_K`, …)."""
    return {name: math.prod(shape[:-1]) * TYPES[kinds[name]].row_bytes(shape[-1]) for name, shape in shapes.items()}


def activation_bytes(config: DecoderConfig, users: int) -> int:
    """Bytes of a step's intermediate numbers, in float32: of a chunk of a prompt, and the logits of every user.

    A dense decoder's step is one native call (kernels/cpu/forward.cpp, Plan): hidden states before and after a norm,
    rope's table, and what is wider of attention's four arrays and the feed-forward's two, which lie in the same place.
    Others run an op at a time, each of which makes a new array: a sum beside both of its terms, queries and keys before
    and after rope, and three arrays of the feed-forward; a mixture has those of the shared expert and the others' rows.
    Logits stand in a second array while a token is drawn.
    """
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    if definition(config) is decoder:
        width = 2 * config.dim + config.head_dim + max(2 * q + 2 * kv, 2 * config.hidden_dim)
    else:
        hidden = config.hidden_dim
        if isinstance(config, Llama4Config) and config.moe_layers:
            dense = hidden if len(config.moe_layers) < config.layers else 0
            hidden = max(dense, config.expert_hidden_dim)
        width = 4 * config.dim + max(3 * q + 3 * kv, 3 * hidden)
    return 4 * (CHUNK * width + 2 * users * config.vocab_size)


def footprint(config: DecoderConfig, weights: int, kv_type: str, load: Load, page: int) -> Footprint:
    """What a model of so many bytes of weights takes under this load, on a processor."""
    cache = load.users * cache_bytes(config, kv_type, load.context, page)
    return Footprint(weights, cache, activation_bytes(config, load.users), PROGRAM + WORD * config.vocab_size)


def expert_share(config: DecoderConfig, rows: int) -> float:
    """The share of its experts that a layer touches for so many tokens, each of which chooses at random."""
    if not isinstance(config, Llama4Config) or not config.experts:
        return 1.0
    return 1.0 - (1.0 - config.experts_per_token / config.experts) ** rows


def bytes_read(config: DecoderConfig, sizes: Mapping[str, int], rows: int, cache: int) -> float:
    """Bytes that a step of so many tokens reads: every matrix once, of experts those that are chosen, and the cache.

    Of the embedding a step reads some rows, which count for nothing, but for a head that is tied to it.
    """
    read = float(cache)
    for name, size in sizes.items():
        if (name == "embedding" and not config.tied_head) or name.startswith(("vision.", "projector.")):
            continue
        read += size * (expert_share(config, rows) if ".experts." in name else 1.0)
    return read


def operations(
    config: DecoderConfig, shapes: Mapping[str, tuple[int, ...]], new: int, context: int, users: int = 1
) -> int:
    """Operations of a step of `new` tokens for each of `users`, after `context` each: products with every matrix (of
    the experts, with those chosen), the head once a user, attention (Kaplan et al. 2020, section 2.1: two operations a
    weight and token; four a number of keys and values that a token sees)."""
    body = experts = 0
    for name, shape in shapes.items():
        if len(shape) == 2 and name.startswith("layers."):
            if ".experts." in name:
                experts += math.prod(shape)
            else:
                body += math.prod(shape)
    if isinstance(config, Llama4Config) and config.experts:
        body += experts * config.experts_per_token // config.experts
    head = config.vocab_size * config.dim
    local = len(config.local_layers)
    seen = new * context + new * (new + 1) // 2
    chunked = new * min(context, config.chunk) + min(new, config.chunk or new) * (new + 1) // 2 if local else 0
    attention = 4 * config.heads * config.head_dim * (seen * (config.cached_layers - local) + chunked * local)
    return users * (2 * body * new + 2 * head + attention)


def speed(
    config: DecoderConfig,
    shapes: Mapping[str, tuple[int, ...]],
    sizes: Mapping[str, int],
    product: str,
    kv_type: str,
    load: Load,
    page: int,
    machine: Machine,
) -> Speed:
    """How fast a model of these weights is likely to be; `product` is the kind of product that they take.

    Cards share a model's matrices, so their bandwidths and peaks add up; what they tell each other is not counted.
    """
    reads, multiplies = machine.shares

    def seconds(new: int, context: int, users: int) -> float:
        cache = users * cache_bytes(config, kv_type, max(1, context), page)
        read = bytes_read(config, sizes, new * users, cache) / (machine.cards * machine.read * reads)
        return read + operations(config, shapes, new, context, users) / (machine.peak(product) * multiplies)

    half = max(1, load.context // 2)
    chunks = [(at, min(CHUNK, half - at)) for at in range(0, half, CHUNK)]
    reading = sum(seconds(new, at, 1) for at, new in chunks)
    one, every = seconds(1, half, 1), seconds(1, half, load.users)
    return Speed(
        prefill=half / reading,
        decode=1 / one,
        decode_all=load.users / every,
        load=sum(sizes.values()) / machine.disk,
        first_token=reading,
    )
