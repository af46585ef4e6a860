"""The engine over a checksum runner: it answers with a hash of what its cache really holds.

A wrong position, a token computed twice or a stale prefix changes every later answer, so equality with the plain
computation below is a strong claim.
"""

from __future__ import annotations

import numpy as np
import pytest

from puna.engine.engine import PREFILL_CHUNK, Engine
from puna.engine.runner import HostRunner, capacity_for
from puna.errors import ContextError, DeviceError, PunaError, UsageError
from puna.models import decoder
from puna.models.config import DecoderConfig
from puna.models.rope import Rope
from puna.types import Sampling

CONFIG = DecoderConfig(
    generation="llama2", vocab_size=101, dim=16, layers=2, heads=4, kv_heads=2, head_dim=4, hidden_dim=24,
    norm_eps=1e-5, rope=Rope(4, 10000.0), context_length=2048,
)  # fmt: skip
GREEDY = Sampling(temperature=0, max_tokens=20)


class ChecksumRunner:
    """Stores ids by position and answers with the token that a hash of all of them names."""

    def __init__(self) -> None:
        self.config = CONFIG
        self.stored: dict[int, int] = {}
        self.computed = 0

    def reset(self, expected: int) -> None:
        self.stored.clear()

    def run(self, tokens: list[int], start: int) -> np.ndarray:
        for i, token in enumerate(tokens):
            self.stored[start + i] = token
        self.computed += len(tokens)
        seen = [self.stored[i] for i in range(start + len(tokens))]
        return np.eye(CONFIG.vocab_size, dtype=np.float32)[checksum(seen)]

    def all_logits(self, tokens: list[int]) -> np.ndarray:
        raise AssertionError("not used here")


def checksum(tokens: list[int]) -> int:
    value = 7
    for token in tokens:
        value = (value * 31 + token + 1) % 100_003
    return value % CONFIG.vocab_size


def plainly(prompt: list[int], n: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(checksum(tokens))
    return tokens[len(prompt) :]


def answer(engine: Engine, prompt: list[int], sampling: Sampling, stop: frozenset[int] = frozenset()):
    engine.submit(prompt, sampling, stop)
    tokens, reused = [], 0
    while True:
        progress = engine.step()
        engine.check()
        reused = progress.reused
        if progress.token is not None:
            tokens.append(progress.token)
        if progress.finish is not None:
            return tokens, progress.finish, reused


@pytest.mark.parametrize("length", [1, 5, PREFILL_CHUNK, PREFILL_CHUNK + 1, 3 * PREFILL_CHUNK - 1])
def test_answers_equal_the_plain_computation(length: int) -> None:
    prompt = [(i * 7) % 101 for i in range(length)]
    tokens, finish, _ = answer(Engine(ChecksumRunner()), prompt, GREEDY)
    assert tokens == plainly(prompt, 20)
    assert finish == "length"


def test_the_next_turn_computes_only_what_is_new() -> None:
    runner = ChecksumRunner()
    engine = Engine(runner)
    first = list(range(50))
    tokens, _, _ = answer(engine, first, GREEDY)
    before = runner.computed
    second = [*first, *tokens, 3, 1, 4]
    again, _, reused = answer(engine, second, GREEDY)
    assert again == plainly(second, 20)
    assert reused == len(first) + len(tokens) - 1  # the last token of the answer was never computed
    assert runner.computed - before == len(second) - reused + 19


def test_a_shared_beginning_is_kept_and_the_rest_forgotten() -> None:
    engine = Engine(ChecksumRunner())
    answer(engine, [1, 2, 3, 4, 5, 6], GREEDY)
    tokens, _, reused = answer(engine, [1, 2, 3, 9, 9], GREEDY)
    assert (tokens, reused) == (plainly([1, 2, 3, 9, 9], 20), 3)
    tokens, _, reused = answer(engine, [1, 2, 3, 9, 9], GREEDY)
    assert (tokens, reused) == (plainly([1, 2, 3, 9, 9], 20), 4)  # the last prompt token is computed for its logits


def test_a_stop_token_ends_and_is_not_handed_out() -> None:
    prompt = [5, 6]
    whole = plainly(prompt, 20)
    tokens, finish, _ = answer(Engine(ChecksumRunner()), prompt, GREEDY, frozenset({whole[4]}))
    assert finish == "stop"
    assert tokens == whole[: whole.index(whole[4])]


def test_a_full_context_is_said() -> None:
    prompt = [1] * (CONFIG.context_length - 3)
    tokens, finish, _ = answer(Engine(ChecksumRunner()), prompt, Sampling(temperature=0))
    assert (tokens, finish) == (plainly(prompt, 3), "context")


def test_too_long_says_by_how_many_tokens_and_keeps_the_request_before() -> None:
    engine = Engine(ChecksumRunner())
    with pytest.raises(ContextError, match="by 20 tokens"):
        engine.submit([1] * 2048, GREEDY)
    with pytest.raises(ContextError, match="by 1 tokens"):
        engine.submit([1] * 2048, Sampling())


def test_bad_prompts_are_refused() -> None:
    engine = Engine(ChecksumRunner())
    with pytest.raises(UsageError, match="no tokens"):
        engine.submit([], GREEDY)
    with pytest.raises(UsageError, match="Token 101 is outside"):
        engine.submit([3, 101], GREEDY)
    with pytest.raises(PunaError, match="no request"):
        engine.step()


def test_cancelling_an_older_request_leaves_the_newer_one() -> None:
    engine = Engine(ChecksumRunner())
    old = engine.submit([1, 2], GREEDY)
    new = engine.submit([3, 4], GREEDY)
    engine.cancel(old)
    assert engine.active == new
    engine.cancel(new)
    with pytest.raises(PunaError):
        engine.step()


def test_the_books_are_checked() -> None:
    engine = Engine(ChecksumRunner())
    engine.submit([1, 2, 3], GREEDY)
    engine.step()
    engine._cached[0] = 99
    with pytest.raises(AssertionError):
        engine.check()


def test_the_cache_grows_without_changing_the_answer() -> None:
    rng = np.random.default_rng(0)
    weights = decoder.build(CONFIG, lambda name: rng.normal(0, 0.4, decoder.shapes(CONFIG)[name]).astype(np.float32))
    prompt = [int(i) for i in rng.integers(0, 101, 240)]
    grown = answer(Engine(HostRunner(CONFIG, weights)), prompt, Sampling(temperature=0, max_tokens=None, seed=1))[0]
    roomy = HostRunner(CONFIG, weights)
    roomy.reset(2048)
    whole = roomy.all_logits([*prompt, *grown[:40]])[len(prompt) - 1 :].argmax(-1).tolist()
    assert grown[:40] == whole[:40]  # positions 240 to 280 cross the first growth, at 256
    assert len(grown) == CONFIG.context_length - 240


def test_capacity_doubles_and_stops_at_the_context() -> None:
    assert capacity_for(10, CONFIG, 0) == 256
    assert capacity_for(257, CONFIG, 256) == 512
    assert capacity_for(1500, CONFIG, 1024) == 2048


def test_a_request_that_finds_no_room_leaves_none_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the one before would go on with the new one's tokens."""
    runner = ChecksumRunner()
    engine = Engine(runner)
    engine.submit([1, 2, 3], GREEDY)
    engine.step()

    def full(expected: int) -> None:
        raise DeviceError(f"no room for {expected}")

    with monkeypatch.context() as patch:
        patch.setattr(runner, "reset", full)
        with pytest.raises(DeviceError, match="no room for 22"):
            engine.submit([9, 8], GREEDY)
    with pytest.raises(PunaError, match="no request to step"):
        engine.step()
    engine.check()
    engine.submit([9, 8], GREEDY)
    assert [engine.step().token for _ in range(3)] == plainly([9, 8], 3)
