"""The tables of names, word for word, against the lists that transformers, Meta, llama2.c and torchtune write."""

from __future__ import annotations

import numpy as np
import pytest

from puna.models import decoder
from puna.models.config import read_hub
from puna.weights.names import Convention, foreign, ignorable, repair, to_halves, to_neighbours

CONFIG = read_hub(
    {
        "vocab_size": 16, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3,
        "num_key_value_heads": 1, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "attention_bias": True,
        "mlp_bias": True,
    }
).config  # fmt: skip

TABLES: dict[Convention, dict[str, str]] = {
    "hub": {
        "embedding": "model.embed_tokens.weight",
        "layers.1.attention_norm": "model.layers.1.input_layernorm.weight",
        "layers.1.q.weight": "model.layers.1.self_attn.q_proj.weight",
        "layers.1.q.bias": "model.layers.1.self_attn.q_proj.bias",
        "layers.1.k.weight": "model.layers.1.self_attn.k_proj.weight",
        "layers.1.v.weight": "model.layers.1.self_attn.v_proj.weight",
        "layers.1.o.weight": "model.layers.1.self_attn.o_proj.weight",
        "layers.1.mlp_norm": "model.layers.1.post_attention_layernorm.weight",
        "layers.1.gate.weight": "model.layers.1.mlp.gate_proj.weight",
        "layers.1.up.weight": "model.layers.1.mlp.up_proj.weight",
        "layers.1.down.weight": "model.layers.1.mlp.down_proj.weight",
        "layers.1.down.bias": "model.layers.1.mlp.down_proj.bias",
        "norm": "model.norm.weight",
        "head": "lm_head.weight",
    },
    "meta": {
        "embedding": "tok_embeddings.weight",
        "layers.1.attention_norm": "layers.1.attention_norm.weight",
        "layers.1.q.weight": "layers.1.attention.wq.weight",
        "layers.1.k.weight": "layers.1.attention.wk.weight",
        "layers.1.v.weight": "layers.1.attention.wv.weight",
        "layers.1.o.weight": "layers.1.attention.wo.weight",
        "layers.1.mlp_norm": "layers.1.ffn_norm.weight",
        "layers.1.gate.weight": "layers.1.feed_forward.w1.weight",
        "layers.1.up.weight": "layers.1.feed_forward.w3.weight",
        "layers.1.down.weight": "layers.1.feed_forward.w2.weight",
        "norm": "norm.weight",
        "head": "output.weight",
    },
    "torchtune": {
        "embedding": "tok_embeddings.weight",
        "layers.1.attention_norm": "layers.1.sa_norm.scale",
        "layers.1.q.weight": "layers.1.attn.q_proj.weight",
        "layers.1.k.weight": "layers.1.attn.k_proj.weight",
        "layers.1.v.weight": "layers.1.attn.v_proj.weight",
        "layers.1.o.weight": "layers.1.attn.output_proj.weight",
        "layers.1.mlp_norm": "layers.1.mlp_norm.scale",
        "layers.1.gate.weight": "layers.1.mlp.w1.weight",
        "layers.1.up.weight": "layers.1.mlp.w3.weight",
        "layers.1.down.weight": "layers.1.mlp.w2.weight",
        "norm": "norm.scale",
        "head": "output.weight",
    },
}


@pytest.mark.parametrize("convention", TABLES)
def test_names(convention: Convention) -> None:
    assert {name: foreign(name, convention) for name in TABLES[convention]} == TABLES[convention]
    every = [foreign(name, convention) for name in decoder.shapes(CONFIG)]
    assert len(set(every)) == len(every)


def test_what_may_be_left_over() -> None:
    for name in ("rope.freqs", "layers.3.attention.inner_attention.rope.freqs", "freqs_cos", "layers.0.attention.mask",
                 "model.rotary_emb.inv_freq", "model.layers.31.self_attn.rotary_emb.inv_freq"):  # fmt: skip
        assert ignorable(name), name
    for name in ("output.weight", "rope.freqs.weight", "x.rope.freqs", "layers.0.attention.wq.bias"):
        assert not ignorable(name), name


def test_the_two_orders_of_rows() -> None:
    """Two heads of six rows: neighbours (0, 1), (2, 3), (4, 5) become halves 0, 2, 4 | 1, 3, 5."""
    rows = np.arange(12).reshape(12, 1)
    assert to_halves(rows, 2)[:, 0].tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    assert np.array_equal(to_neighbours(to_halves(rows, 2), 2), rows)
    assert np.array_equal(to_neighbours(to_halves(rows[:, 0], 2), 2), rows[:, 0])


def test_only_q_and_k_are_reordered_by_their_own_heads() -> None:
    q, k = np.arange(12), np.arange(4)
    assert repair("layers.0.q.bias", q, CONFIG, interleaved=True).tolist() == [0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11]
    assert repair("layers.0.k.bias", k, CONFIG, interleaved=True).tolist() == [0, 2, 1, 3]
    for name in ("layers.0.v.bias", "layers.0.o.bias", "embedding", "norm", "layers.0.mlp_norm"):
        assert repair(name, q, CONFIG, interleaved=True) is q
    assert repair("layers.0.q.bias", q, CONFIG, interleaved=False) is q
