"""The local backend on the embedded model: the same answers as `LLM` gives, many at once, and clients that leave."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from puna import LLM
from puna.errors import (
    AdapterError,
    ChatFormatError,
    ContextError,
    GrammarError,
    QueueFullError,
    StoppedError,
    TokenizerError,
    UsageError,
)
from puna.gateway.local import LocalBackend, _best
from puna.types import Backend, Event, Grammar, Message, Request, Sampling, TokenLogprob, Usage

PROMPTS = ["Once upon a time", "The dog", "One day, a girl named Lily", "Tom and"]


@pytest.fixture(scope="module")
def plain() -> LLM:
    return LLM("cria")


@pytest.fixture(scope="module")
def invariant() -> LLM:
    """Its bits do not depend on what is computed beside."""
    return LLM("cria", invariant=True)


async def said(backend: LocalBackend, request: Request) -> list[Event]:
    return [event async for event in backend.generate(request)]


def text_of(events: list[Event], choice: int = 0) -> str:
    return "".join(event.text for event in events if event.choice == choice)


def slow() -> LLM:
    """cria at 50 tokens a second at most: an answer that fills its context is under way for ten seconds."""
    llm = LLM("cria")
    run = llm._runner.run

    def wait_first(batch: Any) -> Any:
        time.sleep(0.02)
        return run(batch)

    llm._runner.run = wait_first  # type: ignore[method-assign]
    return llm


def with_backend(run: Any, llm: LLM | None = None) -> Any:
    async def main() -> Any:
        backend = LocalBackend(llm or LLM("cria"))
        try:
            return await asyncio.wait_for(run(backend), 60)
        finally:
            await backend.close()

    return asyncio.run(main())


def test_many_at_once_are_each_as_alone(plain: LLM) -> None:
    samplings = [Sampling(temperature=0, max_tokens=30), Sampling(seed=7, max_tokens=25)]
    requests = [Request(prompt, sampling) for prompt in PROMPTS for sampling in samplings]

    async def run(backend: LocalBackend) -> list[list[Event]]:
        return await asyncio.gather(*(said(backend, request) for request in requests))

    for request, events in zip(requests, with_backend(run), strict=True):
        sampling = request.sampling
        want = plain.generate(
            request.prompt, temperature=sampling.temperature, seed=sampling.seed, max_tokens=sampling.max_tokens
        )
        assert text_of(events) == want.text
        assert tuple(token for event in events for token in event.token_ids) == want.token_ids
        assert events[-1].finish == "length"
        assert events[-1].usage is not None
        assert events[-1].usage.prompt_tokens == want.prompt_tokens
        assert events[-1].usage.completion_tokens == sampling.max_tokens
        assert [event.usage for event in events[:-1]] == [None] * (len(events) - 1)


def test_several_choices_and_a_stop_string_in_one_of_them(plain: LLM) -> None:
    async def run(backend: LocalBackend) -> tuple[list[Event], list[Event]]:
        free = await said(backend, Request(PROMPTS[0], Sampling(seed=3, n=3, max_tokens=40)))
        stop = text_of(free, 1)[20:27]
        return free, await said(backend, Request(PROMPTS[0], Sampling(seed=3, n=3, max_tokens=40, stop=(stop,))))

    free, stopped = with_backend(run)
    texts = [text_of(free, choice) for choice in range(3)]
    assert len(set(texts)) == 3
    assert texts[0] == plain.generate(PROMPTS[0], seed=3, max_tokens=40).text
    stop = texts[1][20:27]
    assert [text_of(stopped, choice) for choice in range(3)] == [text.split(stop)[0] for text in texts]
    ends = {event.choice: event.finish for event in stopped if event.finish}
    assert ends[1] == "stop"
    assert len(ends) == 3


def test_best_of_gives_the_likeliest_of_all() -> None:
    async def run(backend: LocalBackend) -> tuple[list[Event], list[Event]]:
        many = Sampling(seed=3, n=4, max_tokens=20, logprobs=0)
        return await said(backend, Request(PROMPTS[0], many)), await said(
            backend, Request(PROMPTS[0], Sampling(seed=3, n=2, best_of=4, max_tokens=20))
        )

    every, best = with_backend(run)
    means = {
        choice: sum(one.logprob for event in every if event.choice == choice for one in event.logprobs) / 20
        for choice in range(4)
    }
    order = sorted(means, key=lambda choice: -means[choice])[:2]
    assert [text_of(best, choice) for choice in (0, 1)] == [text_of(every, choice) for choice in order]
    assert best[-1].usage is not None
    assert best[-1].usage.completion_tokens == 80


def test_an_answer_of_nothing_is_not_the_best() -> None:
    async def events() -> AsyncIterator[Event]:
        yield Event(0, finish="stop")
        yield Event(1, "a", (5,), (TokenLogprob(5, -2.0),), finish="stop", usage=Usage(3, 0, 1))

    async def run() -> list[Event]:
        return await _best(events(), 1)

    (best,) = asyncio.run(run())
    assert best.text == "a"


def test_a_grammar_is_kept_to() -> None:
    schema = json.dumps({"type": "object", "properties": {"a": {"enum": ["x", "yy"]}}, "required": ["a"],
                         "additionalProperties": False})  # fmt: skip

    async def run(backend: LocalBackend) -> tuple[list[Event], list[Event]]:
        asked = Request(PROMPTS[0], Sampling(seed=1, max_tokens=60), grammar=Grammar("json_schema", schema))
        choice = Request(PROMPTS[1], Sampling(seed=1, max_tokens=60), grammar=Grammar("choice", '["yes", "no"]'))
        return tuple(await asyncio.gather(said(backend, asked), said(backend, choice)))  # type: ignore[return-value]

    structured, chosen = with_backend(run)
    assert json.loads(text_of(structured))["a"] in ("x", "yy")
    assert structured[-1].finish == "stop"
    assert text_of(chosen) in ("yes", "no")


def test_errors_reach_their_caller_and_nobody_else() -> None:
    async def run(backend: LocalBackend) -> None:
        with pytest.raises(ContextError):
            await said(backend, Request(tuple([5] * 100000)))
        with pytest.raises(UsageError, match="no tokens"):
            await said(backend, Request(()))
        with pytest.raises(GrammarError):
            await said(backend, Request(PROMPTS[0], grammar=Grammar("json_schema", '{"type": "nonsense"}')))
        assert (await said(backend, Request(PROMPTS[0], Sampling(max_tokens=3))))[-1].finish == "length"

    with_backend(run)


def test_clients_that_leave_give_their_pages_back() -> None:
    async def run(backend: LocalBackend) -> None:
        events: AsyncIterator[Event] = backend.generate(Request(PROMPTS[0], Sampling(ignore_eos=True)))
        async for event in events:
            if event.text:
                break
        await events.aclose()  # type: ignore[attr-defined]
        task = asyncio.create_task(said(backend, Request(PROMPTS[1], Sampling(ignore_eos=True))))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await said(backend, Request(PROMPTS[2], Sampling(max_tokens=3))))[-1].finish == "length"
        statistics = await asyncio.wrap_future(
            backend._thread.call(lambda engine: (engine.check(), engine.statistics()))
        )
        assert (statistics[1].running, statistics[1].waiting, statistics[1].pages_used) == (0, 0, 0)

    with_backend(run, slow())


def test_a_timeout_ends_with_what_is_there() -> None:
    async def run(backend: LocalBackend) -> list[Event]:
        return await said(backend, Request(PROMPTS[0], Sampling(ignore_eos=True, temperature=0), timeout=0.5))

    events = with_backend(run, slow())
    assert events[-1].finish == "deadline"
    assert text_of(events)


def test_closing_reaches_who_waits() -> None:
    async def main() -> None:
        backend = LocalBackend(slow())
        task = asyncio.create_task(said(backend, Request(PROMPTS[0], Sampling(ignore_eos=True))))
        await asyncio.sleep(0.05)
        await backend.close()
        with pytest.raises(StoppedError):
            await task
        with pytest.raises(StoppedError):
            await said(backend, Request(PROMPTS[0]))
        await backend.close()

    asyncio.run(main())


def test_the_model_has_one_owner() -> None:
    llm = LLM("cria")
    asyncio.run(LocalBackend(llm).close())
    for use in (llm.stream, llm.logits):
        with pytest.raises(UsageError, match="Another owner"):
            use("x")
    with pytest.raises(UsageError, match="an owner already"):
        LocalBackend(llm)


def test_an_open_stream_keeps_its_engine() -> None:
    llm = LLM("cria")
    stream = llm.stream("Once", max_tokens=5)
    next(stream)
    with pytest.raises(UsageError, match="is open"):
        LocalBackend(llm)
    stream.close()
    asyncio.run(LocalBackend(llm).close())


@pytest.mark.parametrize("timeout", [float("nan"), float("inf"), -1, True])
def test_a_timeout_is_a_time(timeout: float) -> None:
    with pytest.raises(UsageError, match="timeout must be"):
        Request("x", timeout=timeout)


def test_a_prompts_logprobs_come_before_the_answer(plain: LLM) -> None:
    ids = plain.encode(PROMPTS[2])

    async def run(backend: LocalBackend) -> list[list[Event]]:
        asked = [Sampling(temperature=0, max_tokens=3, prompt_logprobs=1), Sampling(n=2, max_tokens=3, best_of=3)]
        return [await said(backend, Request(PROMPTS[2], sampling)) for sampling in asked]

    events, without = with_backend(run)
    told = [each for event in events for each in event.prompt_logprobs]
    assert [each.token for each in told] == ids[1:]
    rows = plain.logits(ids)[:-1]
    assert [each.top[0][0] for each in told] == rows.argmax(1).tolist()
    assert not any(event.prompt_logprobs for event in without)


def test_adapters_come_and_go_while_it_answers(tmp_path: Path) -> None:
    async def run(backend: LocalBackend) -> list[str]:
        folder = silent_adapter(backend._llm, tmp_path / "silent")
        asked = Request(PROMPTS[0], Sampling(temperature=0, max_tokens=20))
        long = asyncio.create_task(said(backend, Request(PROMPTS[1], Sampling(temperature=0, max_tokens=60))))
        with pytest.raises(AdapterError, match="no adapter 'silent'"):
            await said(backend, replace(asked, adapter="silent"))
        await backend.load_adapter(folder)
        texts = [text_of(await said(backend, replace(asked, adapter=name))) for name in (None, "silent")]
        await backend.unload_adapter("silent")
        with pytest.raises(AdapterError, match="no adapter 'silent'"):
            await said(backend, replace(asked, adapter="silent"))
        assert (await long)[-1].finish is not None
        return texts

    without, silent = with_backend(run)
    assert without == silent != ""


def silent_adapter(llm: LLM, folder: Path) -> Path:
    """An adapter, in PEFT's format, that adds nothing."""
    folder.mkdir()
    name, config = "base_model.model.model.layers.0.self_attn.v_proj", llm.config
    down = np.ones((2, config.dim), np.float32)
    up = np.zeros((config.kv_heads * config.head_dim, 2), np.float32)
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    return folder


def test_the_card_tells_what_the_model_is(plain: LLM) -> None:
    async def run(backend: LocalBackend) -> Any:
        typed: Backend = backend
        return typed.card

    card = with_backend(run)
    folder = plain.checkpoint.path.parent
    assert (card.name, card.format, card.family) == ("cria", "safetensors", plain.config.generation)
    assert (card.context_length, card.vocab_size, card.embedding_length) == (512, 2048, 256)
    assert card.nbytes == (folder / "model.safetensors").stat().st_size
    assert card.modified == (folder / "model.safetensors").stat().st_mtime
    assert (
        card.quantization
        == {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}[next(iter(plain.checkpoint.tensors.values())).dtype]
    )
    assert (card.chat, card.tools, card.sees, card.infills, card.template) == (False, False, False, False, None)
    assert len(bytes.fromhex(card.digest)) == 32
    other = with_backend(run, LLM("cria", quant="Q8_0"))
    assert (other.quantization, other.digest == card.digest) == ("Q8_0", False)
    assert with_backend(run, LLM("cria")).digest == card.digest


def test_a_path_is_no_name() -> None:
    async def main() -> tuple[str, str]:
        whole = LocalBackend(LLM(LLM("cria").checkpoint.path.parent))
        named = LocalBackend(LLM("cria"), name="other")
        names = whole.card.name, named.card.name
        await whole.close()
        await named.close()
        return names

    assert asyncio.run(main()) == ("cria", "other")


def test_embeddings_are_those_of_the_model(invariant: LLM) -> None:
    texts = [*PROMPTS, (5, 6, 7), *(f"the {n}th" for n in range(80))]

    async def run(backend: LocalBackend) -> list[Any]:
        return [
            await backend.embed(texts),
            await backend.embed(texts[:3], pooling="last", normalize=False),
            await backend.embed([]),
        ]

    every, last, none = with_backend(run, LLM("cria", invariant=True))
    assert [list(vector) for vector in every.vectors] == invariant.embed(texts).tolist()
    assert every.prompt_tokens == sum(len(invariant.prompt_ids(text)[0]) for text in texts)
    assert [list(v) for v in last.vectors] == invariant.embed(texts[:3], pooling="last", normalize=False).tolist()
    assert (none.vectors, none.prompt_tokens) == ((), 0)


def test_texts_that_cannot_be_embedded_end_the_others() -> None:
    async def run(backend: LocalBackend) -> Any:
        with pytest.raises(ContextError):
            await backend.embed([*PROMPTS, (5,) * 513])
        with pytest.raises(UsageError, match="no tokens"):
            await backend.embed([()])
        with pytest.raises(UsageError, match="a list of texts"):
            await backend.embed("a text")
        with pytest.raises(UsageError, match="pooling"):
            await backend.embed(["a"], pooling="sum")  # type: ignore[arg-type]
        return await backend.activity()

    assert with_backend(run).waiting == 0


def test_a_full_queue_is_waited_for_only_with_texts_under_way(invariant: LLM) -> None:
    async def run(backend: LocalBackend) -> Any:
        def most(waiting: int) -> Any:
            def set_most(engine: Any) -> None:
                engine._max_waiting = waiting

            return asyncio.wrap_future(backend._thread.call(set_most))

        await most(1)
        found = await backend.embed([f"text {n}" for n in range(70)])
        await most(0)
        with pytest.raises(QueueFullError):
            await backend.embed(["a", "b"])
        return found

    assert [list(v) for v in with_backend(run, LLM("cria", invariant=True)).vectors] == invariant.embed(
        [f"text {n}" for n in range(70)]
    ).tolist()


def test_scores_are_those_of_the_model(invariant: LLM) -> None:
    continuations = [" there was", " the", (9, 10)]

    async def run(backend: LocalBackend) -> list[Any]:
        with pytest.raises(UsageError):
            await backend.score("Once", [""])
        return [await backend.score("Once upon a time", continuations), await backend.score((1, 5), [(7,)], raw=True)]

    text, ids = with_backend(run, LLM("cria", invariant=True))
    assert list(text) == invariant.score("Once upon a time", continuations)
    assert list(ids) == invariant.score((1, 5), [(7,)])


def test_texts_and_ids(plain: LLM) -> None:
    async def run(backend: LocalBackend) -> None:
        ids = await backend.encode("Once upon")
        assert list(ids) == plain.encode("Once upon")
        assert await backend.encode((5, 6)) == (5, 6)
        assert await backend.decode(ids) == plain.tokenizer.decode(ids)
        assert b"".join(map(backend.token_bytes, ids[1:])).decode().strip() == "Once upon"
        assert backend.token_bytes(ids[0]) == b""
        assert backend.token_bytes(1 << 20) == b""
        with pytest.raises(TokenizerError):
            await backend.decode([1 << 20])
        with pytest.raises(ChatFormatError, match="cria has no chat format"):
            await backend.render([Message("user", "x")])
        with pytest.raises(ChatFormatError, match="no chat format"):
            await backend.encode((Message("user", "x"),))

    with_backend(run)


def test_what_it_does_is_told() -> None:
    async def run(backend: LocalBackend) -> None:
        events = backend.generate(Request(PROMPTS[0], Sampling(ignore_eos=True)))
        async for event in events:
            if event.text:
                break
        busy = await backend.activity()
        assert (busy.running, busy.waiting) == (1, 0)
        assert busy.pages_total == busy.pages_used + busy.pages_cached + busy.pages_free
        assert busy.pages_used > 0
        await events.aclose()  # type: ignore[attr-defined]
        idle = await backend.activity()
        assert (idle.running, idle.pages_used) == (0, 0)
        assert idle.steps >= busy.steps > 0
        assert (idle.page_tokens, idle.kernels, idle.kv_type) == (
            backend._llm._runner.page, backend._llm.kernels, backend._llm.kv_type,
        )  # fmt: skip
        await backend.close()
        with pytest.raises(StoppedError):
            await backend.activity()

    with_backend(run, slow())
