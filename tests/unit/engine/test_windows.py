"""Pages of layers that see one chunk only: how many are held, which are kept, and what a real Llama 4 says with them.

What is surprising: the tests on real weights compare with a run of the model over the whole text at once, whose keys
and values are in no page at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checksum_model import VOCAB, ChecksumRunner, install, plainly

from puna import sessions
from puna.engine.engine import Engine
from puna.engine.native_runner import host_runner
from puna.engine.runner import Batch, HostRunner, local_page_bytes, page_bytes, window
from puna.engine.speculation import PromptLookup
from puna.errors import ContextError, UsageError
from puna.kernels import ops
from puna.kernels.layouts import ChunkedTable, page_table
from puna.models import llama4
from puna.models.llama4_config import Llama4Config
from puna.models.rope import Rope
from puna.types import Sampling

# -- the checksum model ----------------------------------------------------------------------------------------------

PROMPT = [(7 * i + i * i // 3) % VOCAB for i in range(80)]
CHUNK = 4


@pytest.fixture
def checksums(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


def finish(engine: Engine) -> dict[tuple[int, int], list[int]]:
    """What each choice of each request said."""
    made: dict[tuple[int, int], list[int]] = {}
    while not engine.idle:
        for report in engine.step():
            assert report.error is None, report.error.__cause__ or report.error
            made.setdefault((report.request, report.choice), []).extend(report.tokens)
        engine.check()
    return made


def answer(engine: Engine, prompt: list[int], most: int = 6) -> tuple[list[int], int]:
    """An answer, and how many tokens of its prompt the cache had."""
    before = engine.statistics().reused_tokens
    engine.submit(prompt, Sampling(temperature=0, max_tokens=most))
    (made,) = finish(engine).values()
    return made, engine.statistics().reused_tokens - before


@pytest.mark.usefixtures("checksums")
@pytest.mark.parametrize("step_tokens", [1, 3, 64])
def test_a_text_of_twenty_chunks_holds_one(step_tokens: int) -> None:
    engine = Engine(ChecksumRunner(2, CHUNK), pages=48, local_pages=2, step_tokens=step_tokens)
    engine.submit(PROMPT, Sampling(temperature=0, max_tokens=10))
    made: list[int] = []
    while not engine.idle:
        for report in engine.step():
            made += report.tokens
        assert engine.statistics().local_pages_used <= 2
        engine.check()
    assert made == plainly(PROMPT, 10, chunk=CHUNK)[0]
    assert engine.capacity == 96


@pytest.mark.usefixtures("checksums")
def test_pages_that_were_passed_by_go_before_those_of_other_texts() -> None:
    engine = Engine(ChecksumRunner(2, CHUNK), pages=96, local_pages=4)
    talk = PROMPT[::-1][:7]
    said, _ = answer(engine, talk, 1)  # two pages of its last chunk are kept
    answer(engine, PROMPT, 10)  # twenty-two chunks go through the other two
    talk += [*said, 5]
    assert answer(engine, talk) == (plainly(talk, 6, chunk=CHUNK)[0], 7)


@pytest.mark.usefixtures("checksums")
def test_a_prefix_serves_to_the_last_chunk_of_which_all_is_there() -> None:
    engine = Engine(ChecksumRunner(2, CHUNK), pages=96, local_pages=4)
    answer(engine, PROMPT[:35], 1)
    assert answer(engine, PROMPT[:35], 1)[1] == 34
    longer = [*PROMPT[:34], 60]
    assert answer(engine, longer) == (plainly(longer, 6, chunk=CHUNK)[0], 34)
    middle = [*PROMPT[:18], 60]  # of the chunk that begins at 16 nothing is left
    assert answer(engine, middle) == (plainly(middle, 6, chunk=CHUNK)[0], 16)
    for seed in range(2):  # nor of any, now
        answer(engine, [(seed + 3 * i) % VOCAB for i in range(11)])
    assert answer(engine, longer, 1) == (plainly(longer, 1, chunk=CHUNK)[0], 32)
    assert answer(engine, longer, 1)[1] == 34  # it was computed, and is there again


@pytest.mark.usefixtures("checksums")
def test_choices_share_a_window_and_go_on_alone() -> None:
    engine = Engine(ChecksumRunner(4, 16), pages=60, local_pages=16)
    engine.submit(PROMPT[:22], Sampling(temperature=0, max_tokens=25, n=4))
    while engine.statistics().made_tokens == 0:
        engine.step()
        engine.check()
    assert engine.statistics().local_pages_used == 2
    made = finish(engine)
    for choice in range(4):
        expected = plainly(PROMPT[:22], 25, choice=choice, chunk=16)[0]
        assert made[1, choice] == expected[-len(made[1, choice]) :]
    assert engine.statistics().local_pages_used == 0


@pytest.mark.usefixtures("checksums")
def test_prompts_of_equal_words_are_read_once() -> None:
    """The second follows the first, a chunk behind where the first's pages are passed by, and both are right."""
    runner = ChecksumRunner(2, CHUNK)
    engine = Engine(runner, pages=96, local_pages=48, step_tokens=8)
    for _ in range(3):
        engine.submit(PROMPT, Sampling(temperature=0, max_tokens=6))
    assert set(map(tuple, finish(engine).values())) == {tuple(plainly(PROMPT, 6, chunk=CHUNK)[0])}
    assert runner.computed < 80 + 3 * 8


@pytest.mark.usefixtures("checksums")
def test_fewer_pages_than_a_window_are_the_context() -> None:
    engine = Engine(ChecksumRunner(4, 64), pages=24, local_pages=5)
    assert engine.capacity == 20
    with pytest.raises(ContextError, match="room in the KV cache of 20"):
        engine.submit(PROMPT[:20], Sampling(temperature=0, max_tokens=1))
    assert answer(engine, PROMPT[:14])[0] == plainly(PROMPT[:14], 6, chunk=64)[0]
    engine.load_adapter("a", {"salt": 1}, 8)  # type: ignore[dict-item]
    assert engine.capacity == 20
    with pytest.raises(UsageError, match="local_pages must be a whole number, 1 or larger, not 0"):
        Engine(ChecksumRunner(4, 64), pages=24, local_pages=0)


@pytest.mark.usefixtures("checksums")
def test_counts_of_both_kinds() -> None:
    engine = Engine(ChecksumRunner(2, CHUNK), pages=20, local_pages=7, prefix_cache=False)
    engine.submit(PROMPT[:17], Sampling(temperature=0, max_tokens=6))
    engine.step()
    now = engine.statistics()
    assert (now.pages_used, now.pages_free, now.pages_cached) == (9, 11, 0)
    assert (now.local_pages_used, now.local_pages_free, now.local_pages_cached) == (2, 5, 0)
    dense = Engine(ChecksumRunner(2), pages=20).statistics()
    assert (dense.local_pages_used, dense.local_pages_free, dense.local_pages_cached) == (0, 0, 0)


# -- Llama 4 ---------------------------------------------------------------------------------------------------------


def config(chunk: int) -> Llama4Config:
    return Llama4Config(
        generation="llama4", vocab_size=61, dim=48, layers=5, heads=6, kv_heads=2, head_dim=16, hidden_dim=40,
        norm_eps=1e-5, rope=Rope(16, 500_000.0), context_length=1024, interleaved_rope=True, chunk=chunk,
        global_layers=(3,), expert_hidden_dim=24, experts=4, experts_per_token=1, moe_layers=(1, 3), qk_norm=True,
        temperature_floor=8, temperature_scale=0.4,
    )  # fmt: skip


@cache
def model(chunk: int) -> tuple[Llama4Config, Any]:
    """Small random weights, whose answers no rounding decides."""
    random = np.random.default_rng(7)
    shapes = llama4.shapes(config(chunk))

    def parameter(name: str) -> Any:
        shape = shapes[name]
        spread = np.float32(1.5 * shape[-1] ** -0.5 if len(shape) == 2 else 1)
        return random.standard_normal(shape, np.float32) * spread

    return config(chunk), llama4.build(config(chunk), parameter)


TEXT = np.random.default_rng(11).integers(0, 61, 333).tolist()
ANSWER = 20


@cache
def expected(chunk: int, prompt: tuple[int, ...]) -> tuple[int, ...]:
    """The likeliest answer, each token from the whole text before it."""
    runner = host_runner(*model(chunk))
    tokens = list(prompt)
    for _ in range(ANSWER):
        tokens.append(int(runner.all_logits(tokens)[-1].argmax()))
    return tuple(tokens[len(prompt) :])


@pytest.fixture(params=[(16, 32), (32, 48), (16, 16)], ids=["whole", "across", "one"])
def sizes(request: pytest.FixtureRequest) -> Iterator[tuple[int, int]]:
    """Tokens of a page and of a chunk: two pages a chunk, one and a half, one."""
    ops.select(invariant=True)
    yield request.param
    ops.select()


def engine(sizes: tuple[int, int], **options: Any) -> Engine:
    page, chunk = sizes
    return Engine(host_runner(*model(chunk), page=page), **{"pages": 40, "local_pages": 12, **options})


def texts(made: dict[tuple[int, int], list[int]]) -> list[tuple[int, ...]]:
    return [tuple(each) for _, each in sorted(made.items())]


def ask(engine: Engine, *prompts: list[int]) -> list[tuple[int, ...]]:
    for prompt in prompts:
        engine.submit(prompt, Sampling(temperature=0, max_tokens=ANSWER))
    return texts(finish(engine))


def test_one_alone_in_pieces_and_from_the_cache(sizes: tuple[int, int]) -> None:
    page, chunk = sizes
    want = expected(chunk, tuple(TEXT))
    for step_tokens in (7, 64, 512):
        of_its_own = engine(sizes, step_tokens=step_tokens, local_pages=-(-chunk // page) + 1)
        assert ask(of_its_own, TEXT) == [want]
        assert ask(of_its_own, TEXT) == [want]
        assert of_its_own.statistics().reused_tokens >= 333 // chunk * chunk
        shorter = TEXT[:201]
        assert ask(of_its_own, shorter) == [expected(chunk, tuple(shorter))]
        assert of_its_own.statistics().reused_tokens > 333 // chunk * chunk + 201 // chunk * chunk - chunk


def test_many_together_preempted_and_guessed_for(sizes: tuple[int, int]) -> None:
    page, chunk = sizes
    prompts = [TEXT[:90], TEXT[:64] + TEXT[200:210], TEXT[50:59], TEXT[:90]]
    want = [expected(chunk, tuple(prompt)) for prompt in prompts]
    assert ask(engine(sizes), *prompts) == want
    assert ask(engine(sizes, speculate=PromptLookup), *prompts) == want
    pages = 1 + (90 + ANSWER) // page  # hardly more than one of them needs
    small = engine(sizes, pages=pages + 4, local_pages=-(-chunk // page) + 2, step_tokens=32)
    assert ask(small, *prompts) == want
    assert small.statistics().preemptions > 0


def test_from_the_disk(sizes: tuple[int, int], tmp_path: Path) -> None:
    page, chunk = sizes
    first, second = engine(sizes), engine(sizes)
    assert ask(first, TEXT) == [expected(chunk, tuple(TEXT))]
    kept = first.kept(TEXT)
    whole = 333 // page
    assert (kept.pages, kept.local_pages) == (whole, whole - whole * page // chunk * chunk // page)
    contents = [bytes(each) for each in kept.contents]
    sizes_of = [page_bytes(config(chunk), "fp32", page), local_page_bytes(config(chunk), "fp32", page)]
    alone = kept.pages - kept.local_pages
    assert list(map(len, contents)) == [sizes_of[0]] * alone + [sum(sizes_of)] * kept.local_pages
    assert second.restore(TEXT, contents) == whole * page
    second.check()
    assert ask(second, TEXT) == [expected(chunk, tuple(TEXT))]
    assert second.statistics().reused_tokens == whole * page
    file = tmp_path / "session"
    identity = {"model": "m"}
    assert sessions.save(file, identity, TEXT, first, first._runner) == whole * page
    from_file = engine(sizes)
    assert sessions.load(file, identity, from_file, from_file._runner) == (tuple(TEXT), whole * page, "")
    assert ask(from_file, TEXT) == [expected(chunk, tuple(TEXT))]
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)  # of the last page; with it goes what nobody can go on from
    third = engine(sizes)
    found = sessions.load(file, identity, third, third._runner)
    assert whole * page - chunk - page < found.tokens < whole * page
    assert "computed again: the file is damaged" in found.note
    assert ask(third, TEXT) == [expected(chunk, tuple(TEXT))]
    if kept.local_pages:  # without them no more than to where the chunk begins, or the page before
        third = engine(sizes)
        alone = [each[: sizes_of[0]] for each in contents]
        found = third.restore(TEXT, alone)
        assert found <= whole * page // chunk * chunk
        assert ask(third, TEXT) == [expected(chunk, tuple(TEXT))]
        third.check()


def test_on_torch() -> None:
    from puna.engine.torch_runner import TorchRunner

    page, chunk = 32, 48
    runner = TorchRunner(*model(chunk), "cpu", page=page)
    small = Engine(runner, pages=24, local_pages=window(config(chunk), page))
    assert ask(small, TEXT) == [expected(chunk, tuple(TEXT))]


def test_pages_given_back_and_pages_kept_make_the_same_bits(sizes: tuple[int, int]) -> None:
    """A runner whose layers all have all pages, as before, beside one whose local pages are two windows in turn."""
    page, chunk = sizes
    plain, paged = (HostRunner(*model(chunk), page=page) for _ in range(2))
    count = window(config(chunk), page)
    plain.allocate(40)
    paged.allocate(40, 2 * count)
    every = np.arange(40, dtype=np.int32)[::-1].copy()
    at = 0
    while at < 333:
        length = min(11, chunk - at % chunk, 333 - at)
        table = page_table([at], [length], [every])
        first = at // chunk * chunk // page
        local = np.full(40, -1, np.int32)
        blocks = np.arange(first, (at + length - 1) // page + 1)
        local[blocks] = blocks % (2 * count)
        tokens, rows = np.array(TEXT[at : at + length], np.int32), np.arange(length, dtype=np.int32)
        want = plain.run(Batch(tokens, table, rows)).copy()
        assert np.array_equal(paged.run(Batch(tokens, ChunkedTable(*table, local[None]), rows)), want)
        at += length


def test_bytes_are_those_of_the_cache_and_copies_are_of_their_kind(sizes: tuple[int, int]) -> None:
    page, chunk = sizes
    runner = host_runner(*model(chunk), kv_type="fp16", page=page)
    runner.allocate(7, 3)
    stored = sum(array.nbytes for array in (*runner._cache.keys, *runner._cache.values))
    assert stored == 7 * runner.page_bytes + 3 * runner.local_page_bytes
    assert runner.local_page_bytes == 4 * runner.page_bytes  # four of five layers see their chunk only
    data = bytes(i % 251 for i in range(runner.local_page_bytes))
    runner.write_page(1, data, local=True)
    runner.copy_page(1, 2, local=True)
    assert runner.read_page(2, local=True) == data
    assert not any(runner.read_page(1) + runner.read_page(2))
    with pytest.raises(ValueError, match="page 3 is not in a cache of 3"):
        runner.read_page(3, local=True)
    with pytest.raises(ValueError, match=f"a page is {runner.local_page_bytes} bytes, not 2"):
        runner.write_page(0, b"ab", local=True)
    assert window(config(chunk), page) == -(-chunk // page) + (chunk % page > 0)
