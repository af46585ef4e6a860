"""What the engine says of texts, by value: logprobs, scores and embeddings are transformers', adapters PEFT's.

What is surprising: all of it runs in one engine at once, in small steps and few rows, so that every kind is cut up.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from puna.engine.engine import Engine, Progress
from puna.engine.native_runner import host_runner
from puna.errors import AdapterError, ContextError, UsageError
from puna.kernels import ops
from puna.types import Sampling
from puna.weights.adapter import Adapter, read_adapter
from puna.weights.checkpoint import open_checkpoint
from puna.weights.load import load_weights

VOCAB = 96
TINY = LlamaConfig(
    vocab_size=VOCAB, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
TEXTS = [[1, *(5 * i * i % 91 for i in range(36))], [1, 70, 71], [1, 8, 13, 21, 34, 55, 89, 48, 41], [1], [1, 40, 4]]
MODELS: dict[str | None, Any] = {}
GREEDY = Sampling(temperature=0, max_tokens=6, logprobs=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and two adapters of it that change much."""
    root: Path = tmp_path_factory.mktemp("numbers")
    torch.manual_seed(5)
    LlamaForCausalLM(TINY).save_pretrained(root / "model")
    MODELS[None] = LlamaForCausalLM.from_pretrained(root / "model")
    for name, targets in (("one", ["q_proj", "v_proj"]), ("two", "all-linear")):
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
        MODELS[name] = peft.get_peft_model(LlamaForCausalLM.from_pretrained(root / "model"), config)
        for key, parameter in MODELS[name].named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(parameter, std=0.3)
        MODELS[name].save_pretrained(root / name)
        MODELS[name].eval()
    return root


@pytest.fixture(
    params=[{}, {"step_tokens": 5, "logits_bytes": 3 * 4 * VOCAB, "max_running": 3}], ids=["wide", "narrow"]
)
def engine(folder: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    ops.select()
    checkpoint = open_checkpoint(folder / "model")
    weights, _ = load_weights(checkpoint, "auto", None)
    yield Engine(host_runner(checkpoint.config, weights, page=16), pages=200, **request.param)
    ops.select()


def adapters(folder: Path) -> dict[str, Adapter]:
    config = open_checkpoint(folder / "model").config
    return {name: read_adapter(folder / name, config) for name in ("one", "two")}


def load(engine: Engine, folder: Path) -> None:
    for name, adapter in adapters(folder).items():
        engine.load_adapter(name, adapter.pairs, adapter.nbytes)


def run(engine: Engine) -> dict[int, list[Progress]]:
    """All that is reported, by request."""
    seen: dict[int, list[Progress]] = {}
    for _ in range(500):
        if engine.idle:
            return seen
        for report in engine.step():
            assert report.error is None, report.error
            seen.setdefault(report.request, []).append(report)
        engine.check()
    raise AssertionError("it does not end")


def logprobs(tokens: list[int], adapter: str | None = None) -> np.ndarray:
    """What the model gives each token of the vocabulary after each of a text: [T, V]."""
    with torch.inference_mode():
        return torch.log_softmax(MODELS[adapter](torch.tensor([tokens])).logits[0].double(), -1).numpy()


def states(tokens: list[int], adapter: str | None = None) -> np.ndarray:
    model = MODELS[adapter] if adapter is None else MODELS[adapter].base_model.model
    with torch.inference_mode():
        return model.model(torch.tensor([tokens])).last_hidden_state[0].numpy()


def test_a_prompts_logprobs_are_told_whole_though_the_cache_knows_it(engine: Engine) -> None:
    for _ in range(2):  # the second time all of it is in the cache
        numbers = [engine.submit(text, Sampling(temperature=0, max_tokens=2, prompt_logprobs=2)) for text in TEXTS]
        seen = run(engine)
        for number, text in zip(numbers, TEXTS, strict=True):
            draws = [draw for report in seen[number] for draw in report.prompt_logprobs or ()]
            want = logprobs(text)[:-1]
            assert [draw.token for draw in draws] == text[1:]
            np.testing.assert_allclose([d.logprob for d in draws], want[range(len(draws)), text[1:]], atol=2e-5)
            for draw, row in zip(draws, want, strict=True):
                assert [token for token, _ in draw.top] == np.argsort(-row)[:2].tolist()
                np.testing.assert_allclose([p for _, p in draw.top], np.sort(row)[::-1][:2], atol=2e-5)


def test_scores_are_the_models_own(engine: Engine) -> None:
    rng = np.random.default_rng(3)
    given = {}
    for text in TEXTS:
        right = [int(logprobs(text)[-1].argmax())]
        right.append(int(logprobs(text + right)[-1].argmax()))
        answers = [right, [right[0], (right[1] + 1) % VOCAB], [7], rng.integers(0, VOCAB, 11).tolist(), right[:1]]
        given[engine.submit_score(text, answers)] = text, answers
    seen = run(engine)
    for number, (text, answers) in given.items():
        for choice, answer in enumerate(answers):
            reports = [report for report in seen[number] if report.choice == choice]
            draws = [draw for report in reports for draw in report.logprobs or ()]
            want = logprobs(text + answer)[len(text) - 1 : -1]
            assert [draw.token for draw in draws] == answer
            np.testing.assert_allclose([d.logprob for d in draws], want[range(len(answer)), answer], atol=2e-5)
            assert [draw.top[0][0] for draw in draws] == want.argmax(1).tolist()
            assert [report.finish for report in reports] == [None] * (len(reports) - 1) + ["length"]


def test_a_prompt_is_computed_once_for_all_its_answers(engine: Engine) -> None:
    text = TEXTS[0]
    engine.submit_score(text, [[3], [4, 5], [6, 7, 8], [9]])
    run(engine)
    assert engine.statistics().computed_tokens == len(text) + 1 + 2


def test_embeddings_are_the_pooled_hidden_states(engine: Engine) -> None:
    poolings: tuple[Any, ...] = ("mean", "last", "cls")
    for _ in range(2):
        numbers = {(tuple(text), p): engine.submit_embedding(text, p) for text in TEXTS for p in poolings}
        answer = engine.submit(TEXTS[0], GREEDY)  # steps of logits and of hidden states take turns
        seen = run(engine)
        for (text, pooling), number in numbers.items():
            rows = states(list(text))
            want = {"mean": rows.mean(0), "last": rows[-1], "cls": rows[0]}[pooling]
            embedding = seen[number][-1].embedding
            assert embedding is not None
            assert embedding.dtype == np.float32
            np.testing.assert_allclose(embedding, want, atol=2e-5)
        assert sum(len(report.tokens) for report in seen[answer]) == 6


def test_every_kind_with_every_adapter_at_once_is_what_peft_computes(engine: Engine, folder: Path) -> None:
    load(engine, folder)
    for round in range(2):
        told: Any = Sampling(temperature=0, max_tokens=4, logprobs=0, prompt_logprobs=0)
        work = [(text, name) for text in TEXTS[:3] for name in (None, "one", "two")]
        answers = [engine.submit(text, told, adapter=name) for text, name in work]
        scores = [engine.submit_score(text, [[9, 9], [4]], adapter=name) for text, name in work]
        vectors = [engine.submit_embedding(text, adapter=name) for text, name in work]
        seen = run(engine)
        for (text, name), answer, score, vector in zip(work, answers, scores, vectors, strict=True):
            made = [token for report in seen[answer] for token in report.tokens]
            draws = [d for report in seen[answer] for d in (*(report.prompt_logprobs or ()), *(report.logprobs or ()))]
            whole = text + made
            rows = logprobs(whole, name)
            assert made == rows[len(text) - 1 : -1].argmax(1).tolist()
            np.testing.assert_allclose([d.logprob for d in draws], rows[range(len(whole) - 1), whole[1:]], atol=5e-5)
            first = [draw for report in seen[score] if report.choice == 0 for draw in report.logprobs or ()]
            want = logprobs([*text, 9, 9], name)[-3:-1, 9]
            np.testing.assert_allclose([draw.logprob for draw in first], want, atol=5e-5)
            np.testing.assert_allclose(seen[vector][-1].embedding, states(text, name).mean(0), atol=5e-5)
        if round == 0:  # the other way round: each name means the other adapter now
            engine.unload_adapter("one")
            engine.unload_adapter("two")
            MODELS["one"], MODELS["two"] = MODELS["two"], MODELS["one"]
            for name, adapter in zip(("two", "one"), adapters(folder).values(), strict=True):
                engine.load_adapter(name, adapter.pairs, adapter.nbytes)
    MODELS["one"], MODELS["two"] = MODELS["two"], MODELS["one"]


def test_adapters_come_and_go_while_others_run(engine: Engine, folder: Path) -> None:
    found = adapters(folder)
    want = {name: logprobs(TEXTS[0], name)[-1].argmax() for name in (None, "one", "two")}
    long = engine.submit(TEXTS[2], Sampling(temperature=0, max_tokens=50))
    engine.step()
    free = engine.statistics()
    engine.load_adapter("one", found["one"].pairs, found["one"].nbytes)
    pages = -(-found["one"].nbytes // engine._runner.page_bytes)
    assert engine.statistics().pages_reserved == pages
    assert engine.statistics().pages_free == free.pages_free - pages
    using = engine.submit(TEXTS[0], Sampling(temperature=0, max_tokens=1), adapter="one")
    with pytest.raises(AdapterError, match="in use by 1 request"):
        engine.unload_adapter("one")
    tokens: dict[int, list[int]] = {long: [], using: []}
    for _ in range(20):
        for report in engine.step():
            tokens[report.request] += report.tokens
    assert tokens[using] == [want["one"]]
    engine.unload_adapter("one")
    assert engine.statistics().pages_reserved == 0
    with pytest.raises(AdapterError, match="no adapter 'one'"):
        engine.submit(TEXTS[0], GREEDY, adapter="one")
    engine.load_adapter("two", found["two"].pairs, found["two"].nbytes)
    second = engine.submit(TEXTS[0], Sampling(temperature=0, max_tokens=1), adapter="two")
    seen = run(engine)
    assert seen[second][-1].tokens == (want["two"],)
    assert engine.adapters == ("two",)


def test_what_cannot_be_is_refused(engine: Engine, folder: Path) -> None:
    pairs = adapters(folder)["one"].pairs
    page = engine._runner.page_bytes
    engine.load_adapter("small", pairs, 3 * page - 5)
    assert engine.statistics().pages_reserved == 3
    with pytest.raises(AdapterError, match="already"):
        engine.load_adapter("small", pairs, 1)
    with pytest.raises(
        AdapterError, match=r"which are 197 pages of \d+ of the KV cache's 197, and a request needs 1 of the 0"
    ):
        engine.load_adapter("large", pairs, 197 * page)
    engine.submit(TEXTS[2], Sampling(max_tokens=30))  # 39 tokens: 3 pages
    with pytest.raises(AdapterError, match="the longest request under way may need 3 of the 2 left"):
        engine.load_adapter("large", pairs, 195 * page)
    engine.load_adapter("large", pairs, 194 * page)
    engine.check()
    assert engine.capacity == 48
    with pytest.raises(ContextError, match="room in the KV cache of 48 by 1 "):
        engine.submit(TEXTS[2], Sampling(max_tokens=40))
    run(engine)
    engine.unload_adapter("large")
    assert engine.capacity == 64
    for given in ([], [[]], [[1], []]):
        with pytest.raises(UsageError, match="no tokens"):
            engine.submit_score([1], given)
    with pytest.raises(UsageError, match="Token 96"):
        engine.submit_score([1], [[3], [VOCAB]])
    with pytest.raises(ContextError, match="by 1 tokens"):
        engine.submit_score([1] * 60, [[3] * 5])
    with pytest.raises(UsageError, match="no pooling 'max'"):
        engine.submit_embedding([1], "max")  # type: ignore[arg-type]
    with pytest.raises(ContextError):
        engine.submit_embedding([1] * 65)
    number = engine.submit_embedding([1] * 64, "last")
    assert run(engine)[number][-1].finish == "length"
    assert engine.idle


@pytest.mark.parametrize("engine", [{"logits_bytes": 3 * 4 * VOCAB, "max_running": 6}], indirect=True)
def test_steps_make_few_rows_of_logits(engine: Engine) -> None:
    runner: Any = engine._runner
    widest = 0

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(runner, name)

        def run(self, batch: Any) -> Any:
            nonlocal widest
            widest = max(widest, len(batch.wanted))
            return runner.run(batch)

    engine._runner = Counting()  # type: ignore[assignment]
    for text in TEXTS * 4:
        engine.submit(text, Sampling(temperature=0, max_tokens=3, prompt_logprobs=0))
        engine.submit_score(text, [[5] * 20, [6] * 20])
    run(engine)
    assert 3 <= widest <= 3 + 6
