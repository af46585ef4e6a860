"""Small random checkpoints in other people's formats, written by other people's libraries (torch, transformers).

What it is not: our own writers; `test_convert.py` proves those against these.
What is surprising: sizes differ in every dimension that could be mistaken for another, and divide by eight shards.
"""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any

import numpy as np
import torch

from puna.kernels.layouts import BF16, Weight
from puna.models import decoder
from puna.models.config import DecoderConfig, read_meta
from puna.weights import names
from puna.weights.checkpoint import Checkpoint
from puna.weights.files import raw

PARAMS: dict[str, Any] = {
    "dim": 64, "n_layers": 2, "n_heads": 16, "n_kv_heads": 8, "vocab_size": 56, "multiple_of": 8, "norm_eps": 1e-5,
    "rope_theta": 500000.0,
}  # fmt: skip
"""head_dim 4, hidden_dim 176."""

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COLUMNS = ("wo.weight", "w2.weight")


def meta_config(**changes: Any) -> DecoderConfig:
    return read_meta(PARAMS | changes).config


def random_state(
    config: DecoderConfig, convention: names.Convention = "meta", dtype: str = "bf16", seed: int = 0
) -> dict[str, torch.Tensor]:
    """A state dict with the names of `convention`: random, norms near one."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in decoder.shapes(config).items():
        values = torch.randn(shape, generator=generator) * 0.2 + (len(shape) == 1)
        state[names.foreign(name, convention)] = values.to(TORCH_DTYPES[dtype])
    return state


def split(
    state: dict[str, torch.Tensor], shards: int, embedding_by: str, kv_heads: int = 8
) -> list[dict[str, torch.Tensor]]:
    """What each rank of Meta's model parallelism holds; `embedding_by` is "dim" (Llama 1, 2) or "vocab" (Llama 3)."""
    ranks: list[dict[str, torch.Tensor]] = [{} for _ in range(shards)]
    for name, tensor in state.items():
        columns = name.endswith(COLUMNS) or (name == "tok_embeddings.weight" and embedding_by == "dim")
        if tensor.dim() == 1:
            parts = [tensor] * shards
        elif name.endswith(("wk.weight", "wv.weight")) and kv_heads < shards:
            heads = tensor.chunk(kv_heads)
            parts = [heads[i * kv_heads // shards] for i in range(shards)]
        else:
            parts = list(tensor.chunk(shards, 1 if columns else 0))
        for rank, part in zip(ranks, parts, strict=True):
            rank[name] = part.clone().contiguous()
    for rank in ranks:
        rank["rope.freqs"] = torch.zeros(2)
    return ranks


def save_meta(
    folder: Path, state: dict[str, torch.Tensor], *, shards: int = 1, embedding_by: str = "vocab", **changes: Any
) -> Path:
    """A folder of Meta's layout, written by torch."""
    folder.mkdir(parents=True, exist_ok=True)
    params = PARAMS | changes
    (folder / "params.json").write_text(json.dumps(params))
    for i, rank in enumerate(split(state, shards, embedding_by, params["n_kv_heads"])):
        torch.save(rank, folder / f"consolidated.{i:02d}.pth")
    return folder


def hub_model(seed: int = 0, **changes: Any) -> Any:
    """A random transformers model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": 56, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    }  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**(sizes | changes)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def bits(value: Any) -> np.ndarray[Any, Any]:
    """The raw words of a weight or a torch tensor, to compare bit for bit."""
    if isinstance(value, torch.Tensor):
        value = value.detach().contiguous()
        value = BF16(value.view(torch.uint16).numpy()) if value.dtype == torch.bfloat16 else value.numpy()
    array = value.bits if isinstance(value, BF16) else value
    return np.ascontiguousarray(array).view(f"u{array.itemsize}")


def mapped(weight: Weight) -> bool:
    """Whether a weight is a view of a mapped file; NumPy says that a view of copied bytes owns no data either."""
    base: Any = raw(weight)
    while isinstance(base, np.ndarray):
        base = base.base
    return isinstance(base.obj if isinstance(base, memoryview) else base, mmap.mmap)


def assert_holds(checkpoint: Checkpoint, state: dict[str, torch.Tensor], convention: names.Convention = "meta") -> None:
    """Every parameter of the checkpoint has the bits of the state dict."""
    assert list(checkpoint.tensors) == list(decoder.shapes(checkpoint.config))
    for name, tensor in checkpoint.tensors.items():
        expected = state[names.foreign(name, convention)]
        weight = tensor.read()
        assert tensor.shape == weight.shape == tuple(expected.shape)
        assert TORCH_DTYPES[tensor.dtype] == expected.dtype
        assert np.array_equal(bits(weight), bits(expected)), name
