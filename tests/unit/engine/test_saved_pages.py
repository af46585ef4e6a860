"""Pages that leave an engine and come back into another: the same answers, and the books hold."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from checksum_model import VOCAB, ChecksumRunner, install, plainly

from puna.engine.engine import Engine
from puna.types import Sampling


@pytest.fixture(autouse=True)
def _model(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


class Storing(ChecksumRunner):
    def __init__(self, page: int, chunk: int = 0) -> None:
        super().__init__(page, chunk)
        self.page_bytes = 8 * page

    def read_page(self, page: int, *, local: bool = False) -> bytes:
        return (self.local_store if local else self.store)[page].tobytes()

    def write_page(self, page: int, data: Any, *, local: bool = False) -> None:
        if len(data) != 8 * self.page:
            raise ValueError(f"a page is {8 * self.page} bytes")
        (self.local_store if local else self.store)[page] = np.frombuffer(data, np.uint64)


def make(pages: int = 40, chunk: int = 0, **options: Any) -> Engine:
    return Engine(Storing(4, chunk), pages=pages, **options)


def answer(engine: Engine, prompt: list[int], namespace: str = "") -> tuple[list[int], int]:
    request = engine.submit(prompt, Sampling(temperature=0, max_tokens=6), namespace=namespace)
    made: list[int] = []
    reused = 0
    while not engine.idle:
        for report in engine.step():
            if report.request == request:
                made += report.tokens
                reused = report.reused
        engine.check()
    return made, reused


def saved(prompt: list[int], namespace: str = "", chunk: int = 0) -> list[bytes]:
    engine = make(chunk=chunk)
    answer(engine, prompt, namespace)
    kept = engine.kept(prompt, namespace=namespace)
    found = list(kept.contents)
    assert len(found) == kept.pages
    return found


PROMPT = [(7 * i + 3) % VOCAB for i in range(30)]


def test_what_comes_back_is_not_computed_again() -> None:
    pages = saved(PROMPT)
    assert len(pages) == 7  # whole ones
    engine = make()
    assert engine.restore(PROMPT, pages) == 28
    engine.check()
    assert answer(engine, PROMPT) == (plainly(PROMPT, 6)[0], 28)
    longer = [*PROMPT[:28], 1, 2, 3]
    assert answer(engine, longer)[0] == plainly(longer, 6)[0]
    assert engine.statistics().pages_used == 0


def test_pages_are_what_answers_come_from() -> None:
    engine = make()
    pages = saved(PROMPT)
    pages[2] = pages[3]
    engine.restore(PROMPT, pages)
    assert answer(engine, PROMPT)[0] != plainly(PROMPT, 6)[0]


def test_a_namespace_keeps_its_own() -> None:
    engine = make()
    answer(engine, PROMPT, "a")
    assert engine.kept(PROMPT, namespace="b")[0] == engine.kept(PROMPT)[0] == 0
    engine = make()
    engine.restore(PROMPT, saved(PROMPT, "a"), namespace="a")
    assert answer(engine, PROMPT) == (plainly(PROMPT, 6)[0], 0)
    assert answer(engine, PROMPT, "a") == (plainly(PROMPT, 6)[0], 28)


def test_no_more_than_there_is_room_for_beside_what_runs() -> None:
    engine = make(pages=12)
    engine.submit([5] * 18, Sampling(temperature=0, max_tokens=6))
    engine.step()
    assert engine.restore(PROMPT, saved(PROMPT)) == 7 * 4
    engine.check()
    other = PROMPT[::-1]
    assert engine.restore(other, saved(other)) == 7 * 4  # what was restored before gives way
    engine.check()
    assert engine.kept(PROMPT)[0] == 0
    long = [*PROMPT, *PROMPT]
    assert engine.restore(long, saved(long)) == 7 * 4
    engine.check()
    assert answer(engine, long[:40])[0] == plainly(long[:40], 6)[0]


def test_without_a_cache_nothing_is_restored() -> None:
    engine = make(prefix_cache=False)
    assert engine.restore(PROMPT, saved(PROMPT)) == 0
    engine.check()


def test_what_is_there_already_stays() -> None:
    engine = make()
    answer(engine, PROMPT[:17])
    used = engine.statistics().pages_cached
    assert engine.restore(PROMPT, saved(PROMPT)) == 28
    engine.check()
    assert engine.statistics().pages_cached == used + 3
    assert answer(engine, PROMPT) == (plainly(PROMPT, 6)[0], 28)


def test_a_fault_on_the_way_keeps_what_came_before_it() -> None:
    engine, pages = make(), saved(PROMPT)
    with pytest.raises(ValueError, match="a page is 32 bytes"):
        engine.restore(PROMPT, [*pages[:3], b"short", *pages[4:]])
    engine.check()
    assert answer(engine, PROMPT) == (plainly(PROMPT, 6)[0], 12)


def test_without_room_for_local_pages_less_comes_back() -> None:
    pages = saved(PROMPT, chunk=16)
    assert list(map(len, pages)) == [32, 32, 32, 32, 64, 64, 64]
    engine = make(chunk=16, local_pages=5)
    engine.submit([5] * 9, Sampling(temperature=0, max_tokens=2))
    engine.step()  # holds three of them
    assert engine.restore(PROMPT, pages) == 24
    engine.check()
    assert engine.kept(PROMPT)[::2] == (6, 2)
    assert answer(engine, PROMPT)[0] == plainly(PROMPT, 6, chunk=16)[0]
    with pytest.raises(ValueError, match="a page is 32 bytes"):
        make().restore(PROMPT, pages)  # a model without such layers
    half = make(chunk=16)
    with pytest.raises(ValueError, match="a page is 32 bytes"):
        half.restore(PROMPT, [*pages[:5], pages[5][:40], pages[6]])
    half.check()
    assert answer(half, PROMPT) == (plainly(PROMPT, 6, chunk=16)[0], 20)


@pytest.mark.parametrize("chunk", [0, 4, 6, 16])
def test_traffic_with_pages_that_come_and_go(chunk: int) -> None:
    pick = random.Random(1)
    engine = make(pages=30, chunk=chunk, step_tokens=8, local_pages=9)
    texts = [[pick.randrange(VOCAB) for _ in range(pick.randint(1, 40))] for _ in range(12)]
    store = {i: saved(text, chunk=chunk) for i, text in enumerate(texts)}
    asked: dict[int, tuple[list[int], list[int]]] = {}
    restored = 0
    for _ in range(600):
        if pick.random() < 0.3 and len(asked) < 20:
            prompt = [*pick.choice(texts), *[pick.randrange(VOCAB)][: pick.randint(0, 1)]]
            asked[engine.submit(prompt, Sampling(temperature=0, max_tokens=5))] = (
                plainly(prompt, 5, chunk=chunk)[0],
                [],
            )
        if pick.random() < 0.3:
            i = pick.randrange(12)
            restored += engine.restore(texts[i], store[i])
        for report in engine.step():
            assert report.error is None
            expected, made = asked[report.request]
            made += report.tokens
            assert made == expected[: len(made)]
            if report.finish:
                del asked[report.request]
        engine.check()
    assert restored > 1000
    assert engine.statistics().evictions > 100
