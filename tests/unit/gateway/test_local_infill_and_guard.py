"""Gaps and judgements through a model on this machine: small random models with the tokenizers of the real ones."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from puna.errors import UsageError
from puna.gateway.local import LocalBackend
from puna.llm import LLM
from puna.text.guard import judge_ids
from puna.text.infill import infill_ids
from puna.types import Infill, Judge, Message, Request, Sampling

Make = Callable[..., Path]


def _write(folder: Path, vocab: int, layers: int, theta: float) -> None:
    from safetensors.numpy import save_file

    dim, rng = 16, np.random.default_rng(3)
    folder.mkdir()
    config = {
        "model_type": "llama", "hidden_size": dim, "num_attention_heads": 2, "num_key_value_heads": 1,
        "num_hidden_layers": layers, "intermediate_size": 32, "vocab_size": vocab, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5, "rope_theta": theta, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))

    def matrix(*shape: int) -> Any:
        return rng.standard_normal(shape, np.float32) / 4

    ones = np.ones(dim, np.float32)
    weights = {"model.embed_tokens.weight": matrix(vocab, dim), "lm_head.weight": matrix(vocab, dim)}
    weights["model.norm.weight"] = ones
    for i in range(layers):
        at = f"model.layers.{i}."
        for name, shape in {
            "self_attn.q_proj": (dim, dim), "self_attn.k_proj": (8, dim), "self_attn.v_proj": (8, dim),
            "self_attn.o_proj": (dim, dim), "mlp.gate_proj": (32, dim), "mlp.up_proj": (32, dim),
            "mlp.down_proj": (dim, 32),
        }.items():  # fmt: skip
            weights[f"{at}{name}.weight"] = matrix(*shape)
        weights[f"{at}input_layernorm.weight"] = weights[f"{at}post_attention_layernorm.weight"] = ones
    save_file(weights, folder / "model.safetensors")


def _piece(text: str) -> bytes:
    body = b"\n" + bytes([len(text.encode())]) + text.encode() + b"\x15" + struct.pack("<f", -1e6)
    return b"\n" + bytes([len(body)]) + body


@pytest.fixture(scope="module")
def make(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A folder with a model, and Llama 2's tokenizer or, for code, the same with the marks of a gap."""

    def at(name: str, *, marks: bool, layers: int = 1) -> Path:
        folder = tmp_path_factory.mktemp("models") / name
        words = (reference / "tokenizers/llama2/tokenizer.model").read_bytes()
        if marks:
            names = [*(f"▁<f{n}" for n in range(7)), "▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"]
            words += b"".join(map(_piece, [*names, *(f"▁<g{n}" for n in range(5))]))
        _write(folder, 32016 if marks else 32000, layers, 1e6 if marks else 1e4)
        (folder / "tokenizer.model").write_bytes(words)
        return folder

    return at


def test_a_gap_is_filled_up_to_its_end(make: Make) -> None:
    llm = LLM(make("CodeLlama-7b", marks=True))
    gap = Infill("def f(x):\n    ", "\n    return y")
    assert llm.infills
    assert not llm.guards
    assert 32010 in llm.stop_ids
    free = llm.generate(gap, temperature=0, max_tokens=6)
    assert free.prompt_tokens == len(infill_ids(llm.tokenizer, gap))
    assert free.finish_reason == "length"
    ended = llm.generate(gap, temperature=0, max_tokens=6, logit_bias=((32010, 100.0),))
    assert (ended.text, ended.finish_reason) == ("", "stop")
    other = llm.generate(Infill(gap.prefix, gap.suffix, True), temperature=0, max_tokens=6)
    assert other.token_ids != free.token_ids  # the same tokens, in another order
    with pytest.raises(UsageError, match="no guard model"):
        llm.generate(Judge((Message("user", "Hi"),)))
    with pytest.raises(UsageError, match="no place for a system message"):
        llm.generate(gap, system="Be brief.")

    async def served() -> None:
        backend = LocalBackend(llm)
        try:
            assert backend.card.infills
            sampling = Sampling(temperature=0, max_tokens=6)
            events = [event async for event in backend.generate(Request(gap, sampling))]
            assert "".join(event.text for event in events) == free.text
            assert list(await backend.encode(gap)) == infill_ids(llm.tokenizer, gap)
        finally:
            await backend.close()

    asyncio.run(served())


def test_which_models_fill_no_gap(make: Make) -> None:
    big = LLM(make("CodeLlama-70b", marks=True, layers=80))
    assert not big.infills
    with pytest.raises(UsageError, match="not trained to fill"):
        big.generate(Infill("a", "b"))


def test_a_guard_is_known_by_its_name_and_asked_in_its_form(make: Make) -> None:
    llm = LLM(make("LlamaGuard-7b", marks=False))
    assert (llm.guards, llm.infills) == ("1", False)
    judge = Judge((Message("user", "Hi"), Message("assistant", "Hello.")))
    answer = llm.generate(judge, temperature=0, max_tokens=3)
    assert answer.prompt_tokens == len(judge_ids("1", llm.tokenizer, judge))

    async def served() -> None:
        backend = LocalBackend(llm)
        try:
            assert backend.card.guards == "1"
            sampling = Sampling(temperature=0, max_tokens=3)
            events = [event async for event in backend.generate(Request(judge, sampling))]
            assert "".join(event.text for event in events) == answer.text
        finally:
            await backend.close()

    asyncio.run(served())
