"""`--device cuda` gives what the CPU gives. Skipped, saying so, where there is no GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from puna import LLM

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
PROMPT = "Once upon a time"


def test_cria_writes_the_same_story() -> None:
    options = {"temperature": 0, "max_tokens": 100}
    there = LLM("cria", dtype="fp32", device="cuda").generate(PROMPT, **options)
    assert there.text == LLM("cria", dtype="fp32").generate(PROMPT, **options).text
    assert there.kernels == "torch cuda"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_logits_agree(dtype: str) -> None:
    here = LLM("cria", dtype="fp32").logits(PROMPT)
    there = LLM("cria", dtype=dtype, device="cuda").logits(PROMPT)
    assert np.abs(there - here).max() < (1e-4 if dtype == "fp32" else 5e-2) * np.abs(here).max()
