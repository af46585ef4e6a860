"""The models on this machine as a shelf: what they are and take, known without loading, and their names."""

from __future__ import annotations

import asyncio
import gc
import shutil
import weakref
from pathlib import Path

import pytest

from puna.errors import CheckpointError, PunaError, UsageError
from puna.gateway.fleet import Fleet
from puna.gateway.shelf import LocalShelf, ModelOptions
from puna.llm import LLM
from puna.models.tree import leaves
from puna.types import Request, Sampling
from puna.weights.embedded import embedded_folder


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PUNA_HOME of the test's own: nothing was pulled there."""
    monkeypatch.setenv("PUNA_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_model_is_known_without_loading_it() -> None:
    shelf = LocalShelf()
    [served] = shelf.served()
    assert (served.name, served.stays) == ("cria", False)
    described = shelf.describe(served)
    llm = LLM("cria")
    card = described.card
    assert (card.context_length, card.vocab_size, card.embedding_length) == (
        llm.config.context_length, llm.config.vocab_size, llm.config.dim,
    )  # fmt: skip
    assert card.chat is False
    assert card.format == "safetensors"
    assert card.nbytes == (embedded_folder() / "model.safetensors").stat().st_size
    assert len(card.digest) == 64
    assert described.need.tokens == llm.config.context_length
    assert described.need.cache_most == llm.cache.nbytes


@pytest.mark.parametrize(
    "options",
    [ModelOptions(), ModelOptions(dtype="fp32"), ModelOptions(quant="Q8_0"), ModelOptions(kv_type="fp32")],
)
def test_what_a_model_will_take_is_what_it_takes(options: ModelOptions) -> None:
    bare = LocalShelf(options={"cria": options})
    need = bare.describe(bare.served()[0]).need
    llm = LLM("cria", dtype=options.dtype, quant=options.quant, kv_type=options.kv_type)
    weights = sum(leaf.nbytes for _, leaf in leaves(llm._runner._weights))  # type: ignore[attr-defined]
    besides = need.weights - weights
    assert 0 <= besides < 10_000_000  # the tokenizer's
    assert need.cache_most == llm.cache.nbytes
    backend = bare.load(bare.served()[0], bare.describe(bare.served()[0]), need.cache_least)
    loaded: LLM = backend._llm  # type: ignore[attr-defined]
    assert loaded.cache.nbytes == need.cache_least
    assert backend.card.name == "cria"
    asyncio.run(backend.close())


def test_a_wish_for_the_cache_is_had_whole() -> None:
    shelf = LocalShelf(options={"*": ModelOptions(kv_memory=0.003)})
    need = shelf.describe(shelf.served()[0]).need
    assert need.cache_least == need.cache_most == 3_000_000


def test_a_model_answers_from_the_fleet_and_leaves_nothing_behind() -> None:
    async def work() -> None:
        shelf = LocalShelf(["cria"])
        fleet = Fleet(shelf, memory=1_000_000_000)
        await fleet.start()
        request = Request("Once upon a time", sampling=Sampling(temperature=0, max_tokens=8))
        async with fleet.use("cria") as backend:
            text = "".join([event.text async for event in backend.generate(request)])
            gone = weakref.ref(backend._llm)  # type: ignore[attr-defined]
        assert text
        assert (await fleet.states())[0].resident > 0
        del backend
        await fleet.unload("cria")
        gc.collect()
        assert gone() is None
        fleet.check()
        assert (await fleet.states())[0].resident == 0
        async with fleet.use("") as backend:
            assert "".join([event.text async for event in backend.generate(request)]) == text
        await fleet.close()

    asyncio.run(work())


def test_a_path_is_a_name_for_who_typed_it_only(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(embedded_folder(), folder)
    shelf = LocalShelf([str(folder), "cria"], aliases={"m": str(folder), "x": "mine"})
    mine, cria = shelf.served()
    assert (mine.name, mine.aliases, mine.untold) == ("mine", ("m", "x"), (str(folder),))
    assert (cria.name, cria.aliases) == ("cria", ())
    assert shelf.describe(mine).card.name == "mine"
    file = folder / "model.safetensors"
    assert LocalShelf([str(file)]).served()[0].name == "mine"  # those files are all called model
    other = tmp_path / "other" / "mine"
    shutil.copytree(embedded_folder(), other)
    with pytest.raises(UsageError, match="Two models are called mine"):
        LocalShelf([str(folder), str(other)])


def test_no_request_reaches_the_files(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(embedded_folder(), folder)

    async def work() -> None:
        fleet = Fleet(LocalShelf(["cria"]), memory=1_000_000_000)
        for name in (str(folder), str(embedded_folder()), "./cria", "cria/", "../cria", "~", "cria\0"):
            with pytest.raises(PunaError, match="is not served here"):
                async with fleet.use(name):
                    pass
        await fleet.close()

    asyncio.run(work())


def test_a_damaged_model_is_told_in_the_list_and_when_it_is_asked_for(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(embedded_folder(), folder)
    (folder / "model.safetensors").write_bytes(b"\0" * 100)

    async def work() -> None:
        fleet = Fleet(LocalShelf([str(folder)]), memory=1_000_000_000)
        [state] = await fleet.states()
        assert (state.card.name, state.fits) == ("mine", False)
        assert state.why
        with pytest.raises(CheckpointError):
            async with fleet.use("mine"):
                pass
        fleet.check()
        await fleet.close()

    asyncio.run(work())


def test_models_that_are_named_on_demand_take_turns(tmp_path: Path) -> None:
    folder = tmp_path / "my own"  # what follows a blank is no commit here
    shutil.copytree(embedded_folder(), folder)

    async def work() -> None:
        shelf = LocalShelf(["cria", str(folder)], on_demand=True)
        need = shelf.describe(shelf.served()[0]).need
        fleet = Fleet(shelf, memory=need.least * 3 // 2)
        await fleet.start()
        assert fleet.loaded() == []
        request = Request("Once upon a time", sampling=Sampling(temperature=0, max_tokens=4))
        for name in ("my own", "cria", "my own"):
            async with fleet.use(name) as backend:
                assert "".join([event.text async for event in backend.generate(request)])
                assert backend.card.name == name
            assert [state.card.name for state in await fleet.states() if state.loaded] == [name]
            fleet.check()
        await fleet.close()

    asyncio.run(work())


def test_the_card_of_a_loaded_model_has_the_context_that_its_cache_has_room_for() -> None:
    shelf = LocalShelf(options={"*": ModelOptions(kv_memory=0.0005)})
    [served] = shelf.served()
    described = shelf.describe(served)
    backend = shelf.load(served, described, None)
    loaded: LLM = backend._llm  # type: ignore[attr-defined]
    assert backend.card.context_length == loaded.cache.tokens < described.card.context_length
    asyncio.run(backend.close())
