"""Puna's Llama 4 against transformers' Llama4ForCausalLM, by value, on small random models.

What it is: logits over {a Scout, a Maverick, two experts a token, none at all} x {fp32, bf16 weights} x {every way of
feeding a sequence} x {NumPy reference, each C++ instruction set, torch}, with chunks far shorter than the rows, queries
past the temperature's floor, and positions past the original context of a stretched rope; and gradients.
What is surprising: the two measures are those of `test_transformers`. With bf16 weights a router may pick another
expert than it does in float32, in transformers too, and one token's logits are then others altogether. So what is
compared in bf16 is the median token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from model_arrays import answers, host_array
from test_transformers import FP32_LIMIT, NOISE, WAYS, Ours, prefill
from transformers import Llama4ForCausalLM, Llama4TextConfig

from puna.kernels.layouts import PageTable, page_table
from puna.models import llama4
from puna.models.config import read_hub
from puna.models.llama4_config import Llama4Config
from puna.models.tree import Llama4Weights, Placed, tree_map

Floats = npt.NDArray[np.float32]
ROWS = (83, 70, 77)
SCOUT = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "scout": {
        "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "num_hidden_layers": 5, "head_dim": 8,
        "intermediate_size": 40, "intermediate_size_mlp": 80, "vocab_size": 61, "num_local_experts": 4,
        "attention_chunk_size": 16, "floor_scale": 8, "attn_scale": 0.4, "rope_parameters": SCOUT,
    },
    "maverick": {
        "hidden_size": 40, "num_attention_heads": 4, "num_key_value_heads": 1, "num_hidden_layers": 4, "head_dim": 10,
        "intermediate_size": 24, "intermediate_size_mlp": 56, "vocab_size": 67, "num_local_experts": 8,
        "attention_chunk_size": 48, "floor_scale": 16, "interleave_moe_layer_step": 2, "use_qk_norm": False,
    },
    "two-experts": {
        "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 3, "num_hidden_layers": 4, "head_dim": 14,
        "intermediate_size": 32, "intermediate_size_mlp": 48, "vocab_size": 53, "num_local_experts": 5,
        "num_experts_per_tok": 2, "attention_chunk_size": 8, "moe_layers": [1, 2], "no_rope_layers": [1, 0, 1, 1],
        "attention_bias": True, "tie_word_embeddings": True, "attn_temperature_tuning": False,
    },
    "no-experts": {
        "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3, "head_dim": 8,
        "intermediate_size": 40, "intermediate_size_mlp": 40, "vocab_size": 59, "num_local_experts": 0,
        "moe_layers": [], "no_rope_layers": [1, 1, 1], "layer_types": ["full_attention"] * 3,
    },
}  # fmt: skip


def hub_config(case: str) -> Llama4TextConfig:
    numbers = {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}, "rms_norm_eps": 1e-5}
    return Llama4TextConfig(**(numbers | CASES[case]), max_position_embeddings=512)


def random_model(config: Llama4TextConfig, seed: int) -> Llama4ForCausalLM:
    """Numbers that spread as a trained model's do: see `conftest.random_model`."""
    model = Llama4ForCausalLM(config).eval()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.uniform_(0.5, 1.5, generator=random)
            elif p.ndim == 1:
                p.normal_(0, 0.5, generator=random)
            else:  # of the fused experts the rows are the inputs
                p.normal_(0, 1.5 * p.shape[1] ** -0.5, generator=random)
    return model


def parameter(model: Llama4ForCausalLM, name: str) -> torch.Tensor:
    """The model's own numbers under a canonical name; an expert's are views of the fused tensors."""
    tops = {"embedding": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}
    if name in tops:
        return model.get_parameter(tops[name])
    _, i, part, *rest = name.split(".")
    layer = model.model.layers[int(i)]
    if part.endswith("norm"):
        found = layer.input_layernorm if part == "attention_norm" else layer.post_attention_layernorm
        return found.weight
    if part in "qkvo":
        return layer.self_attn.get_parameter(f"{part}_proj.{rest[0]}")
    if part == "router":
        return layer.feed_forward.router.weight
    if part == "shared":
        return layer.feed_forward.shared_expert.get_parameter(f"{rest[0]}_proj.weight")
    if part == "experts":
        fused, e = layer.feed_forward.experts, int(rest[0])
        gate, up = fused.gate_up_proj[e].T.chunk(2)
        return {"gate": gate, "up": up, "down": fused.down_proj[e].T}[rest[1]]
    return layer.feed_forward.get_parameter(f"{part}_proj.weight")


@dataclass
class Oracle:
    """One model in one type of weights, and what transformers answers in float32 and in that type."""

    config: Llama4Config
    model: Llama4ForCausalLM
    host: Llama4Weights
    tensors: Llama4Weights
    ids: list[npt.NDArray[np.int32]]
    exact: list[Floats]
    rounded: list[Floats]


@cache
def oracle(case: str, dtype: str) -> Oracle:
    config, seed = hub_config(case), list(CASES).index(case)
    model = random_model(config, seed)
    random = np.random.default_rng(seed)
    rows = [random.integers(0, config.vocab_size, length, dtype=np.int32) for length in ROWS]
    if dtype == "bf16":
        for p in model.parameters():
            p.data = p.data.to(torch.bfloat16)
        rounded = answers(model, rows)
        for p in model.parameters():
            p.data = p.data.float()
        exact = answers(model, rows)
        for p in model.parameters():
            p.data = p.data.to(torch.bfloat16)
    else:
        exact = rounded = answers(model, rows)
    read = read_hub(config.to_dict())
    assert read.unknown == ()
    assert isinstance(read.config, Llama4Config)
    shapes = llama4.shapes(read.config)
    assert all(parameter(model, name).shape == shape for name, shape in shapes.items())
    assert sum(p.numel() for p in model.parameters()) == llama4.parameter_count(read.config)
    host = llama4.build(read.config, lambda name: host_array(parameter(model, name)))
    tensors = llama4.build(read.config, lambda name: parameter(model, name))
    tensors = tree_map(lambda leaf: leaf if isinstance(leaf, torch.Tensor) else torch.from_numpy(leaf), tensors)
    return Oracle(read.config, model, host, tensors, rows, exact, rounded)


def errors(ours: list[Floats], exact: list[Floats]) -> npt.NDArray[np.float64]:
    """The RMS distance of each token's logits, of all rows."""
    rows = [np.float64(a) - b[: len(a)] for a, b in zip(ours, exact, strict=False)]
    return np.concatenate([np.sqrt(np.mean(np.square(row), -1)) for row in rows])


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_logits(kernels: str, case: str, dtype: str, way: Any) -> None:
    known = oracle(case, dtype)
    found = way(Ours(known.config, known.tensors if kernels == "torch" else known.host), known.ids)
    if dtype == "fp32":
        for ours, exact in zip(found, known.exact, strict=False):
            assert np.abs(ours - exact[: len(ours)]).max() < FP32_LIMIT * np.abs(exact).max()
        return
    ours, theirs = (np.median(errors(rows, known.exact)) for rows in (found, known.rounded))
    assert ours <= NOISE * theirs


@pytest.mark.parametrize(
    "change", ["chunk", "global_layers", "qk_norm", "temperature_floor", "temperature_scale", "rope"]
)
def test_each_number_shows(change: str) -> None:
    """Another chunk, floor, scale, … gives other logits: the comparison above looks at each of them."""
    known = oracle("scout", "fp32")
    values: dict[str, Any] = {
        "chunk": 32, "global_layers": (2,), "qk_norm": False, "temperature_floor": 9, "temperature_scale": 0.5,
        "rope": replace(known.config.rope, llama3=None),
    }  # fmt: skip
    config = replace(known.config, **{change: values[change]})
    weights = llama4.build(config, lambda name: host_array(parameter(known.model, name)))
    found = prefill(Ours(config, weights), known.ids)
    assert np.abs(found[0] - known.exact[0]).max() > 100 * FP32_LIMIT * np.abs(known.exact[0]).max()


def test_gradients() -> None:
    """Every parameter's gradient of a cross-entropy over two rows, in float32."""
    for case in ("scout", "two-experts"):
        known = oracle(case, "fp32")
        batch = torch.from_numpy(np.stack([row[: min(ROWS)] for row in known.ids[:2]])).long()

        def loss(scores: torch.Tensor, batch: torch.Tensor = batch) -> torch.Tensor:
            return F.cross_entropy(scores[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

        parameters = dict(known.model.named_parameters())
        tensors = llama4.build(known.config, lambda name, model=known.model: parameter(model, name))
        tensors = tree_map(lambda leaf: leaf if isinstance(leaf, torch.Tensor) else torch.from_numpy(leaf), tensors)
        ours = loss(llama4.logits(tensors, llama4.forward(tensors, known.config, batch.int())))
        theirs = loss(known.model(batch).logits)
        found = torch.autograd.grad(ours, list(parameters.values()))
        wanted = torch.autograd.grad(theirs, list(parameters.values()))
        for name, gradient, target in zip(parameters, found, wanted, strict=True):
            if name == "model.layers.1.self_attn.k_proj.bias":  # without rope it moves all scores alike: no gradient
                assert gradient.abs().max() < 1e-6
                continue
            assert target.abs().max() > 1e-6, name
            assert (gradient - target).abs().max() < FP32_LIMIT * target.abs().max(), name


def test_what_was_seen_stands_for_embeddings(kernels: str) -> None:
    """Rows of the embedding, placed over other tokens, whole and in pieces that cut through them."""
    known = oracle("scout", "fp32")
    model, ids = Ours(known.config, known.tensors if kernels == "torch" else known.host), known.ids[0][:40]
    table = known.tensors.embedding.detach()
    other = ids.copy()
    other[5:12], other[20:31] = 3, 3
    seen = [(0, 5, table[ids[5:12].astype(np.int64)]), (0, 20, table[ids[20:31].astype(np.int64)])]
    placed = [Placed(*each) if kernels == "torch" else Placed(each[0], each[1], each[2].numpy()) for each in seen]
    for sizes in ([40], [7, 1, 16, 16]):
        found = in_pieces(model, other, sizes, placed)
        assert np.abs(found - known.exact[0][:40]).max() < FP32_LIMIT * np.abs(known.exact[0]).max()


def in_pieces(model: Ours, row: npt.NDArray[np.int32], sizes: list[int], placed: list[Placed]) -> Floats:
    cache, parts, start = model.cache(4), [], 0
    for size in sizes:
        table: Any = page_table([start], [size], np.arange(4)[None])
        ids: Any = row[start : start + size].copy()
        if model.torch:
            ids, table = torch.from_numpy(ids), PageTable(*map(torch.from_numpy, table))
        with torch.no_grad():
            hidden = model.model.forward(model.weights, model.config, ids, table, cache, placed)
            parts.append(np.asarray(model.model.logits(model.weights, hidden)))
        start += size
    return np.concatenate(parts)
