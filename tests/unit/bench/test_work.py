"""Bytes, operations and the least time of each kind of work, on a model small enough to count by hand."""

from __future__ import annotations

import pytest

from puna.bench.work import FULL, QUICK, STARTS, Model, Work, bytes_read, least_seconds, operations
from puna.models.config import DecoderConfig
from puna.models.llama4_config import Llama4Config
from puna.models.rope import Rope

CONFIG = DecoderConfig(
    generation="llama3", vocab_size=10, dim=4, layers=2, heads=2, kv_heads=1, head_dim=2, hidden_dim=6, norm_eps=1e-5,
    rope=Rope(2, 1e4), context_length=64, tied_head=True,
)  # fmt: skip
LAYER = 4 * 4 + 2 * 4 + 2 * 4 + 4 * 4 + 3 * 6 * 4  # q, k, v, o, and gate, up, down
HEAD = 10 * 4
MODEL = Model(CONFIG, sizes={"layers.0.q.weight": 600, "embedding": 400}, products="int8", kv_type="fp16")


def test_a_step_reads_each_matrix_once_and_every_stream_s_cache() -> None:
    one = Work("decode", "tokens/s", "decode", context=5)
    number = 2 * 2 * 1 * 2 * 2  # keys and values, layers, heads, head size, bytes
    assert bytes_read(one, MODEL) == 1000 + 5 * number
    eight = Work("decode_8_streams", "tokens/s", "decode", streams=8, context=5)
    assert bytes_read(eight, MODEL) == 1000 + 8 * 5 * number
    assert bytes_read(Work("prefill", "tokens/s", "prefill", tokens=9), MODEL) == 1000


def test_operations() -> None:
    # One token that sees itself and five before it.
    one = Work("decode", "tokens/s", "decode", context=5)
    assert operations(one, MODEL) == 2 * (2 * LAYER + HEAD) + 4 * 6 * 2 * 2 * 2
    eight = Work("decode", "tokens/s", "decode", streams=8, context=5)
    assert operations(eight, MODEL) == 8 * operations(one, MODEL)
    # A prompt of three: they see 1, 2 and 3 tokens; the head runs once.
    prompt = Work("prefill", "tokens/s", "prefill", tokens=3)
    assert operations(prompt, MODEL) == 2 * (3 * 2 * LAYER + HEAD) + 4 * (1 + 2 + 3) * 2 * 2 * 2


def test_the_larger_of_two_times_is_the_least() -> None:
    work = Work("decode", "tokens/s", "decode", context=5)
    read, done = bytes_read(work, MODEL), operations(work, MODEL)
    assert least_seconds(work, MODEL, {"read": read / 2, "int8": done / 1}) == (2.0, "memory")
    assert least_seconds(work, MODEL, {"read": read / 2, "int8": done / 3}) == (3.0, "arithmetic")
    # Without the instruction the products are computed in fp32; without any figure nothing is known.
    assert least_seconds(work, MODEL, {"read": read / 2, "fp32": done / 3}) == (3.0, "arithmetic")
    assert least_seconds(work, MODEL, {"read": 1.0}) is None
    assert least_seconds(work, MODEL, {}) is None
    assert least_seconds(STARTS[0], MODEL, {"read": 1.0, "int8": 1.0}) is None


@pytest.mark.parametrize(
    ("name", "seconds", "shown"),
    [("decode", 0.5, 2.0), ("decode_8_streams", 0.5, 16.0), ("prefill_512", 2.0, 256.0), ("cold_start", 0.7, 0.7)],
)
def test_figures_in_their_unit(name: str, seconds: float, shown: float) -> None:
    work = next(work for work in (*QUICK, *FULL, *STARTS) if work.name == name)
    assert work.shown(seconds) == shown


def test_the_names_that_scripts_rely_on() -> None:
    assert [work.name for work in QUICK] == ["decode", "prefill_512", "decode_8_streams"]
    assert [work.name for work in FULL] == ["prefill_2048", "decode_at_8192"]
    assert {"cold_start", "peak_memory"} <= {work.name for work in STARTS}


def test_a_mixture_is_read_and_multiplied_as_far_as_it_is_chosen() -> None:
    config = Llama4Config(
        "llama4", 10, 4, 2, 2, 1, 2, 6, 1e-5, Rope(2, 1e4), 64, expert_hidden_dim=3, experts=16, experts_per_token=1,
        moe_layers=(0, 1), qk_norm=True,
    )  # fmt: skip
    sizes = {"embedding": 400, "head": 400, "layers.0.q.weight": 200, "layers.0.experts.3.up.weight": 1600}
    model = Model(config, sizes, "int8", "fp16")
    assert bytes_read(Work("decode", "tokens/s", "decode"), model) == 600 + 100
    # Two tokens choose the same expert once in sixteen times.
    assert bytes_read(Work("decode", "tokens/s", "decode", streams=2), model) == pytest.approx(600 + 100 * (2 - 1 / 16))
    layer = 4 * 4 + 2 * 4 + 2 * 4 + 4 * 4 + 16 * 4 + 2 * 3 * 3 * 4  # the router, and two parts of sixteen and one
    assert operations(Work("decode", "tokens/s", "decode"), model) == 2 * (2 * layer + 10 * 4) + 4 * 1 * 2 * 2 * 2
