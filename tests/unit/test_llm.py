"""`LLM` over the embedded model: what streams, what stops it, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from puna import LLM
from puna.errors import AdapterError, ChatFormatError, ContextError, DeviceError, UsageError
from puna.kernels import ops
from puna.text.chat import ChatFormat
from puna.types import Message

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("cria")


def test_pieces_join_to_the_answer_and_a_seed_repeats_it(llm: LLM) -> None:
    stream = llm.stream(PROMPT, seed=5, max_tokens=40)
    pieces = list(stream)
    assert len(pieces) > 10
    assert "".join(pieces) == stream.answer.text
    assert stream.answer.token_ids == llm.generate(PROMPT, seed=5, max_tokens=40).token_ids
    assert stream.answer.token_ids != llm.generate(PROMPT, seed=6, max_tokens=40).token_ids


def test_the_figures_of_an_answer(llm: LLM) -> None:
    answer = llm.generate(PROMPT, temperature=0, max_tokens=12)
    assert (answer.prompt_tokens, answer.completion_tokens) == (len(llm.encode(PROMPT)), 12)
    assert (answer.finish_reason, answer.model) == ("length", "cria")
    assert answer.timings.decode_seconds > 0
    assert answer.text == llm.tokenizer.decode([*llm.encode(PROMPT), *answer.token_ids])[len("<|bos|>" + PROMPT) :]


def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(llm: LLM) -> None:
    whole = llm.generate(PROMPT, temperature=0, max_tokens=60).text
    stop = whole[30:36]
    answer = llm.generate(PROMPT, temperature=0, max_tokens=60, stop=(stop,))
    assert answer.text == whole[: whole.index(stop)]
    assert answer.finish_reason == "stop"


def test_closing_a_stream_keeps_what_was_made(llm: LLM) -> None:
    stream = llm.stream(PROMPT, temperature=0, max_tokens=60)
    first = next(stream)
    stream.close()
    assert stream.answer.finish_reason == "cancelled"
    assert stream.answer.text.startswith(first)
    assert stream.answer.completion_tokens < 5


def test_closing_before_the_first_piece(llm: LLM) -> None:
    stream = llm.stream(PROMPT, max_tokens=60)
    stream.close()
    assert (stream.answer.text, stream.answer.finish_reason) == ("", "cancelled")
    assert list(stream) == []


def test_streams_run_beside_each_other(llm: LLM) -> None:
    first = llm.generate(PROMPT, temperature=0, max_tokens=30).text
    second = llm.generate("The dog", temperature=0, max_tokens=20).text
    old = llm.stream(PROMPT, temperature=0, max_tokens=30)
    begun = next(old)
    new = llm.stream("The dog", temperature=0, max_tokens=20)
    assert next(new) + "".join(new) == second
    assert begun + "".join(old) == first
    assert old.answer.finish_reason == "length"


def test_a_stream_that_nobody_holds_is_not_computed(llm: LLM) -> None:
    next(llm.stream(PROMPT, temperature=0, max_tokens=60))
    llm.generate("The dog", temperature=0, max_tokens=3)
    assert llm._engine.idle


def test_the_answer_is_not_there_before_the_end(llm: LLM) -> None:
    with pytest.raises(UsageError, match="not finished"):
        _ = llm.stream(PROMPT, max_tokens=3).answer


def test_logits_are_those_the_greedy_answer_came_from(llm: LLM) -> None:
    ids = llm.encode(PROMPT)
    made = llm.generate(ids, temperature=0, max_tokens=8).token_ids
    logits = llm.logits([*ids, *made])
    assert logits.shape == (len(ids) + 8, llm.config.vocab_size)
    assert logits.dtype == np.float32
    assert tuple(logits[len(ids) - 1 : -1].argmax(-1).tolist()) == made


def test_token_ids_of_any_integer_type_are_taken_as_they_are(llm: LLM) -> None:
    ids = llm.encode(PROMPT)
    expected = llm.generate(ids, temperature=0, max_tokens=5)
    assert llm.generate(np.array(ids), temperature=0, max_tokens=5).token_ids == expected.token_ids
    assert expected.prompt_tokens == len(ids)


def test_the_stop_tokens_of_config_json_end_an_answer(llm: LLM, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(llm.path, folder)
    (folder / "generation_config.json").unlink()
    whole = llm.generate(PROMPT, temperature=0, max_tokens=12).token_ids
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": [1, whole[5]]}))
    answer = LLM(folder).generate(PROMPT, temperature=0, max_tokens=12)
    assert (answer.finish_reason, answer.token_ids) == ("stop", whole[: whole.index(whole[5])])


def test_a_broken_chat_template_leaves_raw_text(llm: LLM, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(llm.path, folder)
    (folder / "chat_template.jinja").write_text("{{ messages")
    broken = LLM(folder)
    assert broken.generate(PROMPT, raw=True, temperature=0, max_tokens=3).text
    with pytest.raises(ChatFormatError, match=r"cannot be used.*\n.*--raw"):
        broken.stream(PROMPT)
    with pytest.raises(UsageError, match="list of messages"):
        broken.stream([{"role": "user", "content": "a"}])


def test_a_base_model_has_no_roles(llm: LLM) -> None:
    assert llm.chat_format is None
    with pytest.raises(ChatFormatError, match="has no chat format"):
        llm.encode([Message("user", "Hello")])
    with pytest.raises(UsageError, match="system message"):
        llm.encode("Hello", system="Be brief.")
    with pytest.raises(UsageError, match="raw"):
        llm.encode([Message("user", "Hello")], raw=True)


def test_a_long_prompt_is_an_error_not_a_cut(llm: LLM) -> None:
    with pytest.raises(ContextError, match=r"exceed the model's context of 512\b.* by \d+ tokens"):
        llm.generate("once upon a time " * 300)


def test_a_whole_context_can_be_scored_and_one_more_cannot(llm: LLM) -> None:
    assert llm.logits([1] * 512).shape[0] == 512
    with pytest.raises(ContextError, match="by 1 tokens"):
        llm.logits([1] * 513)


def test_dtypes_and_kernels_agree(llm: LLM) -> None:
    ids = llm.encode(PROMPT)
    auto = llm.logits(ids)
    scale = np.abs(auto).max()
    for options in ({"dtype": "fp32"}, {"dtype": "fp32", "kernels": "reference"}):
        assert np.abs(LLM("cria", **options).logits(ids) - auto).max() < 0.02 * scale  # bf16 rounding of activations
    LLM("cria")  # back to auto


def test_two_models_keep_their_own_kernels() -> None:
    one, two = LLM("cria", kernels="reference"), LLM("cria")
    stream, other = one.stream(PROMPT, temperature=0, max_tokens=4), two.stream(PROMPT, temperature=0, max_tokens=4)
    for _ in range(3):
        next(stream)
        assert ops.summary() == one.kernels
        next(other)
        assert ops.summary() == two.kernels
    one.logits(PROMPT)
    assert ops.summary() == one.kernels == "NumPy reference"
    two.logits(PROMPT)


def test_a_device_that_is_not_there_is_refused_with_a_remedy() -> None:
    with pytest.raises(DeviceError, match="--device nonsense"):
        LLM("cria", device="nonsense")


def test_an_answer_in_a_chat_is_a_text_of_its_own(reference: Path) -> None:
    folder = reference / "checkpoints" / "stories260K"
    llm = LLM(folder / "stories260K.bin", tokenizer=folder / "tok512.bin")
    continued = llm.generate(llm.encode("Once upon"), temperature=0, max_tokens=10)
    assert continued.text.startswith(" ")
    llm.chat_format = ChatFormat("plain", lambda messages, *_: [messages[0].content])
    answered = llm.generate("Once upon", temperature=0, max_tokens=10)
    assert answered.token_ids == continued.token_ids
    assert answered.text == continued.text[1:]  # sentencepiece's space, which Meta's decoding of an answer drops too


@pytest.mark.parametrize("prompt", [None, 7, [1.5, 2.7], ["a"], b"x", [True]])
def test_what_is_no_prompt_is_refused_before_anything_runs(llm: LLM, prompt: object) -> None:
    for use in (llm.generate, llm.logits):
        with pytest.raises((UsageError, ChatFormatError)):
            use(prompt)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("temperature", value) for value in ("a", None, True, float("inf"))),
        *(("top_k", value) for value in (1.5, "1", True)),
        *(("max_tokens", value) for value in (1.5, "3", True)),
        *(("seed", value) for value in (1.5, "a", -1)),
        *(("stop", value) for value in ("END", None, (1,), ("",))),
        *((name, "x") for name in ("top_p", "min_p")),
        *(("n", 2), ("best_of", 3), ("logprobs", 0), ("prompt_logprobs", 1)),  # a stream is one text
        ("banned_tokens", (10**9,)),
    ],
)
def test_an_option_of_the_wrong_kind_is_refused_by_name(llm: LLM, field: str, value: object) -> None:
    with pytest.raises(UsageError, match=field) as caught:
        llm.stream(PROMPT, **{field: value})
    assert caught.value.remedy


def test_kernels_chosen_elsewhere_do_not_stay(llm: LLM) -> None:
    ops.select("reference")
    llm.generate(PROMPT, max_tokens=2)
    assert ops.summary() == llm.kernels


def log_softmax(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    return rows - np.log(np.exp(rows - rows.max(1, keepdims=True)).sum(1, keepdims=True)) - rows.max(1, keepdims=True)


def test_scores_are_what_the_logits_say(llm: LLM) -> None:
    answer = llm.generate(PROMPT, temperature=0, max_tokens=5)
    wrong = [*answer.token_ids[:4], (answer.token_ids[4] + 1) % llm.config.vocab_size]
    scores = llm.score(PROMPT, [answer.token_ids, wrong, ", there"])
    ids = llm.encode(PROMPT)
    assert [score.greedy for score in scores[:2]] == [True, False]
    assert b"".join(llm.tokenizer.token_bytes(each.token) for each in scores[2].tokens) == b", there"
    for score in scores:
        given = [each.token for each in score.tokens]
        rows = log_softmax(llm.logits([*ids, *given]))[len(ids) - 1 : -1]
        want = rows[range(len(given)), given]
        np.testing.assert_allclose([each.logprob for each in score.tokens], want, atol=5e-3)  # the cache is fp16
        assert score.logprob == sum(each.logprob for each in score.tokens)
    with pytest.raises(UsageError, match="no tokens"):
        llm.score(PROMPT, [""])


@pytest.fixture
def invariant() -> Iterator[None]:
    cpu = pytest.importorskip("puna.kernels.cpu", reason="the C++ is not built: NumPy is not invariant")
    cpu.set_invariant(True)
    yield
    cpu.set_invariant(False)


@pytest.mark.usefixtures("invariant")
def test_embeddings_have_length_one_and_do_not_depend_on_company(llm: LLM) -> None:
    texts = [PROMPT, "The dog ran", "One day, a girl named Lily found a stone."]
    vectors = llm.embed(texts)
    assert (vectors.shape, vectors.dtype) == ((3, llm.config.dim), np.float32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    for text, vector in zip(texts, vectors, strict=True):
        np.testing.assert_array_equal(llm.embed([text])[0], vector)
    plain = llm.embed(texts, normalize=False)
    np.testing.assert_allclose(plain / np.linalg.norm(plain, axis=1, keepdims=True), vectors, atol=1e-6)
    assert not np.allclose(plain, llm.embed(texts, pooling="last", normalize=False))
    first = llm.embed(texts, pooling="cls")  # all begin with BOS
    np.testing.assert_array_equal(first[0], first[1])
    assert llm.embed([]).shape == (0, llm.config.dim)
    with pytest.raises(UsageError, match="list of texts"):
        llm.embed(PROMPT)


def adapter_of(llm: LLM, folder: Path, scale: float) -> Path:
    """An adapter in PEFT's format, of the values' matrices."""
    from safetensors.numpy import save_file

    folder.mkdir()
    config, rng = llm.config, np.random.default_rng(1)
    tensors = {}
    for i in range(config.layers):
        name = f"base_model.model.model.layers.{i}.self_attn.v_proj"
        tensors[f"{name}.lora_A.weight"] = rng.normal(size=(2, config.dim)).astype(np.float32)
        out = config.kv_heads * config.head_dim
        tensors[f"{name}.lora_B.weight"] = (scale * rng.normal(size=(out, 2))).astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    config_of = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config_of))
    return folder


def test_an_adapter_is_loaded_named_and_unloaded(tmp_path: Path) -> None:
    llm = LLM("cria")
    context = llm._engine.capacity
    without = llm.score(PROMPT, [[5, 6, 7]])[0].logprob
    assert llm.load_adapter(adapter_of(llm, tmp_path / "loud", 0.5)) == "loud"
    llm.load_adapter(adapter_of(llm, tmp_path / "silent", 0.0), "mute")
    assert llm._engine.capacity == context
    assert llm.score(PROMPT, [[5, 6, 7]])[0].logprob == without
    assert abs(llm.score(PROMPT, [[5, 6, 7]], adapter="mute")[0].logprob - without) < 1e-5
    loud = llm.score(PROMPT, [[5, 6, 7]], adapter="loud")[0].logprob
    assert abs(loud - without) > 0.1
    stream = llm.stream(PROMPT, temperature=0, max_tokens=8, adapter="loud")
    next(stream)
    with pytest.raises(AdapterError, match="in use"):
        llm.unload_adapter("loud")
    list(stream)
    assert stream.answer.token_ids != llm.generate(PROMPT, temperature=0, max_tokens=8).token_ids
    llm.unload_adapter("loud")
    with pytest.raises(AdapterError, match="Loaded are: mute"):
        llm.stream(PROMPT, adapter="loud")
    assert LLM("cria", adapter=tmp_path / "loud").score(PROMPT, [[5, 6, 7]])[0].logprob == loud
