"""The host's runner: its cache in each type, growing, against the same model with a cache that is never rounded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from puna.engine.runner import HostRunner, settled_kv_type
from puna.errors import UsageError
from puna.kernels.layouts import BF16, Packed, to_bf16
from puna.models import decoder
from puna.models.config import DecoderConfig
from puna.models.rope import Rope
from puna.models.tree import DecoderWeights

CONFIG = DecoderConfig(
    generation="llama2", vocab_size=61, dim=64, layers=2, heads=4, kv_heads=2, head_dim=32, hidden_dim=48,
    norm_eps=1e-5, rope=Rope(32, 10000.0), context_length=2048,
)  # fmt: skip


def model(convert: Any = lambda x: x) -> DecoderWeights:
    rng = np.random.default_rng(3)

    def parameter(name: str) -> Any:
        shape = decoder.shapes(CONFIG)[name]
        values = rng.standard_normal(shape, dtype=np.float32) * np.float32(0.3 if len(shape) == 2 else 1)
        return convert(values) if len(shape) == 2 else values

    return decoder.build(CONFIG, parameter)


TOKENS = [int(i) for i in np.random.default_rng(5).integers(0, CONFIG.vocab_size, 300)]


@pytest.mark.parametrize(
    ("kv_type", "tolerance"), [("fp32", 1e-5), ("fp16", 0.03), ("bf16", 0.04), ("q8_0", 0.15), ("auto", 1e-5)]
)
def test_each_type_answers_as_the_whole_text_does_also_when_it_grew(kv_type: str, tolerance: float) -> None:
    """A prompt, then one by one past the first cache's end. Random heads are sharp and magnify rounding."""
    runner = HostRunner(CONFIG, model(), kv_type)
    want = runner.all_logits(TOKENS)
    runner.reset(250)
    got = [runner.run(TOKENS[:250], 0), *(runner.run([token], 250 + i) for i, token in enumerate(TOKENS[250:]))]
    assert runner._cache is not None
    assert runner._cache.capacity == 512
    error = np.abs(np.stack(got) - want[249:])
    assert error.max() <= tolerance * np.abs(want).max()
    if tolerance > 1e-3:  # and it is really rounded
        assert error.max() > 1e-2 * tolerance * np.abs(want).max()


def test_auto_is_fp32_only_where_every_matrix_is() -> None:
    assert HostRunner(CONFIG, model()).kv_type == "fp32"
    assert HostRunner(CONFIG, model(to_bf16)).kv_type == "fp16"
    assert HostRunner(CONFIG, model(to_bf16), "fp32").kv_type == "fp32"


def test_the_cache_is_of_that_type() -> None:
    for kv_type, kind in (("fp32", np.ndarray), ("fp16", np.ndarray), ("bf16", BF16), ("q8_0", Packed)):
        runner = HostRunner(CONFIG, model(), kv_type)
        runner.reset(1)
        assert runner._cache is not None
        for array in (*runner._cache.keys, *runner._cache.values):
            assert isinstance(array, kind)
            assert array.shape == (1, 256, 2, 32)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UsageError, match="--kv-type fp8: no such type"):
        settled_kv_type("fp8", CONFIG, all_fp32=True)
    small = DecoderConfig("llama2", 61, 64, 2, 4, 2, 16, 48, 1e-5, Rope(16, 1e4), 64)
    with pytest.raises(UsageError, match="packs 32 numbers together, and this model's heads have 16"):
        settled_kv_type("q8_0", small, all_fp32=True)
