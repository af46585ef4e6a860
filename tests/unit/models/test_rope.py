"""Rope's tables against transformers' own functions, and against the rule they come from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from puna.models import llama3
from puna.models.rope import Llama3Scaling, Rope


def transformers_table(head_dim: int, **rope: Any) -> Any:
    """inv_freq as transformers computes it, float32 [D/2]."""
    config = LlamaConfig(hidden_size=head_dim * 2, num_attention_heads=2, head_dim=head_dim, rope_parameters=rope)
    kind = rope["rope_type"]
    function = LlamaRotaryEmbedding.compute_default_rope_parameters if kind == "default" else ROPE_INIT_FUNCTIONS[kind]
    table, attention_scaling = function(config, device="cpu")
    assert attention_scaling == 1.0
    return table.numpy()


def units_apart(a: Any, b: Any) -> int:
    """The largest distance in units in the last place, for positive float32."""
    assert a.dtype == b.dtype == np.float32
    assert a.shape == b.shape
    return int(np.abs(a.view(np.int32).astype(np.int64) - b.view(np.int32)).max())


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0, 1_000_000.0, 12_345.6])
@pytest.mark.parametrize("head_dim", [2, 8, 48, 64, 96, 100, 128])
def test_default(head_dim: int, theta: float) -> None:
    theirs = transformers_table(head_dim, rope_type="default", rope_theta=theta)
    assert units_apart(Rope(head_dim, theta).inv_freq(), theirs) <= 1


@pytest.mark.parametrize("factor", [2.0, 3.7, 8.0])
@pytest.mark.parametrize("head_dim", [8, 96, 128])
def test_linear(head_dim: int, factor: float) -> None:
    theirs = transformers_table(head_dim, rope_type="linear", rope_theta=10_000.0, factor=factor)
    assert units_apart(Rope(head_dim, 10_000.0, linear_factor=factor).inv_freq(), theirs) <= 1


@pytest.mark.parametrize(
    "scaling",
    [llama3.SCALING_3_1, llama3.SCALING_3_2, Llama3Scaling(4.0, 1.0, 4.0, 64), Llama3Scaling(8.0, 1.5, 3.0, 500)],
)
@pytest.mark.parametrize("head_dim", [16, 48, 64, 128])
def test_llama3(head_dim: int, scaling: Llama3Scaling) -> None:
    theirs = transformers_table(
        head_dim, rope_type="llama3", rope_theta=llama3.ROPE_THETA, factor=scaling.factor,
        low_freq_factor=scaling.low_freq_factor, high_freq_factor=scaling.high_freq_factor,
        original_max_position_embeddings=scaling.original_context,
    )  # fmt: skip
    ours = Rope(head_dim, llama3.ROPE_THETA, llama3=scaling).inv_freq()
    assert units_apart(ours, theirs) <= 1


def test_what_each_stretching_does() -> None:
    plain = Rope(128, 500_000.0).inv_freq()
    assert plain[0] == 1.0
    assert plain[32] == pytest.approx(500_000.0**-0.5, rel=1e-6)
    assert np.array_equal(Rope(128, 500_000.0, linear_factor=4.0).inv_freq(), plain / np.float32(4))

    stretched = Rope(128, 500_000.0, llama3=llama3.SCALING_3_1).inv_freq()
    wavelength = 2 * np.pi / plain.astype(np.float64)
    fast, slow = wavelength < 8192 / 4, wavelength > 8192
    assert fast.sum() > 10
    assert slow.sum() > 10
    assert (~fast & ~slow).sum() > 3
    assert np.array_equal(stretched[fast], plain[fast])
    assert np.array_equal(stretched[slow], plain[slow] / np.float32(8))
    between = stretched[~fast & ~slow] / plain[~fast & ~slow]
    assert np.all(np.diff(between) < 0)
    assert np.all((between > 1 / 8) & (between < 1))
