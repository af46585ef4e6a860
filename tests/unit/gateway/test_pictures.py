"""Pictures through `LLM` and the local backend, on small random models of both kinds that see."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from seeing_folders import llama4_folder, mllama_folder, png

from puna import LLM
from puna.errors import ChatFormatError, ContextError, PictureError, QueueFullError, UsageError
from puna.gateway import local
from puna.gateway.local import LocalBackend
from puna.types import Event, Message, Picture, Request, Sampling

MAKE = {"mllama": mllama_folder, "llama4": llama4_folder}
CAT, DOG = png(1, 28, 28), png(2, 56, 28)
TOKENS = {"mllama": (1, 1), "llama4": (3 + 4, 3 + 4 + 10)}
"""How many each takes: a picture; start, whole and end, and of each tile four patches and what stands behind it."""


@pytest.fixture(scope="module", params=list(MAKE))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MAKE[kind](tmp_path_factory.mktemp(kind))


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder)


def asks(*images: bytes, text: str = "What is it?") -> tuple[Message, ...]:
    return (Message("user", text, pictures=tuple((0, Picture(each)) for each in images)),)


def greedy(llm: LLM, prompt: Any, **options: Any) -> tuple[int, ...]:
    return llm.generate(prompt, temperature=0, max_tokens=12, ignore_eos=True, **options).token_ids


def test_an_image_decides_the_answer_and_counts_as_tokens(llm: LLM, kind: str, tmp_path: Path) -> None:
    file = tmp_path / "cat.png"
    file.write_bytes(CAT)
    cat = llm.generate("What is it?", images=[file], temperature=0, max_tokens=12, ignore_eos=True)
    assert greedy(llm, "What is it?", images=[DOG]) != cat.token_ids
    assert greedy(llm, asks(CAT)) == cat.token_ids
    assert greedy(llm, "What is it?", images=[Picture(CAT)]) == cat.token_ids
    plain = llm.generate("What is it?", temperature=0, max_tokens=12, ignore_eos=True)
    assert plain.token_ids != cat.token_ids
    assert cat.prompt_tokens == plain.prompt_tokens + TOKENS[kind][0]
    both = llm.encode(asks(CAT, DOG))
    assert len(both) == plain.prompt_tokens + sum(TOKENS[kind])


def test_the_models_own_numbers_for_pictures_are_heeded_and_go_with_it(
    llm: LLM, kind: str, folder: Path, tmp_path: Path
) -> None:
    """The loaded model is not touched: a copy beside it says how it wants its pictures."""
    from puna.weights.convert import convert

    assert not any("tokenizer" in note for note in llm.notes)
    own = tmp_path / "own"
    shutil.copytree(folder, own)
    (own / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0, 0.25, 1], "image_std": [1, 0.5, 1]}))
    convert(own, tmp_path / "copy")
    for each in (own, tmp_path / "copy"):
        processor = LLM(each)._processor
        assert (processor.mean, processor.std) == ((0, 0.25, 1), (1, 0.5, 1))
    assert llm._processor.mean != (0, 0.25, 1)


def test_the_next_turn_finds_the_picture_in_the_cache(llm: LLM) -> None:
    first = asks(DOG, CAT, text="Both. " * 12)
    answer = greedy(llm, first)
    seen = llm._engine._sights.seen
    turns = [*first, Message("assistant", "x"), Message("user", "And now?")]
    before = llm._engine.statistics()
    again = greedy(llm, turns)
    after = llm._engine.statistics()
    assert after.reused_tokens - before.reused_tokens > 64
    assert llm._engine._sights.seen == seen
    llm._engine.check()
    assert answer
    assert again


def test_what_has_no_place_for_pictures_says_so(llm: LLM, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Pictures have no place here"):
        llm.score(asks(CAT), ["x"], raw=False)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="Pictures have no place here"):
        llm.save_session(tmp_path / "s", asks(CAT))
    with pytest.raises(UsageError, match="raw text has no place"):
        llm.stream("x", images=[CAT], raw=True)
    with pytest.raises(UsageError, match="no such file"):
        llm.stream("x", images=[tmp_path / "none.png"])
    with pytest.raises(UsageError, match="is a list"):
        llm.stream("x", images="cat.png")
    with pytest.raises(UsageError, match="ends with none"):
        llm.stream([1, 2, 3], images=[CAT])
    with pytest.raises(PictureError, match="no PNG"):
        llm.stream("x", images=[b"text"])
    with pytest.raises(UsageError, match="33 pictures"):
        llm.stream("x", images=[CAT] * 33)
    with pytest.raises(ContextError, match="exceed"):
        llm.stream("x" * 500, images=[CAT])


def test_a_model_that_is_blind_says_so_before_it_reads_a_file() -> None:
    cria = LLM("cria")
    with pytest.raises(PictureError, match="takes no pictures"):
        cria.stream("x", images=["none.png"])
    with pytest.raises(ChatFormatError):
        cria.stream(asks(CAT))
    assert not cria.sees


def test_the_backend_answers_as_the_llm_and_keeps_its_room(
    llm: LLM, folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [greedy(llm, asks(each)) for each in (CAT, DOG)]
    sampling = Sampling(temperature=0, max_tokens=12, ignore_eos=True)

    async def main() -> None:
        backend = LocalBackend(LLM(folder))
        try:
            assert backend.card.sees

            async def said(*images: bytes, **options: Any) -> list[Event]:
                return [each async for each in backend.generate(Request(asks(*images), sampling, **options))]

            events = await asyncio.gather(said(CAT), said(DOG), said(CAT))
            told = [tuple(token for event in each for token in event.token_ids) for each in events]
            assert told == [*expected, expected[0]]
            usage = events[0][-1].usage
            assert usage is not None
            assert usage.prompt_tokens == len(await backend.encode(asks(CAT)))
            with pytest.raises(PictureError):
                await said(b"text")
            assert backend._pixel_bytes == 0
            with pytest.raises(UsageError, match="Pictures have no place"):
                await backend.score(asks(CAT), ["x"])
            monkeypatch.setattr(local, "PIXEL_BYTES", 1)
            stream = backend.generate(Request(asks(CAT), Sampling(max_tokens=400, ignore_eos=True)))
            await anext(stream)  # alone, one is taken whatever it weighs
            with pytest.raises(QueueFullError, match="Pictures of"):
                await said(DOG)
            await stream.aclose()  # type: ignore[attr-defined]
            assert backend._pixel_bytes == 0
        finally:
            await backend.close()

    asyncio.run(main())
