"""Reads a LoRA adapter in PEFT's format: `adapter_config.json` and `adapter_model.safetensors` in one folder.

What it is: the strict reader, from the hub's names to canonical ones (`layers.0.q`), scale and q/k order settled.
What it is not: arithmetic (`ops.linear` of an `layouts.Adapted`), or training.
What is surprising: what PEFT can say and this cannot do (DoRA, biases, whole modules, added tokens, adapters of the
embedding) is refused by name; an adapter that loads and does nothing is the worst of all, so one that touches no
matrix, or a matrix that the model does not have, is an error. The scale (alpha / r, or alpha / √r with rsLoRA) is
multiplied into B.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from puna.errors import CheckpointError, ConfigError
from puna.kernels.layouts import to_float32
from puna.models.config import DecoderConfig, Fields
from puna.models.llama3_vision_config import MllamaConfig
from puna.models.registry import definition
from puna.weights import names
from puna.weights.files import MappedFile, read_json
from puna.weights.safetensors import DTYPES, Entry, read_header

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"

F32 = npt.NDArray[np.float32]

REFUSED: Mapping[str, Any] = {
    "use_dora": False, "use_qalora": False, "fan_in_fan_out": False, "lora_bias": False, "bias": "none",
    "modules_to_save": None, "layer_replication": None, "target_parameters": None, "trainable_token_indices": None,
    "alora_invocation_tokens": None, "megatron_config": None, "arrow_config": None,
}  # fmt: skip
"""Keys that change the arithmetic in ways not implemented here, and the value with which they do not."""

IGNORED = (
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout",
    "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
)  # fmt: skip
"""Keys that say how it was trained, or which matrices it has, as the tensors say too."""

_TENSOR = re.compile(
    r"base_model\.model\.((?:language_model\.)?model\.(?:language_model\.)?layers\.\d{1,4}\.[a-z_]+\.[a-z_]+)"
    r"\.lora_([AB])(?:\.default)?\.weight"
)


@dataclass(frozen=True)
class Adapter:
    """An adapter: canonical name of a matrix (`layers.0.q`) → A [r, in] and B [out, r], float32, the scale in B.

    `unknown` lists keys of its config that are not known here.
    """

    path: Path
    pairs: Mapping[str, tuple[F32, F32]]
    unknown: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of memory it takes."""
        return sum(a.nbytes + b.nbytes for a, b in self.pairs.values())


def read_adapter(folder: Path, config: DecoderConfig) -> Adapter:
    """The adapter in a folder, checked against the model it is for.

    Raises CheckpointError and ConfigError for one that is damaged, incomplete, of another model, or not implemented.
    """
    for name in (CONFIG, TENSORS):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder}: there is no {name}.",
                remedy=f"An adapter is a folder of PEFT's with {CONFIG} and {TENSORS}; old `.bin` files are not read.",
            )
    scales = _Scales(folder / CONFIG)
    matrices = {
        plan.parts[name][0].stored.removesuffix(".weight"): (name.removesuffix(".weight"), shape)
        # PEFT saves the names of a model in memory, which transformers may change when it saves the model itself.
        for plan in (names.plan(config, "hub"), names.plan(config, "hub", {names.IN_MEMORY: ()}))
        for name, shape in definition(config).shapes(config).items()
        # Not a mixture's experts and router, nor cross layers: some rows of a batch pass them only.
        if name.startswith("layers.") and len(shape) == 2 and name.count(".") == 3 and ".router." not in name
        if not (isinstance(config, MllamaConfig) and int(name.split(".")[1]) in config.cross_layers)
    }
    found: dict[str, dict[str, Entry]] = {}
    for stored, entry in read_header(MappedFile(folder / TENSORS)).items():
        match = _TENSOR.fullmatch(stored)
        if match is None or match[1] not in matrices:
            raise CheckpointError(
                f"{folder / TENSORS}: {stored[:120]!r} belongs to no matrix of the model's layers.",
                remedy="The adapter is of another model, or changes what Puna adapts not (embedding, head, norms, "
                "layers that look at pictures).",
            )
        halves = found.setdefault(match[1], {})
        if match[2] in halves:
            raise CheckpointError(
                f"{folder / TENSORS}: lora_{match[2]} of {match[1]} stands there twice.",
                remedy="Two adapters were saved into one file; save them apart.",
            )
        halves[match[2]] = entry
    if not found:
        raise CheckpointError(f"{folder}: the adapter has no matrices.", remedy="Save it again from the training.")
    pairs = {}
    for hub_name, parts in found.items():
        canonical, (out, inner) = matrices[hub_name]
        pairs[canonical] = _pair(folder, hub_name, parts, (out, inner), scales, config, canonical)
    return Adapter(folder, pairs, scales.unknown)


class _Scales:
    """The config, read strictly: the rank and the scale of each matrix."""

    def __init__(self, path: Path) -> None:
        fields = Fields(read_json(path), str(path))
        if fields.choice("peft_type", ("LORA",), None) is None:
            raise fields.fault("peft_type", "is missing")
        for key, value in REFUSED.items():
            fields.asked.add(key)
            if (given := fields.data.get(key, value)) != value and given not in ([], {}):
                raise ConfigError(
                    f"{path}: {key} is {given!r:.80}, which Puna does not compute.",
                    remedy=f"Only {key} = {value!r} is; merge the adapter into its model with PEFT instead.",
                )
        self._path = path
        self._rank = fields.integer("r", most=1 << 14)
        self._alpha = fields.number("lora_alpha")
        self._root = fields.boolean("use_rslora", False)
        self._ranks = self._pattern(fields, "rank_pattern", whole=True)
        self._alphas = self._pattern(fields, "alpha_pattern")
        fields.ignore(*IGNORED)
        self.unknown = fields.unread()

    def of(self, module: str) -> tuple[int, float]:
        """Rank and scale of a matrix, by the hub's name."""
        rank = int(self._lookup(self._ranks, module, self._rank))
        alpha = self._lookup(self._alphas, module, self._alpha)
        return rank, alpha / (math.sqrt(rank) if self._root else rank)

    def _pattern(self, fields: Fields, key: str, *, whole: bool = False) -> dict[str, float]:
        fields.asked.add(key)
        given = fields.data.get(key) or {}
        ok = isinstance(given, Mapping) and all(
            isinstance(value, int if whole else int | float) and not isinstance(value, bool) and 0 < value < 1 << 14
            for value in given.values()
        )
        # PEFT takes regular expressions here; a stranger's is not run. Ends of names are what is written.
        if not ok or not all(re.fullmatch(r"[\w.]{1,200}", name) for name in given):
            raise ConfigError(
                f"{self._path}: {key} must map plain names of matrices to {'whole ' * whole}numbers above zero.",
                remedy="Regular expressions are not read; write the names out.",
            )
        return dict(given)

    @staticmethod
    def _lookup(pattern: Mapping[str, float], module: str, default: float) -> float:
        """As PEFT: a key is a whole name, or its end after a dot; the first that fits counts."""
        return next((value for key, value in pattern.items() if module == key or module.endswith(f".{key}")), default)


def _pair(
    folder: Path,
    hub_name: str,
    parts: Mapping[str, Entry],
    shape: tuple[int, int],
    scales: _Scales,
    config: DecoderConfig,
    canonical: str,
) -> tuple[F32, F32]:
    if parts.keys() != {"A", "B"}:
        raise CheckpointError(
            f"{folder / TENSORS}: {hub_name} has lora_{next(iter(parts))} without its other half.",
            remedy="The file is incomplete: save or fetch it again.",
        )
    rank, scale = scales.of(hub_name)
    (out, inner), arrays = shape, {}
    for half, expected in (("A", (rank, inner)), ("B", (out, rank))):
        entry = parts[half]
        if entry.shape != expected or entry.dtype not in DTYPES:
            raise CheckpointError(
                f"{folder / TENSORS}: lora_{half} of {hub_name} is {entry.dtype} {list(entry.shape)}, and this model "
                f"takes {', '.join(DTYPES)} {list(expected)}.",
                remedy="The adapter is of another model, or its config does not belong to it.",
            )
        arrays[half] = np.array(to_float32(entry.lazy().read()), np.float32)
        if not np.isfinite(arrays[half]).all():
            raise CheckpointError(
                f"{folder / TENSORS}: lora_{half} of {hub_name} holds numbers that are not finite.",
                remedy="The training diverged, or the file is damaged.",
            )
    # An adapter's q and k rows are ordered as the hub's, whatever the order of the model's own.
    as_hub, order = replace(config, interleaved_rope=False), config.interleaved_rope
    up = names.repair(f"{canonical}.weight", arrays["B"] * np.float32(scale), as_hub, interleaved=order)
    return arrays["A"], up
