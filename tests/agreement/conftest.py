"""Small random Llamas, each with transformers' answer computed once and shared by every test of the session.

What it is: the models (`CASES`), the `oracle` fixture (transformers' logits and Puna's trees over the same numbers),
and `kernels`, which settles the ops for one test and puts them back.
What is surprising: norms are not near 1 and weights are not near 0, as transformers would initialise them: attention
over such a model is nearly uniform, and a wrong rope would hardly show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from model_arrays import answers, host_array
from transformers import LlamaConfig, LlamaForCausalLM

from puna.kernels import ops
from puna.models import decoder
from puna.models.config import DecoderConfig, read_hub
from puna.models.tree import DecoderWeights
from puna.weights import names

torch.set_num_threads(1)  # models this small lose ten times what they win from a second thread

Floats = npt.NDArray[np.float32]
ORIGINAL_CONTEXT = 64
ROWS = (83, 70, 77)
"""Lengths of the sequences of every model: all past ORIGINAL_CONTEXT."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _scaled(factor: float) -> dict[str, Any]:
    # At base 500,000 these factors leave a frequency of each kind, kept, ramped and stretched, in every head_dim below.
    return {
        "rope_type": "llama3", "rope_theta": 500_000.0, "factor": factor, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": ORIGINAL_CONTEXT,
    }  # fmt: skip


CASES: dict[str, dict[str, Any]] = {
    "llama1": {"dim": 40, "heads": 5, "kv_heads": 5, "layers": 3, "hidden": 72, "vocab": 61, "eps": 1e-6},
    "llama2-gqa": {"dim": 48, "heads": 6, "kv_heads": 2, "layers": 3, "hidden": 80, "vocab": 67},
    "codellama": {"dim": 32, "heads": 4, "kv_heads": 1, "layers": 3, "hidden": 56, "vocab": 71, "theta": 1e6},
    "llama3": {"dim": 48, "heads": 6, "kv_heads": 3, "layers": 2, "hidden": 88, "vocab": 73, "theta": 5e5},
    "llama3.1": {"dim": 64, "heads": 4, "kv_heads": 1, "layers": 3, "hidden": 72, "vocab": 79, "rope": _scaled(8.0)},
    "llama3.2": {
        "dim": 64, "heads": 4, "kv_heads": 2, "layers": 3, "hidden": 56, "vocab": 83, "rope": _scaled(32.0),
        "tied": True,
    },
    "biases": {"dim": 48, "heads": 4, "kv_heads": 2, "layers": 3, "hidden": 40, "vocab": 59, "biases": True},
    "linear": {
        "dim": 40, "heads": 4, "kv_heads": 2, "layers": 3, "hidden": 64, "vocab": 53,
        "rope": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
    },
    "head-dim": {"dim": 42, "heads": 6, "kv_heads": 3, "head_dim": 10, "layers": 2, "hidden": 48, "vocab": 89},
}  # fmt: skip


def hub_config(
    *, dim: int, heads: int, kv_heads: int, layers: int, hidden: int, vocab: int, eps: float = 1e-5,
    head_dim: int | None = None, theta: float = 10_000.0, rope: dict[str, Any] | None = None,
    tied: bool = False, biases: bool = False, context: int = ORIGINAL_CONTEXT,
) -> LlamaConfig:  # fmt: skip
    """transformers' config of one case."""
    rope = rope or {"rope_type": "default", "rope_theta": theta}
    return LlamaConfig(
        hidden_size=dim, num_attention_heads=heads, num_key_value_heads=kv_heads, num_hidden_layers=layers,
        intermediate_size=hidden, vocab_size=vocab, rms_norm_eps=eps, head_dim=head_dim, rope_parameters=rope,
        tie_word_embeddings=tied, attention_bias=biases, mlp_bias=biases,
        max_position_embeddings=int(context * rope.get("factor", 1)),
    )  # fmt: skip


def random_model(config: LlamaConfig, seed: int) -> LlamaForCausalLM:
    """A float32 model whose numbers spread as a trained one's do: scores of order 1, norms away from 1, real biases."""
    model = LlamaForCausalLM(config).eval()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.uniform_(0.5, 1.5, generator=random)
            elif p.ndim == 1:
                p.normal_(0, 0.5, generator=random)
            else:
                p.normal_(0, 1.5 * p.shape[1] ** -0.5, generator=random)
    return model


def cast(model: LlamaForCausalLM, dtype: torch.dtype) -> LlamaForCausalLM:
    """The parameters in another type, and rope's table left in float32, which is how `from_pretrained` leaves it."""
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model


def trees(model: LlamaForCausalLM, config: DecoderConfig) -> tuple[DecoderWeights, DecoderWeights]:
    """The model's own numbers as Puna's tree: (host arrays, tensors that share memory and gradients with the model)."""
    parameters = dict(model.named_parameters())
    assert len(parameters) == len(decoder.shapes(config))
    tensors = decoder.build(config, lambda name: parameters[names.foreign(name, "hub")])
    host = decoder.build(config, lambda name: host_array(parameters[names.foreign(name, "hub")]))
    tensors = DecoderWeights(
        tensors.embedding, tensors.layers, tensors.norm, tensors.head, torch.from_numpy(tensors.inv_freq)
    )
    return host, tensors


@dataclass
class Oracle:
    """One model in one type of weights: Puna's trees, the token ids, and what transformers answers."""

    config: DecoderConfig
    model: LlamaForCausalLM
    host: DecoderWeights
    tensors: DecoderWeights
    ids: list[npt.NDArray[np.int32]]
    exact: list[Floats]
    """transformers in float32 on these weights: [T, V] a row."""
    rounded: list[Floats]
    """transformers in the weights' own type (the same as `exact` for fp32)."""


@cache
def build_oracle(case: str, dtype: str) -> Oracle:
    """See Oracle; the same for every test that asks."""
    config = hub_config(**CASES[case])
    seed = list(CASES).index(case)
    model = cast(random_model(config, seed), DTYPES[dtype])
    ids = np.random.default_rng(seed)
    rows = [ids.integers(0, config.vocab_size, length, dtype=np.int32) for length in ROWS]
    rounded = answers(model, rows)
    exact = rounded
    if dtype != "fp32":
        exact = answers(cast(cast(random_model(config, seed), DTYPES[dtype]), torch.float32), rows)
    ours = read_hub(config.to_dict())
    assert ours.unknown == ()
    return Oracle(ours.config, model, *trees(model, ours.config), rows, exact, rounded)


@pytest.fixture(scope="session")
def oracle() -> Callable[[str, str], Oracle]:
    """`oracle(case, dtype)`, computed on first use."""
    return build_oracle


@pytest.fixture(scope="session")
def cases() -> tuple[str, ...]:
    """The names of all models."""
    return tuple(CASES)


@pytest.fixture
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Settle what serves this test (an indirect parameter: one of `--kernels`, or `torch`), and `auto` afterwards."""
    ops.select("auto" if request.param == "torch" else request.param)
    yield request.param
    ops.select("auto")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for `kernels` runs on the NumPy reference, each instruction set of this machine, and torch.

    One that asks for `oracle` and a `case` runs on every model.
    """
    if {"oracle", "case"} <= set(metafunc.fixturenames):
        metafunc.parametrize("case", CASES)
    if "kernels" not in metafunc.fixturenames:
        return
    try:
        from puna.kernels import cpu

        native = [pytest.param(isa) for isa in cpu.isas()]
    except ImportError:
        native = [pytest.param("auto", id="cpp", marks=pytest.mark.skip("the C++ extension is not built here"))]
    metafunc.parametrize("kernels", [pytest.param("reference"), *native, pytest.param("torch")], indirect=True)
