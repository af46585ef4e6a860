"""Puna against Meta's published arithmetic, written down here once more from the description, not from our code.

What it is: a decoder in torch that turns queries and keys as complex numbers, repeats key/value heads, masks with
-inf and keeps its own cache, as Meta's reference (llama/model.py; llama-models, models/llama3/model.py) does. It takes
parameters by Meta's names and a `params.json`; Puna gets the same two things.
What is surprising: Meta pairs neighbours (2i, 2i+1), so the numbers go into Puna unpermuted.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from puna.kernels.layouts import PageTable, page_table
from puna.models import decoder
from puna.models.config import DecoderConfig, read_meta
from puna.models.tree import DecoderWeights, tree_map
from puna.weights import names

Floats = npt.NDArray[np.float32]
LIMIT = 1e-4

PARAMS: dict[str, dict[str, Any]] = {
    "llama1": {"dim": 40, "multiple_of": 16, "n_heads": 5, "n_layers": 3, "norm_eps": 1e-6, "vocab_size": -1},
    "llama2": {
        "dim": 48, "multiple_of": 8, "ffn_dim_multiplier": 1.3, "n_heads": 6, "n_kv_heads": 2, "n_layers": 2,
        "norm_eps": 1e-5, "vocab_size": -1,
    },
    "codellama": {
        "dim": 32, "multiple_of": 8, "n_heads": 4, "n_kv_heads": 1, "n_layers": 3, "norm_eps": 1e-5,
        "rope_theta": 1e6, "vocab_size": 51,
    },
    "llama3.1": {
        "dim": 96, "multiple_of": 8, "ffn_dim_multiplier": 1.3, "n_heads": 3, "n_kv_heads": 1, "n_layers": 2,
        "norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": True, "rope_scaling_factor": 8, "vocab_size": 51,
    },
    "llama3.2": {
        "dim": 64, "multiple_of": 8, "n_heads": 2, "n_kv_heads": 1, "n_layers": 2, "norm_eps": 1e-5,
        "rope_theta": 500000.0, "use_scaled_rope": True, "vocab_size": 51,
    },
}  # fmt: skip
VOCAB = 51
FACTOR = {"llama3.1": 8.0, "llama3.2": 32.0}


def frequencies(case: str, head_dim: int, theta: float) -> torch.Tensor:
    """One angle per position for each pair; Llama 3.1 divides the slow ones by its factor, with a ramp between."""
    steps = 1.0 / theta ** (torch.arange(0, head_dim, 2)[: head_dim // 2].float() / head_dim)
    if case not in FACTOR:
        return steps
    stretched = []
    for step in steps:
        wavelength = 2 * math.pi / step
        if wavelength < 8192 / 4:
            stretched.append(step)
        elif wavelength > 8192 / 1:
            stretched.append(step / FACTOR[case])
        else:
            share = (8192 / wavelength - 1) / (4 - 1)
            stretched.append((1 - share) * step / FACTOR[case] + share * step)
    return torch.stack(stretched)


class Meta:
    """The published decoder, over parameters by Meta's names, fed from `start` on."""

    def __init__(self, case: str, parameters: dict[str, torch.Tensor], capacity: int) -> None:
        said = PARAMS[case]
        self.parameters, self.eps, self.layers = parameters, said["norm_eps"], said["n_layers"]
        self.heads, self.kv_heads = said["n_heads"], said.get("n_kv_heads", said["n_heads"])
        self.head_dim = said["dim"] // self.heads
        angles = torch.outer(
            torch.arange(capacity).float(), frequencies(case, self.head_dim, said.get("rope_theta", 10000.0))
        )
        self.rotations = torch.polar(torch.ones_like(angles), angles)
        self.keys = torch.zeros(self.layers, 1, capacity, self.kv_heads, self.head_dim)
        self.values = torch.zeros_like(self.keys)

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.parameters[name]

    def turn(self, x: torch.Tensor, rotations: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * rotations[None, :, None]).flatten(3)

    @torch.no_grad()
    def __call__(self, ids: torch.Tensor, start: int) -> torch.Tensor:
        p, T = self.parameters, ids.shape[1]
        x = p["tok_embeddings.weight"][ids.long()]
        rotations = self.rotations[start : start + T]
        mask = torch.full((T, T), float("-inf")).triu(1)
        mask = torch.hstack([torch.zeros(T, start), mask])
        for i in range(self.layers):
            at = f"layers.{i}."
            h = self.norm(x, at + "attention_norm.weight")
            q = (h @ p[at + "attention.wq.weight"].T).view(1, T, self.heads, self.head_dim)
            k = (h @ p[at + "attention.wk.weight"].T).view(1, T, self.kv_heads, self.head_dim)
            v = (h @ p[at + "attention.wv.weight"].T).view(1, T, self.kv_heads, self.head_dim)
            self.keys[i, :, start : start + T] = self.turn(k, rotations)
            self.values[i, :, start : start + T] = v
            repeats = self.heads // self.kv_heads
            k = self.keys[i, :, : start + T].repeat_interleave(repeats, 2).transpose(1, 2)
            v = self.values[i, :, : start + T].repeat_interleave(repeats, 2).transpose(1, 2)
            scores = self.turn(q, rotations).transpose(1, 2) @ k.transpose(2, 3) / math.sqrt(self.head_dim) + mask
            mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(1, T, -1)
            x = x + mixed @ p[at + "attention.wo.weight"].T
            h = self.norm(x, at + "ffn_norm.weight")
            gate, up = h @ p[at + "feed_forward.w1.weight"].T, h @ p[at + "feed_forward.w3.weight"].T
            x = x + (gate / (1 + torch.exp(-gate)) * up) @ p[at + "feed_forward.w2.weight"].T
        return self.norm(x, "norm.weight") @ p["output.weight"].T


def hidden_width(said: dict[str, Any]) -> int:
    """FeedForward's width: two thirds of 4 dim, times the multiplier, up to a multiple."""
    width = int(2 * 4 * said["dim"] / 3)
    width = int(said.get("ffn_dim_multiplier", 1) * width)
    return -(-width // said["multiple_of"]) * said["multiple_of"]


def meta_parameters(case: str) -> dict[str, torch.Tensor]:
    """Random numbers under Meta's names and in Meta's shapes."""
    said = PARAMS[case]
    dim, width = said["dim"], hidden_width(said)
    kv = said.get("n_kv_heads", said["n_heads"]) * (dim // said["n_heads"])
    shapes = {"tok_embeddings.weight": (VOCAB, dim), "norm.weight": (dim,), "output.weight": (VOCAB, dim)}
    for i in range(said["n_layers"]):
        shapes |= {
            f"layers.{i}.attention_norm.weight": (dim,), f"layers.{i}.ffn_norm.weight": (dim,),
            f"layers.{i}.attention.wq.weight": (dim, dim), f"layers.{i}.attention.wk.weight": (kv, dim),
            f"layers.{i}.attention.wv.weight": (kv, dim), f"layers.{i}.attention.wo.weight": (dim, dim),
            f"layers.{i}.feed_forward.w1.weight": (width, dim), f"layers.{i}.feed_forward.w2.weight": (dim, width),
            f"layers.{i}.feed_forward.w3.weight": (width, dim),
        }  # fmt: skip
    random = torch.Generator().manual_seed(len(case))
    return {
        name: torch.empty(shape).uniform_(0.5, 1.5, generator=random)
        if len(shape) == 1
        else torch.empty(shape).normal_(0, 1.5 * shape[1] ** -0.5, generator=random)
        for name, shape in shapes.items()
    }


def puna_model(case: str, parameters: dict[str, torch.Tensor], kernels: str) -> tuple[DecoderConfig, DecoderWeights]:
    """The same numbers through `read_meta` and the table of Meta's names; every one is used."""
    config = read_meta(PARAMS[case], vocab_size=VOCAB).config
    assert config.interleaved_rope
    used = {name: parameters[names.foreign(name, "meta")] for name in decoder.shapes(config)}
    assert len(used) == len(parameters)
    assert {name: tuple(p.shape) for name, p in used.items()} == decoder.shapes(config)
    weights = decoder.build(config, lambda name: used[name].numpy())
    return config, tree_map(torch.from_numpy, weights) if kernels == "torch" else weights


@pytest.mark.parametrize("start", [0, 9000])
@pytest.mark.parametrize("case", PARAMS)
def test_logits(kernels: str, case: str, start: int) -> None:
    """A prefill of 21 tokens at `start`, then single tokens, over a cache that is empty before `start`.

    Both see the empty entries alike (keys of zeros), so 9000 takes a scaled rope past its original 8192 in moments.
    """
    parameters = meta_parameters(case)
    capacity = start + 32
    meta = Meta(case, parameters, capacity)
    config, weights = puna_model(case, parameters, kernels)
    ids = np.random.default_rng(3).integers(0, VOCAB, (1, 26), dtype=np.int32)

    def zeros(shape: tuple[int, ...]) -> Any:
        return torch.zeros(shape) if kernels == "torch" else np.zeros(shape, np.float32)

    page = 16
    cache = decoder.make_cache(config, -(-capacity // page), page, zeros)
    pages = np.random.default_rng(1).permutation(-(-capacity // page))[None]
    for first, last in [(0, 21), *((i, i + 1) for i in range(21, 26))]:
        tokens = ids[:, first:last].copy()
        wanted = meta(torch.from_numpy(tokens), start + first).numpy()
        step: Any = tokens[0]
        table = page_table([start + first], [last - first], pages)
        if kernels == "torch":
            step, table = torch.from_numpy(step), PageTable(*map(torch.from_numpy, table))
        found = np.asarray(decoder.logits(weights, decoder.forward(weights, config, step, table, cache)))[None]
        assert found.shape == wanted.shape
        assert np.abs(found - wanted).max() < LIMIT * np.abs(wanted).max()
