"""Anthropic's and Ollama's clients, rankings and tokens, on real models in this process: `cria`, and a random one with
the real Llama 3 vocabulary and Meta's chat template."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import jsonschema
import numpy as np
import ollama
import pytest
from safetensors.numpy import save_file

from puna import LLM
from puna.gateway.local import LocalBackend
from puna.models import decoder
from puna.models.config import read_hub
from puna.server.app import create_app
from puna.text.chat import builtin_format
from puna.types import Message
from puna.weights import names

SCHEMA: Any = {
    "type": "object",
    "properties": {"zone": {"enum": ["UTC", "CET"]}, "day": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["zone", "day"],
    "additionalProperties": False,
}
HI: Any = [{"role": "user", "content": "What time is it?"}]


@dataclass
class Served:
    """A model behind a server, and the same model to compare with."""

    llm: LLM
    url: str

    @property
    def ollama(self) -> ollama.Client:
        return ollama.Client(host=self.url, timeout=60)

    @property
    def anthropic(self) -> anthropic.Anthropic:
        return anthropic.Anthropic(
            base_url=self.url, api_key="any", max_retries=0, timeout=60, _strict_response_validation=True
        )


@pytest.fixture(scope="module")
def cria(serve_module: Any) -> Served:
    return Served(LLM("cria"), serve_module(create_app(LocalBackend(LLM("cria")))))


@pytest.fixture(scope="module")
def chats(reference: Path, tmp_path_factory: pytest.TempPathFactory, serve_module: Any) -> Served:
    folder = tmp_path_factory.mktemp("chats") / "tiny"
    folder.mkdir()
    sizes = {
        "vocab_size": 128_256, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }  # fmt: skip
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **sizes}
    (folder / "config.json").write_text(json.dumps(config))
    random = np.random.default_rng(0)
    shapes = decoder.shapes(read_hub(config, "config").config)
    weights = {
        names.foreign(name, "hub"): random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()
    }
    save_file(weights, folder / "model.safetensors")
    shutil.copy(reference / "tokenizers/llama3/tokenizer.model", folder)
    shutil.copy(reference / "tokenizers/llama3.1/tokenizer_config.json", folder)
    template = reference / "prompt_formats/chat_templates/meta-llama-Llama-3.1-8B-Instruct.jinja"
    shutil.copy(template, folder / "chat_template.jinja")
    return Served(LLM(folder), serve_module(create_app(LocalBackend(LLM(folder)))))


def test_ollama_tells_the_story_that_the_model_tells(cria: Served) -> None:
    want = cria.llm.generate("Once upon a time", temperature=0, max_tokens=40)
    options = {"temperature": 0, "num_predict": 40, "repeat_last_n": 0}
    whole = cria.ollama.generate("cria", "Once upon a time", options=options)
    assert whole.response == want.text
    assert (whole.prompt_eval_count, whole.eval_count, whole.done_reason) == (want.prompt_tokens, 40, "length")
    lines = list(cria.ollama.generate("cria", "Once upon a time", raw=True, options=options, stream=True))
    assert "".join(line.response or "" for line in lines) == want.text
    assert lines[-1].total_duration is not None
    assert lines[-1].total_duration > 0
    drawn = [cria.ollama.generate("cria", "Tom", options={"seed": 5, "num_predict": 9}).response for _ in range(2)]
    assert drawn[0] == drawn[1]
    stop = want.text[20:26]
    stopped = cria.ollama.generate("cria", "Once upon a time", options={**options, "stop": [stop]})
    assert (stopped.response, stopped.done_reason) == (want.text.split(stop)[0], "stop")


def test_ollama_knows_the_model(cria: Served) -> None:
    (listed,) = cria.ollama.list().models
    assert listed.model == "cria"
    assert [model.model for model in cria.ollama.ps().models] == ["cria"]
    shown = cria.ollama.show("cria")
    assert shown.modelinfo is not None
    assert shown.modelinfo["llama.context_length"] == 512
    made = cria.ollama.embed("cria", ["Tom and Lily", "a dog"])
    want = cria.llm.embed(["Tom and Lily", "a dog"])
    assert np.allclose(made.embeddings, want)


def test_what_cria_cannot_do_is_said(cria: Served) -> None:
    with pytest.raises(anthropic.BadRequestError, match="no chat format"):
        cria.anthropic.messages.create(model="cria", max_tokens=5, messages=HI)
    with pytest.raises(ollama.ResponseError, match="no chat format"):
        cria.ollama.chat("cria", HI)
    with pytest.raises(ollama.ResponseError, match="never cuts"):
        cria.ollama.generate("cria", "word " * 600)
    body = {"query": "Lily", "documents": ["Tom.", "word " * 600]}
    refused = httpx2.post(f"{cria.url}/rerank", json=body)
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "context_length_exceeded"


def test_rankings_are_the_models_own_scores(cria: Served) -> None:
    documents = ["Lily had a red ball. Lily was happy.", "The dog ran in the park."]
    body = {"query": "Lily and her red ball", "documents": documents, "return_documents": True}
    answer = httpx2.post(f"{cria.url}/v1/rerank", json=body, timeout=60).json()
    want = []
    for document in documents:
        (score,) = cria.llm.score(f"Document: {document}\n\nQuery:", [" Lily and her red ball"], raw=True)
        want.append(math.exp(score.logprob / len(score.tokens)))
    scores = {one["index"]: one["relevance_score"] for one in answer["results"]}
    assert scores == pytest.approx(dict(enumerate(want)), rel=1e-2)  # a remembered prompt has the cache's rounding
    assert answer["results"][0]["document"] == {"text": documents[0]}
    near = httpx2.post(f"{cria.url}/rerank", json=body | {"method": "embeddings"}, timeout=60).json()
    asked, *vectors = cria.llm.embed([body["query"], *documents])
    cosines = {one["index"]: one["relevance_score"] for one in near["results"]}
    assert cosines == pytest.approx({i: float(np.dot(asked, vector)) for i, vector in enumerate(vectors)}, abs=1e-5)


def test_tokens_are_the_models_own(cria: Served) -> None:
    text = "Once upon a time, Lily."
    ids = cria.llm.encode(text, raw=True)
    bos = ids[0] == cria.llm.tokenizer.bos_id
    told = httpx2.post(f"{cria.url}/tokenize", json={"prompt": text}).json()
    assert told["tokens"] == ids
    bare = httpx2.post(f"{cria.url}/tokenize", json={"content": text}).json()["tokens"]
    assert bare == ids[bos:]
    assert httpx2.post(f"{cria.url}/detokenize", json={"tokens": bare}).json()["content"] == text


def test_anthropics_tools_on_a_real_template(chats: Served) -> None:
    tool: Any = {"name": "clock", "description": "Tells the time.", "input_schema": SCHEMA}
    asked: Any = {
        "model": "tiny", "max_tokens": 200, "messages": HI, "tools": [tool], "tool_choice": {"type": "any"},
        "extra_body": {"temperature": 1.5},
    }  # fmt: skip
    made = chats.anthropic.messages.create(**asked)
    with chats.anthropic.messages.stream(**asked) as stream:
        streamed = stream.get_final_message()
    for message in (made, streamed):
        assert message.stop_reason == "tool_use"
        (call,) = message.content
        assert call.type == "tool_use"
        assert call.name == "clock"
        jsonschema.validate(call.input, SCHEMA)
    again: Any = [
        *HI,
        made.to_param(),
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": made.content[0].id, "content": "Noon"}]},  # type: ignore[union-attr]
    ]
    counted = chats.anthropic.messages.count_tokens(model="tiny", messages=again, tools=[tool]).input_tokens
    answer = chats.anthropic.messages.create(model="tiny", max_tokens=1, messages=again, tools=[tool])
    assert counted == answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0)


def test_anthropics_answers_are_the_models_own(chats: Served) -> None:
    said = [Message("system", "Be brief."), Message("user", HI[0]["content"])]
    want = chats.llm.generate(said, temperature=0, max_tokens=30)
    asked: Any = {"model": "tiny", "max_tokens": 30, "messages": HI, "system": "Be brief.",
                  "extra_body": {"temperature": 0}}  # fmt: skip
    made = chats.anthropic.messages.create(**asked)
    assert made.content[0].text == want.text  # type: ignore[union-attr]
    assert made.stop_reason == "max_tokens"
    with chats.anthropic.messages.stream(**asked) as stream:
        assert stream.get_final_text() == want.text
    stop = want.text[10:14]
    stopped = chats.anthropic.messages.create(**asked, stop_sequences=["never said", stop])
    assert stopped.content[0].text == want.text.split(stop)[0]  # type: ignore[union-attr]
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", stop)
    longer = chats.anthropic.messages.create(**(asked | {"max_tokens": 100_000}))
    assert longer.stop_reason in ("end_turn", "model_context_window_exceeded")


def test_an_answer_that_was_begun_goes_on(chats: Served) -> None:
    begun = "It is <|eot_id|> now"  # the caller's text: no special token comes of it
    ids = [*chats.llm.encode([Message("user", HI[0]["content"])]), *chats.llm.encode(begun, raw=True)[1:]]
    want = chats.llm.generate(ids, temperature=0, max_tokens=20)
    messages: Any = [*HI, {"role": "assistant", "content": begun}]
    made = chats.anthropic.messages.create(
        model="tiny", max_tokens=20, messages=messages, extra_body={"temperature": 0}
    )
    assert made.content[0].text == want.text  # type: ignore[union-attr]
    assert made.usage.input_tokens + (made.usage.cache_read_input_tokens or 0) == len(ids)
    options = {"temperature": 0, "num_predict": 20, "repeat_last_n": 0}
    assert chats.ollama.chat("tiny", messages, options=options).message.content == want.text


def test_ollamas_forms_and_system(chats: Served) -> None:
    made = chats.ollama.chat("tiny", HI, format=SCHEMA, options={"seed": 3, "num_predict": 200})
    jsonschema.validate(json.loads(made.message.content or ""), SCHEMA)
    said = [Message("system", "Be brief."), Message("user", "Hi")]
    want = chats.llm.generate(said, temperature=0, max_tokens=20)
    options = {"temperature": 0, "num_predict": 20, "repeat_last_n": 0}
    assert chats.ollama.generate("tiny", "Hi", system="Be brief.", options=options).response == want.text
    assert chats.ollama.show("tiny").capabilities == ["completion", "tools"]
    prompt = httpx2.post(f"{chats.url}/apply-template", json={"messages": HI}).json()["prompt"]
    assert prompt.endswith("What time is it?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")


def test_the_card_knows_what_begins_and_ends_a_text(cria: Served, chats: Served) -> None:
    for served in (cria, chats):
        told = httpx2.get(f"{served.url}/tokenizer_info").json()
        words = served.llm.tokenizer
        assert words.bos_id is not None
        assert words.eos_id is not None
        assert (told["bos_token"], told["eos_token"]) == (words.bos_token, words.eos_token)
        assert words.special[told["bos_token"]] == words.bos_id
    assert told["bos_token"] == "<|begin_of_text|>"
    assert told["eos_token"] == "<|end_of_text|>"  # what the file of merges names; a turn ends by another


@pytest.mark.parametrize("error", [RuntimeError("secret"), MemoryError("secret")])
def test_an_engine_that_fails_in_the_middle_ends_every_stream_with_an_error(
    serve: Any, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    streams = {
        "/v1/completions": {"prompt": "Once", "max_tokens": 400},
        "/api/generate": {"model": "cria", "prompt": "Once", "raw": True},
        "/v1/completions#n": {"prompt": ["Once", "Tom"], "n": 2, "max_tokens": 200, "ignore_eos": True},
    }
    for path, body in streams.items():
        llm = LLM("cria")
        run, left = llm._runner.run, [12]

        def failing(batch: Any, run: Any = run, left: list[int] = left) -> Any:
            left[0] -= 1
            if not left[0]:
                raise error
            return run(batch)

        llm._runner.run = failing  # type: ignore[method-assign]
        url = serve(create_app(LocalBackend(llm)))
        answer = httpx2.post(f"{url}{path.partition('#')[0]}", json={**body, "stream": True}, timeout=60)
        assert answer.status_code == 200, answer.text
        pieces = [line for line in answer.text.splitlines() if line]
        assert len(pieces) > 1
        assert "error" in json.loads(pieces[-1].removeprefix("data: ")), pieces[-1]
        assert "secret" not in answer.text
        assert not any(json.loads(each.removeprefix("data: ")).get("done") for each in pieces[:-1])
        # The server goes on, and says why it does not answer.
        again = httpx2.post(f"{url}/v1/completions", json={"prompt": "Once"}, timeout=60)
        assert again.status_code in (200, 503), again.text
        assert httpx2.get(f"{url}/health").status_code == 200


def test_a_chat_that_fails_in_the_middle_ends_with_an_error(chats: Served, serve: Any, tmp_path: Path) -> None:
    ask = {"messages": HI, "max_tokens": 100}
    streams = {
        "/v1/chat/completions": ask,
        "/v1/messages": {"model": "tiny", **ask},
        "/v1/responses": {"input": "Hi", "max_output_tokens": 100},
        "/api/chat": {"model": "tiny", "messages": HI},
    }
    for path, body in streams.items():
        llm = LLM(chats.llm.checkpoint.path)
        run, left = llm._runner.run, [8]

        def failing(batch: Any, run: Any = run, left: list[int] = left) -> Any:
            left[0] -= 1
            if not left[0]:
                raise RuntimeError("secret")
            return run(batch)

        llm._runner.run = failing  # type: ignore[method-assign]
        url = serve(create_app(LocalBackend(llm, name="tiny")))
        answer = httpx2.post(f"{url}{path}", json={**body, "stream": True}, timeout=60)
        assert answer.status_code == 200, answer.text
        last = json.loads([line for line in answer.text.splitlines() if line][-1].removeprefix("data: "))
        assert "secret" not in answer.text
        assert last.get("error") or last["response"]["error"], last
        if path == "/v1/messages":
            assert last["type"] == "error"
        if path == "/v1/responses":
            assert last["type"] == "response.failed"


def test_message_start_counts_the_tag_before_a_call_that_must_be_made(chats: Served, serve: Any) -> None:
    llm = LLM(chats.llm.checkpoint.path)
    llm.chat_format = builtin_format("llama3.1", instruct=True)
    served = Served(llm, serve(create_app(LocalBackend(llm, name="tiny"))))
    tool: Any = {"name": "clock", "description": "The time.", "input_schema": SCHEMA}
    prompts = []
    for kind in ("auto", "any"):
        events = served.anthropic.messages.create(
            model="tiny", max_tokens=40, messages=HI, tools=[tool], tool_choice={"type": kind}, stream=True,
        )  # type: ignore[call-overload]  # fmt: skip
        told = list(events)
        (start,) = [event.message.usage for event in told if event.type == "message_start"]
        (end,) = [event.usage for event in told if event.type == "message_delta"]
        assert start.input_tokens == end.input_tokens + end.cache_read_input_tokens
        prompts.append(start.input_tokens)
    assert prompts[1] == prompts[0] + 1
