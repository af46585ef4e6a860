"""The host's runner: its pages in each type, against the same model with a cache that is never rounded."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
import pytest

from puna.engine.runner import Batch, HostRunner, settled_kv_type
from puna.errors import PunaError, UsageError
from puna.kernels.layouts import BF16, Packed, page_table, to_bf16
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


def batch(tokens: list[int], start: int, pages: Any, wanted: list[int] | None = None) -> Batch:
    """One sequence's next tokens; the last one's logits are wanted unless said otherwise."""
    rows = np.array([len(tokens) - 1] if wanted is None else wanted, np.int32)
    return Batch(np.array(tokens, np.int32), page_table([start], [len(tokens)], [pages]), rows)


@pytest.mark.parametrize(
    ("kv_type", "tolerance"), [("fp32", 1e-5), ("fp16", 0.03), ("bf16", 0.04), ("q8_0", 0.15), ("auto", 1e-5)]
)
def test_each_type_answers_as_the_whole_text_does(kv_type: str, tolerance: float) -> None:
    """A prompt, then one by one. Random heads are sharp and magnify rounding."""
    runner = HostRunner(CONFIG, model(), kv_type)
    want = runner.all_logits(TOKENS)
    runner.allocate(7)
    pages = [6, 1, 4, 2, 0]
    got = [runner.run(batch(TOKENS[:250], 0, pages))[0]]
    got += [runner.run(batch([token], 250 + i, pages))[0] for i, token in enumerate(TOKENS[250:])]
    error = np.abs(np.stack(got) - want[249:])
    assert error.max() <= tolerance * np.abs(want).max()
    if tolerance > 1e-3:  # and it is really rounded
        assert error.max() > 1e-2 * tolerance * np.abs(want).max()


def test_hidden_states_are_those_of_the_logits() -> None:
    runner = HostRunner(CONFIG, model())
    runner.allocate(1)
    step = batch(TOKENS[:20], 0, [0], [3, 19])
    hidden, logits = runner.hidden(step), runner.run(step)
    assert hidden.shape == (2, 64)
    np.testing.assert_allclose(decoder.logits(model(), hidden), logits, rtol=1e-5, atol=1e-5)
    assert runner.run(batch(TOKENS[:20], 0, [0], [])).shape == (0, 61)


@pytest.mark.parametrize("kv_type", ["fp32", "fp16", "bf16", "q8_0"])
def test_pages_are_copied_read_and_written(kv_type: str) -> None:
    """Another sequence goes on from a copy, and one in another runner from bytes, as the first one does."""
    runner, other = (HostRunner(CONFIG, model(), kv_type, page=16) for _ in range(2))
    runner.allocate(5)
    other.allocate(2)
    runner.run(batch(TOKENS[:20], 0, [3, 1], []))
    runner.copy_page(1, 4)
    for source, target in ((3, 1), (1, 0)):
        data = runner.read_page(source)
        assert len(data) == runner.page_bytes
        other.write_page(target, data)
    copied = runner.run(batch([7], 20, [3, 4]))
    moved = other.run(batch([7], 20, [1, 0]))
    runner.run(batch([9], 20, [3, 1]))  # what the copy holds stays
    assert np.array_equal(copied, runner.run(batch([7], 20, [3, 1])))
    assert np.array_equal(copied, moved)
    stored = [*runner._cache.keys, *runner._cache.values]
    assert runner.page_bytes * 5 == sum(array.nbytes for array in stored)


def test_pages_that_are_not_there_are_refused() -> None:
    runner = HostRunner(CONFIG, model())
    with pytest.raises(ValueError, match="page 0 is not in a cache of 0"):
        runner.read_page(0)
    runner.allocate(2)
    for call in (lambda: runner.copy_page(0, 2), lambda: runner.copy_page(-1, 0), lambda: runner.write_page(2, b"")):
        with pytest.raises(ValueError, match="is not in a cache of 2"):
            call()
    with pytest.raises(ValueError, match=f"a page is {runner.page_bytes} bytes, not 3"):
        runner.write_page(0, b"abc")


def test_no_memory_is_said_with_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = HostRunner(CONFIG, model())

    def full(*_: object) -> NoReturn:
        raise MemoryError

    monkeypatch.setattr(decoder, "make_cache", full)
    with pytest.raises(PunaError, match="no memory for a cache of 640 tokens"):
        runner.allocate(10)


def test_auto_is_fp32_only_where_every_matrix_is() -> None:
    assert HostRunner(CONFIG, model()).kv_type == "fp32"
    assert HostRunner(CONFIG, model(to_bf16)).kv_type == "fp16"
    assert HostRunner(CONFIG, model(to_bf16), "fp32").kv_type == "fp32"


def test_the_cache_is_of_that_type() -> None:
    for kv_type, kind in (("fp32", np.ndarray), ("fp16", np.ndarray), ("bf16", BF16), ("q8_0", Packed)):
        runner = HostRunner(CONFIG, model(), kv_type)
        runner.allocate(3)
        for array in (*runner._cache.keys, *runner._cache.values):
            assert isinstance(array, kind)
            assert array.shape == (3, 64, 2, 32)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UsageError, match="--kv-type fp8: no such type"):
        settled_kv_type("fp8", CONFIG, all_fp32=True)
    small = DecoderConfig("llama2", 61, 64, 2, 4, 2, 16, 48, 1e-5, Rope(16, 1e4), 64)
    with pytest.raises(UsageError, match="packs 32 numbers together, and this model's heads have 16"):
        settled_kv_type("q8_0", small, all_fp32=True)
