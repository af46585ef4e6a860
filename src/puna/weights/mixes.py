"""Which block type each tensor of a model gets: `Q4_K_M` and its kin, as other programs mean them.

What it is: the rule by which llama.cpp chooses types, for dense Llamas and Llama 4, written down for the mixes people
use.
What it is not: the packing (`kernels.encode`), or a search for a better mix.
What is surprising: a mix's name is the type of most tensors, not of all. The head (or the embedding where that serves
as the head) gets Q6_K, and some layers' values and feed-forward outputs more bits than the rest. A type of 256 numbers
does not fit rows that are no multiple of that; then the next larger type of 32 takes its place, which is noted. An
expert's matrices go by the rule of the layer's, the router stays F32, and a vision encoder is not packed at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from puna.errors import UsageError
from puna.kernels import blocks
from puna.models.config import DecoderConfig
from puna.types import TYPES
from puna.weights.gguf import FILE_TYPES


@dataclass(frozen=True, slots=True)
class Mix:
    """`base` is the block type of most tensors, `file_type` the number of llama.h's `llama_ftype`."""

    name: str
    base: str
    file_type: int


_FILE_TYPES = {name: number for number, name in FILE_TYPES.items()}

MIXES: dict[str, Mix] = {
    name: Mix(name, name.removesuffix("_S").removesuffix("_M").removesuffix("_L"), _FILE_TYPES[name]) for name in TYPES
}
"""The mixes that can be written, under the names of `types.TYPES`."""

_INSTEAD = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""What takes the place of a type of 256 numbers in rows that are no multiple of it."""


def find(name: str, flag: str, among: Collection[str] = tuple(MIXES)) -> Mix:
    """The mix of that name. Raises UsageError, which names the `flag`, for one that is not `among` those allowed."""
    if name not in among:
        raise UsageError(f"{flag} {name}: no such type.", remedy=f"One of: {', '.join(among)}.")
    return MIXES[name]


def choose(mix: Mix, config: DecoderConfig, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, str], list[str]]:
    """Canonical name → block type for every parameter of `shapes`, and notes on those that cannot have the mix's own.

    Vectors (norms, biases) and a few small tensors stay F32, as every reader of GGUF expects; matrices of a vision
    encoder are left out: they stay as they are stored.
    """
    kinds: dict[str, str] = {}
    replaced: Counter[tuple[str, str, int]] = Counter()
    for name, shape in shapes.items():
        if stays_plain(name, shape):
            kinds[name] = "F32"
            continue
        if is_vision(name):
            continue
        wanted = kind = _wanted(mix, config, name, shape[-1])
        if shape[-1] % blocks.TYPES[kind].block:
            kind = _INSTEAD.get(kind, kind)
        if shape[-1] % blocks.TYPES[kind].block:
            kind = "F16"
        if kind != wanted:
            replaced[wanted, kind, shape[-1]] += 1
        kinds[name] = kind
    notes = [
        f"{count} matrices are {kind} in place of {wanted}, whose blocks of {blocks.TYPES[wanted].block} do not divide "
        f"rows of {columns}"
        for (wanted, kind, columns), count in replaced.items()
    ]
    return kinds, notes


def is_vision(name: str) -> bool:
    """Whether a parameter belongs to the vision encoder, or to what carries its features to the text."""
    return name.startswith(("vision.", "projector."))


def stays_plain(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter is F32 in every GGUF: vectors, a mixture's router, and a vision encoder's first tensors.

    llama.cpp's converter does so (conversion/base.py, `prepare_tensors`, `tensor_force_quant`).
    """
    return len(shape) == 1 or name.endswith(".router.weight") or name in _PLAIN_VISION


_PLAIN_VISION = ("vision.patch.weight", "vision.position_embedding")


def _wanted(mix: Mix, config: DecoderConfig, name: str, columns: int) -> str:
    """llama.cpp's choice for a matrix, before its rows are looked at (llama-quant.cpp, `llama_tensor_get_type`)."""
    base = mix.base
    if base in ("F32", "F16", "BF16"):
        return base
    if name == ("embedding" if config.tied_head else "head"):
        return "Q8_0" if base == "Q8_0" or columns % blocks.TYPES[base].block else "Q6_K"
    if name in ("embedding", "head"):
        return base
    _, layer, *_, part, _ = name.split(".")  # an expert's `down` and the shared one's are a `down`
    if part == "v":
        return _value_kind(mix, config, int(layer))
    if part == "down":
        return _down_kind(mix, int(layer), config.layers)
    if part == "o":
        return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(mix.name, base)
    return base


def packed_anew(stored: Mapping[str, str], kinds: Mapping[str, str]) -> list[str]:
    """The note that numbers packed already are packed again, by their types as stored and as chosen; or none."""
    if all(stored[name] in ("F32", "F16", "BF16", kind) for name, kind in kinds.items()):
        return []
    return ["the source is packed already: packing its rounded numbers anew loses more than packing the original"]


def _more_bits(layer: int, layers: int) -> bool:
    """The first and last eighth of the layers, and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _value_kind(mix: Mix, config: DecoderConfig, layer: int) -> str:
    kind = mix.base
    shared = config.heads // config.kv_heads
    if mix.name == "Q2_K":
        kind = "Q4_K" if shared >= 4 else "Q3_K"
    elif mix.name == "Q3_K_M":
        kind = "Q5_K" if layer < 2 else "Q4_K"
    elif mix.name == "Q3_K_L":
        kind = "Q5_K"
    elif mix.name in ("Q4_K_M", "Q5_K_M") and _more_bits(layer, config.layers):
        kind = "Q6_K"
    elif mix.name == "Q4_K_S" and layer < 4:
        kind = "Q5_K"
    # The 70B's values are an eighth of its queries, so that more bits for them cost little.
    is_70b = config.layers == 80 and shared > 1
    return "Q5_K" if is_70b and kind in ("Q3_K", "Q4_K") else kind


def _down_kind(mix: Mix, layer: int, layers: int) -> str:
    if mix.name == "Q2_K":
        return "Q3_K"
    if mix.name == "Q3_K_M":
        return "Q5_K" if layer < layers // 16 else "Q4_K"
    if mix.name == "Q3_K_L":
        return "Q5_K"
    if mix.name in ("Q4_K_M", "Q5_K_M") and _more_bits(layer, layers):
        return "Q6_K"
    if mix.name == "Q4_K_S" and layer < layers // 8:
        return "Q5_K"
    return mix.base
