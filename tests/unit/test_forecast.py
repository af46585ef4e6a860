"""The arithmetic of `puna plan`, against numbers worked out by hand, and against what the engine allocates."""

from __future__ import annotations

from dataclasses import replace

import pytest

from puna import forecast
from puna.engine import engine, runner
from puna.forecast import Load, Machine
from puna.models import decoder, llama4
from puna.models.config import DecoderConfig
from puna.models.llama4_config import Llama4Config
from puna.models.rope import Rope

DENSE = DecoderConfig("llama3", 100, 64, 2, 4, 2, 16, 128, 1e-5, Rope(16, 5e5), 4096, tied_head=True)
MIXTURE = Llama4Config(
    "llama4", 100, 64, 4, 4, 2, 16, 96, 1e-5, Rope(16, 5e5), 4096, chunk=1024, global_layers=(3,),
    expert_hidden_dim=32, experts=4, experts_per_token=1, moe_layers=(1, 3), qk_norm=True,
)  # fmt: skip
MACHINE = Machine("a machine", 10**9, 1e9, {"fp32": 1e9, "bf16": 4e9}, 5e8, measured=True)


def test_the_cache_of_a_dense_model_by_hand() -> None:
    # 2 layers of keys and values, 2 heads of 16 numbers, 128 tokens in pages of 64
    assert forecast.cache_bytes(DENSE, "fp16", 100, 64) == 2 * 2 * 2 * 16 * 2 * 128
    assert forecast.cache_bytes(DENSE, "fp32", 128, 64) == 2 * 2 * 2 * 16 * 4 * 128
    # Q8_0 takes 34 bytes for 32 numbers
    assert forecast.cache_bytes(replace(DENSE, head_dim=32), "q8_0", 1, 64) == 2 * 2 * 2 * 34 * 64


def test_a_chunked_layer_keeps_its_chunk() -> None:
    row = 2 * 2 * 16 * 2
    assert forecast.cache_bytes(MIXTURE, "fp16", 512, 64) == row * 4 * 512
    assert forecast.cache_bytes(MIXTURE, "fp16", 4096, 64) == row * (4096 + 3 * 1024)
    # pages of 48 tokens do not divide a chunk: its ends may lie in 23
    assert forecast.cache_bytes(MIXTURE, "fp16", 4096, 48) == row * (86 * 48 + 3 * 23 * 48)


@pytest.mark.parametrize("config", [DENSE, MIXTURE])
@pytest.mark.parametrize("tokens", [1, 64, 1000, 1025, 4096])
@pytest.mark.parametrize("page", [16, 48, 64])
def test_the_cache_is_what_the_engine_counts(config: DecoderConfig, tokens: int, page: int) -> None:
    pages = -(-tokens // page)
    local = min(pages, runner.window(config, page))
    counted = pages * runner.page_bytes(config, "fp16", page) + local * runner.local_page_bytes(config, "fp16", page)
    assert forecast.cache_bytes(config, "fp16", tokens, page) == counted


def test_a_chunk_of_a_prompt_is_the_engines() -> None:
    assert forecast.CHUNK == engine.PREFILL_CHUNK


def test_activations_by_hand() -> None:
    # x and its norm, rope's cos and sin, gate and up: wider than q, k, v and heads (64 + 32 + 32 + 64)
    assert forecast.activation_bytes(DENSE, 3) == 4 * (512 * (2 * 64 + 16 + 2 * 128) + 2 * 3 * 100)
    assert forecast.activation_bytes(replace(DENSE, hidden_dim=10), 1) == 4 * (512 * (2 * 64 + 16 + 192) + 2 * 100)
    # an op at a time; the dense layers' 96 are wider than the experts' 32, and than q, k and v are before and after
    assert forecast.activation_bytes(MIXTURE, 1) == 4 * (512 * (4 * 64 + 3 * 96) + 2 * 100)


def test_a_footprint_is_its_parts() -> None:
    need = forecast.footprint(DENSE, 1000, "fp16", Load(100, users=3), 64)
    assert need.weights == 1000
    assert need.cache == 3 * forecast.cache_bytes(DENSE, "fp16", 100, 64)
    assert need.program == forecast.PROGRAM + 100 * forecast.WORD
    assert need.total == need.weights + need.cache + need.activations + need.program


def test_weights_by_their_types() -> None:
    shapes = {"embedding": (100, 64), "norm": (64,), "head": (100, 256)}
    sizes = forecast.weight_bytes(shapes, {"embedding": "Q8_0", "norm": "F32", "head": "Q4_K"})
    assert sizes == {"embedding": 100 * 68, "norm": 256, "head": 100 * 144}


def test_a_mixture_is_read_by_what_its_tokens_choose() -> None:
    assert forecast.expert_share(DENSE, 1) == 1.0
    assert forecast.expert_share(MIXTURE, 1) == 0.25
    assert forecast.expert_share(MIXTURE, 2) == pytest.approx(1 - 0.75**2)
    sizes = {"embedding": 7, "head": 10, "layers.1.q.weight": 100, "layers.1.experts.0.up.weight": 1000, "vision.a": 9}
    assert forecast.bytes_read(MIXTURE, sizes, 1, 5) == 5 + 10 + 100 + 250  # of the embedding, a row
    assert forecast.bytes_read(DENSE, {"embedding": 7}, 1, 0) == 7  # which is the head


def test_operations_by_hand() -> None:
    body = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
    shapes = decoder.shapes(DENSE)
    head, attention = 100 * 64, 4 * 4 * 16 * 2
    assert forecast.operations(DENSE, shapes, 1, 0) == 2 * body + 2 * head + attention
    # the third token of two users sees 3; the head is computed once a user
    assert forecast.operations(DENSE, shapes, 1, 2, 2) == 2 * (2 * body + 2 * head + 3 * attention)
    assert forecast.operations(DENSE, shapes, 3, 0) == 3 * 2 * body + 2 * head + (1 + 2 + 3) * attention
    # one of four experts in each of two layers, and the shared one
    moe = sum(a * b for name, (a, *rest) in llama4.shapes(MIXTURE).items() for b in rest if ".experts." in name)
    rest = sum(
        a * b for name, (a, *rest) in llama4.shapes(MIXTURE).items()
        for b in rest if name.startswith("layers.") and ".experts." not in name
    )  # fmt: skip
    # at 3,000 a local layer sees 1,024 at most, a global one all
    seen = 4 * 4 * 16 * ((3000 + 1) + 3 * 1025)
    assert forecast.operations(MIXTURE, llama4.shapes(MIXTURE), 1, 3000) == 2 * (rest + moe // 4) + 2 * head + seen


def test_speed_is_reading_and_multiplying() -> None:
    shapes = decoder.shapes(DENSE)
    sizes = forecast.weight_bytes(shapes, dict.fromkeys(shapes, "F32"))
    fast = forecast.speed(DENSE, shapes, sizes, "bf16", "fp16", Load(2, users=2), 64, MACHINE)
    cache = forecast.cache_bytes(DENSE, "fp16", 1, 64)
    read = (sum(sizes.values()) + cache) / (1e9 * forecast.READS)
    one = read + forecast.operations(DENSE, shapes, 1, 1) / (4e9 * forecast.MULTIPLIES)
    assert fast.decode == pytest.approx(1 / one)
    both = (
        read
        + cache / (1e9 * forecast.READS)
        + forecast.operations(DENSE, shapes, 1, 1, 2) / (4e9 * forecast.MULTIPLIES)
    )
    assert fast.decode_all == pytest.approx(2 / both)
    assert fast.load == sum(sizes.values()) / 5e8
    assert fast.first_token == pytest.approx(1 / fast.prefill)  # of one token
    # int8 has no peak of its own there, so it is computed in fp32
    assert MACHINE.peak("int8") == 1e9
    two = replace(MACHINE, cards=2)
    assert forecast.speed(DENSE, shapes, sizes, "bf16", "fp16", Load(2), 64, two).decode == pytest.approx(2 / one)
